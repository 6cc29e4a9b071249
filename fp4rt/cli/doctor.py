"""`fp4rt doctor`: what this machine offers, and for each problem its cause and one command that mends it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from fp4rt import __version__
from fp4rt.driver import cuda_extra, cuda_version, driver_library, system_library
from fp4rt.errors import Fp4rtError

OLDEST_GPU = (7, 5)  # Turing: the first with the fp16 tensor core shapes that the kernels are made of


@dataclass(frozen=True)
class Finding:
    """One thing looked at: status "ok", "problem", or "none" (not there, and not needed here)."""

    name: str
    status: str
    found: str
    cause: str | None = None
    command: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check driver, GPU, CUDA libraries, cache directory and CPU.

    The exit code is 0 if fp4rt can run here, on a GPU or on the CPU.
    """
    findings = examine()
    usable = {name: any(one.name == f"{name} backend" and one.status == "ok" for one in findings)
              for name in ("cuda", "cpu")}
    if as_json:
        click.echo(json.dumps({"fp4rt": __version__, "usable": usable, "findings": [asdict(one) for one in findings]},
                              indent=2))
    else:
        for one in findings:
            click.echo(f"{one.status:8} {one.name:16} {one.found}")
            if one.status == "problem":
                click.echo(f"{'':25} cause: {one.cause}\n{'':25} run:   {one.command}")
        names = [name for name, can in usable.items() if can]
        click.echo(f"fp4rt can run on: {', '.join(names)}" if names else "fp4rt cannot run here")
    ctx.exit(0 if any(usable.values()) else 1)


def examine() -> list[Finding]:
    """All findings. A check that fails in a way nobody foresaw is itself a finding; nothing is raised."""
    findings: list[Finding] = []
    for check in (versions, driver, gpus, cupy, nvrtc, cache, cuda_backend, cpu_backend):
        try:
            findings += check(findings)
        except Exception as error:
            findings.append(Finding(check.__name__.replace("_", " "), "problem", "could not be examined", _line(error),
                                    "fp4rt doctor --json"))
    return findings


def versions(_: list[Finding]) -> Iterator[Finding]:
    names = ("numpy", "numba", "tokenizers", "jinja2", "huggingface_hub")
    yield Finding("fp4rt", "ok", f"{__version__}, Python {platform.python_version()}, {platform.system()} "
                  f"{platform.machine()}, " + ", ".join(f"{name} {_version(name)}" for name in names))


def driver(_: list[Finding]) -> Iterator[Finding]:
    """The driver, asked by itself: no CUDA library of anybody's stands between."""
    library = driver_library()
    if library is None:
        if _gpu_on_bus():
            yield Finding("driver", "problem", "none", "an NVIDIA GPU is built in, but libcuda is not installed",
                          "sudo ubuntu-drivers install" if shutil.which("ubuntu-drivers")
                          else "xdg-open https://www.nvidia.com/drivers")
        else:
            yield Finding("driver", "none", "no NVIDIA driver, and no NVIDIA GPU on the PCI bus")
        return
    status, version = library.cuInit(0), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    found = f"{_driver_release() or 'version unknown'}, CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if status == 0:
        yield Finding("driver", "ok", found)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    cause, remedy = {
        100: ((f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES") if hidden is not None
              else ("the driver sees no GPU; a container must be started with access to it", "nvidia-smi -L")),
        803: ("the kernel module and libcuda are of different releases, as after an update", "sudo reboot"),
        804: ("a CUDA compatibility library is loaded that this GPU does not support", "unset LD_LIBRARY_PATH"),
    }.get(status, (f"cuInit answers with error {status}", "nvidia-smi"))
    yield Finding("driver", "problem", found, cause, remedy)


def gpus(findings: list[Finding]) -> Iterator[Finding]:
    library = driver_library()
    if library is None or not _ok(findings, "driver"):
        yield Finding("gpu", "none", "no driver to ask")
        return
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, 256, device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # and _MINOR
        found = (f"{index}: {name.value.decode(errors='replace')}, compute capability {major.value}.{minor.value}, "
                 f"{memory.value / 2**30:.1f} GiB")
        if (major.value, minor.value) >= OLDEST_GPU:
            yield Finding("gpu", "ok", found)
        else:
            yield Finding("gpu", "problem", found, "older than compute capability 7.5, which the kernels need",
                          "fp4rt generate --device cpu demo Hello")


def cupy(findings: list[Finding]) -> Iterator[Finding]:
    wheels = [name for name in ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy") if _version(name) != "missing"]
    extra = cuda_extra()
    if len(wheels) > 1:
        yield Finding("cupy", "problem", ", ".join(wheels), "several CuPy wheels overwrite each other's files",
                      f"pip uninstall -y {' '.join(wheels)} && pip install {extra}")
    elif not wheels:
        needed = _ok(findings, "driver")
        yield Finding("cupy", "problem" if needed else "none", "not installed",
                      "the CUDA backend needs CuPy" if needed else None, f"pip install {extra}" if needed else None)
    else:
        found = f"{wheels[0]} {_version(wheels[0])}"
        try:
            import cupy
        except Exception as error:  # a broken wheel raises what it likes
            yield Finding("cupy", "problem", found, f"it does not import: {_line(error)}",
                          f"pip install --force-reinstall {extra}")
            return
        newest = cuda_version() // 1000
        if _ok(findings, "driver") and newest < int("0" + "".join(filter(str.isdigit, wheels[0]))):
            yield Finding("cupy", "problem", found, f"the driver knows CUDA {newest} only",
                          f"pip uninstall -y {wheels[0]} && pip install {extra}")
        else:
            yield Finding("cupy", "ok", f"{found} in {Path(cupy.__file__).parent}")


def nvrtc(findings: list[Finding]) -> Iterator[Finding]:
    if not _ok(findings, "cupy"):
        yield Finding("nvrtc", "none", "reached through CuPy")
        return
    from fp4rt.ops.cuda.compile import include_directory, nvrtc_version

    try:
        major, minor = nvrtc_version()
        headers = include_directory()
    except Fp4rtError as error:
        yield Finding("nvrtc", "problem", "not usable", str(error), f"pip install {cuda_extra()}")
        return
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        where = load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception:  # where it lies is worth a word, not a failure
        where = "a place unknown"
    yield Finding("nvrtc", "ok", f"{major}.{minor} from {where}, headers in {headers}")


def cache(findings: list[Finding]) -> Iterator[Finding]:
    """Where compiled code is kept; nothing is created by looking."""
    from fp4rt.ops.cpu.runtime import _cache_home

    directories = [_cache_home()]
    if _ok(findings, "cupy"):
        from fp4rt.ops.cuda.compile import cache_directory

        directories.append(cache_directory())
    for path in directories:
        there = next(one for one in (path, *path.parents) if one.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            sizes = [one.stat().st_size for one in path.rglob("*") if one.is_file()]
            yield Finding("cache", "ok", f"{path}, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB")
        else:
            yield Finding("cache", "problem", str(path), f"{there} cannot be written, so every process compiles anew",
                          f'sudo chown -R "$USER" {path}' if there == path else "export XDG_CACHE_HOME=$(mktemp -d)")


def cuda_backend(findings: list[Finding]) -> Iterator[Finding]:
    """The proof: the backend starts, with a context on the GPU."""
    if not (_ok(findings, "gpu") and _ok(findings, "cupy") and _ok(findings, "nvrtc")):
        needed = ("driver", "gpu", "cupy", "nvrtc")
        broken = [one.name for one in findings if one.status == "problem" and one.name in needed]
        yield Finding("cuda backend", "none", f"see {', '.join(broken)}" if broken else "no NVIDIA GPU")
        return
    yield _start("cuda backend", "cuda", f"pip install {cuda_extra()}")


def cpu_backend(_: list[Finding]) -> Iterator[Finding]:
    yield _start("cpu backend", "cpu", "pip install --force-reinstall fp4rt")


def _start(name: str, device: str, remedy: str) -> Finding:
    from fp4rt.ops.select import make_ops

    try:
        ops = make_ops(device, None, None, False)
    except Exception as error:
        return Finding(name, "problem", "does not start", _line(error), remedy)
    try:
        return Finding(name, "ok", ops.device)
    finally:
        ops.close()


# -- What the checks ask --------------------------------------------------------------------------------------------


def _ok(findings: list[Finding], name: str) -> bool:
    return any(one.name == name and one.status == "ok" for one in findings)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Fp4rtError) else f"{type(error).__name__}: {text}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _driver_release() -> str | None:
    """The driver's release, such as 580.65.06, from NVML."""
    library, text = system_library("libnvidia-ml.so.1", "nvml.dll"), ctypes.create_string_buffer(96)
    if library is None or library.nvmlInit_v2() != 0:
        return None
    try:
        return text.value.decode() if library.nvmlSystemGetDriverVersion(text, 96) == 0 else None
    finally:
        library.nvmlShutdown()


def _gpu_on_bus() -> bool:
    """Whether an NVIDIA display controller is on the PCI bus, as Linux lists it."""
    def is_gpu(device: Path) -> bool:
        try:
            return ((device / "vendor").read_text().strip() == "0x10de"
                    and (device / "class").read_text().startswith("0x03"))
        except OSError:
            return False

    return any(is_gpu(device) for device in Path("/sys/bus/pci/devices").glob("*"))
