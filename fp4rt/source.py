"""Where a model comes from: a directory, the demo inside the package, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from fp4rt.errors import Fp4rtError

PATTERNS = ["*.safetensors", "*.json", "*.jinja"]  # never pickles, never code
NOT_READ = ["*/*.safetensors", "*/*.json", "consolidated*"]  # the same weights in other formats, in some repositories
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = {
    ".gguf": "GGUF is not read; give the directory or repository of the Hugging Face checkpoint (config.json and "
             "safetensors) it was made from",
    ".safetensors": "give the directory that holds it, with config.json and tokenizer.json beside it",
    ".json": "give the directory that holds it",
    ".bin": "pickled weights can run code when loaded and are not read; use a checkpoint in safetensors",
}
_FILES[".pt"] = _FILES[".pth"] = _FILES[".ckpt"] = _FILES[".bin"]


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of a model, downloaded first where it is a repository id that is not in the cache.

    model: a directory; "demo", the checkpoint in this package (a directory of that name is ./demo); or
    "owner/name", of which `revision` is a branch, tag or commit. Downloads resume where they were cut off, and what
    is in the cache is used without a network. Raises Fp4rtError("request") where there is no such model.
    """
    if not model:
        raise Fp4rtError("request", "the model is empty; give a directory, owner/name on the Hugging Face hub, or demo")
    try:
        path = Path(model).expanduser()
        local = model == "demo" or path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise Fp4rtError("request", f"{model[:100]}: not a usable path ({error})") from None
    if local and revision is not None:
        raise Fp4rtError("request", f"revision is {revision!r}, which is for repository ids; {model} is on this disk")
    if model == "demo":
        return _demo()
    if local:
        return path
    remedy = _FILES.get(path.suffix.lower())
    if path.exists():
        raise Fp4rtError("request", f"{model}: a file; {remedy or 'give the directory of a checkpoint'}")
    if model.startswith((".", "/", "~", "\\")) or not _REPOSITORY.fullmatch(model):
        raise Fp4rtError("request", f"{model}: no such directory, and not a repository id (owner/name) either")
    if remedy:
        raise Fp4rtError("request", f"{model}: no such file, and it would not be read: {remedy}")
    return _download(model, revision)


def _demo() -> Path:
    path = Path(str(resources.files("fp4rt") / "demo"))
    if not path.is_dir():
        raise Fp4rtError("request", "demo: this installation of fp4rt came without its demo checkpoint; reinstall it")
    return path


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):
        """The hub's progress bar, where there is a person to see it."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or not sys.stderr.isatty()})

    def problem(what: str) -> Fp4rtError:
        return Fp4rtError("request", f"{model}{f' at {revision}' if revision else ''}: {what}")

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=PATTERNS, ignore_patterns=NOT_READ,
                                      tqdm_class=Progress))
    except errors.GatedRepoError:
        raise problem(f"gated: accept its terms at https://huggingface.co/{model}, then run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise problem("no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise problem("no such directory here, and no such repository on the Hugging Face hub (if it is private, run "
                      "`hf auth login`)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise problem("no such directory here, not (or not wholly) in the Hugging Face cache, and the hub cannot be "
                      "reached; check the name and the network") from None
    except errors.HFValidationError:
        raise problem("no such directory here, and not a valid repository id") from None
    except Exception as error:  # of the hub's HTTP client, whichever it uses; of the disk; of a proxy
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise problem(f"cannot be downloaded ({reason})") from None
