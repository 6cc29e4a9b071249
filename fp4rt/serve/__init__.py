"""`fp4rt serve`: an OpenAI-compatible HTTP server around AsyncLLM (the extra "serve")."""

from fp4rt.errors import Fp4rtError

try:
    import llguidance  # noqa: F401
    import msgspec  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise Fp4rtError("request", f"serving needs the package {error.name}: pip install 'fp4rt[serve]'") from None

from fp4rt.serve.app import make_app
from fp4rt.serve.front import is_loopback, log_to_stderr
from fp4rt.serve.server import Server, bind

__all__ = ["Server", "bind", "is_loopback", "log_to_stderr", "make_app"]
