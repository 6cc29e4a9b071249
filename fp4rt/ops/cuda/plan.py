"""What the CUDA backend would hold for a linear, without a GPU: for `fp4rt inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from fp4rt.formats import Weight
from fp4rt.ops.cuda.layouts import choose_layout


def plan_linear(parts: Sequence[Weight], gated: bool) -> tuple[str, str, int]:
    """(kernel, reason, bytes of device memory) of these parts; as linear_weight packs them, to 1 part in 1000."""
    chosen = [choose_layout(part) for part in parts]
    nbytes = 0
    for part, (layout, _) in zip(parts, chosen):
        n, k = part.shape
        tiles = -(-n // 8) / 2 if gated else -(-n // 16)
        nbytes += int(tiles * (-(-k // layout.tile_k) * layout.tile_bytes + 16 * 4 * (1 if part.bias is None else 2)))
    kernels, reasons = ("; ".join(dict.fromkeys(found)) for found in
                        ((layout.stem for layout, _ in chosen), (reason for _, reason in chosen)))
    return kernels.replace("; ", "+"), reasons, nbytes
