"""What is said of programs that are moved together where that is dear, or not taken for being large."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_lift import MCMC, SGLDGibbs, whole
from pyro_lift.inference.gibbs import blocks, together_plan

N = 6
Y = torch.randn(N, generator=torch.Generator().manual_seed(0))


def heavy_tailed() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("tasks", N, subsample_size=2) as index:
        theta = pyro.sample("theta", dist.StudentT(4.0, phi, 0.5))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[index])


def looped(law: Callable[[torch.Tensor], dist.Distribution]) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        for i in pyro.plate("tasks", N):
            theta = pyro.sample(f"theta_{i}", law(phi))
            pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=Y[i])

    return model


def test_a_large_program_without_exact_draws_is_told_its_size_and_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_COORDINATES", N)
    with pytest.raises(
        ValueError,
        match=r"(?s)langevin.*large \(7 coordinates.*up to 6 .*whole\(model\), phi_update=\"nuts\".*Normal",
    ):
        SGLDGibbs(heavy_tailed).setup(1)
    mcmc = MCMC(SGLDGibbs(whole(heavy_tailed), phi_update="nuts", seed=0), num_samples=3, disable_progbar=True)
    mcmc.run()  # the first way out is one
    assert torch.isfinite(mcmc.get_samples()["phi"]).all()


def test_a_loop_that_is_run_many_times_a_draw_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, normal = looped(lambda phi: dist.StudentT(4.0, phi, 0.5)), looped(lambda phi: dist.Normal(phi, 0.5))
    with caplog.at_level(logging.WARNING, "pyro_lift"):
        SGLDGibbs(student, seed=0).setup(1)
        assert not caplog.messages  # six tasks are no matter
        monkeypatch.setattr(together_plan, "MANY_SITES", 2 * N)
        SGLDGibbs(normal, seed=0).setup(1)
        SGLDGibbs(whole(heavy_tailed), seed=0).setup(1)
        assert not caplog.messages  # exact draws; a vectorised plate
        SGLDGibbs(student, seed=0).setup(1)
    (said,) = caplog.messages
    assert "iterates over its 6 tasks" in said and "with pyro.plate('tasks', 6) as index" in said
