"""Joint training: one vector for all tasks, which Adam moves, each task by its weight."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFTSettings, SGLDGibbs, Task
from pyro_lift.inference.gibbs.task_factors import checked_factors
from pyro_lift.settings import complete_settings
from pyro_lift.tuning.chain_kernel import task_weights

WEIGHTS = (2.0, 0.5, 1.0, 0.25)
SIZES = (2, 7, 4, 12)


def vectorised(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("tasks", len(y), subsample_size=2, dim=-1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
        pyro.sample("y", dist.StudentT(3.0, theta, 1.0).to_event(1), obs=y[index])


def iterated(data: list[Tensor]) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("tasks", len(data), subsample_size=2):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
        with pyro.plate(f"rows_{i}", len(data[int(i)])):
            pyro.sample(f"y_{i}", dist.StudentT(3.0, theta, 1.0).to_event(1), obs=data[int(i)])


def trained(model: object, data: object, steps: int, **options: object) -> Tensor:
    kernel = SGLDGibbs(model, sgd_steps=steps, sgd_step_size=0.05, step_size=1e-3, seed=0, **options)  # type: ignore[arg-type]
    kernel.setup(steps, data)
    params = dict(kernel.initial_params)
    for _ in range(steps):
        params = kernel.sample(params)
    return params["phi"]


def by_torch(data: list[Tensor], weights: tuple[float, ...], steps: int) -> Tensor:
    """Train by torch's Adam on the weighted log likelihood of the blocks, which take their turns."""
    phi = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([phi], lr=0.05, betas=(0.9, 0.99))
    for step in range(steps):
        block = [(2 * step + k) % len(data) for k in range(2)]
        adam.zero_grad()
        loss = -sum(weights[i] * dist.StudentT(3.0, phi, 1.0).log_prob(data[i]).sum() for i in block)
        loss.backward()  # type: ignore[union-attr]
        adam.step()
    return phi.detach()


def rows(sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator) + torch.arange(3.0) - i for i, n in enumerate(sizes)]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_torchs_adam_on_the_weighted_likelihood_of_tasks_of_any_size(weights: tuple[float, ...] | None) -> None:
    data = rows(SIZES)
    expected = by_torch(data, weights or (1.0,) * 4, 15)
    torch.testing.assert_close(trained(iterated, data, 15, sgd_weights=weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_block_of_a_plate_weighs_its_tasks_likewise(weights: tuple[float, ...] | None) -> None:
    y = torch.stack([row[0] for row in rows((1,) * 4)])
    expected = by_torch([row.unsqueeze(0) for row in y], weights or (1.0,) * 4, 15)
    torch.testing.assert_close(trained(vectorised, y, 15, sgd_weights=weights), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, by_torch([row.unsqueeze(0) for row in y], (1.0, 2.0, 1.0, 3.0), 15), atol=1e-3)


def test_there_is_one_weight_a_task_and_it_is_above_zero() -> None:
    with pytest.raises(ValueError, match="sgd_weights has 3 factors for 4 tasks"):
        trained(iterated, rows(SIZES), 2, sgd_weights=[1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"sgd_weights\[1\]=0.0"):
        checked_factors("sgd_weights", [1.0, 0.0])


def test_with_lifts_weights_all_tasks_count_alike_at_the_mean_size() -> None:
    tasks = [Task(f"t{n}", (torch.zeros(n, 2), torch.zeros(n).long()), num_classes=2) for n in SIZES]
    weights = task_weights(tasks)
    assert weights is not None
    assert [w * n for w, n in zip(weights, SIZES, strict=True)] == pytest.approx([sum(SIZES) / len(SIZES)] * 4)
    assert task_weights(tasks[:1] * 3) is None


def test_a_run_that_was_saved_before_there_were_weights_goes_on_without() -> None:
    assert complete_settings({})["sgd_weights"] == "rows"
    assert LiFTSettings(**complete_settings({"sgd_weights": "tasks"})).sgd_weights == "tasks"
    with pytest.raises(ValueError, match="sgd_weights"):
        LiFTSettings(sgd_weights="task")  # type: ignore[arg-type]
