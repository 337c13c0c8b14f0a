r"""MAML-Mix and i-MAML-Mix: K starts, of which each task takes the one that suits it.

.. math:: r_k = \mathrm{softmax}_k\bigl(-L_i^{\mathrm{query}}(\theta_i(\phi_k)) / \tau\bigr), \qquad
          g_{i,k} = r_k\, \nabla_{\phi_k} L_i^{\mathrm{query}}(\theta_i(\phi_k))

the weights r held fixed. With tau = 0 a task trains its best start alone.

Cost: a task's minibatches are those of the base method; the inner loop and the query loss run K times without a graph,
the base's gradient once for each start that the task trains. Memory is the base's.

Our choices, where the LiFT paper gives none: tau = 0; in the first fifth of the outer steps a task takes a random start
one time in ten, against collapse; starts are scattered around the jointly trained weights (equal ones would stay
equal); a new task takes the start with the lowest loss on its own rows after the training-time inner loop, and adapts
that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import EpisodicState, Gradient, meta_train, scattered
from pyro_lift.inference.baselines.imaml import ImplicitMAML
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.peak_memory import PeakMemory
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, episodes_space
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["MAMLMix", "MAMLMixState", "mixture_weights"]

#: Share of the outer steps in which starts are explored.
EXPLORED = 0.2


class MAMLMixState(NamedTuple):
    """The starts ``[K, D]``, how often tasks took each, and outer steps made."""

    phi: Tensor
    taken: tuple[int, ...]
    meta_steps: int


@dataclass(frozen=True)
class MAMLMix:
    """MAML-Mix: several starts, of which each task takes the best; i-MAML-Mix with ``base=ImplicitMAML``.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws the base's minibatches.
        base: :class:`MAML` or :class:`ImplicitMAML`; ``functools.partial`` of it for other settings.
        components: K.
        temperature: tau; 0 is a hard choice.
        exploration: probability of a random start, at first.
        jitter: standard deviation of the starts around the jointly trained weights.
        options: of the base.

    References:
        LiFT, section 4, where both are baselines without further description.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    base: Callable[..., MAML | ImplicitMAML] = MAML
    components: int = 5
    temperature: float = 0.0
    exploration: float = 0.1
    jitter: float = 0.01
    inner_learning_rate: float = 0.05
    tasks_per_step: int = 4

    def __post_init__(self) -> None:
        check_number("components", self.components, least=1, open_below=False, whole=True)
        check_number("temperature", self.temperature, open_below=False)
        check_number("exploration", self.exploration, open_below=False)
        check_number("jitter", self.jitter, open_below=self.components > 1)

    @property
    def space(self) -> SearchSpace:
        """What every method has that learns in episodes."""
        return episodes_space(self.budget, self.tasks_per_step, self.inner_learning_rate)

    @property
    def method(self) -> MAML | ImplicitMAML:
        """Base method with this method's settings."""
        options: dict[str, Any] = {
            "inner_learning_rate": self.inner_learning_rate,
            "tasks_per_step": self.tasks_per_step,
        }
        return self.base(self.adapter, self.budget, **options)

    @property
    def minibatches_per_task(self) -> int:
        """Minibatches drawn in one task of an outer step: the base's."""
        return self.method.minibatches_per_task

    @property
    def second_order(self) -> bool:
        """Whether the whole run needs attention with a double backward: as the base."""
        return self.method.second_order

    @property
    def memory(self) -> PeakMemory:
        """Peak memory: the base's, for one start has a graph at a time."""
        return self.method.memory

    def start(self, phi: Tensor) -> Tensor:
        """Scatter the starts ``[K, D]`` around the jointly trained weights."""
        return scattered(phi, self.components, self.jitter, self.budget.seed)

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> MAMLMixState:
        """Train jointly, then take outer steps on all starts; early ones explore."""
        taken = [0] * self.components
        visits = self.budget.visits // self.minibatches_per_task
        chance = torch.Generator().manual_seed(self.budget.seed)

        def exploring(phi: Tensor) -> Gradient:
            del phi

            def gradient(omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
                early = sum(taken) < EXPLORED * visits
                explore = early and float(torch.rand((), generator=chance)) < self.exploration
                weights = self.weights(omega, episode, heads, generator)
                if explore:
                    choice = int(torch.randint(self.components, (), generator=chance))
                    weights = torch.nn.functional.one_hot(torch.tensor(choice), self.components).to(weights)
                taken[int(weights.argmax())] += 1
                return self.weighted_gradient(omega, weights, episode, heads, generator)

            return gradient

        state = meta_train(self, tasks, gradient=exploring, on_step=on_step)
        return MAMLMixState(state.phi, tuple(taken), state.meta_steps)

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the gradient of one task with respect to the starts ``[K, D]``, without exploration."""
        weights = self.weights(omega, episode, heads, generator)
        return self.weighted_gradient(omega, weights, episode, heads, generator)

    def weights(self, starts: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        """Compute the weights r ``[K]`` of the starts; every start sees the same minibatches."""
        seed = generator.get_state()
        losses = []
        for phi in starts:
            generator.set_state(seed)
            losses.append(self.method.query_loss(phi, episode, heads, generator))
        generator.set_state(seed)
        return mixture_weights(torch.stack(losses), self.temperature)

    def weighted_gradient(
        self, starts: Tensor, weights: Tensor, episode: Episode, heads: Heads, generator: torch.Generator
    ) -> Tensor:
        """Compute the base's gradient of each start that the task trains, times its weight ``[K, D]``."""
        g = torch.zeros_like(starts)
        seed = generator.get_state()
        for k in torch.nonzero(weights).flatten().tolist():
            generator.set_state(seed)
            g[k] = weights[k] * self.method.gradient(starts[k], episode, heads, generator)
        return g

    @at_top_level()
    def adapt(self, state: MAMLMixState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Adapt, as the base does, from the start that suits the task best."""
        best = self.choose(state.phi, task)
        return self.method.adapt(EpisodicState(state.phi[best], state.meta_steps), task, seed=seed)

    def choose(self, starts: Tensor, task: Task) -> int:
        """Choose the start with the lowest loss on the task's rows after the inner loop on them."""
        task = task.to(starts.device)
        heads = Heads(self.adapter, [task], self.budget, self.budget.learning_rate)
        episode = Episode(0, task, task.train, task.train)
        generator = torch.Generator().manual_seed(self.budget.seed)
        return int(self.weights(starts, episode, heads, generator).argmax())


def mixture_weights(losses: Tensor, temperature: float) -> Tensor:
    r"""Compute :math:`r_k = \mathrm{softmax}_k(-L_k / \tau)` of losses ``[K]``; one-hot at a temperature of zero.

    The responsibilities of the starts, as in the E-step of a mixture with equal weights.

    References:
        Reconciling meta-learning and continual learning with online mixtures of tasks, Jerfel et al., 2019,
        arXiv:1812.06080, whose mixture of MAML starts takes responsibilities of this form.
    """
    if temperature == 0.0:
        return torch.nn.functional.one_hot(losses.argmin(), len(losses)).to(losses)
    return torch.softmax(-losses / temperature, -1)
