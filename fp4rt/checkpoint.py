"""config.json and memory-mapped safetensors: a checkpoint directory as named, typed, checked byte ranges.

The container is parsed here (https://huggingface.co/docs/safetensors) because numpy has no name for BF16 and FP8, and
because every length in it is a stranger's claim that must be checked before it is believed.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fp4rt.errors import Fp4rtError, shown

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
MAX_JSON_BYTES = 64 << 20
MAX_NAME = 255  # characters of a file's or tensor's name
MAX_DIMENSIONS = 8
CHECKS_TOGETHER = 64  # that a thread takes at once: it waits longer for the interpreter than it looks

# How each safetensors dtype is held in numpy: the bits, not the meaning, where numpy has no such number.
STORAGE = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8), "F8_E8M0": np.dtype(np.uint8), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as it lies in a file: `data` has the storage dtype (BF16 as uint16, FP8 as uint8)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    file: str

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name} ({self.dtype} {list(self.shape)})"


class _Entry(NamedTuple):
    """Where a tensor lies: byte offsets from the start of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of strangers, or an Fp4rtError("checkpoint") that names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Fp4rtError("checkpoint", f"{path}: {path.stat().st_size} bytes is too large for a JSON file here")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Fp4rtError("checkpoint", f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise Fp4rtError("checkpoint", f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise Fp4rtError("checkpoint", f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, every claim in its header checked against the file's size."""
    def broken(what: str) -> Fp4rtError:
        return Fp4rtError("checkpoint", f"{path}: {what}; the file is damaged or incomplete, download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise broken(f"{size} bytes is too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise broken(f"its header claims {length} bytes in a file of {size}")
            raw = stream.read(length)
    except OSError as error:
        raise Fp4rtError("checkpoint", f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")

    entries: dict[str, _Entry] = {}
    start = 8 + length
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable() or len(name) > MAX_NAME:
            raise broken(f"a tensor is named {shown(name)}")
        if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
            raise broken(f"tensor {name} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in STORAGE:
            raise Fp4rtError("checkpoint", f"{path}: tensor {name} has dtype {shown(dtype)}, which fp4rt does not read")
        if not (_integers(shape) and len(shape) <= MAX_DIMENSIONS
                and (not shape or min(shape) >= 0 and max(shape) < 1 << 48)):
            raise broken(f"tensor {name} has shape {shown(shape)}")
        if not (_integers(offsets) and len(offsets) == 2):
            raise broken(f"tensor {name} has data_offsets {shown(offsets)}")
        begin, end = offsets
        if not 0 <= begin <= end <= size - start:
            raise broken(f"tensor {name} has data_offsets {shown(offsets)} in {size - start} bytes")
        if math.prod(shape) * STORAGE[dtype].itemsize != end - begin:
            raise broken(f"tensor {name} is {dtype} {shape} but occupies {end - begin} bytes")
        entries[name] = _Entry(path, dtype, tuple(shape), start + begin, start + end)
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for (name, one), (other, two) in zip(ordered, ordered[1:]):
        if two.begin < one.end:
            raise broken(f"tensors {name} and {other} overlap")
    return entries


def _integers(value: Any) -> bool:
    """Whether a value out of a header is a list of whole numbers (which true and false are not)."""
    return isinstance(value, list) and {int}.issuperset(map(type, value))


class Checkpoint:
    """A directory with config.json and safetensors. Bytes are mapped when a tensor is asked for, not before."""

    def __init__(self, path: str | Path, *, scale_layout: str = "auto"):
        self.path = Path(path)
        self.scale_layout = scale_layout
        if not self.path.is_dir():
            raise Fp4rtError("checkpoint", f"{self.path}: no such directory")
        if not (self.path / "config.json").is_file():
            raise Fp4rtError("checkpoint", f"{self.path}: has no config.json; give the directory of a checkpoint")
        self.config = read_json(self.path / "config.json")
        self.quantization = self._read_quantization()
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries = self._read_entries()
        self._read: set[str] = set()
        self.skipped: dict[str, str] = {}  # tensors that are not used, and why
        self._looks: list[Callable[[], None]] = []  # not handed to the checker yet
        self._checks: list[Future[None]] = []
        self._checker: ThreadPoolExecutor | None = None

    def _read_quantization(self) -> dict[str, Any]:
        """What the exporter says it did, from either place; used to refuse and to explain, never to decide a format."""
        inside = self.config.get("quantization_config")
        if isinstance(inside, dict):
            return inside
        beside = self.path / "hf_quant_config.json"
        if beside.is_file():
            found = read_json(beside).get("quantization")
            if isinstance(found, dict):
                return found
        return {}

    def _read_entries(self) -> dict[str, _Entry]:
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            single = self.path / "model.safetensors"
            if single.is_file():
                return read_header(single)
            if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
                raise Fp4rtError("checkpoint", f"{self.path}: holds pickled weights, which can run code when loaded and "
                                               "are not read; use a checkpoint in safetensors")
            raise Fp4rtError("checkpoint", f"{self.path}: has neither model.safetensors nor its index")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Fp4rtError("checkpoint", f"{index}: has no weight_map")
        shards: dict[str, dict[str, _Entry]] = {}
        entries = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file not in shards:
                if not (isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
                        and len(file) <= MAX_NAME and file.isprintable()):
                    raise Fp4rtError("checkpoint", f"{index}: puts {shown(name)} into {shown(file)}, which is not a "
                                                   "safetensors file in this directory")
                if not (self.path / file).is_file():
                    raise Fp4rtError("checkpoint", f"{index}: names {file}, which is missing; download it")
                shards[file] = read_header(self.path / file)
            if name not in shards[file]:
                raise Fp4rtError("checkpoint", f"{self.path / file}: has no tensor {shown(name)}, which {index.name} "
                                               "puts there")
            entries[name] = shards[file][name]
        return entries

    def names(self) -> list[str]:
        return list(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape from the header, without reading it. Raises like `tensor`."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """A tensor's dtype in the header's spelling. Raises like `tensor`."""
        return self._entry(name).dtype

    def bytes_of(self, name: str) -> int:
        """A tensor's bytes in its file. Raises like `tensor`."""
        entry = self._entry(name)
        return entry.end - entry.begin

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.bytes_of, self._entries))

    def files(self) -> set[Path]:
        return {entry.file for entry in self._entries.values()}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            close = [other for other in self._entries if other.rsplit(".", 2)[0] == name.rsplit(".", 2)[0]][:6]
            beside = f"; beside it are {', '.join(close)}" if close else ""
            raise Fp4rtError("checkpoint", f"{self.path}: tensor {name} is missing{beside}; the checkpoint is "
                                           "incomplete, or config.json does not belong to it")
        return self._entries[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file (copied only where its bytes are not aligned for its dtype)."""
        self._read.add(name)
        return self._map(name)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte. Reads them, but they do not count as read."""
        one, two = self._map(name), self._map(other)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        a, b, step = one.data.reshape(-1).view(np.uint8), two.data.reshape(-1).view(np.uint8), 1 << 20
        return all(np.array_equal(a[i:i + step], b[i:i + step]) for i in range(0, len(a), step))

    def _map(self, name: str) -> Tensor:
        entry = self._entry(name)
        storage = STORAGE[entry.dtype]
        if entry.end == entry.begin:
            data = np.empty(entry.shape, storage)
        else:
            if entry.file not in self._maps:
                with entry.file.open("rb") as stream:
                    self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(self._maps[entry.file], storage, (entry.end - entry.begin) // storage.itemsize,
                                 entry.begin).reshape(entry.shape)
            if entry.begin % storage.itemsize:
                data = data.copy()
        return Tensor(name, entry.dtype, entry.shape, data, entry.file.name)

    def check(self, look: Callable[[], None]) -> None:
        """Look through many values in another thread, while more is read; `finish_checks` raises what that raises."""
        self._looks.append(look)
        if len(self._looks) == CHECKS_TOGETHER:
            self._begin_checks()

    def _begin_checks(self) -> None:
        def look_through(looks: list[Callable[[], None]]) -> None:
            for look in looks:
                look()

        if self._checker is None:
            self._checker = ThreadPoolExecutor(2, "fp4rt-check")
        self._checks.append(self._checker.submit(look_through, self._looks))
        self._looks = []

    def finish_checks(self) -> None:
        """Wait for all checks; raises what the first one found, in the order they were asked for."""
        try:
            if self._looks:
                self._begin_checks()
            for check in self._checks:
                check.result()
        finally:
            self.drop_checks()

    def drop_checks(self) -> None:
        """Begin no more checks, and wait for those under way: the files are nobody's business afterwards."""
        self._looks, self._checks = [], []
        if self._checker is not None:
            self._checker.shutdown(cancel_futures=True)
            self._checker = None

    def skip(self, name: str, reason: str) -> None:
        """Note that a tensor is deliberately not used, and why; one that has been read is."""
        if name not in self._read:
            self.skipped[name] = reason

    def unread(self) -> list[str]:
        """The tensors that nothing asked for."""
        return [name for name in self._entries if name not in self._read and name not in self.skipped]

    def at(self, prefix: str) -> Scope:
        return Scope(self, prefix)


@dataclass(frozen=True)
class Scope:
    """A checkpoint seen from a module: names are relative to its prefix."""

    checkpoint: Checkpoint
    prefix: str

    def name(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}" if self.prefix and suffix else self.prefix or suffix

    def at(self, suffix: str) -> Scope:
        return Scope(self.checkpoint, self.name(suffix))

    def has(self, suffix: str) -> bool:
        return self.checkpoint.has(self.name(suffix))

    def shape(self, suffix: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self.name(suffix))

    def tensor(self, suffix: str) -> Tensor:
        return self.checkpoint.tensor(self.name(suffix))
