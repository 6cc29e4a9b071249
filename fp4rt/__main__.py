"""`python -m fp4rt` is the command fp4rt."""

from fp4rt.cli import main

if __name__ == "__main__":
    main()
