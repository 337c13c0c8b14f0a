"""The search space of a method: what may be tuned, told beside the method's code; the tuner does the rest.

A dimension is a handful of alternatives to what the method was given, each a set of fields and their values. Fields are
the budget's or the method's own; ``settings.beta`` is a field of a field. What a method was given is the first point of
every dimension, without being named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pyro_lift.inference.baselines.protocol import Budget

__all__ = [
    "RATES",
    "Changes",
    "Dimension",
    "SearchSpace",
    "Tunable",
    "adaptation",
    "episodes_space",
    "joint_shares",
    "lengths",
    "multiples",
    "values",
]

Changes = Mapping[str, Any]
Dimension = Mapping[str, Changes]

#: Rates of adaptation, over the given one, that every method of meta-training tries with each of its settings.
RATES = (0.25, 4.0)
#: Fewer steps of adaptation: the same is never given more than others get.
FEWER_STEPS = (0.5,)
#: Visits that a shorter joint training or meta-training has at least.
LEAST_VISITS = 8


class SearchSpace(NamedTuple):
    """What may be tuned.

    Attributes:
        meta: dimensions of meta-training: alternatives by the word that tables show.
        adapt: dimensions of adaptation; settings that differ in these alone share one meta-training. ``"rate"`` is
            tried in full with each of them.
    """

    meta: Mapping[str, Dimension] = {}
    adapt: Mapping[str, Dimension] = {}


@runtime_checkable
class Tunable(Protocol):
    """A method that tells its search space."""

    @property
    def space(self) -> SearchSpace:
        """What may be tuned, around what the method was given."""
        ...


def multiples(field: str, value: float, factors: Sequence[float]) -> Dimension:
    """Return multiples of a number as alternatives to it.

    Example:
        >>> multiples("sigma", 0.2, (0.5,))
        {'x 0.5': {'sigma': 0.1}}
    """
    return {f"x {factor:g}": {field: factor * value} for factor in factors}


def values(field: str, given: Any, alternatives: Sequence[Any]) -> Dimension:
    """Return other values of a field than the given one."""
    return {str(value): {field: value} for value in alternatives if value != given}


def adaptation(
    budget: Budget, rates: Sequence[float] = RATES, fewer_steps: Sequence[float] = FEWER_STEPS
) -> dict[str, Dimension]:
    """Return the dimensions of adaptation that all methods have: its rate, and fewer steps."""
    steps = {f"x {x:g}": {"steps": max(round(x * budget.steps), 2 * budget.draws)} for x in fewer_steps}
    return {"rate": multiples("learning_rate", budget.learning_rate, rates), "steps": steps}


def joint_shares(budget: Budget, shares: Sequence[float] = (0.25, 0.5, 0.9)) -> Dimension:
    """Return other shares of meta-training's minibatches that go into joint training first."""
    total = budget.warm_up + budget.visits
    found: dict[str, Changes] = {}
    for share in shares:
        visits = max(total - round(share * total), min(LEAST_VISITS, budget.visits))
        if total - visits != budget.warm_up:
            found[f"{100 * share:g} %"] = {"warm_up": total - visits, "visits": visits, "warm_start": None}
    return found


def lengths(budget: Budget, shares: Sequence[float] = (0.5,)) -> Dimension:
    """Return shorter meta-trainings."""
    return {
        f"x {share:g}": {
            "warm_up": round(share * budget.warm_up),
            "visits": max(round(share * budget.visits), min(LEAST_VISITS, budget.visits)),
            "warm_start": None,
        }
        for share in shares
    }


def episodes_space(budget: Budget, tasks_per_step: int, inner_learning_rate: float | None = None) -> SearchSpace:
    """Return what all methods have that learn in episodes: rates, tasks of an outer step, share of joint training.

    Args:
        budget: the method's.
        tasks_per_step: tasks of an outer step: fewer of them make more steps.
        inner_learning_rate: of the loop inside an episode; None where there is none.
    """
    meta: dict[str, Dimension] = {
        "meta rate": multiples("meta_learning_rate", budget.meta_learning_rate, (0.3, 3.0)),
        "tasks a step": values("tasks_per_step", tasks_per_step, (1, 2, 4)),
        "joint": joint_shares(budget),
    }
    if inner_learning_rate is not None:
        meta["inner rate"] = multiples("inner_learning_rate", inner_learning_rate, (0.1, 0.4, 2.5))
    return SearchSpace(meta, adaptation(budget))
