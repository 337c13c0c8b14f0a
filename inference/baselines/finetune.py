"""Fine-tuning of one task from a given start: the adaptation step that every point-estimate baseline shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.inference.adaptation.inner_loop import (
    HeadPolicy,
    Kernel,
    Reparametrisation,
    Weights,
    adapt,
    mean_loss,
    minibatches,
)
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import Rule, adam
from pyro_lift.inference.baselines.protocol import Budget, Posterior
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.hierarchical import agree
from pyro_lift.models.observation import check_width
from pyro_lift.models.stacked import block_log_likelihood, stack_rows
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["Iterates", "finetune", "finetune_block", "finetuned", "finetuned_block"]


class Iterates(NamedTuple):
    """Late iterates ``[S, D]``, for predictions that average over them as LiFT averages over draws.

    Attributes:
        thetas: ``[S, D]``; of particles ``[S, M, D]``.
        losses: of the minibatches, in order.
        heads: ``[S, C, width + 1]``, or ``[S, M, C, width + 1]``, where the task has a head of its own.
    """

    thetas: Tensor
    losses: list[float]
    heads: Tensor | None = None


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
    prior: Distribution | None = None,
    n_inflate: float = 1.0,
    rule: Rule | None = None,
    kernel: Kernel | None = None,
    reparametrisation: Reparametrisation | None = None,
    heads: HeadPolicy | None = None,
    noise_scale: float = 1.0,
    on_step: Callable[[], None] | None = None,
) -> Iterates:
    """AdamW from ``start``; keeps ``draws`` iterates, evenly spaced over the last half of the steps.

    Args:
        adapter: the network as a function of theta.
        task: what to adapt to.
        start: ``[D]``; with a kernel particles ``[M, D]``; with a reparametrisation its parameters.
        steps: gradient steps.
        learning_rate: of AdamW.
        weight_decay: of AdamW, towards ``start`` (a decay towards zero would undo the adapter's own start).
        batch_size: rows of a minibatch.
        draws: iterates kept.
        seed: of the minibatches and of the rule's noise.
        prior: over theta; its gradient counts once per data set, as in MAP estimation.
        n_inflate: power on the likelihood, over the prior and the rule's noise.
        rule: how theta moves, in place of AdamW.
        kernel: of particles.
        reparametrisation: from what is optimised to the weights.
        heads: whether the task has a head of its own; it starts at zero.
        noise_scale: standard deviation of the noise in regression.
        on_step: called after each step, for a progress bar.

    Raises:
        ValueError: labels outside the head's range; too few steps for the draws.
        DivergedError: a loss that is not finite.
    """
    check_number("learning_rate", learning_rate)
    heads = heads or HeadPolicy()
    task = task.to(start.device)
    width = check_width(adapter, [task], heads.scale)
    generator = torch.Generator().manual_seed(seed)
    path = adapt(
        lambda weights, rows: mean_loss(adapter, task, rows, weights, noise_scale=noise_scale),
        Weights(start, _for_each(heads.fresh(task, width, start), start)),
        minibatches(task.train, batch_size, generator),
        rule or adam(learning_rate, weight_decay=weight_decay, towards=start),
        steps=steps,
        n_eff=n_inflate * len(task.train),
        keep=draws,
        prior=prior,
        kernel=kernel,
        reparametrisation=reparametrisation,
        head_rule=adam(heads.rate * learning_rate),
        head_prior=heads.prior,
        generator=noise_generator(generator, start),
        on_step=on_step,
        name=task.name,
    )
    kept_heads = [w.head for w in path.kept if w.head is not None]
    return Iterates(
        torch.stack([w.theta for w in path.kept]), path.losses, torch.stack(kept_heads) if kept_heads else None
    )


def finetune_block(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    start: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 2e-3,
    batch_size: int = 16,
    draws: int = 10,
    seed: int = 0,
    heads: HeadPolicy | None = None,
    noise_scale: float = 1.0,
    on_step: Callable[[], None] | None = None,
) -> list[Iterates]:
    """:func:`finetune` of several tasks from one start, their rows in one pass: the same minibatches, the same moves.

    Args:
        adapter: the network as a function of theta.
        tasks: of one kind and, with heads of their own, one number of classes.
        start: ``[D]``, of each task alike.
        steps: gradient steps.
        learning_rate: of Adam.
        batch_size: rows of a minibatch of each task.
        draws: iterates kept.
        seed: of each task's minibatches.
        heads: whether tasks have heads of their own.
        noise_scale: standard deviation of the noise in regression.
        on_step: called after each step, which moves every task.

    Raises:
        ValueError: labels outside the head's range; tasks that cannot share a pass.
        DivergedError: a loss that is not finite.
    """
    check_number("learning_rate", learning_rate)
    heads = heads or HeadPolicy()
    tasks = [task.to(start.device) for task in tasks]
    width = check_width(adapter, tasks, heads.scale)
    kind, sizes = tasks[0].kind, [len(task.train) for task in tasks]
    draw = [minibatches(task.train, batch_size, torch.Generator().manual_seed(seed)) for task in tasks]
    rows = torch.tensor(sizes, device=start.device, dtype=start.dtype)
    fresh = heads.fresh(tasks[0], width, start)
    path = adapt(
        lambda weights, block: (
            -block_log_likelihood(adapter, kind, block, weights.theta, weights.head, noise_scale) / rows
        ),
        Weights(start.expand(len(tasks), -1), None if fresh is None else fresh.expand(len(tasks), *fresh.shape)),
        lambda: stack_rows([one() for one in draw], sizes, kind),
        adam(learning_rate),
        steps=steps,
        n_eff=rows,
        keep=draws,
        block=True,
        head_rule=adam(heads.rate * learning_rate),
        head_prior=heads.prior,
        on_step=on_step,
        name=f"{tasks[0].name} .. {tasks[-1].name}",
    )
    return [
        Iterates(
            torch.stack([w.theta[k] for w in path.kept]),
            path.losses,
            None if fresh is None else torch.stack([w.head[k] for w in path.kept if w.head is not None]),
        )
        for k in range(len(tasks))
    ]


def _for_each(head: Tensor | None, start: Tensor) -> Tensor | None:
    """A head for each particle."""
    return head if head is None or start.dim() == 1 else head.expand(len(start), *head.shape).clone()


def noise_generator(generator: torch.Generator, like: Tensor) -> torch.Generator:
    """The generator itself where the weights are on the CPU, else one of the same seed on their device."""
    if like.device.type == "cpu":
        return generator
    return torch.Generator(device=like.device).manual_seed(generator.initial_seed())


def finetuned(
    adapter: RandomAdapter, task: Task, start: Tensor, budget: Budget, seed: int | None = None, **options: Any
) -> Ensemble:
    """The adaptation that all point-estimate methods share, with the budget's settings."""
    settings = {**_adaptation(budget), "seed": budget.seed if seed is None else seed}
    found = finetune(adapter, task, start, **{**settings, **options})
    thetas, heads = found.thetas, found.heads
    if start.dim() == 2:  # particles: one ensemble of all of them
        thetas, heads = thetas.flatten(0, 1), None if heads is None else heads.flatten(0, 1)
    return Ensemble(adapter, task, thetas, heads, tuple(found.losses))


def finetuned_block(adapter: RandomAdapter, tasks: Sequence[Task], start: Tensor, budget: Budget) -> list[Posterior]:
    """:func:`finetuned` of several tasks in one pass, from the budget's seed; one by one where they cannot share it."""
    if not agree(tasks, budget.heads.scale):
        return [finetuned(adapter, task, start, budget) for task in tasks]
    found = finetune_block(adapter, tasks, start, **_adaptation(budget))
    return [
        Ensemble(adapter, task, one.thetas, one.heads, tuple(one.losses))
        for task, one in zip(tasks, found, strict=True)
    ]


def _adaptation(budget: Budget) -> dict[str, Any]:
    """What fine-tuning takes from the budget."""
    names = ("steps", "learning_rate", "batch_size", "draws", "heads", "noise_scale", "seed")
    return {name: getattr(budget, name) for name in names}
