"""Shared by all tests: seeds, threads and processes, where the real data may lie, and the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
#: Real data for the benchmarks, beside the checkout; not part of the project, so tests that want it may be skipped.
DATA = ROOT.parent / "shared" / "data"

#: Processes of ``-n auto``: each takes about 1.5 GB, and its imports alone take ten seconds.
MOST_WORKERS = 8
# No test may wait for a hub: a name that is no folder is answered at once. Processes that tests start read it too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' tensors are small: a second thread costs more than it gives, and takes a core from another worker. The
# variable is for the processes that tests start, and for pytest-xdist's workers, which read it as they begin.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(allowed), MOST_WORKERS)


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
