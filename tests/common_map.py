"""Tasks whose labels one map makes that they have in common, and a small network for them."""

from __future__ import annotations

import peft
import torch

from pyro_lift import Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone


def adapter(width: int = 8, sureness: float = 1.0) -> RandomAdapter:
    torch.manual_seed(0)
    last = torch.nn.Linear(width, 3)
    last.weight.data *= sureness
    net = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), last)
    return adapt_backbone(net, peft.LoraConfig(r=3, target_modules=["0", "2"]), seed=0)


def tasks(number: int = 8, rows: int = 12, noise: float = 0.0) -> list[Task]:
    """Labels by one map that all tasks have in common, some of them replaced by others at random."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(6, 3, generator=generator)
    made = []
    for k in range(number):
        x = torch.randn(rows, 6, generator=generator)
        y = (x @ common).argmax(-1)
        other = torch.randint(0, 3, (rows,), generator=generator)
        y = torch.where(torch.rand(rows, generator=generator) < noise, other, y)
        made.append(Task(f"t{k}", (x, y), num_classes=3))
    return made
