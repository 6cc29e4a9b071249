"""The CUDA backend: CuPy for memory and streams, own kernels compiled through NVRTC."""

from fp4rt.driver import cuda_extra
from fp4rt.errors import Fp4rtError

try:
    from fp4rt.ops.cuda.backend import CudaOps
except ImportError as error:
    if not (error.name or "").startswith("cupy"):
        raise
    raise Fp4rtError("device", f"the CUDA backend needs CuPy ({error}); pip install {cuda_extra()}") from None

__all__ = ["CudaOps"]
