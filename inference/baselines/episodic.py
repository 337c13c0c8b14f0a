r"""The outer loop that episodic methods share: Adam on meta-parameters, by gradients averaged over a few tasks.

.. math:: \omega \leftarrow \mathrm{Adam}\Bigl(\omega,\ \tfrac1B \sum_{i=1}^B \nabla_\omega\, \mathcal L_i(\omega)\Bigr)

What L_i is, is the method. A method that needs a second derivative runs inside :func:`twice_differentiable`: the fused
attention kernels have no double backward, PyTorch's plain ("math") kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_lift.inference.adaptation.inner_loop import Loss, Weights, adapt, differentiate, mean_loss, minibatches
from pyro_lift.inference.adaptation.update_rules import adam, sgd
from pyro_lift.inference.baselines.episodes import Episode, Heads, check_tasks, episodes
from pyro_lift.inference.baselines.finetune import noise_generator
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows, Task

__all__ = [
    "EpisodicState",
    "Gradient",
    "inner_loop",
    "loss_of",
    "outer_loop",
    "query_gradient",
    "query_loss",
    "scattered",
    "twice_differentiable",
]

#: The gradient of one task's meta-loss at the meta-parameters; it also moves that task's own head.
Gradient = Callable[[Tensor, Episode, Heads, torch.Generator], Tensor]


class EpisodicState(NamedTuple):
    """The start that was learned ``[D]`` (``[K, D]`` where there are several), and outer steps made."""

    phi: Tensor
    meta_steps: int


def twice_differentiable(wanted: bool = True) -> AbstractContextManager[None]:
    """A context in which attention has a double backward; the usual kernels where that is not ``wanted``.

    It rules over ``scaled_dot_product_attention``, which timm's models and those of transformers call by default. A
    model loaded with ``attn_implementation="flash_attention_2"`` is beyond it: load that with ``"eager"``.
    """
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()
    return context


def outer_loop(
    gradient: Gradient,
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    budget: Budget,
    *,
    tasks_per_step: int,
    minibatches_per_task: int,
    start: Callable[[Tensor], Tensor] = lambda phi: phi,
    on_step: Callable[[], None] | None = None,
) -> EpisodicState:
    """Joint training by the budget's warm-up, then outer steps until its minibatches are spent.

    Args:
        gradient: of one task's meta-loss.
        adapter: the network as a function of theta.
        tasks: to learn from.
        budget: ``visits`` counts minibatches drawn.
        tasks_per_step: B.
        minibatches_per_task: drawn in one task of an outer step.
        start: from the warmed-up weights ``[D]`` to the meta-parameters.
        on_step: called after each outer step.
    """
    tasks = check_tasks(tasks, adapter.initial.device)
    omega = start(warm_up(adapter, tasks, budget))
    steps = max(budget.visits // (tasks_per_step * minibatches_per_task), 1)
    generator = torch.Generator().manual_seed(budget.seed)
    stream = episodes(tasks, generator)
    heads = Heads(adapter, tasks, budget, budget.meta_learning_rate)
    rule = adam(budget.meta_learning_rate)
    state = rule.init(omega)
    for _ in range(steps):
        found = [gradient(omega, episode, heads, generator) for episode in islice(stream, tasks_per_step)]
        omega, state = rule.move(omega, torch.stack(found).mean(0), None, state, 1.0, None)
        if on_step is not None:
            on_step()
    return EpisodicState(omega, steps)


def scattered(phi: Tensor, number: int, scale: float, seed: int) -> Tensor:
    """Several starts ``[number, D]``: the first at phi, the others around it; equal ones would stay equal for ever."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, len(phi), generator=generator, dtype=phi.dtype).to(phi.device)
    noise[0] = 0.0
    return phi + scale * noise


def loss_of(adapter: RandomAdapter, task: Task, budget: Budget) -> Loss:
    """Mean negative log likelihood of some rows of one task."""
    return lambda weights, rows: mean_loss(adapter, task, rows, weights, noise_scale=budget.noise_scale)


def inner_loop(
    adapter: RandomAdapter,
    budget: Budget,
    episode: Episode,
    start: Weights,
    generator: torch.Generator,
    *,
    steps: int,
    learning_rate: float,
    create_graph: bool,
    rows: Rows | None = None,
    **hooks: Any,
) -> Weights:
    """Gradient steps on an episode's support rows (or others); the head moves faster, by the budget's policy."""
    rows = episode.support if rows is None else rows
    path = adapt(
        loss_of(adapter, episode.task, budget),
        start,
        minibatches(rows, budget.batch_size, generator),
        sgd(learning_rate),
        steps=steps,
        n_eff=hooks.pop("n_eff", float(len(rows))),
        create_graph=create_graph,
        head_rule=sgd(budget.heads.rate * learning_rate),
        head_prior=budget.heads.prior,
        generator=noise_generator(generator, start.theta),
        name=episode.task.name,
        **hooks,
    )
    return path.last


def query_loss(
    adapter: RandomAdapter, budget: Budget, episode: Episode, adapted: Weights, generator: torch.Generator
) -> Tensor:
    """Mean loss of one query minibatch at the adapted weights."""
    rows = minibatches(episode.query, budget.batch_size, generator)()
    return loss_of(adapter, episode.task, budget)(adapted, rows)


def query_gradient(
    adapter: RandomAdapter, budget: Budget, episode: Episode, adapted: Weights, at: Weights, generator: torch.Generator
) -> Weights:
    """Gradient of that loss at weights that the adapted ones are a function of."""
    return differentiate(query_loss(adapter, budget, episode, adapted, generator), at)
