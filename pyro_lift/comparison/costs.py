"""Measuring what a gradient, a step and an adaptation cost, before the sizes of a comparison are chosen."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from pyro_lift.comparison.cells import method_of, predict_rows
from pyro_lift.comparison.plan import Costs, Plan
from pyro_lift.comparison.problem import Fold, Problem
from pyro_lift.comparison.settings import REFERENCE, CompareSettings, entrant
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.task import Task
from pyro_lift.tuning.held_out import judged

__all__ = ["load_all", "measured"]

#: Gradients that are timed.
MEASURED = 10


def load_all() -> None:
    """Run the methods on a network of a few weights, so that no measurement pays for what Python imports only once."""
    import peft

    generator = torch.Generator().manual_seed(0)
    tasks = [
        Task(f"task-{k}", (torch.randn(8, 3, generator=generator), torch.arange(8) % 2), num_classes=2)
        for k in range(2)
    ]
    with torch.random.fork_rng(devices=[]):
        network = torch.nn.Sequential(torch.nn.Linear(3, 2))
    adapter = adapt_backbone(network, peft.LoraConfig(r=1, target_modules=["0"]), seed=0)
    budget = Budget(warm_up=2, visits=8, steps=4, draws=2)
    log = logging.getLogger("pyro_lift")
    silent, log.disabled = log.disabled, True  # what is said of this network is of no interest
    try:
        for name in ("linear-probe", "pooled-probe", "no-meta-train", REFERENCE):
            method = BASELINES[name](adapter, budget)
            method.adapt(method.meta_train(tasks), tasks[0], seed=0)
    finally:
        log.disabled = silent


def measured(
    problem: Problem, folds: Sequence[Fold], settings: CompareSettings, methods: Sequence[str], seconds: float
) -> Costs:
    """Run some methods for a moment, on the tasks of the first fold, and time them.

    Everything is run twice, and timed the second time: what is computed once for every row (the layers below the
    adapter) is there by then, as it is for most of a comparison.

    Gradients by Union Train and LiFT (another meta-learner's is taken for Union Train's), adaptation and predictions of
    a typical task by LiFT and the methods without meta-learning. A step of adaptation is taken for a gradient.

    Args:
        problem: tasks and network.
        folds: how the tasks are held out.
        settings: draws, minibatches and rows to be judged by.
        methods: that are compared.
        seconds: after which nothing more is measured: what is known by then stands for the rest.
    """
    end = time.monotonic() + seconds
    adapter, turn = problem.adapter(0), folds[0]
    task = judged(_typical(turn.judged), settings.test_rows)
    sizes = Plan(MEASURED, 2 * settings.draws, tuple(settings.rates[:1]), 1, 1, 0.0)
    joint = _method("union-train", adapter, problem, settings, sizes)
    gradient, setup, state = _meta_train(joint, turn.train)
    gradients = {"union-train": gradient}
    setups = [setup]
    adaptations, probe = [], 0.0
    for name in sorted(methods, key=lambda name: name != REFERENCE):
        if time.monotonic() > end:
            break
        rank, method = entrant(name).rank, _method(name, adapter, problem, settings, sizes)
        if not entrant(name).steps:
            probe += _adapt_and_predict(method, method.meta_train(turn.train if rank else [task]), task)
        elif name == REFERENCE:
            gradients[name], setup, state = _meta_train(method, turn.train)
            setups.append(setup)
            adaptations.append(_adapt_and_predict(method, state, task))
        elif rank == 1:
            adaptations.append(_adapt_and_predict(method, method.meta_train([task]), task))
    if not adaptations:
        adaptations.append(_adapt_and_predict(joint, state, task))
    each = [gradients.get(name, gradient) for name in methods if entrant(name).meta and entrant(name).steps]
    mean = statistics.fmean(each) if each else gradient
    begun = max(statistics.fmean(adaptations) - sizes.steps * gradient, 0.1 * gradient)
    return Costs(mean, statistics.fmean(setups), gradient, begun, probe)


def _method(
    name: str, adapter: RandomAdapter, problem: Problem, settings: CompareSettings, sizes: Plan
) -> Baseline[Any]:
    return method_of(name, adapter, problem, settings, sizes, seed=0)


def _typical(tasks: Sequence[Task]) -> Task:
    """Pick the task with the middle number of rows."""
    return sorted(tasks, key=lambda task: len(task.train))[len(tasks) // 2]


def _meta_train(method: Baseline[Any], tasks: Sequence[Task]) -> tuple[float, float, Any]:
    """Return seconds a gradient, seconds before the first, and the state."""
    count = method.budget.warm_up + method.budget.visits
    times: list[float] = []
    method.meta_train(tasks)
    start = _now()
    state = method.meta_train(tasks, on_step=lambda: times.append(_now()))
    end = _now()
    if len(times) < 3:
        return (end - start) / count, 0.0, state
    between = [later - earlier for earlier, later in pairwise(times)]
    # Methods tell of outer steps of several gradients; each of these then stands for its share of all.
    each = statistics.fmean(between) * len(times) / count
    return each, max(end - start - count * each, 0.0), state


def _adapt_and_predict(method: Baseline[Any], state: Any, task: Task) -> float:
    """Return seconds of an adaptation and its predictions."""
    assert task.test is not None
    predict_rows(method.adapt(state, task, seed=0), task.test)
    start = _now()
    predict_rows(method.adapt(state, task, seed=0), task.test)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
