"""Tasks that are none of the kind: adapted to from the network as it was, alone and in blocks."""

from __future__ import annotations

import pytest
import torch
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.task import Task
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings


def prior_far_from(task: Task, spread: float) -> LiFTPrior:
    adapter = tiny_adapter()
    mixture = OnlineGaussianMixture(1)
    generator = torch.Generator().manual_seed(0)
    far = adapter.initial + spread * torch.randn(adapter.dim, generator=generator, dtype=adapter.initial.dtype)
    for _ in range(60):
        noise = torch.randn(adapter.dim, generator=generator, dtype=adapter.initial.dtype)
        mixture.update(far + 0.01 * noise)
    return LiFTPrior(adapter, mixture, LiFTSettings(beta=0.01), AdaptSettings(steps=4, draws=2), seed=0)


def test_such_a_task_begins_and_stays_at_the_untouched_network_and_zero_switches_that_off() -> None:
    task = tiny_tasks(1, rows=12)[0]
    prior = prior_far_from(task, 5.0)
    posterior = prior.adapt(task)
    assert posterior.component == -1
    assert float((posterior.thetas - prior.adapter.initial).abs().max()) < 0.3
    assert prior.adapt(task, untouched=0.0).component == 0
    with pytest.raises(ValueError, match="a probability below 1"):
        prior.adapt(task, untouched=1.0)


def test_a_block_of_both_kinds_gives_each_task_what_it_gets_among_its_own() -> None:
    adapter = tiny_adapter()
    tasks = tiny_tasks(4, rows=12)
    prior = prior_far_from(tasks[0], 1.0)
    mean = prior.mixture.get().component_distribution.mean[0]
    x = tasks[0].train.inputs[""]
    # Rows that the far network explains perfectly, and rows that the untouched one does.
    labels = [adapter(x, theta=theta).argmax(-1) for theta in (mean, adapter.initial, mean)]
    mixed = [Task(f"m{k}", (x, y), num_classes=tasks[0].num_classes) for k, y in enumerate(labels)]
    block = prior.adapt_many(mixed, block_size=3)
    assert [posterior.task.name for posterior in block] == ["m0", "m1", "m2"]
    assert [posterior.component for posterior in block] == [prior.adapt(task).component for task in mixed]
    centres = [prior.adapter.initial if posterior.component == -1 else mean for posterior in block]
    for posterior, centre in zip(block, centres, strict=True):
        assert float((posterior.thetas - centre).abs().max()) < 0.3
