"""The chain of one half of the tasks: its draws of phi are of that half's posterior, and it begins at the vector."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pytest
import torch
from common_map import adapter, tasks
from torch import Tensor
from toy_lift import toy_lift, toy_tasks

from pyro_lift import LiFT
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.linear_gaussian import Gaussian, LinearGaussian, gaussian_kl
from pyro_lift.tuning.half_chain import Settled, half_chain
from pyro_lift.tuning.halves import Joint
from pyro_lift.tuning.joint_run import Standing

JOINT = Joint(0.1, 800, 0.5, 0.1, True)


def half_of(toy: LinearGaussian) -> LinearGaussian:
    half = copy.copy(toy)
    half.num_tasks, half.x, half.y = toy.num_tasks // 2, toy.x[::2], toy.y[::2]
    return half


def test_it_finds_the_exact_posterior_of_its_half() -> None:
    toy = half_of(LinearGaussian(12, seed=0))
    lift, own = toy_lift(toy), toy_tasks(toy)
    kernel = lift.kernel(lift.program(own))
    with pyro.validation_enabled(False):
        settled = half_chain(kernel, Standing(torch.full((2,), 0.1).double(), {}, own), 200, 4_000)
    assert settled is not None
    normal = Gaussian(settled.phi.mean[0], torch.diag(settled.phi.variance[0]))
    assert gaussian_kl(normal, toy.posterior()) < 0.04


def half(
    monkeypatch: pytest.MonkeyPatch, sample: Callable[[SGLDGibbs, dict[str, Tensor]], dict[str, Tensor]]
) -> tuple[Settled | None, Standing]:
    """Run LiFT's own chain of half of some tasks, whose transitions are replaced."""
    run = LiFT(adapter(), sgd_steps=40, burn_in=2, samples=4, seed=0).before_chain(tasks(), crossed=False)
    standing = run.run._joint_run(tasks()[::2], 0.01, 40, "half").to(40)
    monkeypatch.setattr(SGLDGibbs, "sample", sample)
    return run.run._half_chain(standing, JOINT, run.settings, 8), standing


def test_it_goes_on_from_the_vector_with_its_preconditioner(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def sample(kernel: SGLDGibbs, params: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(kernel.state)
        assert kernel.structure is not None and kernel.structure.num_tasks == 4
        return {**params, "phi": params["phi"] + 1.0}

    settled, standing = half(monkeypatch, sample)
    assert len(states) == 3, "half as long as the chain of all tasks"
    torch.testing.assert_close(states[0].phi["phi"].reshape(-1), standing.vector)
    assert torch.equal(states[0].second_moment["theta"].reshape(-1), standing.moments["theta"])
    assert settled is not None  # of two draws, two and three steps away
    torch.testing.assert_close(settled.phi.mean[0], standing.vector + 2.5)
    torch.testing.assert_close(settled.phi.variance[0], torch.full_like(standing.vector, 0.5))


def test_a_chain_that_diverges_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(kernel: SGLDGibbs, params: dict[str, Tensor]) -> dict[str, Tensor]:
        raise DivergedError("a loss that is not finite", 0)

    assert half(monkeypatch, sample)[0] is None


def test_the_untouched_network_has_no_chain() -> None:
    run = LiFT(adapter(), sgd_steps=40, burn_in=2, samples=4, seed=0).before_chain(tasks(), crossed=False)
    assert run.run._half_chain(Standing(torch.zeros(3), {}), JOINT, run.settings, 8) is None
