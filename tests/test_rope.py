"""Rotary frequencies against the formulas of the papers, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fp4rt.config import Config
from fp4rt.rope import inverse_frequencies

PLAIN = 10000.0 ** (-np.arange(0, 16, 2) / 16)


def frequencies(config: dict) -> tuple[np.ndarray, float]:
    return inverse_frequencies(Config({"max_position_embeddings": 64, **config}, Path("config.json")), 16)


@pytest.mark.parametrize("spelling", [
    {}, {"rope_theta": 10000.0, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, {"rope_theta": 1e4, "rope_parameters": {}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}], ids=str)
def test_within_its_length_dynamic_scaling_changes_nothing(spelling: dict):
    """base * (factor * max(length, trained) / trained - (factor - 1)) is base up to the trained length (NTK-aware)."""
    found, factor = frequencies(spelling)
    np.testing.assert_allclose(found, PLAIN, rtol=1e-6)
    assert factor == 1.0
