"""From a checkpoint's tensors to a Weight: which tensors lie beside `weight` decides what it is."""

from __future__ import annotations

import math

import numpy as np

from fp4rt.checkpoint import Scope, Tensor
from fp4rt.errors import Fp4rtError
from fp4rt.formats.dense import Dense, to_float32
from fp4rt.formats.fp8 import Fp8
from fp4rt.formats.mxfp4 import Mxfp4
from fp4rt.formats.nvfp4 import BLOCK, BLOCKS, Nvfp4, of_blocks, unswizzle
from fp4rt.formats.weight import Weight

FLOATS = ("BF16", "F16", "F32")

# Of W4A4 and W8A8 exports, and of exports for FP8 caches: not used when activations, keys and values stay wider.
_ACTIVATION, _CACHE = "activations are not quantized here", "keys and values are not in FP8 (--kv-dtype fp8)"
UNUSED = {"input_scale": _ACTIVATION, "input_global_scale": _ACTIVATION, "output_scale": _ACTIVATION,
          "k_scale": _CACHE, "v_scale": _CACHE, "k_bias": _CACHE, "v_bias": _CACHE}


def _refuse(tensor: Tensor | str, found: str, do: str = "the checkpoint is damaged or of an unknown layout") -> Fp4rtError:
    return Fp4rtError("checkpoint", f"{tensor}: {found}; {do}")


def read_vector(scope: Scope, suffix: str, size: int) -> np.ndarray:
    """A float tensor of `size` elements as float32 [size]; refuses NaN and infinity."""
    tensor = scope.tensor(suffix)
    if tensor.dtype not in FLOATS:
        raise _refuse(tensor, f"expected one of {', '.join(FLOATS)}")
    if tensor.data.size != size:
        raise _refuse(tensor, f"expected {size} values as the config and the weights around it say")
    values = to_float32(tensor.data, tensor.dtype).reshape(size)
    if not np.isfinite(values).all():
        raise _refuse(tensor, "holds NaN or infinity", "the checkpoint is damaged; download or export it again")
    return values


def _scalar(scope: Scope, suffix: str, size: int = 1) -> float:
    """A positive number, or the largest of so many of which all are."""
    values = read_vector(scope, suffix, size)
    if not (values > 0).all():
        raise _refuse(scope.tensor(suffix), f"is {values.min()}, a scale must be positive")
    return float(values.max())


def _e4m3_scales(scope: Scope, tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Block scales, to be checked for NaN codes (0x7f, 0xff) and for negative ones, which no exporter writes."""
    def look() -> None:
        if data.size and (data.max() >= 0x7F):
            worst = "NaN" if ((data & 0x7F) == 0x7F).any() else "negative values"
            raise _refuse(tensor, f"holds {worst}", "the checkpoint is damaged; download or export it again")

    scope.checkpoint.check(look)
    return data


def read_kv_scales(scope: Scope) -> tuple[float, float] | None:
    """The scales of FP8 keys and values below an attention module; one serves both where the other is missing.

    None where there are none: exporters write them beside k_proj and v_proj, older ones beside the module or as one.
    Of scales for each head the largest serves them all. Those of affine caches, which subtract a bias before rounding,
    grow by what that takes; those of NVFP4 caches by the 6 that older versions of ModelOpt leave to the block scales.
    """
    quantization = scope.checkpoint.quantization
    cache = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    factor = 6.0 if isinstance(cache, str) and cache.upper().startswith("NVFP4") else 1.0
    found: list[float | None] = []
    for one in "kv":
        suffixes, bias = (f"{one}_proj.{one}_scale", f"{one}_scale", "kv_scale"), f"{one}_proj.{one}_bias"
        suffix = next((suffix for suffix in suffixes if scope.has(suffix)), None)
        found.append(None if suffix is None else factor * _scalar(scope, suffix, math.prod(scope.shape(suffix)) or 1))
        if suffix is not None and scope.has(bias):
            values = read_vector(scope, bias, math.prod(scope.shape(bias)))
            found[-1] += float(np.abs(values).max(initial=0)) / 448
    k, v = found
    return None if k is None and v is None else (k or v, v or k)


def _block_scales(scope: Scope, suffix: str, n: int, k: int) -> np.ndarray:
    """E4M3 scales uint8 [N, K/16], un-swizzled where their shape (or --scale-layout) says they are swizzled.

    Of wider blocks (ModelOpt's W4A8_NVFP4_FP8 has 32) each scale is repeated.
    """
    tensor = scope.tensor(suffix)
    if tensor.dtype not in ("F8_E4M3", "U8"):
        raise _refuse(tensor, "NVFP4 block scales are F8_E4M3")
    columns = k // BLOCK
    padded = (-(-n // 128) * 128, -(-columns // 4) * 4)
    linear, swizzled = (n, columns), (tensor.shape == padded or tensor.data.size == padded[0] * padded[1])
    asked = scope.checkpoint.scale_layout
    if asked == "swizzled" and not swizzled:
        raise _refuse(tensor, f"is not in the swizzled layout, which would be {list(padded)}", "use --scale-layout auto")
    if asked == "swizzled" or (asked == "auto" and swizzled and tensor.shape != linear):
        return _e4m3_scales(scope, tensor, unswizzle(tensor.data.reshape(-1), n, columns))
    width = next((width for width in BLOCKS if tensor.shape == (n, k / width)), None)
    if width is None:
        raise _refuse(tensor, f"a weight [{n}, {k}] needs block scales {list(linear)}")
    return of_blocks(_e4m3_scales(scope, tensor, tensor.data), width)


def _fp8_scales(scope: Scope, n: int, k: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Scales float32 [rows, columns] and the block (bn, bk) each of them covers."""
    suffix = next((s for s in ("weight_scale", "weight_scale_inv") if scope.has(s)), None)
    if suffix is None:
        raise _refuse(scope.tensor("weight"), "FP8 codes without weight_scale or weight_scale_inv beside them")
    tensor = scope.tensor(suffix)
    if tensor.dtype == "U8":
        raise _refuse(tensor, "E8M0 scales (MXFP8) are not supported", "use an FP8 or NVFP4 export")
    shape = tuple(size for size in tensor.shape if size != 1) if len(tensor.shape) == 4 else tensor.shape
    scales = read_vector(scope, suffix, tensor.data.size)
    if not (scales > 0).all():
        raise _refuse(tensor, f"holds {scales.min()}, a scale must be positive")
    if scales.size == 1:
        return scales.reshape(1, 1), (n, k)
    if shape in ((n,), (n, 1)):
        return scales.reshape(n, 1), (1, k)
    if len(tensor.shape) in (2, 4):
        rows, columns = (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 2 else tensor.shape[::2]
        block = _block_size(scope, tensor, n, k, rows, columns)
        return scales.reshape(rows, columns), block
    raise _refuse(tensor, f"does not fit an FP8 weight [{n}, {k}] per tensor, per channel or per block")


def _block_size(scope: Scope, tensor: Tensor, n: int, k: int, rows: int, columns: int) -> tuple[int, int]:
    """The edges of FP8 scale blocks: as the config says, else 128, and they must account for the scales' shape."""
    for bn, bk in [*_stated_blocks(scope.checkpoint.quantization), (128, 128)]:
        if (-(-n // bn), -(-k // bk)) == (rows, columns):
            return bn, bk
    if rows and columns and n % rows == 0 and k % columns == 0:
        return n // rows, k // columns
    raise _refuse(tensor, f"does not fit an FP8 weight [{n}, {k}] in blocks of 128x128")


def _stated_blocks(quantization: dict) -> list[tuple[int, int]]:
    """What DeepSeek's config calls weight_block_size, and compressed-tensors' block_structure in a group of linears."""
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    stated = [quantization.get("weight_block_size"),
              *(one.get("block_structure") for one in weights if isinstance(one, dict))]
    return [tuple(block) for block in stated if isinstance(block, list) and len(block) == 2
            and all(type(edge) is int and edge > 0 for edge in block)]


def _mxfp4(scope: Scope, tensor: Tensor, n: int, k: int, extra: dict) -> Mxfp4:
    """Codes with E8M0 scales [n, k/32] and no global scale."""
    scales = scope.tensor("weight_scale")
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != (n, k // 32) or k % 32:
        raise _refuse(scales, f"packed codes [{n}, {k // 2}] without a global scale beside them need E8M0 scales "
                              f"[{n}, {k // 32}] (MXFP4), or weight_scale_2 or weight_global_scale (NVFP4)")
    if scales.data.size and scales.data.max() == 255:
        raise _refuse(scales, "holds NaN", "the checkpoint is damaged; download or export it again")
    return Mxfp4(tensor.name, tensor.data, scales.data, **extra)


def has_weight(scope: Scope) -> bool:
    """Whether a linear lies at `scope`, in whatever format."""
    return scope.has("weight") or scope.has("weight_packed")


def is_copy(scope: Scope, other: Scope) -> bool:
    """Whether the unquantized linear at `scope` holds the same bytes as the one at `other`."""
    return (scope.has("weight") and other.has("weight") and not scope.has("weight_scale")
            and scope.checkpoint.same(scope.name("weight"), other.name("weight")))


def read_weight(scope: Scope, n: int, k: int, *, bias: bool = False) -> Weight:
    """The linear at `scope`, [n, k] and with a bias or without as the config says.

    Raises Fp4rtError("checkpoint") where the tensors disagree. Codes are not searched for NaN here: that would read
    every byte twice, and a NaN weight cannot hide from the check on the logits.
    """
    for suffix, reason in UNUSED.items():
        if scope.has(suffix):
            scope.checkpoint.skip(scope.name(suffix), reason)
    bias_values = read_vector(scope, "bias", n) if bias else None
    pre_quant_scale = read_vector(scope, "pre_quant_scale", k) if scope.has("pre_quant_scale") else None
    if scope.has("svdquant_lora_a"):
        raise _refuse(scope.tensor("svdquant_lora_a"), "NVFP4_SVD keeps a low-rank part, which fp4rt does not run",
                      "use a plain NVFP4 export")
    packed = scope.has("weight_packed")
    tensor = scope.tensor("weight_packed" if packed else "weight")
    extra = {"bias": bias_values, "pre_quant_scale": pre_quant_scale}

    if tensor.dtype not in ("U8", "F8_E4M3", *FLOATS):
        raise _refuse(tensor, f"fp4rt reads weights in U8 (packed FP4), F8_E4M3, {', '.join(FLOATS)}",
                      "use an export in one of these formats")
    if tensor.dtype == "U8":
        if not scope.has("weight_scale"):
            raise _refuse(tensor, "packed 4-bit codes without weight_scale beside them")
        if tensor.shape != (n, k // 2) or k % BLOCK:
            raise _refuse(tensor, f"the config makes this weight [{n}, {k}], which packs into [{n}, {k // 2}]",
                          "config.json does not belong to these weights")
        if scope.has("weight_scale_2"):
            global_scale = _scalar(scope, "weight_scale_2")
        elif scope.has("weight_global_scale"):
            divisor = _scalar(scope, "weight_global_scale")
            if divisor < np.finfo(np.float32).tiny:
                raise _refuse(scope.tensor("weight_global_scale"), f"is {divisor}, too small to divide by")
            global_scale = float(np.float32(1) / np.float32(divisor))
        else:
            return _mxfp4(scope, tensor, n, k, extra)
        return Nvfp4(tensor.name, tensor.data, _block_scales(scope, "weight_scale", n, k), global_scale, **extra)

    if tensor.shape != (n, k):
        raise _refuse(tensor, f"the config makes this weight [{n}, {k}]", "config.json does not belong to these weights")
    if tensor.dtype == "F8_E4M3":
        scales, block = _fp8_scales(scope, n, k)
        return Fp8(tensor.name, tensor.data, scales, block, **extra)
    return Dense(tensor.name, tensor.dtype, tensor.data, **extra)
