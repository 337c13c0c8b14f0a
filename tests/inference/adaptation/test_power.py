"""Adapting with another power than meta-training had: the preconditioner must be of the same forces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.adaptation.chain import rows_of_moments
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.weight_scales import typical_size


def prior_and_task() -> tuple[LiFTPrior, Task]:
    """A prior so wide that it pulls at nothing, with a preconditioner of its own."""
    torch.manual_seed(0)
    adapter = adapt_backbone(
        torch.nn.Sequential(torch.nn.Linear(4, 2)), peft.LoraConfig(r=2, target_modules=["0"]), seed=0
    )
    x = torch.randn(24, 4)
    task = Task("signs", (x, (x[:, 0] > 0).long()), num_classes=2)
    options: dict[str, Any] = {"sgd_steps": 5, "burn_in": 5, "samples": 20, "beta": 0.05, "sigma": 0.05}
    prior = LiFT(adapter, seed=0, temperature=0.1, n_inflate=4.0, **options).meta_train([task], progress=False)
    prior.settings = type(prior.settings)(**{**vars(prior.settings), "beta": 1e4})
    return prior, task


def test_without_noise_and_prior_the_power_changes_no_step() -> None:
    """The preconditioned force is a gradient over its own size, whatever multiplies both."""
    prior, task = prior_and_task()
    assert prior.second_moment
    how: dict[str, Any] = {"steps": 20, "draws": 4, "temperature": 0.0, "learning_rate": 0.01, "batch_size": 0}
    plain = prior.adapt(task, **how)
    assert float((plain.thetas[-1] - plain.thetas[0]).abs().max()) > 1e-3
    for power in (0.25, 400.0):
        torch.testing.assert_close(prior.adapt(task, n_inflate=power, **how).thetas, plain.thetas, atol=1e-4, rtol=1e-3)


def repeated(task: Task, times: int) -> Task:
    """The same rows several times over."""
    rows = task.train.take(torch.arange(len(task.train)).repeat(times))
    return Task(f"{task.name} x {times}", rows, num_classes=task.num_classes)


def test_a_task_whose_rows_are_there_twice_at_half_the_power_is_the_same_task() -> None:
    prior, task = prior_and_task()
    assert prior.rows == 24.0
    power, prior.rows = prior.settings.n_inflate, 240.0
    assert power is not None
    how: dict[str, Any] = {"steps": 20, "draws": 4, "learning_rate": 0.01, "batch_size": 0, "seed": 3}
    plain = prior.adapt(task, **how).thetas
    twice = prior.adapt(repeated(task, 2), n_inflate=power / 2.0, **how).thetas
    torch.testing.assert_close(twice, plain, atol=1e-5, rtol=1e-4)


def test_steps_of_few_rows_are_as_long_as_those_of_many_alone_or_in_a_block() -> None:
    """Without noise and prior a step is a gradient over its size, in a block of tasks of other sizes too."""
    prior, task = prior_and_task()
    prior.rows = 9.0 * len(task.train)
    how: dict[str, Any] = {"steps": 20, "draws": 4, "temperature": 0.0, "learning_rate": 0.01, "batch_size": 0}
    plain = prior.adapt(task, **how).thetas
    torch.testing.assert_close(prior.adapt(repeated(task, 9), **how).thetas, plain, atol=1e-4, rtol=1e-3)
    moved = [move_of(each.thetas) for each in prior.adapt_many([task, repeated(task, 2), repeated(task, 9)], **how)]
    # A block's chains share the mean that the damping is relative to, which the large tasks raise.
    assert 0.5 < moved[0] / moved[2] < 1.0 and 0.5 < moved[0] / move_of(plain) < 1.5
    prior.rows = None  # as a prior that was saved before
    assert float((prior.adapt(task, **how).thetas - plain).abs().max()) > 0.1


def move_of(thetas: Tensor) -> float:
    """The distance from the first draw that was kept to the last."""
    return float((thetas[-1] - thetas[0]).norm())


def test_a_prior_keeps_the_rows_of_its_tasks_in_its_folder(tmp_path: Path) -> None:
    prior, task = prior_and_task()
    assert rows_of_moments([task, repeated(task, 7)], alike=False) == 120.0
    assert rows_of_moments([task, repeated(task, 7)], alike=True) == 96.0
    again = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), prior.adapter)
    assert again.rows == 24.0 and prior.merge(prior).rows == 24.0


def test_a_larger_rate_makes_no_step_longer_than_six_of_the_networks_own_up_to_sixteen_times_it() -> None:
    """With mean squares that are far too small both of two steps are as long as the limit lets them be."""
    prior, task = prior_and_task()
    prior.second_moment = {name: 1e-12 * moment for name, moment in prior.second_moment.items()}
    own, start = 0.05 * typical_size(prior.adapter), prior.mixture.get().component_distribution.mean[0]
    how: dict[str, Any] = {"steps": 2, "draws": 1, "temperature": 0.0, "batch_size": 0}
    for times, most in ((0.5, 1.5), (1.0, 3.0), (2.0, 6.0), (16.0, 6.0), (100.0, 37.5)):
        moved = (prior.adapt(task, learning_rate=times * own, **how).thetas[0] - start).abs().max()
        assert math.isclose(float(moved), 2 * most * own, rel_tol=1e-3), times
