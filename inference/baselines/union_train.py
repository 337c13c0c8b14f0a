"""Union Train: one adapter trained on all meta-training tasks together, the start for every new task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_lift.data.task import Task
from pyro_lift.inference.baselines.finetune import minibatch_loss
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.options import check_number

__all__ = ["union_train"]


def union_train(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    *,
    steps: int = 600,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Adam on one vector; each step takes a minibatch of one task, tasks in turn (uniform over tasks, not rows).

    Returns:
        The trained adapter weights ``[D]``.

    Raises:
        DivergedError: a loss that is not finite; names the task.
    """
    check_number("learning_rate", learning_rate)
    check_number("steps", steps, least=1, open_below=False, whole=True)
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to train on.")
    generator = torch.Generator().manual_seed(seed)
    theta = adapter.initial.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=learning_rate)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        loss = minibatch_loss(adapter, task, theta, batch_size, generator)
        if not torch.isfinite(loss):
            raise DivergedError(f"step {step}, task {task.name!r}: the loss is {float(loss)}.", step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step()
    return theta.detach()
