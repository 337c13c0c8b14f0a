"""The problem of a comparison: tasks, how they are held out, rows they are judged by, and the network's start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.class_rates import class_counts
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.linear_probe import has_probe
from pyro_lift.inference.baselines.pooled_probe import why_not_pooled
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.common_classes import with_common_classes
from pyro_lift.models.task import Task, check_task_names, shares_classes
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.tuning.held_out import can_be_judged, dealt, told_unjudged

__all__ = [
    "Fold",
    "Problem",
    "chance_loss",
    "folds_of",
    "heads_of",
    "in_common_classes",
    "measure_of",
    "pooled_missing",
    "probe_missing",
    "told_of_one_class",
    "without_unjudged",
]

from pyro_lift.support.wording import some_names

log = logging.getLogger("pyro_lift")

#: Fraction of the tasks to learn from that choices are made on, where the tasks to be judged by are given.
CHOSEN_SHARE = 0.2


class Problem(NamedTuple):
    """What is compared on.

    Attributes:
        train: tasks to learn from; where ``test`` is empty, they are held out in turn.
        test: tasks to be judged by.
        dev: tasks that choices are made on.
        adapter: the network with its initial adapter, by seed.
        settings: LiFT's.
        adapt: LiFT's, of adaptation.
        name: for titles.
    """

    train: Sequence[Task]
    test: Sequence[Task]
    dev: Sequence[Task]
    adapter: Callable[[int], RandomAdapter]
    settings: LiFTSettings
    adapt: AdaptSettings
    name: str = "tasks"


class Fold(NamedTuple):
    """One turn: tasks to learn from, tasks that are judged, and tasks that choices alone are made on."""

    number: int
    train: list[Task]
    judged: list[Task]
    dev: list[Task]


def without_unjudged(problem: Problem) -> tuple[Problem, list[str]]:
    """Leave out tasks of one row that would be judged, or chosen on: there is no row left for it; return notes on them.

    Where tasks to be judged by are given, those of one row are still learned from.
    """
    in_turn, told = not problem.test, "left out"
    kept = {
        part: [task for task in getattr(problem, part) if can_be_judged(task) or (part == "train" and not in_turn)]
        for part in ("train", "test", "dev")
    }
    names = {task.name for part in kept.values() for task in part}
    left_out = [t.name for t in (*problem.train, *problem.dev, *problem.test) if t.name not in names]
    if not left_out:
        return problem, []
    if problem.test and not kept["test"]:
        raise ValueError(told_unjudged(left_out, "all that there is to be judged by"))
    log.warning("%s", told_unjudged(left_out, told))
    fit = problem._replace(train=kept["train"], test=kept["test"], dev=kept["dev"])
    return fit, [told_unjudged(left_out, told)]


def in_common_classes(problem: Problem) -> Problem:
    """Give tasks whose rows lack some of the classes by chance those of the others, for all methods alike."""
    tasks = iter(with_common_classes([*problem.train, *problem.test, *problem.dev]))
    train, test, dev = ([next(tasks) for _ in part] for part in (problem.train, problem.test, problem.dev))
    return problem._replace(train=train, test=test, dev=dev)


def folds_of(problem: Problem, count: int) -> list[Fold]:
    """Hold tasks out: the given test tasks once, or else every task in one of ``count`` parts, dealt in turn.

    Raises:
        ValueError: fewer than two tasks, tasks of several kinds, two tasks of one name.
    """
    tasks = [*problem.train, *problem.dev, *problem.test]
    check_task_names(tasks)
    kinds = sorted({measure_of(task) if task.kind != "tokens" else "tokens" for task in tasks})
    if len(kinds) > 1:
        kinds = sorted({task.kind for task in tasks})
        raise ValueError(
            f"tasks of several kinds ({', '.join(kinds)}): their losses cannot be averaged. Give one kind."
        )
    if problem.test:
        train, dev = list(problem.train), list(problem.dev)
        if not train:
            raise ValueError("no task to learn from beside those to be judged by.")
        fit = [task for task in train if can_be_judged(task)]
        if not dev and len(fit) >= 3:
            kept = max(round(CHOSEN_SHARE * len(fit)), 1)
            dev = [fit[(k * len(fit)) // kept] for k in range(kept)]
            train = _without(train, dev)
        return [Fold(0, train, list(problem.test), dev)]
    tasks = [*problem.train, *problem.dev]
    if len(tasks) < 2:
        raise ValueError(
            f"{len(tasks)} task: there is none to learn from beside the one that is held out. Give two or more."
        )
    parts = min(count, len(tasks))
    return [Fold(k, _without(tasks, out), out, []) for k, out in enumerate(dealt(tasks, parts))]


def _without(tasks: Sequence[Task], others: Sequence[Task]) -> list[Task]:
    names = {task.name for task in others}
    return [task for task in tasks if task.name not in names]


def measure_of(task: Task) -> str:
    """Name the loss that a task is judged by: ``nll`` in nats, or of a regression ``unexplained`` variance."""
    return "unexplained" if task.kind == "regression" else "nll"


def chance_loss(task: Task) -> float | None:
    """Return the loss of the answer that looks at no input: class frequencies of the training rows, or their mean.

    Each class counts one row more than it has, so that one without rows keeps a probability. Rows with options of their
    own are answered uniformly. None for tokens.
    """
    if task.kind == "tokens":
        return None
    if task.kind == "regression":
        return unexplained(task.train.target.cpu().double().mean(0).expand_as(_judged(task)), task)
    counts = class_counts(task)
    return _nll_of(_even(task) if counts is None else counts + 1.0, task)


def chance_losses(tasks: Sequence[Task], learned: Sequence[Task]) -> dict[str, float | None]:
    """Return the losses of the best answer that looks at no input, by task: one sort of answer for all of them.

    Class frequencies of the task's own rows (:func:`chance_loss`), which a few rows hardly tell; even ones; or, where
    tasks have as many classes, those of all tasks' rows. Of regressions the mean of the own rows or of all.

    Args:
        tasks: to be judged, with the rows that they are judged by.
        learned: whose training rows are known.
    """
    own = {task.name: chance_loss(task) for task in tasks}
    kinds = {(task.kind, task.num_classes, task.train.target.shape[1:]) for task in (*tasks, *learned)}
    if not tasks or None in own.values():
        return own
    ways = [own]
    if tasks[0].kind == "regression":
        if len(kinds) == 1:
            mean = torch.cat([task.train.target for task in learned]).double().mean(0).cpu()
            ways.append({task.name: unexplained(mean.expand_as(_judged(task)), task) for task in tasks})
    else:
        counts = [found for task in (*tasks, *learned) if (found := class_counts(task)) is not None]
        if len(counts) < len(tasks) + len(learned):  # options of the rows' own, answered evenly already
            return own
        ways.append({task.name: _nll_of(_even(task), task) for task in tasks})
        if len(kinds) == 1:
            common = torch.stack(counts[len(tasks) :]).sum(0) + 1.0
            ways.append({task.name: _nll_of(common, task) for task in tasks})
    return min(ways, key=lambda way: sum(value or 0.0 for value in way.values()))


def _judged(task: Task) -> Tensor:
    assert task.test is not None
    return task.test.target.cpu()


def _even(task: Task) -> Tensor:
    return torch.ones(task.num_classes or 1)


def _nll_of(counts: Tensor, task: Task) -> float:
    """Compute the mean NLL of the rows to be judged by under class frequencies."""
    return float(-(counts / counts.sum()).log()[_judged(task)].mean())


def told_of_one_class(tasks: Sequence[Task]) -> tuple[str | None, str | None]:
    """Say where labels are such that no method can be told from another: one class is repeated by any of them.

    Args:
        tasks: with the test rows that they are judged by. Rows with options of their own have no classes.

    Returns:
        Advice in the place of one that follows from the losses, where no task can tell; and else a note on the tasks
        that cannot. Both None where all can.
    """
    with_classes = [task for task in tasks if shares_classes(task)]
    if not with_classes or len(with_classes) < len(tasks):
        return None, None
    judged_by = {label for task in tasks if task.test is not None for label in task.test.target.unique().tolist()}
    one = [task.name for task in tasks if len(_labels(task)) == 1]
    if len(one) == len(tasks) or len(judged_by) == 1:
        whose = "each task that is judged has" if len(judged_by) > 1 else "the rows that tasks are judged by have"
        return (
            f"These tasks cannot tell which method is better: {whose} one class only, which any method that has seen "
            "it repeats, and one that has learned it from other tasks the most surely. Give tasks to be judged by "
            "whose test rows are of several classes.",
            None,
        )
    if not one:
        return None, None
    few = f"{len(one)} of {len(tasks)} judged tasks have one class only, and tell little of any method"
    return None, f"{few}: {some_names(one)}."


def _labels(task: Task) -> set[int]:
    parts = [task.train.target] if task.test is None else [task.train.target, task.test.target]
    return {int(label) for target in parts for label in target.unique().tolist()}


def unexplained(prediction: Tensor, task: Task) -> float:
    r"""Compute the squared error over the variance, :math:`1 - R^2`, around the mean of the training rows."""
    assert task.test is not None
    y, known = task.test.target.cpu().double(), task.train.target.cpu().double()
    spread = (y - known.mean(0)).square().mean()
    return float((prediction.cpu().double().reshape(y.shape) - y).square().mean() / spread.clamp_min(1e-12))


def heads_of(problem: Problem) -> HeadPolicy:
    """Give all methods the heads that the settings give LiFT; what these leave open, the network decides."""
    s = problem.settings
    update: Literal["step", "solve", "shared"] = "solve"
    if s.head in ("langevin", "shared"):
        update = "step" if s.head == "langevin" else "shared"
    return HeadPolicy(scale=s.head_scale, lr_scale=s.head_lr_scale, update=update)


def probe_missing(problem: Problem) -> str | None:
    """Say why there is no linear probe of these tasks; None where there is."""
    without = [task.name for task in (*problem.train, *problem.dev, *problem.test) if not has_probe(task)]
    if not without:
        return None
    return f"no linear probe: task {without[0]!r} has no classes that all its rows share, and no numbers to predict"


def pooled_missing(problem: Problem) -> str | None:
    """Say why there is no probe of all these tasks' rows; None where there is."""
    reason = why_not_pooled([*problem.train, *problem.dev, *problem.test])
    return None if reason is None else f"no pooled probe: {reason}"
