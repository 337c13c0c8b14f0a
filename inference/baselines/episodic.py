r"""The shell that episodic methods share: Adam on meta-parameters, by gradients averaged over a few tasks.

.. math:: \omega \leftarrow \mathrm{Adam}\Bigl(\omega,\ \tfrac1B \sum_{i=1}^B \nabla_\omega\, \mathcal L_i(\omega)\Bigr)

A method states its meta-gradient, the minibatches that it draws in one task, its peak memory, and whether it needs a
second derivative (:class:`Episodic`); :func:`meta_train` does the rest. A method that needs a second derivative runs
inside :func:`twice_differentiable`: the fused attention kernels have no double backward, PyTorch's plain ("math")
kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_lift.inference.adaptation.gradients import Weights, differentiate
from pyro_lift.inference.adaptation.inner_loop import Hooks, WeightsRule, follow, iterates, minibatches
from pyro_lift.inference.adaptation.update_rules import adam, sgd
from pyro_lift.inference.baselines.episodes import Episode, Heads, check_tasks, episodes
from pyro_lift.inference.baselines.finetune import loss_of, noise_generator
from pyro_lift.inference.baselines.peak_memory import PeakMemory, check_memory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, episodes_space
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows, Task
from pyro_lift.watching.watch import tell

__all__ = [
    "Episodic",
    "EpisodicMethod",
    "EpisodicState",
    "Gradient",
    "InnerLoop",
    "meta_train",
    "query_gradient",
    "query_loss",
    "scattered",
    "twice_differentiable",
]

#: The gradient of one task's meta-loss at the meta-parameters; it also moves that task's head.
Gradient = Callable[[Tensor, Episode, Heads, torch.Generator], Tensor]


class EpisodicState(NamedTuple):
    """The start that was learned ``[D]`` (``[K, D]`` where there are several), and outer steps made."""

    phi: Tensor
    meta_steps: int


class Episodic(Protocol):
    """The statements of an episodic method that :func:`meta_train` turns into a training run."""

    @property
    def adapter(self) -> RandomAdapter:
        """The network as a function of theta."""
        ...

    @property
    def budget(self) -> Budget:
        """Settings that all methods share; ``visits`` counts minibatches drawn."""
        ...

    @property
    def tasks_per_step(self) -> int:
        """Tasks of an outer step."""
        ...

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step."""
        ...

    @property
    def memory(self) -> PeakMemory | None:
        """Peak memory, to be checked before the run; None where it is no more than that of joint training."""
        ...

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward."""
        ...

    def start(self, phi: Tensor) -> Tensor:
        """Return the meta-parameters to begin from, given the jointly trained weights ``[D]``."""
        ...

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Return the gradient of one task's meta-loss with respect to the meta-parameters."""
        ...


class EpisodicMethod:
    """Base of the episodic methods: everything that follows from what :class:`Episodic` asks a method to state."""

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward."""
        return False

    def start(self, phi: Tensor) -> Tensor:
        """Begin from the jointly trained weights themselves."""
        return phi

    @property
    def space(self: Episodic) -> SearchSpace:
        """What every method has that learns in episodes; the rate of the inner loop where there is one."""
        return episodes_space(self.budget, self.tasks_per_step, getattr(self, "inner_learning_rate", None))

    @at_top_level()
    def meta_train(
        self: Episodic, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None
    ) -> EpisodicState:
        """Train jointly, then take the method's outer steps; see :func:`meta_train`."""
        return meta_train(self, tasks, on_step=on_step)

    def needed_bytes(self: Episodic, tasks: Sequence[Task]) -> int:
        """Estimate the peak memory of meta-training in bytes; raise a MemoryError if it cannot fit."""
        return 0 if self.memory is None else check_memory(self.adapter, tasks, self.budget, self.memory)


def meta_train(
    method: Episodic,
    tasks: Sequence[Task],
    *,
    gradient: Callable[[Tensor], Gradient] | None = None,
    on_step: Callable[[], None] | None = None,
) -> EpisodicState:
    """Train jointly by the budget's warm-up, then take outer steps until the budget's minibatches are spent.

    Args:
        method: its meta-gradient, and what that costs.
        tasks: the tasks to learn from.
        gradient: from the jointly trained weights ``[D]`` to the gradient of a task, in place of ``method.gradient``.
        on_step: called after each outer step; :func:`pyro_lift.watching.watch` is told more of it.

    Raises:
        ValueError: no task, or a task of one row.
        MemoryError: the method cannot fit; with numbers, before the run.
    """
    budget = method.budget
    tasks = check_tasks(tasks, method.adapter.initial.device)
    if method.memory is not None:
        check_memory(method.adapter, tasks, budget, method.memory)
    with twice_differentiable(method.second_order):
        phi = warm_up(method.adapter, tasks, budget)
        omega = method.start(phi)
        gradient_of = method.gradient if gradient is None else gradient(phi)
        steps = max(budget.visits // (method.tasks_per_step * method.minibatches_per_task), 1)
        generator = torch.Generator().manual_seed(budget.seed)
        stream = episodes(tasks, generator)
        heads = Heads(method.adapter, tasks, budget, budget.meta_learning_rate)
        rule = adam(budget.meta_learning_rate)
        state = rule.init(omega)
        for _ in range(steps):
            batch = islice(stream, method.tasks_per_step)
            gradients = [gradient_of(omega, episode, heads, generator) for episode in batch]
            omega, state = rule.update(omega, torch.stack(gradients).mean(0), state)
            tell(on_step, phase="meta", step_size=budget.meta_learning_rate)
    return EpisodicState(omega, steps)


def twice_differentiable(enabled: bool = True) -> AbstractContextManager[None]:
    """Make a context in which attention has a double backward; one with the usual kernels if not ``enabled``.

    It rules over ``scaled_dot_product_attention``, which timm's models and those of transformers call by default. A
    model loaded with ``attn_implementation="flash_attention_2"`` is beyond it: load that with ``"eager"``.
    """
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if enabled else nullcontext()
    return context


def scattered(phi: Tensor, number: int, scale: float, seed: int) -> Tensor:
    """Scatter several starts ``[number, D]``: the first at phi, the others around it, for equal ones would stay equal.

    Args:
        phi: ``[D]``.
        number: of starts.
        scale: standard deviation around phi.
        seed: of the scatter.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, len(phi), generator=generator, dtype=phi.dtype).to(phi.device)
    noise[0] = 0.0
    return phi + scale * noise


@dataclass(frozen=True)
class InnerLoop:
    r"""Plain gradient steps on rows of an episode's task, :math:`w \leftarrow w - \alpha \nabla L_i(w)`.

    Attributes:
        adapter: the network as a function of theta.
        budget: rows of a minibatch and noise scale; its head policy says how much faster the head learns.
        steps: how many; 0 stays at the start.
        learning_rate: alpha.
        create_graph: whether the result is a differentiable function of the start.
        hooks: a prior, a kernel of particles, or a reparametrisation.
        effective_rows: N_eff, by which priors, kernels and KL terms are divided; None takes the rows stepped on.
    """

    adapter: RandomAdapter
    budget: Budget
    steps: int
    learning_rate: float
    create_graph: bool = False
    hooks: Hooks = field(default_factory=Hooks)
    effective_rows: float | None = None

    def run(self, episode: Episode, start: Weights, generator: torch.Generator, rows: Rows | None = None) -> Weights:
        """Return the weights after the steps, on the episode's support rows or on others."""
        start = start if self.create_graph else start.detached()
        if self.steps == 0:
            return start
        rows = episode.support if rows is None else rows
        effective_rows = float(len(rows)) if self.effective_rows is None else self.effective_rows
        noise = noise_generator(generator, start.theta)
        loss = loss_of(self.adapter, episode.task, self.budget)
        estimator = self.hooks.estimator(loss, start.theta.dim() == 2, effective_rows, noise, self.create_graph)
        rule = WeightsRule(
            sgd(self.learning_rate),
            effective_rows,
            self.hooks.prior,
            head=sgd(self.budget.heads.lr_scale * self.learning_rate),
            head_prior=self.budget.heads.prior,
        )
        batches = minibatches(rows, self.budget.batch_size, generator)
        return follow(iterates(estimator, rule, start, batches, episode.task.name), self.steps).last


def query_loss(
    adapter: RandomAdapter, budget: Budget, episode: Episode, adapted: Weights, generator: torch.Generator
) -> Tensor:
    """Compute the mean loss of one query minibatch at the adapted weights."""
    rows = minibatches(episode.query, budget.batch_size, generator)()
    return loss_of(adapter, episode.task, budget)(adapted, rows)


def query_gradient(
    adapter: RandomAdapter, budget: Budget, episode: Episode, adapted: Weights, at: Weights, generator: torch.Generator
) -> Weights:
    """Differentiate :func:`query_loss` with respect to weights that the adapted ones are a function of."""
    return differentiate(query_loss(adapter, budget, episode, adapted, generator), at)
