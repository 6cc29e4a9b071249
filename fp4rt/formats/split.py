"""Weights taken apart along rows or columns, so that a wide expert becomes several of another width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fp4rt.formats.fp8 import Fp8
from fp4rt.formats.weight import Weight


def split(weight: Weight, count: int, axis: int) -> list[Weight]:
    """Equal parts along rows (axis 0) or columns (1) as views, of a weight without bias and pre_quant_scale.

    Every value stays what it is: none where they cannot be equal, or a block of values with one scale would be cut.
    """
    matrices = {name: array for name, array in vars(weight).items() if isinstance(array, np.ndarray)}
    if isinstance(weight, Fp8):
        if weight.scales.shape[axis] == 1:
            del matrices["scales"]  # each part has them all
        elif weight.shape[axis] // count % weight.block[axis]:
            return []
    if any(array.shape[axis] % count for array in matrices.values()):
        return []
    parts = zip(*(np.split(array, count, axis) for array in matrices.values()))
    return [replace(weight, **dict(zip(matrices, part))) for part in parts]


def count_parts(shared_up: Sequence[Weight], shared_down: Weight, up: Sequence[Weight], down: Weight) -> int:
    """How many experts like (up, down) a wider one is the sum of: each with rows of its up and columns of its down.

    0 if it is not: other formats or granularities, another input or output, a width that is no multiple or that scales
    do not let it divide, a bias or a pre_quant_scale.
    """
    shared, expert = [*shared_up, shared_down], [*up, down]
    count, rest = divmod(shared_down.shape[1], down.shape[1])
    fits = (count > 0 and rest == 0
            and shared_up[0].shape[1] == up[0].shape[1] and shared_down.shape[0] == down.shape[0]
            and list(map(_kind, shared)) == list(map(_kind, expert))
            and all(part.bias is None and part.pre_quant_scale is None for part in shared)
            and all(split(part, count, 0) for part in shared_up) and split(shared_down, count, 1))
    return count if fits else 0


def _kind(weight: Weight) -> tuple[str, str]:
    return weight.format, weight.granularity if isinstance(weight, Fp8) else ""
