"""Every variant of the warpgroup linears on sm_90a, whichever a shape would choose, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cases import LinearCase
from test_cuda_ops import expected, run, values

pytestmark = pytest.mark.gpu

# Rows that end within a block, columns that end within a tile, tokens that end within 8, and two tiles of tokens.
CASES = [*[LinearCase(t, ((kind, 300), (kind, 100)), 1136, bias=True) for kind in ("NVFP4", "MXFP4", "FP8", "BF16")
           for t in (9, 300) if kind != "MXFP4"],
         *[LinearCase(133, ((kind, 200), (kind, 200)), 1120, gated=True, norm=True)
           for kind in ("NVFP4", "MXFP4", "FP8", "BF16")],
         LinearCase(70, (("NVFP4", 323), ), 1040, residual=True), LinearCase(70, (("BF16", 323), ), 1039)]


@pytest.fixture(scope="module")
def ops():
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps()
    if backend.gpu.arch != "sm_90a":
        backend.close()
        pytest.skip("warpgroup products need sm_90a")
    yield backend
    backend.close()


@pytest.mark.parametrize("number", range(17))
def test_every_variant(ops, monkeypatch, number: int):
    from fp4rt.ops.cuda import warpgroup

    assert len(warpgroup.VARIANTS) == 17
    variant = warpgroup.VARIANTS[number]
    monkeypatch.setattr(warpgroup, "choose", lambda *_: variant)
    for case in CASES:
        y, allowed, _ = expected(case)
        result, _ = run(ops, case)
        if hasattr(result, "exponent"):
            allowed = allowed + 2.0 ** (result.exponent - 24)
        np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + 1e-30, err_msg=f"{case}: {variant}")


@pytest.mark.parametrize("tokens", [16, 17, 64, 100, 128, 129, 300, 1024])
def test_the_chosen_variant(ops, tokens: int):
    case = LinearCase(tokens, (("NVFP4", 1040), ), 2048, residual=True)
    y, allowed, _ = expected(case)
    result, _ = run(ops, case)
    np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + 1e-30)
