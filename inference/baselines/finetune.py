"""Fine-tuning of one task from a given start: the adaptation step that every point-estimate baseline shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.early_stopping import DrawWindows, Verdict
from pyro_lift.inference.adaptation.gradients import Loss, Weights, per_task
from pyro_lift.inference.adaptation.inner_loop import (
    Hooks,
    Trajectory,
    WeightsRule,
    follow,
    iterates,
    mean_loss,
    minibatches,
)
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.unmoved import Unmoved
from pyro_lift.inference.adaptation.update_rules import UpdateRule, adam
from pyro_lift.inference.baselines.protocol import Budget, with_heads
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.block_likelihood import Block, block_log_likelihood, stack_rows
from pyro_lift.models.hierarchical import can_share_pass
from pyro_lift.models.observation import check_width
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Rows, Task

__all__ = ["finetune", "finetune_each", "loss_of", "noise_generator"]

PLAIN = Hooks()


def finetune(
    adapter: RandomAdapter,
    task: Task,
    start: Tensor,
    budget: Budget,
    hooks: Hooks = PLAIN,
    *,
    rule: UpdateRule | None = None,
    n_inflate: float = 1.0,
    seed: int | None = None,
) -> Ensemble:
    """Fine-tune from ``start``; keep the budget's draws, evenly spaced over the last half of its steps.

    The task's own head, where the budget's policy gives it one, starts at zero; or it is solved, and then the start
    itself is among the draws (:class:`~pyro_lift.inference.adaptation.unmoved.Unmoved`).

    Args:
        adapter: the network as a function of theta.
        task: the task to adapt to.
        start: ``[D]``; with a kernel particles ``[M, D]``; with a reparametrisation its parameters.
        budget: steps, learning rate, minibatches, draws, heads and noise scale; with ``stopping`` the draws of the
            window that the task's development rows judge best are kept (not of particles or parameters).
        hooks: a prior over theta (its gradient counts once per data set, as in MAP estimation), a kernel of particles,
            or a reparametrisation.
        rule: how theta moves; None takes Adam at the budget's rate.
        n_inflate: power on the likelihood, over the prior and the rule's noise.
        seed: of the minibatches and of the noise; None takes the budget's.

    Returns:
        The late iterates; those of particles one after the other.

    Raises:
        ValueError: labels outside the head's range.
        DivergedError: a loss that is not finite.
    """
    data = task.to(start.device)
    budget = with_heads(budget, adapter, [data])
    width = check_width(adapter, [data], budget.heads.scale)
    generator = torch.Generator().manual_seed(budget.seed if seed is None else seed)
    noise = noise_generator(generator, start)
    particles = start.dim() == 2
    # Under a reparametrisation the weights are parameters, at which no head can be solved.
    plain = hooks.reparametrisation is None and not particles
    unmoved = Unmoved(
        [data],
        budget.heads.solved(adapter, [data], start, budget.noise_scale) if plain else None,
        looks=budget.stopping is not None,
    )
    (data,), solved = unmoved.tasks, unmoved.solved
    effective_rows = n_inflate * len(data.train)
    head = budget.heads.fresh(data, width, start) if solved is None else None
    if head is not None and particles:
        head = head.expand(len(start), *head.shape).clone()
    steps = iterates(
        hooks.estimator(loss_of(adapter, data, budget, solved), particles, effective_rows, noise),
        WeightsRule(
            rule or adam(budget.learning_rate),
            effective_rows,
            hooks.prior,
            head=adam(budget.heads.lr_scale * budget.learning_rate),
            head_prior=budget.heads.prior,
            generator=noise,
        ),
        Weights(start, head),
        minibatches(data.train, rows_of_pass(data, budget, solved), generator),
        task.name,
    )
    windows = _windows(adapter, data, budget, solved) if plain else None
    trajectory = follow(steps, budget.steps, keep=budget.draws, windows=windows)
    thetas, heads = _stacked(trajectory)
    if unmoved.heads is not None:
        thetas = unmoved.put_back(0, start, thetas)
        heads = unmoved.heads.solve_each(0, thetas)
    if particles:  # one ensemble of all of them
        thetas, heads = thetas.flatten(0, 1), None if heads is None else heads.flatten(0, 1)
    return Ensemble(adapter, task, thetas, heads, tuple(trajectory.losses))


def finetune_each(adapter: RandomAdapter, tasks: Sequence[Task], start: Tensor, budget: Budget) -> list[Ensemble]:
    """Fine-tune several tasks from one start ``[D]``, their rows in one pass where they can share it.

    The minibatches and the updates are those of :func:`finetune` of each task alone, with the budget's seed.

    Raises:
        ValueError: labels outside the head's range.
        DivergedError: a loss that is not finite.
    """
    budget = with_heads(budget, adapter, [task.to(start.device) for task in tasks])
    apart = budget.stopping is not None and any(task.dev is not None for task in tasks)
    if apart or not can_share_pass(tasks, budget.heads.scale, budget.heads.update != "step"):
        return [finetune(adapter, task, start, budget) for task in tasks]
    return _finetune_block(adapter, tasks, start, budget)


def _finetune_block(adapter: RandomAdapter, tasks: Sequence[Task], start: Tensor, budget: Budget) -> list[Ensemble]:
    data = [task.to(start.device) for task in tasks]
    width = check_width(adapter, data, budget.heads.scale)
    unmoved = Unmoved(
        data, budget.heads.solved(adapter, data, start, budget.noise_scale), looks=budget.stopping is not None
    )
    data, solved = unmoved.tasks, unmoved.solved
    kind, sizes = data[0].kind, [len(task.train) for task in data]
    effective_rows = torch.tensor(sizes, device=start.device, dtype=start.dtype)
    samplers = [
        minibatches(task.train, rows_of_pass(task, budget, solved), torch.Generator().manual_seed(budget.seed))
        for task in data
    ]
    head = budget.heads.fresh(data[0], width, start) if solved is None else None

    def losses(weights: Weights, block: Block) -> Tensor:
        if solved is not None:
            return -solved.block_log_likelihood(range(len(data)), block, weights.theta) / effective_rows
        total = block_log_likelihood(adapter, kind, block, weights.theta, weights.head, budget.noise_scale)
        return -total / effective_rows

    steps = iterates(
        per_task(losses),
        WeightsRule(
            adam(budget.learning_rate),
            effective_rows,
            head=adam(budget.heads.lr_scale * budget.learning_rate),
            head_prior=budget.heads.prior,
        ),
        Weights(start.expand(len(tasks), -1), None if head is None else head.expand(len(tasks), *head.shape)),
        lambda: stack_rows([sampler() for sampler in samplers], sizes, kind),
        f"{tasks[0].name} .. {tasks[-1].name}",
    )
    trajectory = follow(steps, budget.steps, keep=budget.draws)
    thetas, heads = _stacked(trajectory)
    losses_of_steps = tuple(trajectory.losses)
    ensembles = []
    for k, task in enumerate(tasks):
        theta, own_head = thetas[:, k].contiguous(), None if heads is None else heads[:, k].contiguous()
        if unmoved.heads is not None:
            theta = unmoved.put_back(k, start, theta)
            own_head = unmoved.heads.solve_each(k, theta)
        ensembles.append(Ensemble(adapter, task, theta, own_head, losses_of_steps))
    return ensembles


def _windows(adapter: RandomAdapter, task: Task, budget: Budget, solved: SolvedHeads | None) -> DrawWindows | None:
    """Cut a fine-tuning into windows that the task's development rows judge; None where they are not looked at."""
    stopping = budget.stopping
    if stopping is None or task.dev is None:
        return None

    def judge(window: dict[str, Tensor]) -> Verdict:
        thetas = window["theta"]
        heads = window.get("head") if solved is None else solved.solve_each(0, thetas)
        return stopping.judge(adapter, task, thetas, heads)

    return DrawWindows(budget.steps, budget.draws, stopping.every, stopping.patience, judge)


def _stacked(trajectory: Trajectory) -> tuple[Tensor, Tensor | None]:
    """Stack the weights that were kept, ``[S, ...]``."""
    heads = [weights.head for weights in trajectory.kept if weights.head is not None]
    return torch.stack([weights.theta for weights in trajectory.kept]), torch.stack(heads) if heads else None


def rows_of_pass(task: Task, budget: Budget, solved: SolvedHeads | None) -> int:
    """Return the rows of a minibatch: a head that is solved needs some of each class."""
    return budget.batch_size if solved is None else solved.rows(task, budget.batch_size)


def loss_of(adapter: RandomAdapter, task: Task, budget: Budget, solved: SolvedHeads | None = None) -> Loss[Rows]:
    """Make the loss of one task: the mean negative log likelihood of some of its rows, of solved heads held out."""
    if solved is not None:
        return lambda weights, rows: -solved.log_prob_at(0, rows, weights.theta).mean()
    return lambda weights, rows: mean_loss(adapter, task, rows, weights, noise_scale=budget.noise_scale)


def noise_generator(generator: torch.Generator, like: Tensor) -> torch.Generator:
    """Return the generator itself where the weights are on the CPU, else one of the same seed on their device."""
    if like.device.type == "cpu":
        return generator
    return torch.Generator(device=like.device).manual_seed(generator.initial_seed())
