r"""The plan of a comparison: what a gradient costs here, and how many each method gets within the budget.

A seed and a fold of the tasks cost

.. math:: n\,t_{\text{probe}} + \sum_m \bigl(s + G\,a + n\,R\,(c + S\,b)\bigr)

with n held-out tasks, R rates of adaptation that a method chooses from, G gradients of meta-training, S steps of
adaptation, and measured: seconds a of a gradient in meta-training, b of a step, c of an adaptation's beginning and of
its predictions, s of setting up. G, S and R are the same for all methods. What does not fit is made smaller in this
order: G and S, then R, then seeds, then the number of folds that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.support.durations import format_duration

__all__ = ["PLANNED", "Costs", "Plan", "planned", "solve", "turn_seconds", "whole_budget"]

#: Fraction of the time that a first plan is for; the rest is for machines that slow down, and for what the turns after
#: it can do with it.
PLANNED = 0.8
#: Gradients of meta-training below which R and S are made smaller first, in falling order.
ENOUGH = (600, 300, 150, 60)
#: Gradients and steps below which nothing means anything.
LEAST_GRADIENTS, LEAST_STEPS = 20, 10
#: Budgets that are told, in seconds up to a minute, in minutes up to an hour, and in hours.
ROUND = (5, 10, 15, 20, 30, 45, 60)


@dataclass(frozen=True)
class Costs:
    """Seconds, measured before anything is compared.

    Attributes:
        gradient: a, of meta-training, the mean over methods.
        setup: s, of a meta-training.
        step: b, of an adaptation, the mean over methods.
        adaptation: c, of one task: what is done before and after its steps, predictions included.
        probe: of one task.
    """

    gradient: float
    setup: float
    step: float
    adaptation: float
    probe: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The sizes that every method gets.

    Attributes:
        gradients: of meta-training.
        steps: of adaptation.
        rates: of adaptation, over LiFT's own, that each method chooses from.
        folds: that are judged.
        seeds: repetitions.
        seconds: that all this should take.
        cut: what was made smaller, in words.
        least: seconds of a budget in which the least that means anything fits, what comes before it included.
    """

    gradients: int
    steps: int
    rates: tuple[float, ...]
    folds: int
    seeds: int
    seconds: float
    cut: tuple[str, ...] = ()
    least: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return what is written beside the records."""
        return asdict(self)


class _Shape:
    """The numbers that the cost depends on: held-out tasks of each fold, and methods that take gradients."""

    def __init__(self, held_out: Sequence[int], meta: int, alone: int, costs: Costs) -> None:
        self.held_out, self.meta, self.alone, self.costs = held_out, meta, alone, costs

    def adapting(self, folds: int, rates: int, steps: int) -> float:
        """Seconds of everything but meta-training's gradients, for one seed."""
        tasks, c = sum(self.held_out[:folds]), self.costs
        each = rates * (c.adaptation + steps * c.step)
        return tasks * (c.probe + (self.meta + self.alone) * each) + folds * self.meta * c.setup

    def gradients(self, seconds: float, folds: int, rates: int, steps: int) -> int:
        """Count the gradients of meta-training that the rest of the time has room for."""
        left = seconds - self.adapting(folds, rates, steps)
        if self.meta == 0:
            return 10**9 if left >= 0.0 else -1
        return math.floor(left / (folds * self.meta * self.costs.gradient))


def turn_seconds(costs: Costs, held_out: int, meta: int, alone: int, sizes: tuple[int, int, int]) -> float:
    """Seconds of one turn: a seed, and a part of the tasks.

    Args:
        costs: measured.
        held_out: tasks of the part.
        meta: methods that learn from other tasks.
        alone: other methods that take gradients.
        sizes: rates of adaptation, its steps, and gradients of meta-training.
    """
    rates, steps, gradients = sizes
    return _Shape([held_out], meta, alone, costs).adapting(1, rates, steps) + meta * gradients * costs.gradient


def solve(
    costs: Costs,
    settings: CompareSettings,
    held_out: Sequence[int],
    meta: int,
    alone: int,
    seconds: float,
    before: float = 0.0,
    share: float = 1.0,
) -> Plan:
    """Find the largest sizes that fit.

    Args:
        costs: measured.
        settings: the sizes that are wanted.
        held_out: tasks that are judged or chosen on, of each fold.
        meta: methods that learn from other tasks.
        alone: other methods that take gradients.
        seconds: there are.
        before: seconds of the budget that went into getting ready.
        share: of the rest of the budget, what the comparison itself gets; settings are chosen in the other.

    Returns:
        The plan; where even the least does not fit, the least, which runs until time is up.
    """
    shape = _Shape(held_out, meta, alone, costs)
    available = PLANNED * seconds
    fewest, few = _fewest_steps(settings), min(LEAST_GRADIENTS, settings.gradients)
    least = shape.adapting(1, 1, fewest) + meta * few * costs.gradient
    budget = whole_budget(before + least / (PLANNED * share))
    for folds, seeds, rates, steps, gradients in _by_preference(shape, settings, available):
        cut = _cut(settings, len(held_out), folds, seeds, (rates, steps, gradients), meta)
        spent = seeds * (shape.adapting(folds, rates, steps) + folds * meta * gradients * costs.gradient)
        return Plan(gradients, steps, tuple(settings.rates[:rates]), folds, seeds, spent, cut, budget)
    note = (
        f"the least that means anything needs a budget of {format_duration(budget)} or more; what is missing is what "
        "time ran out for"
    )
    cut = _cut(settings, len(held_out), 1, 1, (1, fewest, few), meta)
    return Plan(few, fewest, tuple(settings.rates[:1]), 1, 1, least, (*cut, note), budget)


def whole_budget(seconds: float) -> float:
    """Return a length of time as a person would give it, at least as long.

    Example:
        >>> whole_budget(0.3), whole_budget(31.0), whole_budget(61.0), whole_budget(4000.0)
        (5.0, 45.0, 120.0, 7200.0)
    """
    for unit in (1.0, 60.0):
        numbers = ROUND if unit == 1.0 else (2, 3, *ROUND)
        fitting = [number * unit for number in numbers if number * unit >= seconds]
        if fitting:
            return fitting[0]
    return math.ceil(seconds / 3600.0) * 3600.0


def _by_preference(
    shape: _Shape, settings: CompareSettings, available: float
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the sizes that fit, best first: folds, seeds, rates, steps and gradients."""
    all_folds = len(shape.held_out)
    fewest = _fewest_steps(settings)
    ladder = [s for s in (settings.steps, 60, 40, 30, 20, LEAST_STEPS) if fewest <= s <= settings.steps]
    rates_and_steps = sorted(
        product(range(1, len(settings.rates) + 1), dict.fromkeys(ladder)), key=_worth, reverse=True
    )
    for folds in range(all_folds, 0, -1):
        for seeds in range(settings.seeds, 0, -1):
            for enough in (*ENOUGH, LEAST_GRADIENTS):
                for rates, steps in rates_and_steps:
                    fit = shape.gradients(available / seeds, folds, rates, steps)
                    if fit >= min(enough, settings.gradients):
                        yield folds, seeds, rates, steps, min(fit, settings.gradients)


def _fewest_steps(settings: CompareSettings) -> int:
    return min(max(LEAST_STEPS, 2 * settings.draws), settings.steps)


def _worth(pair: tuple[int, int]) -> tuple[float, int]:
    """Rate a number of rates and of steps: a third rate is worth about half as many steps."""
    rates, steps = pair
    return (min(rates, 2) + 0.5 * max(rates - 2, 0)) * math.sqrt(steps), rates


def _cut(
    settings: CompareSettings, all_folds: int, folds: int, seeds: int, sizes: tuple[int, int, int], meta: int
) -> tuple[str, ...]:
    rates, steps, gradients = sizes
    cut = []
    if folds < all_folds:
        cut.append(f"{folds} of {all_folds} parts of the tasks are judged")
    if seeds < settings.seeds:
        cut.append(f"{seeds} of {settings.seeds} seeds")
    if rates < len(settings.rates):
        cut.append(f"{rates} of {len(settings.rates)} rates of adaptation tried")
    if meta and gradients < settings.gradients:
        cut.append(f"{gradients} gradients of meta-training in place of {settings.gradients}")
    if steps < settings.steps:
        cut.append(f"{steps} steps of adaptation in place of {settings.steps}")
    return tuple(cut)


def planned(stored: dict[str, object]) -> Plan:
    """Read a plan that was written beside the records."""
    values = {**stored, "rates": tuple(stored["rates"]), "cut": tuple(stored["cut"])}  # type: ignore[arg-type]
    return Plan(**values)  # type: ignore[arg-type]
