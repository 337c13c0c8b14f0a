"""Plain fine-tuning of one task from a given start: the adaptation step of every point-estimate baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.data.task import Task
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import batch_of, outputs
from pyro_lift.options import check_number

__all__ = ["Iterates", "finetune", "minibatch_loss", "no_meta_train"]


class Iterates(NamedTuple):
    """Late iterates ``[S, D]``, for predictions that average over them as LiFT averages over draws."""

    thetas: Tensor
    losses: list[float]


def minibatch_loss(
    adapter: RandomAdapter, task: Task, theta: Tensor, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Mean negative log likelihood of a random minibatch."""
    size = len(task.train)
    rows = torch.randperm(size, generator=generator)[: batch_of(task, batch_size)]
    batch = task.train.take(rows)
    return -log_likelihood(task.kind, outputs(adapter, batch, theta, None), batch.target).mean()


def finetune(
    adapter: RandomAdapter,
    task: Task,
    start: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    batch_size: int = 16,
    draws: int = 10,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Iterates:
    """AdamW from ``start``; keeps ``draws`` iterates, evenly spaced over the last half of the steps.

    Args:
        adapter: the network as a function of theta.
        task: with a head shared by all tasks.
        start: ``[D]``.
        steps: gradient steps.
        learning_rate: of AdamW.
        weight_decay: of AdamW, towards ``start`` (a decay towards zero would undo the adapter's own start).
        batch_size: rows of a minibatch.
        draws: iterates kept.
        seed: of the minibatches.
        on_step: called after each step, for a progress bar.

    Raises:
        DivergedError: a loss that is not finite.
    """
    check_number("learning_rate", learning_rate)
    check_number("weight_decay", weight_decay, open_below=False)
    if steps < 2 * draws:
        raise ValueError(f"steps={steps}: {draws} iterates from the last half need at least {2 * draws} steps.")
    generator = torch.Generator().manual_seed(seed)
    # AdamW decays its parameter towards zero: let the parameter be the distance from the start.
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=learning_rate, weight_decay=weight_decay)
    thinning = max(steps // 2 // draws, 1)
    kept, losses = [], []
    for step in range(steps):
        loss = minibatch_loss(adapter, task, start + delta, batch_size, generator)
        if not torch.isfinite(loss):
            raise DivergedError(f"step {step}, task {task.name!r}: the loss is {float(loss)}.", step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        left = steps - 1 - step
        if left % thinning == 0 and left // thinning < draws:
            kept.append((start + delta).detach().clone())
        if on_step is not None:
            on_step()
    return Iterates(torch.stack(kept), losses)


def no_meta_train(adapter: RandomAdapter) -> Tensor:
    """The start of No Meta Train: the adapter's own initial weights."""
    return adapter.initial.clone()
