"""fp4rt: runs LLM checkpoints with 4-bit float weights on GPUs without FP4 arithmetic and on CPUs, without PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp4rt.async_llm import AsyncLLM
    from fp4rt.errors import Fp4rtError
    from fp4rt.llm import LLM, Output, load
    from fp4rt.sampling import Sampling
    from fp4rt.session import Session

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Fp4rtError", "Output", "Sampling", "Session", "load"]

_HOMES = {"LLM": "llm", "AsyncLLM": "async_llm", "Output": "llm", "Session": "session", "load": "llm",
          "Sampling": "sampling", "Fp4rtError": "errors"}


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `import fp4rt` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fp4rt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fp4rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
