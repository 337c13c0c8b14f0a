"""Shared by all tests: seeds, where the real data may lie, and the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
#: Real data for the benchmarks, beside the checkout; not part of the project, so tests that want it may be skipped.
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data_root() -> Path:
    """The folder with the real data, or a skip."""
    if not DATA.is_dir():
        pytest.skip(f"needs the benchmark data in {DATA}, which is not part of the project")
    return DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
