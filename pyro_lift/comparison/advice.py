r"""One sentence of advice that follows from a table of losses, and the paired differences behind it.

Losses are per task (means over its rows and over seeds; NLL in nats, or unexplained variance), so that differences
between methods are paired over tasks,

.. math:: d_i = \mathrm{loss}_i(A) - \mathrm{loss}_i(B),\qquad
          \mathrm{se} = \sqrt{\tfrac{1}{M(M-1)} \sum_i (d_i - \bar d)^2}

The advice is the *simplest* method whose mean loss is within one standard error of the best one's (Breiman's rule), and
a method is called better only where Student's paired t-test says so.

References:
    Classification and regression trees, Breiman et al., 1984, section 3.4.3, for the rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyro_lift.metrics.significance import PairedTest, paired_test

__all__ = ["GUESS", "Contestant", "advise", "difference"]

#: A p-value below which a difference is called one.
ALPHA = 0.05
#: A mean difference that nobody would act on, in nats (or as a fraction of the variance).
NEGLIGIBLE = 0.003
#: What the answer that knows no input is called, in the table too.
GUESS = "guess"


class Contestant(NamedTuple):
    """A method as advice looks at it.

    Attributes:
        losses: one a task, in one order for all methods; NaN where it gave none.
        rank: how much there is to it: 0 a regression on frozen features, 1 an adapter of the task's own, 2 and more
            methods that learn from other tasks.
        steps: whether it takes steps of gradients; regressions on frozen features do not.
    """

    losses: Sequence[float]
    rank: int
    steps: bool = True

    @property
    def meta(self) -> bool:
        """Whether it learns from other tasks."""
        return self.rank >= 2


def difference(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Return the mean of ``first - second``, its standard error and p-value; the last two NaN of a single task."""
    if len(first) == 1:
        return PairedTest(first[0] - second[0], math.nan, math.nan)
    return paired_test(first, second)


def advise(
    contestants: Mapping[str, Contestant],
    chance: Sequence[float] | None = None,
    *,
    unit: str = "nats",
    measure: str = "NLL",
) -> str:
    """Say which method to use and why.

    Args:
        contestants: by the name that the table shows, at least one; those whose losses are not finite are passed over,
            and named.
        chance: losses of the answer that knows no input (the class frequencies); None where there is no such answer.
        unit: of the losses.
        measure: what the losses are called.

    Returns:
        One sentence; a second where something was passed over.
    """
    usable = {name: c for name, c in contestants.items() if c.losses and all(map(math.isfinite, c.losses))}
    passed_over = [name for name in contestants if name not in usable]
    note = f" ({_listed(passed_over)}: no finite {measure} on some task, not counted.)" if passed_over else ""
    if not usable:
        return f"No method gave a finite {measure} on every task, so there is nothing to advise." + note
    return _verdict(usable, chance, unit, measure) + note


def _verdict(usable: Mapping[str, Contestant], chance: Sequence[float] | None, unit: str, measure: str) -> str:
    mean = {name: statistics.fmean(c.losses) for name, c in usable.items()}
    best = min(usable, key=lambda name: (mean[name], usable[name].rank))
    count = len(usable[best].losses)
    if count == 1:
        return (
            f"{best} has the lowest {measure} ({mean[best]:.3f}), but one task to be judged by decides nothing: "
            "give more tasks."
        )
    if chance is not None:
        over_chance = difference(usable[best].losses, chance)
        # One-sided: the question is whether it is better, and a few tasks that differ much are all there is.
        over_chance = over_chance._replace(p_value=0.5 * over_chance.p_value)
        if over_chance.difference >= 0.0 or over_chance.p_value > ALPHA:
            return (
                f"Nothing here is clearly better than guessing without a look at the inputs ({measure} "
                f"{statistics.fmean(chance):.3f}; the best, {best}, {mean[best]:.3f}{_p(over_chance)}): these rows and "
                "this backbone do not tell the answers, or the tasks to be judged by are too few."
            )
    if len(usable) == 1:
        return f"{best} is all that could be compared ({measure} {mean[best]:.3f})."
    ties = [name for name, c in usable.items() if _as_good(c.losses, usable[best].losses)]
    simplest = min(ties, key=lambda name: (usable[name].rank, mean[name]))
    if not usable[simplest].meta:
        return _without_meta(simplest, best, usable, mean, unit, measure)
    return _with_meta(simplest, best, usable, chance, unit)


def _without_meta(
    simplest: str, best: str, usable: Mapping[str, Contestant], mean: Mapping[str, float], unit: str, measure: str
) -> str:
    """Advise a method that learns from the task alone."""
    meta = [name for name, c in usable.items() if c.meta]
    gap = "" if simplest == best else f"; {best}, {_gap(usable[best], usable[simplest], unit)}, is not clearly better"
    sentence = f"{simplest} is as good as anything here ({measure} {mean[simplest]:.3f}{gap}): use it"
    if simplest == best:
        others = [name for name in usable if name != best]
        second = min(others, key=mean.__getitem__)
        test = difference(usable[second].losses, usable[best].losses)
        if test.p_value <= ALPHA and test.difference > NEGLIGIBLE:
            sentence = f"{best}: {_better(test, unit)} than the next ({second}{_p(test)}): use it"
    if not meta:
        return sentence + "."
    return sentence + "; these tasks share nothing that meta-learning can use in this time."


def _with_meta(
    simplest: str, best: str, usable: Mapping[str, Contestant], chance: Sequence[float] | None, unit: str
) -> str:
    """Advise a method that learns from other tasks, by its lead over the best that does not, guessing among them."""
    alone = {name: c.losses for name, c in usable.items() if not c.meta}
    if not alone:
        alike = "" if simplest == best else f" ({best}, {_gap(usable[best], usable[simplest], unit)}, no simpler)"
        return f"{simplest} is as good as anything here{alike}; nothing without meta-learning was compared."
    if chance is not None:
        alone[GUESS] = chance
    losses = usable[simplest].losses
    bar = min(alone, key=lambda name: statistics.fmean(alone[name]))
    test = difference(alone[bar], losses)
    others = {name: c.losses for name, c in usable.items() if name != simplest} | alone
    second = min(others, key=lambda name: statistics.fmean(others[name]))
    beside = "" if second == bar else _beside(second, difference(others[second], losses), unit)
    trains = usable[simplest].steps
    without = f"the best without {'meta-learning' if trains else 'other tasks'}"
    if test.p_value <= ALPHA and test.difference > 0.0:
        what = "the next" if second == bar else without
        pays = "meta-learning pays here" if trains else "one regression over the rows of all tasks is enough here"
        return f"{simplest}: {_better(test, unit)} than {what} ({bar}{_p(test)}): {pays}, use it{beside}."
    pays = "meta-learning may pay here" if trains else "one regression over the rows of all tasks may be enough here"
    return (
        f"{simplest} is ahead by {_size(test.difference, unit)} (standard error {_size(test.standard_error, unit)}) of "
        f"{without} ({bar}{_p(test)}): {pays}, and more tasks to be judged by would tell{beside}."
    )


def _beside(second: str, test: PairedTest, unit: str) -> str:
    """Say how the next method stands to the one that is advised, where it is another than the best without others."""
    if test.difference < 0.0:
        return f"; {second}, {_size(-test.difference, unit)} lower, is not clearly better"
    if test.p_value <= ALPHA:
        return f"; it is {_better(test, unit)} than the next ({second}{_p(test)})"
    return f"; it is not clearly better than {second} ({_size(test.difference, unit)}{_p(test)})"


def _as_good(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a method is within one standard error of the best one, or behind it by next to nothing."""
    test = difference(losses, best)
    return test.difference <= max(test.standard_error, NEGLIGIBLE)


def _gap(better: Contestant, worse: Contestant, unit: str) -> str:
    test = difference(worse.losses, better.losses)
    return f"{_size(test.difference, unit)} lower (standard error {_size(test.standard_error, unit)})"


def _better(test: PairedTest, unit: str) -> str:
    return f"{_size(test.difference, unit)} better"


def _size(value: float, unit: str) -> str:
    shown = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    return f"{shown} {unit}".strip()


def _p(test: PairedTest) -> str:
    if math.isnan(test.p_value):
        return ""
    return ", p < 0.001" if test.p_value < 0.001 else f", p = {test.p_value:.2g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
