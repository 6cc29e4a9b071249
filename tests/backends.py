"""The backends a test runs on, and how far each may be from a float32 reference."""

from __future__ import annotations

import pytest

# Backend name -> (load arguments, allowed error of logits relative to the largest logit).
HOST = {"reference": (dict(device="reference"), 1e-3), "cpu": (dict(device="cpu"), 1e-3)}
CUDA = {f"cuda-{arch or 'native'}": (dict(device="cuda", arch=arch), 1e-2)
        for arch in (None, "sm_75", "sm_80", "sm_86", "sm_89")}
BACKENDS = {**HOST, **CUDA}

each_backend = pytest.mark.parametrize("backend", [
    *HOST, *(pytest.param(name, marks=pytest.mark.gpu) for name in CUDA)])
