"""CUDA C++ to machine code through NVRTC, without a driver: own choice of architecture, disk cache, ptxas's figures."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import resources as package_resources
from pathlib import Path

from fp4rt.driver import cuda_extra
from fp4rt.errors import Fp4rtError

_MAGIC = b"fp4rt kernel 1\n"


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one entry: registers, spilled and stack bytes per thread, static shared bytes per block."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Binary:
    """kind "cubin" (machine code of one architecture; `resources` by entry name) or "ptx" (compiled by the driver)."""

    kind: str
    data: bytes
    resources: dict[str, Resources]


def kernel_directory() -> Path:
    """Where the .cu files lie: inside the installed package, or beside it in a checkout."""
    packaged = Path(str(package_resources.files("fp4rt"))) / "kernels"
    return packaged if packaged.is_dir() else packaged.parents[1] / "kernels"


def cache_directory() -> Path:
    """The platform's directory for files that can be made again, fp4rt's part of it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fp4rt" / "kernels"


def kernel_source(stem: str) -> str:
    """kernels/<stem>.cu with each of its own headers (`#include "x.cuh"`) written out once, in place."""
    directory, seen = kernel_directory(), set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        try:
            text = (directory / name).read_text(encoding="utf-8")
        except OSError as error:
            raise Fp4rtError("device", f"kernel source {directory / name} cannot be read ({error.strerror}); "
                                       "reinstall fp4rt") from None
        body = re.sub(r'^#include "([^"]+)"$', lambda match: expand(match[1]), text, flags=re.MULTILINE)
        return f'#line 1 "{name}"\n{body}\n'

    return expand(f"{stem}.cu")


def compile_kernel(stem: str, arch: str, defines: dict[str, int] | None = None) -> Binary:
    """Compile kernels/<stem>.cu, or take it from the disk cache.

    arch: "sm_90a" and the like give machine code, "compute_75" and the like PTX. defines: preprocessor constants.
    Raises Fp4rtError("device") when NVRTC or the CUDA headers are missing or do not belong together.
    """
    defines = dict(sorted((defines or {}).items()))
    source = kernel_source(stem)
    identity = json.dumps([source, defines, arch, nvrtc_version()])
    name = f"{stem}-{arch}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    path = cache_directory() / name
    binary = _read_cache(path)
    if binary is None:
        binary = _compile(stem, source, arch, defines)
        _write_cache(path, binary)
    return binary


@functools.cache
def _nvrtc():
    """CuPy's NVRTC binding, which needs no driver."""
    try:
        from cupy_backends.cuda.libs import nvrtc
        nvrtc.getVersion()
    except Exception as error:  # the loader's own exception types differ between CuPy and pathfinder versions
        raise Fp4rtError("device", f"NVRTC, CUDA's run-time compiler, cannot be loaded ({_first_line(error)}); "
                                   f"pip install {cuda_extra()}") from None
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use."""
    return tuple(_nvrtc().getVersion())


@functools.cache
def include_directory() -> str:
    """The CUDA headers that belong to the NVRTC in use; cuda_fp16.h of another version would not compile or mislead."""
    from cuda.pathfinder import find_nvidia_header_directory

    major, minor = nvrtc_version()
    try:
        found = find_nvidia_header_directory("cudart")
    except Exception:  # pathfinder's own exception type differs between versions
        found = None
    if not found:
        raise Fp4rtError("device", f"the CUDA {major}.{minor} headers (cuda_fp16.h) are not installed; "
                                   f"pip install {cuda_extra()}")
    match = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", (Path(found) / "cuda.h").read_text(errors="replace"))
    version = int(match[1]) if match else 0
    if (version // 1000, version % 1000 // 10) != (major, minor):
        runtime = "nvidia-cuda-runtime-cu12" if major == 12 else "nvidia-cuda-runtime"
        raise Fp4rtError("device", f"NVRTC is CUDA {major}.{minor} but the CUDA headers in {found} are "
                                   f"{version // 1000}.{version % 1000 // 10}; pip install "
                                   f"'{runtime}=={major}.{minor}.*'")
    return found


def _compile(stem: str, source: str, arch: str, defines: dict[str, int]) -> Binary:
    nvrtc = _nvrtc()
    options = [f"-arch={arch}", "-std=c++17", "-default-device", "-I" + include_directory(),
               *(f"-D{name}={value}" for name, value in defines.items())]
    is_ptx = arch.startswith("compute_")
    if not is_ptx:
        options.append("--ptxas-options=-v")
    program = nvrtc.createProgram(source, f"{stem}.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            errors = [line for line in log.splitlines() if "error" in line] or log.splitlines() or ["no log"]
            raise Fp4rtError("device", f"kernels/{stem}.cu does not compile for {arch} with NVRTC "
                                       f"{'.'.join(map(str, nvrtc_version()))}: {errors[0]}") from None
        if is_ptx:
            return Binary("ptx", nvrtc.getPTX(program), {})
        # CuPy cuts the last byte of the ELF as if it were a string's end.
        return Binary("cubin", nvrtc.getCUBIN(program) + b"\0", _parse_log(nvrtc.getProgramLog(program)))
    finally:
        nvrtc.destroyProgram(program)


def _parse_log(log: str) -> dict[str, Resources]:
    """ptxas -v: "Compiling entry function 'name'", then its stack and spills, then its registers and shared memory."""
    found, parts = {}, re.split(r"Compiling entry function '([^']+)'", log)
    for name, text in zip(parts[1::2], parts[2::2]):
        numbers = [re.search(pattern, text) for pattern in
                   (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame",
                    r"(\d+) bytes smem")]
        found[name] = Resources(*(int(match[1]) if match else 0 for match in numbers))
    return found


def _read_cache(path: Path) -> Binary | None:
    """A cache entry is magic, SHA-256 of the rest, one JSON line, the code; anything else counts as absent."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    magic, digest, body = content[:len(_MAGIC)], content[len(_MAGIC):len(_MAGIC) + 32], content[len(_MAGIC) + 32:]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    head, data = body.split(b"\n", 1)
    header = json.loads(head)
    return Binary(header["kind"], data, {name: Resources(**r) for name, r in header["resources"].items()})


def _write_cache(path: Path, binary: Binary) -> None:
    """Written beside its place and renamed, so that another process sees all of it or nothing.

    A cache that cannot be written (read-only home, full disk) costs time at the next start, nothing else.
    """
    header = {"kind": binary.kind, "resources": {name: asdict(r) for name, r in binary.resources.items()}}
    body = json.dumps(header).encode() + b"\n" + binary.data
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
