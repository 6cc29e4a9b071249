"""Puts the tests' own modules on the path and leaves `gpu` tests out, visibly, where no NVIDIA driver answers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fp4rt.driver import driver_answers  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if driver_answers():
        return
    kept = [item for item in items if "gpu" not in item.keywords]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if "gpu" in item.keywords])
        items[:] = kept
