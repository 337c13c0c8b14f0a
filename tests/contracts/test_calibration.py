"""Simulation-based calibration of the example's hierarchical Poisson model: ranks are uniform where they should be."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from pyro_lift.diagnostics.calibration import uniform_p_value


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration_example", ROOT / "examples" / "calibration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uniform_ranks_pass_and_others_do_not(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(example.DRAWS + 1, (1_500,), generator=generator)
    assert uniform_p_value(example.histogram(uniform)) > 1e-3
    # Draws too wide by a fifth: the truth sits in their middle.
    draws = 1.2 * torch.randn(example.DRAWS, 1_500, generator=generator)
    hump = (draws < torch.randn(1_500, generator=generator)).sum(0)
    assert uniform_p_value(example.histogram(hump)) < 1e-3
    assert int(example.histogram(uniform).sum()) == 1_500 and len(example.histogram(uniform)) == example.BINS


@pytest.mark.slow
def test_the_gibbs_update_is_calibrated(example: ModuleType) -> None:
    found = example.ranks(example.SAMPLERS["gibbs"], 1_000, burn_in=1_000, thinning=100, seed=0)
    for site, values in found.items():
        assert uniform_p_value(example.histogram(values)) > 1e-3, site
