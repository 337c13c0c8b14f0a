"""Chains of named tasks that failed: errors with the tasks' names and advice that can be followed; others are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pyro_lift.inference.sgld import STOPPED, DivergedError
from pyro_lift.inference.stability import DEFAULT_SHARE, UnstableStepError

__all__ = ["LostTasksError", "all_kept", "named_adaptation", "named_chain", "those_kept"]

from pyro_lift.support.wording import some_names

log = logging.getLogger("pyro_lift")

P = TypeVar("P")
T = TypeVar("T")

#: Added to a task's place for the number of its block where it is adapted to once more, by itself.
AGAIN = 2_000_000


class LostTasksError(DivergedError):
    """Some of several tasks could not be adapted to; what was finished of all the others is kept in it.

    Attributes:
        tasks: names of those that were lost.
        posteriors: one for each task that was given, in their order; None for one that was lost.
        errors: of the lost tasks, in their order.
    """

    def __init__(
        self,
        message: str,
        step: int,
        tasks: tuple[int | str, ...] = (),
        posteriors: Sequence[Any] = (),
        errors: Sequence[DivergedError] = (),
    ) -> None:
        super().__init__(message, step, tasks)
        self.posteriors, self.errors = list(posteriors), list(errors)


def all_kept(tasks: Sequence[Any], block_size: int, adapt: Callable[[int, Sequence[Any]], Sequence[P]]) -> list[P]:
    """Adapt to blocks of tasks, and go on past those that are lost.

    A block whose chain diverges is done over, each task by itself with a stream of its own, so that a task takes no
    other with it.

    Args:
        tasks: with names.
        block_size: tasks of a block.
        adapt: given the number of a block and its tasks, returns their posteriors.

    Raises:
        LostTasksError: after all tasks, where some were lost.
    """
    found: list[P | None] = []
    failed: dict[str, DivergedError] = {}
    for number, first in enumerate(range(0, len(tasks), block_size)):
        parts = [(number, tasks[first : first + block_size])]
        while parts:
            number, part = parts.pop(0)
            try:
                found += adapt(number, part)
            except DivergedError as error:
                if len(part) > 1:
                    log.info("%s The tasks of the block are adapted to one by one.", error)
                    parts = [(AGAIN + place, [task]) for place, task in enumerate(part, first)]
                    continue
                found.append(None)
                failed[part[0].name] = error
    kept = [posterior for posterior in found if posterior is not None]
    if not failed:
        return kept
    lost, errors = tuple(failed), list(failed.values())
    raise LostTasksError(
        f"{len(found) - len(kept)} of {len(found)} tasks could not be adapted to ({some_names(lost)}). The {len(kept)} "
        "others are kept in this error's posteriors, which are in the order of the tasks, None for a lost one. "
        f"{errors[0]}",
        errors[0].step,
        lost,
        found,
        errors,
    ) from errors[0]


def those_kept(tasks: Sequence[T], adapt: Callable[[Sequence[T]], Sequence[P]], wanted: str) -> tuple[list[P], list[T]]:
    """Adapt to tasks and return the posteriors of those that could be adapted to, and these; others are warned of.

    Args:
        tasks: with names.
        adapt: returns their posteriors.
        wanted: what they are adapted to for.

    Raises:
        LostTasksError: none could be adapted to.
    """
    try:
        return list(adapt(tasks)), list(tasks)
    except LostTasksError as error:
        pairs = [(task, found) for task, found in zip(tasks, error.posteriors, strict=True) if found is not None]
        if not pairs:
            raise
        log.warning("%s: %d of %d tasks are left out. %s", wanted, len(tasks) - len(pairs), len(tasks), error)
    return [found for _, found in pairs], [task for task, _ in pairs]


@contextmanager
def named_adaptation(tasks: Sequence[Any], rate: float, power: float) -> Iterator[None]:
    """Let a failed adaptation say whose it is, and what to do by the names of ``adapt``.

    Args:
        tasks: of the chain.
        rate: ``learning_rate`` of the adaptation.
        power: ``n_inflate`` of it.

    Raises:
        DivergedError: in the place of one that speaks of the kernel's options; its ``tasks`` are their names.
    """
    names = tuple(task.name for task in tasks)
    whose = f"task {names[0]!r}" if len(names) == 1 else f"tasks {', '.join(map(repr, names))}"
    try:
        yield
    except UnstableStepError as error:
        # A step of the kernel is twice a learning rate.
        raise UnstableStepError(
            f"{whose}: learning_rate={rate:g} is past {0.5 * error.limit:.3g}, above which the adaptation would grow "
            f"without bound: the data pull too hard for it. Give adapt learning_rate={advised(error):.2g}, "
            f"{f'or a lower n_inflate than {power:g}, ' if power > 1.0 else ''}or bring the inputs to the "
            "scale of the tasks that the prior was learned from. A prior that is meta-trained with "
            'preconditioner="rms", the default, finds the step of each weight itself.',
            error.value,
            error.limit,
            names,
        ) from error
    except DivergedError as error:
        if STOPPED not in str(error):  # it speaks of the data, and says what to do
            error.tasks = names
            raise
        what, _, _ = str(error).partition(STOPPED)
        advice = f"Give adapt a smaller learning_rate than {rate:g}, or look at the data: "
        if error.step == 0:  # before any step of this chain
            lower = f"Give adapt a lower n_inflate than {power:g}, or look" if power > 1.0 else "Look"
            advice = f"No step was taken before. {lower} at the data: "
        raise DivergedError(
            f"{whose}, adaptation: {what}{advice}inputs far outside the scale of those that the prior was learned from "
            "are to be scaled, or the task left out.",
            error.step,
            names,
        ) from error


@contextmanager
def named_chain(names: Sequence[str], rate: float, joint_rate: float, joint_steps: int) -> Iterator[None]:
    """Let a failed chain of meta-training name its tasks, and what to do by the names of LiFT's settings.

    Args:
        names: of the tasks, by number.
        rate: ``learning_rate`` of the chain.
        joint_rate: ``sgd_learning_rate``, of the joint training before it.
        joint_steps: of that.

    Raises:
        DivergedError: in the place of one that speaks of the kernel's options; its ``tasks`` are their numbers.
    """
    try:
        yield
    except UnstableStepError as error:
        raise UnstableStepError(
            f"learning_rate={rate:g} is past {0.5 * error.limit:.3g}, above which the chain would grow without bound: "
            f"the tasks' data pull too hard for it. Give learning_rate={advised(error):.2g}, scale inputs down, or "
            'leave preconditioner at "rms", the default, which finds the step of each weight itself.',
            error.value,
            error.limit,
            error.tasks,
        ) from error
    except DivergedError as error:
        if STOPPED not in str(error):
            raise
        what, _, _ = str(error).partition(STOPPED)
        whose = ", ".join(repr(names[k]) for k in error.tasks if isinstance(k, int) and k < len(names))
        joint = error.step < joint_steps
        smaller = f"sgd_learning_rate than {joint_rate:g}" if joint else f"learning_rate than {rate:g}"
        raise DivergedError(
            f"{what}{STOPPED} Look at the data of {f'task {whose}' if whose else 'the tasks'}, whose inputs may be out "
            f"of scale and are to be scaled or left out; or give a smaller {smaller}.",
            error.step,
            error.tasks,
        ) from error


def advised(error: UnstableStepError) -> float:
    """Return the learning rate that is well below a limit."""
    return 0.5 * DEFAULT_SHARE * error.limit
