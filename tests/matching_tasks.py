"""Tasks under label matching whose texts say nothing of their labels, and an encoder for them."""

from __future__ import annotations

import torch
from tiny_backbones import V, bert

from pyro_lift import Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe

CLASSES = 3


def adapter() -> RandomAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bert().eval()
        return adapt_backbone(network, recipe(network, rank=1), seed=0)


def tasks(number: int, rows: int, seed: int, rates: list[float] | None = None) -> list[Task]:
    """Texts that say nothing of their labels, which all have the same frequency, or others in each task's order."""
    generator, found = torch.Generator().manual_seed(seed), []
    names = torch.randint(5, V, (CLASSES, 4), generator=torch.Generator().manual_seed(0))
    for k in range(number):
        n = rows + 60
        ids = torch.randint(5, V, (n, 6), generator=generator)
        p = torch.ones(CLASSES) if rates is None else torch.tensor(rates)[torch.randperm(CLASSES, generator=generator)]
        y = torch.multinomial(p, n, replacement=True, generator=generator)
        texts = {"input_ids": names, "attention_mask": torch.ones_like(names)}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        parts = [({name: x[part] for name, x in inputs.items()}, y[part]) for part in (slice(rows), slice(rows, None))]
        found.append(Task(f"t{seed}-{k}", parts[0], "matching", test=parts[1], label_texts=texts))
    return found
