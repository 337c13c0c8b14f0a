"""The shell of episodic methods: one method of four statements is trained by it, and the budget is spent as told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import adam
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import (
    EpisodicMethod,
    EpisodicState,
    InnerLoop,
    meta_train,
    query_gradient,
)
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.peak_memory import PeakMemory
from pyro_lift.inference.baselines.protocol import Baseline, Budget, adapt_all
from pyro_lift.inference.baselines.union_train import UnionTrain, warm_up
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task


@dataclass(frozen=True)
class Pull(EpisodicMethod):
    """A method of four statements: pulls the start towards a point, and notes the episodes it sees."""

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    tasks_per_step: int = 2
    minibatches_per_task: int = 3
    memory: PeakMemory | None = None
    seen: list[Episode] = field(default_factory=list)

    def gradient(self, omega: Tensor, episode: Episode, heads: Heads, generator: torch.Generator) -> Tensor:
        self.seen.append(episode)
        return omega - float(episode.number)

    def adapt(self, state: EpisodicState, task: Task, *, seed: int | None = None) -> Ensemble:
        return finetune(self.adapter, task, state.phi, self.budget, seed=seed)


def test_outer_steps_spend_the_minibatches_of_the_budget_on_tasks_in_turn() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    method, called = Pull(adapter, replace(SMALL, visits=25)), []
    state = method.meta_train(tasks, on_step=lambda: called.append(1))
    assert state.meta_steps == len(called) == 25 // (2 * 3)
    assert [episode.number for episode in method.seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    for episode in method.seen:
        rows = torch.cat([episode.support.inputs[""], episode.query.inputs[""]])
        assert len(torch.unique(rows, dim=0)) == len(tasks[episode.number].train)


def test_the_outer_loop_is_adam_on_the_mean_gradient_from_the_joint_weights() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(2)
    budget = replace(SMALL, visits=18, meta_learning_rate=0.1)
    found = Pull(adapter, budget).meta_train(tasks).phi
    rule, omega = adam(0.1), warm_up(adapter, tasks, budget)
    state = rule.init(omega)
    for _ in range(3):
        omega, state = rule.update(omega, omega - 0.5, state)
    torch.testing.assert_close(found, omega)


def test_the_gradient_can_be_replaced_knowing_the_joint_weights() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(2)
    method = Pull(adapter, SMALL)
    told: list[Tensor] = []

    def still(phi: Tensor):  # type: ignore[no-untyped-def]
        told.append(phi)
        return lambda omega, episode, heads, generator: torch.zeros_like(omega)

    state = meta_train(method, tasks, gradient=still)
    torch.testing.assert_close(told[0], warm_up(adapter, tasks, SMALL), rtol=0, atol=0)
    assert torch.equal(state.phi, told[0]) and not method.seen


def test_memory_is_checked_before_anything_is_trained() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(2)
    peak = PeakMemory(graphs=2.0, vectors=3.0, advice="Take a smaller one.")
    method = Pull(adapter, replace(SMALL, memory_limit=10), memory=peak)
    with pytest.raises(MemoryError, match=r"2 graphs of .* 3 vectors of \d+ weights.* Take a smaller one\."):
        method.meta_train(tasks)
    assert not method.seen
    assert replace(method, memory=None).needed_bytes(tasks) == 0
    free = replace(method, budget=SMALL)
    assert free.needed_bytes(tasks) - replace(free, memory=peak._replace(vectors=1.0)).needed_bytes(tasks) == (
        2 * adapter.dim * 8
    )


def test_no_task_and_a_task_of_one_row_are_refused() -> None:
    method = Pull(tiny_adapter(), SMALL)
    with pytest.raises(ValueError, match="tasks is empty"):
        method.meta_train([])
    with pytest.raises(ValueError, match="has one training row"):
        method.meta_train(tiny_tasks(1, rows=1))


def test_an_inner_loop_of_no_steps_stays_and_one_of_one_step_is_its_gradient() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    budget = replace(SMALL, batch_size=1000)
    episode, heads = Episode(0, task, task.train, task.train), Heads(adapter, [task], budget, 0.1)
    start = heads.weights(0, adapter.initial + 0.1)
    assert torch.equal(InnerLoop(adapter, budget, 0, 0.5).run(episode, start, torch.Generator()).theta, start.theta)
    moved = InnerLoop(adapter, budget, 1, 0.5).run(episode, start, torch.Generator()).theta
    leaf = start.leaves()
    g = query_gradient(adapter, budget, episode, leaf, leaf, torch.Generator())
    torch.testing.assert_close(moved, start.theta - 0.5 * g.theta)


def test_states_are_typed_and_methods_that_share_a_pass_are_asked_for_it() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    episodic: Baseline[EpisodicState] = MAML(adapter, SMALL)
    state = episodic.meta_train(tasks)
    one_by_one = adapt_all(episodic, state, tasks)
    for task, posterior in zip(tasks, one_by_one, strict=True):
        assert torch.equal(posterior.predict(task.train), episodic.adapt(state, task).predict(task.train))
    joint = UnionTrain(adapter, SMALL)
    calls: list[int] = []

    class Counting(UnionTrain):
        def adapt_many(self, state, tasks):  # type: ignore[no-untyped-def]
            calls.append(len(tasks))
            return super().adapt_many(state, tasks)

    together = adapt_all(Counting(adapter, SMALL), joint.meta_train(tasks), tasks, block_size=2)
    assert calls == [2, 1] and len(together) == 3
