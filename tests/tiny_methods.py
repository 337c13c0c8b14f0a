"""A tiny family of tasks and a tiny adapter, for all methods."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_lift.inference.baselines.episodes import Episode, episodes
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.task import Task


def tiny_adapter(width: int = 3) -> RandomAdapter:
    import peft

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, width)).double()
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return adapter.to(torch.float64)


def tiny_tasks(number: int, rows: int = 12, classes: int = 3) -> list[Task]:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(4, classes, generator=generator, dtype=torch.float64)
    tasks = []
    for i in range(number):
        x = torch.randn(rows + 20, 4, generator=generator, dtype=torch.float64)
        own = shared + 0.3 * torch.randn(4, classes, generator=generator, dtype=torch.float64)
        y = (x @ own).argmax(-1)
        tasks.append(Task(f"t{i}", (x[:rows], y[:rows]), num_classes=classes, test=(x[rows:], y[rows:])))
    return tasks


SMALL = Budget(warm_up=4, visits=12, steps=8, draws=2, batch_size=6)


FULL = replace(SMALL, batch_size=1000)  # every minibatch is all rows: the loops have no randomness left


def spread(adapter: RandomAdapter) -> Tensor:
    """Weights with no factor at zero, where all gradients live."""
    generator = torch.Generator().manual_seed(3)
    return adapter.initial + 0.3 * torch.randn(adapter.dim, generator=generator, dtype=torch.float64)


def one_episode(task: Task) -> Episode:
    return next(episodes([task], torch.Generator().manual_seed(0)))
