"""Numba as fp4rt uses it: the vector tier, threads that wait asleep, compiled code in the user's cache directory.

Everything that must be settled before Numba compiles or starts a thread is settled here, once, at import.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba.core import caching

_HERE = Path(__file__).parent

# libgomp reads this when it is loaded. Threads that spin at a barrier take the cores that other programs, or the
# barrier's own late threads, need: 0.3-0.9 ms for each region on shared cores against 4 us when they sleep at once.
_OPENMP = {"OMP_WAIT_POLICY": "passive"}


def _features() -> set[str]:
    """What the code generator may use: the host's features, or those that Numba was told to assume."""
    told = numba.config.CPU_FEATURES
    if told is not None:
        return {name[1:] for name in told.split(",") if name.startswith("+")}
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:
        return set()
    return {name for name, there in features.items()
            if there and (numba.config.ENABLE_AVX or not name.startswith("avx"))}


def _tier() -> str:
    """The widest instruction set that the kernels are written for and this processor has.

    An intrinsic of a missing one does not raise: LLVM ends the process. So this is decided before anything compiles.
    """
    features = _features()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features:
        return "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= features else "portable"


TIER = _tier()


def available_threads() -> int:
    """Processors that this process may use: its affinity, and its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_value("cpu.max", "cpu/cpu.cfs_quota_us")
    if quota:
        fields = quota.split()
        if len(fields) == 1:
            fields.append(cgroup_value("", "cpu/cpu.cfs_period_us") or "100000")
        if fields[0] not in ("max", "-1"):
            count = min(count, math.ceil(int(fields[0]) / int(fields[1])))
    return max(1, min(count, numba.config.NUMBA_NUM_THREADS))


def cgroup_value(v2: str, v1: str) -> str | None:
    """A control group's setting as text, or None: its version 2 file name, or version 1 controller and file."""
    root = Path("/sys/fs/cgroup")
    paths = [root / v1]
    try:
        own = next(line[3:].strip("/\n") for line in open("/proc/self/cgroup") if line.startswith("0::"))
        paths = [root / own / v2, root / v2, *paths] if v2 else paths
    except (OSError, StopIteration):
        paths = [root / v2, *paths] if v2 else paths
    for path in paths:
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return None


# -- Compiled code ------------------------------------------------------------------------------------------------


def _source_stamp() -> str:
    """A hash of all files of this package: kernels in one file call code emitted by another."""
    digest = hashlib.sha256()
    for path in sorted(_HERE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache_home() -> Path:
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "fp4rt" / "numba"


_CPU = numba.config.CPU_NAME or llvm.get_host_cpu_name()
_STAMP = _source_stamp()
# One directory for each version of the sources and kind of processor, so that none overwrites another's files.
_CACHE = _cache_home() / hashlib.sha256(repr((
    _STAMP, platform.machine(), _CPU, sorted(_features()), numba.__version__, llvm.llvm_version_info)).encode()
).hexdigest()[:16]


def load_machine_code(name: str, assembly: Callable[[], str], symbols: Iterable[str]) -> None:
    """Compile LLVM assembly (or take it from the cache) and make its `symbols` known to everything compiled here."""
    global _engine
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(
        cpu=_CPU, features=",".join(f"+{feature}" for feature in sorted(_features())), opt=3, codemodel="jitdefault",
        jit=True)
    path = _CACHE / f"{name}.o"
    try:
        code = path.read_bytes()
    except OSError:
        module = llvm.parse_assembly(assembly())
        module.verify()
        code = machine.emit_object(module)
        _write(path, code)
    _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)  # it owns the code: kept for good
    _engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    _engine.finalize_object()
    for symbol in symbols:
        llvm.add_symbol(symbol, _engine.get_function_address(symbol))


def _write(path: Path, data: bytes) -> None:
    """Write a file of the cache as a whole, or not at all where that cannot be."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(data)
        os.replace(own, path)
    except OSError:
        with suppress(OSError):
            own.unlink()


class _Locator(caching._CacheLocator):
    """Numba's own cached code, in the same directory."""

    def __init__(self, py_func: Callable):
        self._name = py_func.__qualname__
        self._py_file = py_func.__code__.co_filename  # Numba names it where it warns

    def get_cache_path(self) -> str:
        return str(_CACHE)

    def get_source_stamp(self) -> str:
        return _STAMP

    def get_disambiguator(self) -> str:
        return self._name

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _Locator | None:
        locator = cls(py_func)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


def compiled_before() -> bool:
    """Whether an earlier process has left compiled functions for this version and processor."""
    return any(_CACHE.glob("*.nbi"))


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(caching.FunctionCache):
    _impl_class = _CacheImpl

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(OSError):  # a full disk: the next process compiles again
            super().save_overload(sig, data)


def compiled(**options: object) -> Callable[[Callable], Callable]:
    """numba.njit without the GIL and with fp4rt's cache; compiled in memory alone where no cache can be written."""

    def decorate(function: Callable) -> Callable:
        dispatcher = numba.njit(nogil=True, **options)(function)
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError:  # no locator: nowhere to write
            pass
        return dispatcher

    return decorate


# -- Threads ------------------------------------------------------------------------------------------------------


def _start_threads() -> AbstractContextManager:
    """Load Numba's threading layer under fp4rt's OpenMP settings; the environment is as before afterwards.

    Returns the lock under which parallel code must be called: the workqueue layer cannot be entered twice at once.
    """
    from numba.np.ufunc import parallel

    before = {name: os.environ.get(name) for name in _OPENMP}
    os.environ.update({name: value for name, value in _OPENMP.items() if before[name] is None})
    try:
        parallel._launch_threads()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
    return threading.RLock() if numba.threading_layer() == "workqueue" else nullcontext()


_LOCK = _start_threads()


class Threads:
    """A context in which parallel code runs with `count` threads; the caller's own setting returns behind it."""

    def __init__(self, count: int):
        self._count = count

    def __enter__(self) -> None:
        _LOCK.__enter__()
        self._before = numba.get_num_threads()
        if self._before != self._count:
            numba.set_num_threads(self._count)

    def __exit__(self, *exception: object) -> None:
        if self._before != self._count:
            numba.set_num_threads(self._before)
        _LOCK.__exit__(*exception)
