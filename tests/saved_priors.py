"""A small trained prior to be saved, and what its network says."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from tiny_backbones import FAMILIES
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.models.backbones import recipe


class Trained(NamedTuple):
    """A backbone without adapter, tasks, and a prior and a posterior learned from a copy of it."""

    backbone: nn.Module
    tasks: list[Task]
    prior: LiFTPrior
    posterior: TaskPosterior


_trained: dict[str, Trained] = {}


def trained(name: str, components: int = 2) -> Trained:
    key = f"{name}-{components}"
    if key not in _trained:
        torch.manual_seed(3)
        family = FAMILIES[name]
        backbone = family.make().eval()
        tasks = [family.task(f"t{i}") for i in range(3)]
        settings: dict[str, Any] = {"sgd_steps": 6, "burn_in": 3, "samples": 30, "batch_size": 4}
        settings |= {"head_scale": family.head_scale, "components": components, "sgd_learning_rate": 0.05}
        mine = copy.deepcopy(backbone)
        prior = LiFT(mine, recipe(mine, rank=2), seed=0, **settings).meta_train(tasks[:2], progress=False)
        _trained[key] = Trained(backbone, tasks, prior, prior.adapt(tasks[2], steps=8, draws=3))
    return _trained[key]


def logits(network: nn.Module, task: Task) -> Tensor:
    named = {k: x for k, x in task.train.named.items() if not k.startswith("label_")}
    with torch.no_grad():
        output: Any = network(**named)
    return torch.as_tensor(getattr(output, "logits", getattr(output, "last_hidden_state", output)))
