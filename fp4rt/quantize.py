"""BF16, F16 and F32 weights to NVFP4: a checkpoint in ModelOpt's export layout, or (FP8 too) a weight being loaded.

The two-level scales and the rounding are ModelOpt's (nvidia-modelopt 0.47), bit for bit, unless a scale search is
asked for. Weights stream through in blocks of rows; what is held at once does not grow with the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from fp4rt import __version__
from fp4rt.checkpoint import Checkpoint, Tensor
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Dense, Fp8, Nvfp4, Weight
from fp4rt.formats.dense import to_float32
from fp4rt.formats.fp8 import E4M3
from fp4rt.formats.nvfp4 import BLOCK, E2M1
from fp4rt.formats.read import FLOATS
from fp4rt.loading import Loader
from fp4rt.models import load_model
from fp4rt.ops.planning import Headers, PlanningOps
from fp4rt.writing import SHARD_BYTES, CheckpointWriter, Spec, replacing, spec_bytes, write_json

E2M1_MAX, E4M3_MAX = 6.0, 448.0
SEARCH_MAX = 256.0       # with a search the largest scale is this, so that each block may take one half as large again
PIECE = 1 << 18          # elements worked on at a time: its float32 copies stay in a core's cache
_POSITIVE_E4M3 = E4M3[:0x7F]
_MAGNITUDES = E2M1[:8]
_HIGHEST_FINITE = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}

# Companions of a checkpoint that are not weights: tokenizer, template, generation config, licence.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_REWRITTEN = {"config.json", "hf_quant_config.json", "model.safetensors.index.json"}


# -- Numbers --------------------------------------------------------------------------------------------------------


def e4m3_codes(values: np.ndarray, least: float = 2.0**-9) -> np.ndarray:
    """Positive float32 to E4M3 bits (uint8), to nearest, ties to even, after clamping to [least > 0, 448]."""
    clamped = np.clip(values, np.float32(least), np.float32(E4M3_MAX))
    # Below 2^-6 the spacing stays 2^-9; from there on a code is the upper bits, rounded, with another exponent bias.
    small = np.rint(np.minimum(clamped, np.float32(2.0**-6)) * np.float32(2.0**9)).astype(np.uint8)
    bits = np.maximum(clamped, np.float32(2.0**-6)).view(np.uint32)
    bits += (bits >> 20 & 1) + 0x7FFFF
    return ((bits >> 20) - (127 - 7 << 3)).astype(np.uint8) - np.uint8(8) + small


def e2m1_codes(values: np.ndarray) -> np.ndarray:
    """float32 to E2M1 codes (uint8), to nearest, ties to the even code; what is below zero keeps its sign (code 8)."""
    magnitude = np.abs(values)
    codes = (values < 0).view(np.uint8) << 3
    for bound, tie_goes_up in ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
                               (5.0, False)):
        codes += (magnitude >= bound if tie_goes_up else magnitude > bound).view(np.uint8)
    return codes


def global_scale_of(amax: float, largest: float = E4M3_MAX) -> np.float32:
    """weight_scale_2 of a group of linears whose largest magnitude is `amax`; one where all of them are zero."""
    return np.float32(amax) / np.float32(E2M1_MAX * largest) if amax > 0 else np.float32(1)


def block_scales(blocks: np.ndarray, global_scale: np.float32) -> np.ndarray:
    """E4M3 bits [..., B] that put the largest of each block of float32 [..., B, 16] at 6; one for blocks of zeros."""
    scales = np.abs(blocks).max(axis=-1) / (np.float32(E2M1_MAX) * global_scale)
    scales[scales == 0] = 1
    return e4m3_codes(scales)


def searched_scales(blocks: np.ndarray, global_scale: np.float32) -> np.ndarray:
    """E4M3 bits [..., B]: for each block the scale of least squared error.

    Tried are all scales from a little below amax/6 to a little above amax/4: a block's largest value may sit at 6, be
    clipped to it, or sit at 4 ("four over six", Cook et al. 2025), which spends the codes on the rest of the block.
    """
    amax = np.abs(blocks).max(axis=-1)
    low = np.maximum(e4m3_codes(amax / (np.float32(6) * global_scale)).astype(np.int16) - 3, 1)
    high = e4m3_codes(amax / (np.float32(4) * global_scale)).astype(np.int16) + 1
    best, least = block_scales(blocks, global_scale), np.full(amax.shape, np.inf, np.float32)
    for offset in range(int((high - low).max(initial=0)) + 1):
        codes = np.minimum(low + offset, 0x7E).astype(np.uint8)
        step = (E4M3[codes] * global_scale)[..., None]
        scaled = np.abs(blocks / step)
        error = np.square(_MAGNITUDES[e2m1_codes(scaled)] - scaled).sum(axis=-1) * np.square(step[..., 0])
        better = (error < least) & (amax > 0) & (low + offset <= high)
        best[better], least[better] = codes[better], error[better]
    return best


def quantize_rows(weight: np.ndarray, global_scale: np.float32, search: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] to NVFP4: packed codes uint8 [N, K/2] (even element in the low nibble), scales uint8 [N, K/16]."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = (searched_scales if search else block_scales)(blocks, global_scale)
    codes = e2m1_codes(blocks / (E4M3[scales] * global_scale)[..., None]).reshape(weight.shape)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] to FP8: E4M3 codes uint8 [N, K], and float32 [N, 1] scales that put a row's largest at 448."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(E4M3_MAX)
    scales[scales == 0] = 1
    codes = e4m3_codes(np.abs(weight) / scales, least=2.0**-12)  # which rounds to zero, as all below do
    return codes | np.signbit(weight).view(np.uint8) << 7, scales


# -- One weight -----------------------------------------------------------------------------------------------------


def quantize_weight(weight: Dense, kind: str, pool: ThreadPoolExecutor) -> Nvfp4 | Fp8:
    """A weight as "nvfp4" (a global scale of its own) or "fp8" (a scale per channel), in pieces on the pool's threads.

    Raises Fp4rtError("checkpoint") for NaN or infinity, Fp4rtError("request") where NVFP4's blocks do not divide it.
    """
    _check_columns(weight, kind)
    n, k = weight.shape
    # The more threads take turns at Python's lock, the larger their pieces.
    step = max(1, PIECE * max(1, _threads() // 4) // k)
    pieces = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    largest = max(pool.map(lambda rows: _amax(weight.data[rows], weight.format, weight.name), pieces))
    if kind == "fp8":
        codes, scales = np.empty((n, k), np.uint8), np.empty((n, 1), np.float32)

        def work(rows: slice) -> None:
            codes[rows], scales[rows] = quantize_channels(weight.dequantize(rows))

        list(pool.map(work, pieces))
        return Fp8(weight.name, codes, scales, (1, k), weight.bias, weight.pre_quant_scale)
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // BLOCK), np.uint8)
    global_scale = global_scale_of(largest)

    def work(rows: slice) -> None:
        codes[rows], scales[rows] = quantize_rows(weight.dequantize(rows), global_scale)

    list(pool.map(work, pieces))
    return Nvfp4(weight.name, codes, scales, float(global_scale), weight.bias, weight.pre_quant_scale)


def outline(weight: Dense, kind: str, pool: ThreadPoolExecutor) -> Nvfp4 | Fp8:
    """What quantize_weight would give, with one for every code and scale; no value is read.

    Raises Fp4rtError("request") where it would.
    """
    _check_columns(weight, kind)
    (n, k), one = weight.shape, np.uint8(0x38)  # 1.0 in E4M3
    if kind == "fp8":
        scales = np.broadcast_to(np.float32(1), (n, 1))
        return Fp8(weight.name, np.broadcast_to(one, (n, k)), scales, (1, k), weight.bias, weight.pre_quant_scale)
    codes, scales = np.broadcast_to(one, (n, k // 2)), np.broadcast_to(one, (n, k // BLOCK))
    return Nvfp4(weight.name, codes, scales, 1.0, weight.bias, weight.pre_quant_scale)


def _check_columns(weight: Dense, kind: str) -> None:
    if kind == "nvfp4" and weight.shape[1] % BLOCK:
        raise Fp4rtError("request", f"{weight.name}: its {weight.shape[1]} columns are not a multiple of NVFP4's block "
                                    f"of {BLOCK}; ask for fp8")


KINDS = ("nvfp4", "fp8")


@dataclass
class Requantizer:
    """What to do with unquantized weights as they are loaded: bytes and time for quality, and only where asked for.

    lm_head, layers: "nvfp4", "fp8" or None, for the head and for all other linears but the routers of experts, whose
    choices are worth their few bytes. A tied token table stays as it is; the head becomes a weight of its own.
    quantize: how; `outline` for a look at what it would come to.
    """

    lm_head: str | None = None
    layers: str | None = None
    quantize: Callable[[Dense, str, ThreadPoolExecutor], Weight] = quantize_weight
    _done: dict[str, int] = field(default_factory=lambda: {"lm_head": 0, "layers": 0})

    def __post_init__(self) -> None:
        for name, kind in (("lm_head", self.lm_head), ("requantize", self.layers)):
            if kind not in (None, *KINDS):
                raise Fp4rtError("request", f"{name} is {kind!r}; it must be one of {', '.join(KINDS)}")
        self._pool = ThreadPoolExecutor(_threads())

    def __call__(self, weight: Weight, place: str) -> Weight:
        """The weight to load instead; place: "lm_head", "layers" or "router"."""
        kind = {"lm_head": self.lm_head, "layers": self.layers}.get(place)
        if kind is None or not isinstance(weight, Dense):
            return weight
        self._done[place] += 1
        return self.quantize(weight, kind, self._pool)

    def finish(self) -> None:
        """Raises Fp4rtError("request") where an option met no weight that it could change."""
        self._pool.shutdown()
        for option, place, kind in (("lm_head", "lm_head", self.lm_head), ("requantize", "layers", self.layers)):
            if kind is not None and not self._done[place]:
                what = "the head is" if place == "lm_head" else "all linears of the layers are"
                raise Fp4rtError("request", f"{option}: {what} quantized in this checkpoint already; leave it out")


def make_requantizer(lm_head: str | None, requantize: str | None,
                     quantize: Callable[..., Weight] = quantize_weight) -> Requantizer:
    """From load's arguments; requantize: "bf16-layers=nvfp4" or "bf16-layers=fp8". Raises Fp4rtError("request")."""
    if requantize is None:
        return Requantizer(lm_head, quantize=quantize)
    what, separator, kind = requantize.partition("=") if isinstance(requantize, str) else ("", "", "")
    if what != "bf16-layers" or not separator or kind not in KINDS:
        raise Fp4rtError("request", f"requantize is {requantize!r}; it must be bf16-layers=nvfp4 or bf16-layers=fp8")
    return Requantizer(lm_head, kind, quantize)


# -- A checkpoint ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearError:
    """What quantizing one linear lost: root mean square of the error over that of the weight, whole and worst block.

    worst_row and worst_column: where the worst block of 16 begins.
    """

    name: str
    shape: tuple[int, int]
    relative_rms: float
    worst_block: float
    worst_row: int
    worst_column: int


@dataclass(frozen=True)
class Report:
    """What `quantize_checkpoint` did: errors in the model's order; linears kept as they were, and why; sizes."""

    errors: tuple[LinearError, ...]
    kept: dict[str, str]
    source_bytes: int
    bytes: int


def _linears(source: Path) -> list[tuple[str, ...]]:
    """The names of the source's linear weights, in the groups that share a scale (q, k, v; gate, up); the head last.

    Builds the model on headers alone, so that a checkpoint which fp4rt could not run is refused here.
    """
    loader = Loader(PlanningOps())
    load_model(Headers(source), loader, 1)
    for linear in loader.linears:
        for name, kind in zip(linear.names, linear.formats):
            if kind not in FLOATS:
                raise Fp4rtError("request", f"{source}: {name} is already quantized ({kind}); give the original BF16, "
                                            "F16 or F32 checkpoint")
    body = [linear.names for linear in loader.linears if linear.names[0].startswith("model.layers.")]
    return body + [linear.names for linear in loader.linears if linear.names not in body]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _choose(groups: list[tuple[str, ...]], checkpoint: Checkpoint, exclude: Sequence[str],
            lm_head: bool) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """(groups of tensors to quantize, reasons for the linears that are kept)."""
    modules = [_module(name) for group in groups for name in group]
    for pattern in exclude:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise Fp4rtError("request", f"--exclude {pattern} matches no linear; they are named like {modules[0]}")
    kept: dict[str, str] = {}
    for module in modules:
        if matching := [pattern for pattern in exclude if fnmatchcase(module, pattern)]:
            kept[module] = f"excluded by {matching[0]}"
        elif "embed" in module:
            kept[module] = "the head is tied to the embedding"
        elif module == "lm_head" and not lm_head:
            kept[module] = "the head is kept by default"
        elif checkpoint.shape(f"{module}.weight")[1] % BLOCK:
            kept[module] = f"its {checkpoint.shape(f'{module}.weight')[1]} columns are not a multiple of {BLOCK}"
    chosen = [tuple(name for name in group if _module(name) not in kept) for group in groups]
    return [group for group in chosen if group], kept


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _amax(data: np.ndarray, dtype: str, what: object) -> float:
    """The largest magnitude; found on the bits, whose order is that of the magnitudes. Refuses NaN and infinity."""
    bits = data.reshape(-1).view({2: np.uint16, 4: np.uint32}[data.itemsize])
    sign = bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    pieces = (bits[i:i + 4 * PIECE] & sign for i in range(0, bits.size, 4 * PIECE))
    most = max((piece.max() for piece in pieces), default=bits.dtype.type(0))
    if most > _HIGHEST_FINITE[dtype]:
        raise Fp4rtError("checkpoint", f"{what}: holds NaN or infinity; the checkpoint is damaged, download it again")
    return float(to_float32(np.array([most]).view(data.dtype), dtype)[0])


@dataclass
class _Piece:
    """Rows of one linear, quantized, with sums for the report."""

    row: int
    codes: np.ndarray
    scales: np.ndarray
    squared_error: float
    squared: float
    worst: tuple[float, int, int]


def _quantize_piece(tensor: Tensor, rows: slice, global_scale: np.float32, search: bool) -> _Piece:
    weight = to_float32(tensor.data[rows], tensor.dtype)
    codes, scales = quantize_rows(weight, global_scale, search)
    step = (E4M3[scales] * global_scale)[..., None]
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1).reshape(*scales.shape, BLOCK) * step
    blocks = weight.reshape(values.shape)
    error = np.square(values - blocks).sum(axis=-1, dtype=np.float64)
    squared = np.square(blocks).sum(axis=-1, dtype=np.float64)
    relative = error / np.where(squared > 0, squared, 1)
    row, block = np.unravel_index(int(relative.argmax()), relative.shape)
    worst = (float(np.sqrt(relative[row, block])), rows.start + int(row), int(block) * BLOCK)
    return _Piece(rows.start, codes, scales, float(error.sum()), float(squared.sum()), worst)


def _in_order(pool: ThreadPoolExecutor, window: int, calls: Iterable[Callable[[], _Piece]]) -> Iterator[_Piece]:
    """The results of the calls, in their order, with at most `window` of them under way."""
    waiting: list[Future[_Piece]] = []
    for call in calls:
        waiting.append(pool.submit(call))
        if len(waiting) >= window:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _quantize_linear(tensor: Tensor, global_scale: np.float32, search: bool, writer: CheckpointWriter,
                     pool: ThreadPoolExecutor, threads: int) -> LinearError:
    """Quantize one linear in pieces and write its three tensors."""
    n, k = tensor.shape
    rows = max(1, PIECE // k)
    squared_error = squared = 0.0
    worst = (0.0, 0, 0)
    calls = (lambda i=i: _quantize_piece(tensor, slice(i, min(i + rows, n)), global_scale, search)
             for i in range(0, n, rows))
    for piece in _in_order(pool, 2 * threads, calls):
        writer.write(tensor.name, piece.codes, piece.row)
        writer.write(f"{tensor.name}_scale", piece.scales, piece.row)
        squared_error, squared = squared_error + piece.squared_error, squared + piece.squared
        worst = max(worst, piece.worst)
    writer.write(f"{tensor.name}_scale_2", np.array(global_scale, np.float32))
    relative = float(np.sqrt(squared_error / squared)) if squared else 0.0
    return LinearError(_module(tensor.name), (n, k), relative, *worst)


def _configs(checkpoint: Checkpoint, kept: Iterable[str], lm_head: bool) -> tuple[dict, dict]:
    """config.json and hf_quant_config.json as ModelOpt writes them for weight-only NVFP4.

    The producer's name is what loaders tell the layout by; its version says who wrote the file.
    """
    producer = {"name": "modelopt", "version": f"fp4rt-{__version__}"}
    ignore = sorted({*kept, "model.embed_tokens", *(() if lm_head else ("lm_head",))})
    group = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}, "targets": ["Linear"]}
    inside = {"config_groups": {"group_0": group}, "ignore": ignore, "quant_algo": "W4A16_NVFP4", "producer": producer,
              "quant_method": "modelopt"}
    beside = {"producer": producer, "quantization": {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None,
                                                     "group_size": BLOCK, "exclude_modules": ignore}}
    return {**checkpoint.config, "quantization_config": inside}, beside


def _layout(checkpoint: Checkpoint, groups: Sequence[Sequence[str]]) -> dict[str, Spec]:
    """Every tensor of the result in the order of the source, a weight's scales right after it."""
    quantized = {name for group in groups for name in group}
    layout: dict[str, Spec] = {}
    for name in checkpoint.names():
        if name in quantized:
            n, k = checkpoint.shape(name)
            layout[name] = "U8", (n, k // 2)
            layout[f"{name}_scale"] = "F8_E4M3", (n, k // BLOCK)
            layout[f"{name}_scale_2"] = "F32", ()
        else:
            layout[name] = checkpoint.dtype(name), checkpoint.shape(name)
    return layout


def quantize_checkpoint(source: str | Path, destination: str | Path, *, exclude: Sequence[str] = (),
                        lm_head: bool = False, search_scales: bool = False, force: bool = False,
                        shard_bytes: int = SHARD_BYTES,
                        progress: Callable[[list], Iterable] = lambda items: items) -> Report:
    """Write `source` (a directory with BF16, F16 or F32 safetensors) to `destination` with its linears in NVFP4.

    exclude: shell patterns of module names to keep, such as "model.layers.0.*" or "*.down_proj".
    lm_head: quantize the head too, where it is not tied. search_scales: choose each block's scale for the least squared
    error instead of putting its largest value at 6. force: replace an existing checkpoint at `destination`.
    progress: wraps the iteration over groups of linears. The destination appears only when all is written.
    Raises Fp4rtError.
    """
    source, destination = Path(source), Path(destination)
    checkpoint = Checkpoint(source)
    if destination.exists() and destination.resolve() in (source.resolve(), *source.resolve().parents):
        raise Fp4rtError("request", f"{destination}: is or holds the source; give another destination")
    groups, kept = _choose(_linears(source), checkpoint, exclude, lm_head)
    if not groups:
        raise Fp4rtError("request", f"{source}: nothing is left to quantize after --exclude")
    layout = _layout(checkpoint, groups)
    threads = _threads()
    errors: list[LinearError] = []
    with replacing(destination, force=force) as partial:
        with CheckpointWriter(partial, layout, shard_bytes) as writer, ThreadPoolExecutor(threads) as pool:
            for group in progress(groups):
                tensors = [checkpoint.tensor(name) for name in group]
                scale = global_scale_of(max(_amax(one.data, one.dtype, one) for one in tensors),
                                        SEARCH_MAX if search_scales else E4M3_MAX)
                errors += [_quantize_linear(tensor, scale, search_scales, writer, pool, threads) for tensor in tensors]
            quantized = {name for group in groups for name in group}
            for name in checkpoint.names():
                if name not in quantized:
                    writer.write(name, checkpoint.tensor(name).data)
        config, beside = _configs(checkpoint, kept, "lm_head.weight" in quantized)
        write_json(partial / "config.json", config)
        write_json(partial / "hf_quant_config.json", beside)
        for file in sorted(source.iterdir()):
            wanted = file.suffix in _COMPANIONS or file.name.upper().startswith(("LICENSE", "NOTICE"))
            if file.is_file() and wanted and file.name not in _REWRITTEN:
                shutil.copyfile(file, partial / file.name)
    return Report(tuple(errors), kept, checkpoint.nbytes, sum(map(spec_bytes, layout.values())))
