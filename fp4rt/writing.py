"""Writes a checkpoint: safetensors files laid out before their first byte, in a directory that appears whole.

The container is https://huggingface.co/docs/safetensors; shards are named and indexed as Hugging Face does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fp4rt.checkpoint import STORAGE
from fp4rt.errors import Fp4rtError

SHARD_BYTES = 4_000_000_000

Spec = tuple[str, tuple[int, ...]]  # safetensors dtype, shape


def spec_bytes(spec: Spec) -> int:
    return math.prod(spec[1]) * STORAGE[spec[0]].itemsize


class SafetensorsFile:
    """One safetensors file of the given tensors, created at full size; `write` fills them in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, Spec]):
        self._specs = dict(tensors)
        self._begins: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        # Wide elements first, as the safetensors library does: every tensor is then aligned for its dtype.
        for name, spec in sorted(self._specs.items(), key=lambda item: (-STORAGE[item[1][0]].itemsize, item[0])):
            end = begin + spec_bytes(spec)
            header[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [begin, end]}
            self._begins[name], begin = begin, end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._stream: BinaryIO = path.open("wb")
        self._stream.write(len(raw).to_bytes(8, "little") + raw)
        self._start = 8 + len(raw)
        self._stream.truncate(self._start + begin)

    def write(self, name: str, data: np.ndarray, row: int = 0) -> None:
        """Fill a tensor's rows from `row` on; `data` has the storage dtype (BF16 as uint16, FP8 as uint8)."""
        dtype, shape = self._specs[name]
        data = np.ascontiguousarray(data, STORAGE[dtype])
        begin = row * math.prod(shape[1:]) * data.itemsize
        if begin + data.nbytes > spec_bytes(self._specs[name]):
            raise ValueError(f"{name}: {data.shape} from row {row} on does not fit {shape}")
        self._stream.seek(self._start + self._begins[name] + begin)
        self._stream.write(data.reshape(-1).view(np.uint8))

    def close(self) -> None:
        self._stream.close()


class CheckpointWriter:
    """The safetensors of one checkpoint: tensors in shards of at most `shard_bytes`, with an index if several.

    shards: the tensors of each file; different files may be written by different threads.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES):
        shards: list[dict[str, Spec]] = [{}]
        room = shard_bytes
        for name, spec in tensors.items():
            size = spec_bytes(spec)
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = spec
            room -= size
        names = (["model.safetensors"] if len(shards) == 1 else
                 [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))])
        self.shards = [list(shard) for shard in shards]
        self._files = [SafetensorsFile(directory / name, shard) for name, shard in zip(names, shards)]
        self._home = {tensor: file for file, shard in zip(self._files, shards) for tensor in shard}
        if len(shards) > 1:
            write_json(directory / "model.safetensors.index.json", {
                "metadata": {"total_size": sum(map(spec_bytes, tensors.values()))},
                "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in sorted(shard)}})

    def write(self, name: str, data: np.ndarray, row: int = 0) -> None:
        self._home[name].write(name, data, row)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


@contextmanager
def replacing(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name once the block has finished without an error.

    Raises Fp4rtError("request") where `directory` exists: always for something that is not a checkpoint or an empty
    directory, and without `force` for a checkpoint too.
    """
    if directory.exists() or directory.is_symlink():
        if not directory.is_dir() or (any(directory.iterdir()) and not (directory / "config.json").is_file()):
            raise Fp4rtError("request", f"{directory}: exists and is not a checkpoint; give another destination")
        if not force:
            raise Fp4rtError("request", f"{directory}: exists; give another destination or --force to replace it")
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if directory.exists():
            old = directory.with_name(f"{directory.name}.old-{os.getpid()}")
            directory.rename(old)
            partial.rename(directory)
            shutil.rmtree(old)
        else:
            partial.rename(directory)
    except OSError as error:
        raise Fp4rtError("request", f"{directory}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
