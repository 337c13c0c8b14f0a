"""Whether targets of regressions are in the unit of the network's outputs, and a new task's in that of the prior."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import outputs
from pyro_lift.models.prior_loss import ROWS as LOOKED_AT
from pyro_lift.models.prior_loss import TASKS
from pyro_lift.models.rows import some_rows
from pyro_lift.models.target_families import ROWS, families_of
from pyro_lift.models.task import Task
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.support.wording import some_tasks

__all__ = ["Units", "advice_on_units", "of_one_unit", "units_of", "warn_of_new_units", "warn_of_units", "warn_of_width"]

log = logging.getLogger("pyro_lift")

#: The network is off by more than so many spreads of the targets. At 5 a small network still got there in 1,000 steps;
#: at 50 it had half of what ridge regression on the inputs had, without a word.
FAR = 8.0
#: Targets vary so many times as much as the outputs, or as little. At 100 some networks got there, others did not.
WIDE = 30.0
#: Targets of a unit that is the prior's may be so much larger than its noise, which is a hundredth of them at least.
EXACT = 1e3
#: Share of the tasks that may be left out because they are in another unit; of more it is not clear who is right.
MOST_LEFT_OUT = 0.25
#: Tasks from which on their spreads say something of all.
FEWEST = 4
#: Columns of targets that share a noise vary so many times as much as one another. One noise for both then costs
#: a third of a nat a value where it is in proportion to what they vary by, a fifth at 2.7 times. Heads of the tasks'
#: own have widths by value, and adapters alone hear the narrow ones less.
APART, APART_WITH_HEADS = 3.5, 30.0
#: How seldom targets of a new task of a few rows may vary so little, or lie so far away, by chance alone.
SELDOM = 1e-3
#: Times as wide as those of the narrowest tenth of the tasks that targets of the widest tenth are, where no task is far
#: from most: one noise is then too large for some and too small for others.
UNEVEN = 10.0
#: Times as far as those of the prior's tasks, or as near, that the rows of a new one are missed by from which on it is
#: told of. A map that is easy for the network is missed by a third of what most are; what is too wide is wrong as well.
FURTHER, NEARER = 3.0, 10.0
#: Rows from which on that is told of: of two or three some of the kind lie as far off by chance.
SAYING = 6
#: Spread of the targets from which on they are small or large beside what networks, widths and rates are made for.
STANDARD = 10.0


class Units(NamedTuple):
    """Where targets and outputs lie, of the output that is furthest off.

    Attributes:
        target: mean of the targets.
        spread: standard deviation of the targets around their task's mean.
        output: mean of the network's outputs on the same rows.
        varies: their standard deviation.
        noise: of the targets around the outputs, where a prior knows it.
        rows: that the spread is of, where they are those of one new task.
    """

    target: float
    spread: float
    output: float
    varies: float
    noise: float = 0.0
    rows: int | None = None

    @property
    def differ(self) -> bool:
        """Whether they are so far apart that an adapter is not what is missing.

        Two or three rows may have nearly the same target by chance, and then neither vary little nor lie far away.
        """
        known = max(self.varies, self.noise)
        spread = self.spread if self.rows is None else self.spread * _by_few(self.rows)
        far = abs(self.target - self.output) > FAR * max(spread, self.noise) > 0.0 and self.spread > 0.0
        wide = 0.0 < WIDE * known < self.spread
        return far or wide or _vary_little(self.spread, known, self.rows)


def _by_few(rows: int) -> float:
    """Return how many times as far from their mean targets of so few rows may lie as those of many, by chance."""
    from scipy.stats import norm, t

    return float(t.isf(0.5 * SELDOM, rows - 1) / norm.isf(0.5 * SELDOM)) if rows > 1 else 1.0


def _vary_little(spread: float, known: float, rows: int | None) -> bool:
    """Whether targets vary far less than is known, and not by chance alone: n spread^2 / known^2 is chi-squared."""
    if not 0.0 < WIDE * spread < known:
        return False
    from scipy.stats import chi2

    return rows is None or float(chi2.cdf(rows * (spread / known) ** 2, rows - 1)) < SELDOM


def units_of(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    theta: Tensor | None = None,
    noise: float = 0.0,
    rows: int | None = None,
) -> Units:
    """Look at a few rows of a few tasks; of the first output that is in another unit, else of the furthest off.

    Args:
        adapter: the network as a function of theta.
        tasks: regressions without heads of their own.
        theta: where the network is looked at, ``[D]``; None where it begins.
        noise: of the targets, where it is known.
        rows: of the one task, where chance in so few is allowed for.
    """
    units = _units_of_each(adapter, tasks, adapter.initial if theta is None else theta, noise)
    units = [each._replace(rows=rows) for each in units]
    worst = max(units, key=lambda u: abs(u.target - u.output) / max(u.spread, 1e-300))
    return next((u for u in units if u.differ), worst)


@torch.no_grad()
def _units_of_each(adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor, noise: float) -> list[Units]:
    some = spread_evenly(tasks, TASKS)
    targets, means, within = [], [], []
    for task in some:
        rows = some_rows(task.train, LOOKED_AT)
        y = _columns(rows.target)
        targets.append(y.mean(0))
        within.append((_columns(task.train.target) - _columns(task.train.target).mean(0)).square().mean(0))
        means.append(_columns(outputs(adapter, rows.to(theta.device), theta, None)))
        if means[-1].shape[-1] != targets[-1].shape[-1]:  # what is made of these is not the output as it stands
            return [Units(0.0, 1.0, 0.0, 1.0)]
    target, spread = torch.stack(targets).mean(0), torch.stack(within).mean(0).sqrt()
    output, varies = torch.cat(means).mean(0), torch.cat(means).std(0, correction=0)
    found = torch.stack([target, spread, output, varies], -1).tolist()
    return [Units(t, s, o, v, noise) for t, s, o, v in found]


def warn_of_units(adapter: RandomAdapter, tasks: Sequence[Task], *, own_heads: bool = False) -> None:
    """Say in the log where targets of regressions are in another unit than the other tasks', or the network's outputs.

    Tasks whose targets are unlike most tasks' are told by name and left out of what is said of all.

    Args:
        adapter: the network as a function of theta.
        tasks: others than regressions have no unit.
        own_heads: whether each has a head of its own, which goes to wherever its targets lie; the noise is all tasks'.
    """
    tasks = [task for task in tasks if task.kind == "regression"]
    if not tasks:
        return
    unlike = _warn_of_families(tasks, own_heads)
    if 2 * len(unlike) > len(tasks):  # there is no unit of all to speak of
        return
    tasks = [task for k, task in enumerate(tasks) if k not in unlike]
    if not own_heads and (units := units_of(adapter, tasks)).differ:
        log.warning(
            "the targets lie around %.3g and vary within a task by %.3g; the untouched network's outputs lie around "
            "%.3g and vary by %.3g. Adapters of its layers hardly carry it there. Learn from (target %s) / %.3g "
            "and undo that in predictions, or bring the network's last layer to the unit of the targets.",
            units.target, units.spread, units.output, units.varies, _less(units.target, units.spread),
            units.spread,
        )  # fmt: skip
    columns = [_columns(task.train.target).std(0, correction=0) for task in tasks]
    _warn_of_uneven(torch.stack([each.max() for each in columns]), own_heads)
    if len({len(each) for each in columns}) > 1:  # heads of their own, or refused where the network is called
        return
    spreads = torch.stack(columns).mean(0)
    spreads = spreads[spreads > 0.0]
    apart = APART_WITH_HEADS if own_heads else APART
    if len(spreads) > 1 and float(spreads.max()) > apart * float(spreads.min()):
        what = "the adapter learns from those that vary much alone"
        log.warning(
            "the columns of the targets vary by %.3g to %.3g within a task, and share one noise: %s. Bring them to one "
            "scale: divide each column by its own standard deviation, and multiply its predictions by it.",
            float(spreads.min()), float(spreads.max()),
            what if own_heads else f"predictions of those that vary little are too wide, and {what}",
        )  # fmt: skip


def of_one_unit(tasks: Sequence[Task], *, says: bool = True) -> Sequence[Task]:
    """Leave out regressions whose targets vary far more than most tasks', where they are few.

    These are tasks whose targets vary :data:`WIDE` times as much as is usual. All share one noise, and square errors
    are what it is found by: one task in a hundred times the unit made it ten times too wide, kept joint training from
    helping, and cost new tasks of up to ten rows a nat.

    Args:
        tasks: to learn from; others than regressions are returned as they are.
        says: whether the log does.
    """
    if any(task.kind != "regression" for task in tasks):
        return tasks
    wide = _far_wider(tasks)
    if not wide or len(wide) > MOST_LEFT_OUT * len(tasks) or len(tasks) - len(wide) < FEWEST:
        return tasks
    usual = next(iter(wide.values()))[1]
    log.log(
        logging.WARNING if says else logging.DEBUG,
        "the targets of %s are in another unit than those of most tasks: they vary by %s within the task, and by %.3g "
        "in most tasks (the median). All tasks share one noise, which they would spoil for the others: they are left "
        "out. To learn from them too, divide their targets so that they vary as those of the others do, and undo that "
        "in predictions.", _listed(tasks, wide), _from_to([spread for spread, _ in wide.values()]), usual,
    )  # fmt: skip
    return [task for k, task in enumerate(tasks) if k not in wide]


def _far_wider(tasks: Sequence[Task]) -> dict[int, tuple[float, float]]:
    """Find the tasks of which a column varies out of all proportion: their places, that spread, and the usual one.

    It is held against tasks of as many rows, or of :data:`ROWS` and more: of two rows targets may lie close together.
    """
    columns = [_columns(task.train.target) for task in tasks]
    if len({y.shape[1] for y in columns}) != 1:
        return {}
    spreads = torch.stack([y.std(0, correction=0) for y in columns])
    rows = torch.tensor([min(len(y), ROWS) for y in columns])
    found = {}
    for number in rows.unique().tolist():
        among = spreads[rows >= number]
        if len(among) <= FEWEST:
            continue
        usual = torch.stack([_lower_median(column[column > 0.0]) for column in among.T])
        for k in ((spreads > WIDE * usual).any(1) & (rows == number)).nonzero().flatten().tolist():
            m = int((spreads[k] / usual).argmax())
            found[k] = (float(spreads[k, m]), float(usual[m]))
    return dict(sorted(found.items()))


def _lower_median(x: Tensor) -> Tensor:
    return x.median() if len(x) else x.new_tensor(math.inf)


def _warn_of_uneven(spreads: Tensor, own_heads: bool) -> None:
    """Say in the log where tasks' targets, which vary by ``[N]``, do so so unevenly that one noise fits few of them."""
    spreads = spreads[spreads > 0.0]
    if len(spreads) < FEWEST:
        return
    low, high = torch.quantile(spreads, torch.tensor([0.1, 0.9], dtype=spreads.dtype)).tolist()
    if high > UNEVEN * low:
        log.warning(
            "the targets vary by %.3g within some tasks and by %.3g within others (the tenths of the tasks that vary "
            "least and most), and all share one noise: %s. Divide each task's targets by their own standard "
            "deviation, and multiply its predictions by it.", low, high,
            "the adapter hears the first little beside the others" if own_heads
            else "predictions are too wide for some and too narrow for others",
        )  # fmt: skip


def _warn_of_families(tasks: Sequence[Task], own_heads: bool) -> set[int]:
    """Say in the log which tasks' targets vary unlike most tasks', or lie elsewhere; their places."""
    found = families_of(tasks)
    if found.units:
        log.warning(
            "the targets of %s are in another unit than those of most tasks: they vary by %s within the task, "
            "and by %.3g in most tasks (the median). All tasks share one network and one noise: tasks that vary much "
            "spoil all others, and those that vary little are not heard. Divide the targets of each task so that they "
            "vary alike, and undo that in its predictions; or leave out the tasks of another unit.",
            _listed(tasks, found.units), _from_to(list(found.units.values())), found.spread,
        )  # fmt: skip
    if own_heads:
        return set(found.units)
    if found.offsets:
        log.warning(
            "the targets of %s lie around %s, those of most tasks around %.3g (the median), and within a task they "
            "vary by %.3g: adapters hardly carry the network's output from one task's targets to another's. Subtract "
            "from each task's targets their own mean, and add it to its predictions again (of a new task, the mean of "
            "its training targets); or leave out the tasks that lie elsewhere.",
            _listed(tasks, found.offsets), _from_to(list(found.offsets.values())), found.middle, found.spread,
        )  # fmt: skip
    return {*found.units, *found.offsets}


def advice_on_units(tasks: Sequence[Task]) -> str:
    """Say what to do about targets of regressions that are all small or all large; nothing where they are neither.

    Args:
        tasks: of a run that went wrong.
    """
    if any(task.kind != "regression" for task in tasks):
        return ""
    spread = families_of(tasks).spread
    if spread == 0.0 or 1.0 / STANDARD <= spread <= STANDARD:
        return ""
    size = "small" if spread < 1.0 else "large"
    return (
        f"The targets are {size}: they vary by {spread:.3g} within a task. Standardise them, and undo that in "
        "predictions: (target - mean) / sd with one mean and sd for all tasks. Then see whether it is still so."
    )


def _listed(tasks: Sequence[Task], places: Iterable[int]) -> str:
    names = [tasks[k].name for k in places]
    return some_tasks(names) + ("" if len(names) == 1 else f" ({len(names)} of {len(tasks)})")


def _from_to(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _less(value: float, spread: float) -> str:
    """Write "- value" with as many digits as it takes to be right to a tenth of a spread; three at least."""
    digits = math.ceil(math.log10(abs(value) / spread)) + 1 if value and spread else 0
    return f"{'-' if value >= 0.0 else '+'} {abs(value):.{min(max(digits, 3), 17)}g}"


def warn_of_new_units(
    adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor, noise: float, *, own_heads: bool = False
) -> None:
    """Say in the log which new regressions are in another unit than those that a prior was learned from.

    Args:
        adapter: the network as a function of theta.
        tasks: new ones.
        theta: the prior's mean, ``[D]``.
        noise: standard deviation of the targets, as the prior knows it.
        own_heads: whether each has a head of its own, so that the noise alone has a unit.
    """
    for task in tasks:
        if own_heads and task.kind == "regression":
            if _is_in_another_unit(task, noise):
                log.warning(
                    "task %r: its targets vary by %.3g, and the prior has learned of a noise of %.2g: they are in "
                    "another unit than the tasks of meta-training, and predictions will have the wrong width. Bring "
                    "the targets to the unit of those, or leave the task out.", task.name, _spread(task), noise,
                )  # fmt: skip
        elif task.kind == "regression" and (units := units_of(adapter, [task], theta, noise, len(task.train))).differ:
            log.warning(
                "task %r: its targets lie around %.3g and vary by %.3g; the network that the prior was learned with "
                "gives %.3g, varying by %.3g, with noise %.2g. They are in another unit than the tasks of "
                "meta-training, or these were in another than the network, as meta-training says then; predictions and "
                "their widths will be wrong. Bring all targets to the unit of the network's outputs, or leave the task "
                "out.",
                task.name, units.target, units.spread, units.output, units.varies, noise,
            )  # fmt: skip


def _is_in_another_unit(task: Task, noise: float) -> bool:
    """Whether targets with a head of their own vary out of all proportion to the noise."""
    spread = _spread(task)
    return spread > EXACT * noise or _vary_little(spread, noise, len(task.train))


def _spread(task: Task) -> float:
    return float(_columns(task.train.target).std(0, correction=0).max())


def warn_of_width(task: Task, missed: float, noise: float) -> None:
    """Say in the log where a new regression's rows are missed too unlike those of the prior's tasks to be one of them.

    Args:
        task: new.
        missed: mean square of rows that are left out in turn, over that of most tasks.
        noise: standard deviation of the targets, as the prior knows it; a task in another unit has been told of.
    """
    times, way = (missed**0.5, "further from") if missed > 1.0 else (missed**-0.5, "nearer to")
    few = len(task.train) < SAYING
    if few or times < (FURTHER if missed > 1.0 else NEARER) or _is_in_another_unit(task, noise):
        return
    log.warning(
        "task %r: its rows lie %.2g times %s what its other rows predict than those of the prior's tasks. How "
        "wide its predictions are goes by its own %d rows. If its targets are in another unit, bring them to that of "
        "the tasks of meta-training.", task.name, times, way, len(task.train),
    )  # fmt: skip


def _columns(x: Tensor) -> Tensor:
    return x.detach().double().cpu().reshape(len(x), -1)
