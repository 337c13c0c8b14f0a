"""Adapting with another power than meta-training had: the preconditioner must be of the same forces."""

from __future__ import annotations

from typing import Any

import peft
import torch

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.models.backbones import adapt_backbone


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
