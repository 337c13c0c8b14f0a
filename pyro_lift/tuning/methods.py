"""Any method of the registry tuned by the one search: its own space, the same number of trials, the same score."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

from pyro_lift.inference.baselines.protocol import Baseline, Budget, Posterior, adapt_all
from pyro_lift.inference.baselines.search_space import (
    LEAST_VISITS,
    Changes,
    Dimension,
    SearchSpace,
    Tunable,
    adaptation,
)
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number
from pyro_lift.tuning.drawn import drawn_points, one_of_each
from pyro_lift.tuning.search import Candidate, Trial, Tuning, search

__all__ = ["TRIALS", "method_candidates", "shortened_method", "space_of", "tune_method", "with_changes"]

#: Settings of each method that are tried, unless said otherwise.
TRIALS = 24
#: The dimension of adaptation that is tried in full with every meta-training.
RATE = "rate"


def space_of(method: Baseline[Any]) -> SearchSpace:
    """Return the space that a method tells; of one that tells none, its rate of adaptation and fewer steps."""
    return method.space if isinstance(method, Tunable) else SearchSpace(adapt=adaptation(method.budget))


def method_candidates(method: Baseline[Any], trials: int = TRIALS) -> list[Candidate]:
    """Draw settings around those that a method has, which are the first.

    Each of several meta-trainings is tried with every rate of adaptation; a method without meta-training tries as many
    settings of adaptation instead. A space of fewer points gives fewer.

    Args:
        method: with the settings that are given.
        trials: candidates.
    """
    check_number("trials", trials, least=1, open_below=False, whole=True)
    space = space_of(method)
    rates = ["", *space.adapt.get(RATE, {})]
    meta = {name: list(dimension) for name, dimension in space.meta.items()}
    adapt = {name: list(dimension) for name, dimension in space.adapt.items()}
    rest = {name: words for name, words in adapt.items() if name != RATE}
    points: list[tuple[dict[str, str], dict[str, str]]]
    if not meta:
        points = [({}, point) for point in drawn_points(partial(one_of_each, adapt), trials)]
    else:
        number = -(-trials // len(rates))
        chosen = random.Random(0)
        points = []
        for point in drawn_points(partial(one_of_each, meta), number):
            other = one_of_each(rest, chosen) if point else {}
            points += [(point, {**({RATE: rate} if rate else {}), **other}) for rate in rates]
    return [_candidate(space, *point) for point in points[:trials]]


def _candidate(space: SearchSpace, meta: Mapping[str, str], adapt: Mapping[str, str]) -> Candidate:
    told = [f"{name} {word}" for name, word in meta.items()]
    told += [f"adapt {name} {word}" for name, word in adapt.items()]
    return Candidate(", ".join(told) or "as given", _changes(space.meta, meta), _changes(space.adapt, adapt))


def _changes(dimensions: Mapping[str, Dimension], point: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that a point changes; a later dimension has the last word."""
    changes: dict[str, Any] = {}
    for name, dimension in dimensions.items():
        if name in point:
            changes |= dimension[point[name]]
    return changes


def with_changes(method: Baseline[Any], changes: Changes) -> Baseline[Any]:
    """Return a method with other values of some fields: of its budget, its own, or ``field.field``.

    Raises:
        TypeError: a field that neither has.
    """
    of_budget = {f.name for f in fields(Budget)}
    budget: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, value in changes.items():
        first, _, inner = name.partition(".")
        if inner:
            own[first] = replace(own.get(first, getattr(method, first)), **{inner: value})
        elif first in of_budget:
            budget[first] = value
        else:
            own[first] = value
    changed: Baseline[Any] = replace(method, budget=replace(method.budget, **budget), **own)  # type: ignore[type-var]
    return changed


def shortened_method(method: Baseline[Any], share: float) -> Baseline[Any]:
    """Return a method whose joint training and visits are a fraction of what they were."""
    if share >= 1.0:
        return method
    b = method.budget
    warm_up = max(round(share * b.warm_up), min(b.warm_up, 1))
    visits = max(round(share * b.visits), min(b.visits, LEAST_VISITS))
    return with_changes(method, {"warm_up": warm_up, "visits": visits, "warm_start": None})


class _Contender(NamedTuple):
    """A method of the registry, for the search."""

    method: Baseline[Any]

    def meta_train(self, tasks: Sequence[Task]) -> Any:
        return self.method.meta_train(tasks)

    def adapt(self, state: Any, tasks: Sequence[Task]) -> Sequence[Posterior]:
        return adapt_all(self.method, state, tasks)


def tune_method(
    method: Baseline[Any],
    tasks: Sequence[Task],
    *,
    held_out: Sequence[Task] = (),
    trials: int = TRIALS,
    seconds: float | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> tuple[Baseline[Any], Tuning]:
    """Choose a method's settings on held-out tasks, and return the method with them.

    Args:
        method: with the settings that are given: the first candidate, which wins ties.
        tasks: of meta-training.
        held_out: tasks to judge by; without them ``tasks`` are held out in turn.
        trials: settings that are tried, the same number for every method of a comparison.
        seconds: see :func:`~pyro_lift.tuning.search.search`.
        on_trial: told of each trial.

    Raises:
        ValueError: see :func:`~pyro_lift.tuning.search.search`.
    """

    def make(candidate: Candidate, share: float) -> _Contender:
        return _Contender(shortened_method(with_changes(method, {**candidate.meta, **candidate.adapt}), share))

    candidates = method_candidates(method, trials)
    tuning = search(candidates, make, tasks, seconds=seconds, held_out=held_out, on_trial=on_trial)
    return with_changes(method, {**tuning.meta, **tuning.adapt}), tuning
