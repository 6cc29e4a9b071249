"""What the hardware of a backend can do at most, measured now: reads of the memory weights lie in, matrix products."""

from __future__ import annotations

from fp4rt.driver import driver_answers


def read_bandwidth(device: str, arch: str | None = None) -> float | None:
    """Bytes per second for "auto", "cuda" or "cpu"; None for the reference, which no bandwidth bounds."""
    if device == "reference":
        return None
    if device == "cpu" or device == "auto" and not driver_answers():
        from fp4rt.ops.cpu import bandwidth

        return bandwidth.read_bandwidth()
    return _measured("read_bandwidth", arch)


def matrix_rate(device: str, arch: str | None = None) -> float | None:
    """Floating-point operations per second of a GPU's tensor cores, fp16 or bf16 with float32 sums; None elsewhere,
    where no such unit bounds prefill."""
    if device in ("reference", "cpu") or device == "auto" and not driver_answers():
        return None
    return _measured("matrix_rate", arch)


def _measured(name: str, arch: str | None) -> float:
    from fp4rt.ops.cuda import limits
    from fp4rt.ops.cuda.device import Device

    gpu = Device(arch)
    try:
        with gpu:
            return getattr(limits, name)(gpu)
    finally:
        gpu.close()
