"""The read bandwidth of the memory that a backend keeps weights in, measured now."""

from __future__ import annotations

from fp4rt.driver import driver_answers


def read_bandwidth(device: str, arch: str | None = None) -> float | None:
    """Bytes per second for "auto", "cuda" or "cpu"; None for the reference, which no bandwidth bounds."""
    if device == "reference":
        return None
    if device == "cpu" or device == "auto" and not driver_answers():
        from fp4rt.ops.cpu import bandwidth

        return bandwidth.read_bandwidth()
    from fp4rt.ops.cuda import bandwidth
    from fp4rt.ops.cuda.device import Device

    gpu = Device(arch)
    try:
        with gpu:
            return bandwidth.read_bandwidth(gpu)
    finally:
        gpu.close()
