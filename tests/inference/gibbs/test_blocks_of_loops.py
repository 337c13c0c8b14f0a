"""How many tasks a visit takes where the program says nothing of it, and runs saved when that was another number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.gibbs import blocks

N = 8
Y = torch.randn(N, 5, generator=torch.Generator().manual_seed(1)) + torch.arange(N).unsqueeze(-1) / 4.0


def looped(subsample_size: int | None = None, family: str = "bernoulli") -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        for i in pyro.plate("tasks", N, subsample_size=subsample_size):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
            law = dist.Normal(theta, 1.0) if family == "normal" else dist.Bernoulli(logits=theta)
            obs = Y[i] if family == "normal" else (Y[i] > 0.5).float()
            pyro.sample(f"y_{i}", law.expand([5]).to_event(1), obs=obs)

    return model


def finished(model: Callable[[], None], draws: int = 40, **options: Any) -> MCMC:
    run_options = {key: options.pop(key) for key in ("checkpoint", "resume", "checkpoint_every") if key in options}
    mcmc = MCMC(SGLDGibbs(model, seed=2, **options), num_samples=draws, warmup_steps=20, disable_progbar=True)
    mcmc.run(**run_options)
    return mcmc


def block_of(mcmc: MCMC) -> int:
    return int(mcmc.kernel.structure.block_size)


def test_a_loop_over_few_tasks_visits_all_of_them() -> None:
    assert block_of(finished(looped())) == N
    assert block_of(finished(looped(2))) == 2
    assert block_of(finished(looped(), block_size=1)) == 1
    assert block_of(finished(looped(), block_size=3)) == 3


def test_a_loop_too_large_to_be_seen_whole_visits_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MOST_COORDINATES", "MOST_OBSERVED"):
        with monkeypatch.context() as patched:
            patched.setattr(blocks, limit, 6)
            assert block_of(finished(looped())) == 1


def test_a_draw_moves_every_theta() -> None:
    """And phi by what all of them say: one task a draw has N draws for it, and a fifth of the effective ones."""

    def moved(**options: Any) -> Tensor:
        draws = finished(looped(), 20, keep_theta=True, **options).get_samples()
        theta = torch.stack([draws[f"theta_{i}"] for i in range(N)], -1)
        return (theta[1:] != theta[:-1]).sum(-1)

    assert bool((moved() == N).all()) and bool((moved(block_size=1) == 1).all())


@pytest.mark.parametrize("family", ["bernoulli", "normal"])
def test_a_run_saved_with_the_default_of_before_goes_on_as_it_was(family: str, tmp_path: Path) -> None:
    model = looped(family=family)
    whole = finished(model, 20, block_size=1).get_samples()["phi"]
    finished(model, 10, block_size=1, checkpoint=tmp_path, checkpoint_every=10)
    again = finished(model, 20, resume=tmp_path)
    assert block_of(again) == 1
    assert torch.equal(again.get_samples()["phi"], whole)
    again.run()  # a run of its own has the default
    assert block_of(again) == N


def test_a_block_that_is_asked_for_must_be_that_of_the_saved_run(tmp_path: Path) -> None:
    finished(looped(), 10, checkpoint=tmp_path, step_size=0.02)
    with pytest.raises(ValueError, match="block_size = 8 and is now 2"):
        finished(looped(), 20, resume=tmp_path, step_size=0.02, block_size=2)
