r"""The head that heads of tasks' own stand around, where the tasks share their classes.

Tasks whose classes are the same have heads that are alike, and a head that is solved on twenty rows alone knows nothing
of that. So one head is solved on the rows of all tasks, on the untouched network's features, and the prior of a task's
own head is put around it,

.. math:: w_c \sim \mathcal N(\bar w_c, s^2 I) \quad\text{in place of}\quad \mathcal N(0, s^2 I).

Classes go by their names where tasks have names, else by their numbers. Whether they are the same classes only the
tasks can tell: the head of four fifths of them is tried on the others, by the log probability of rows that were left
out, and taken where it predicts them better by the one-sided test at 5 %. It is a share of it that is tried
(:mod:`~pyro_lift.tuning.head_share`), and of regressions all of it, of one half for the other.

Of classes, the tasks also choose the prior's width s and the standard deviation of a bias together, whether they share
a head or not, and one for each number of rows (:mod:`~pyro_lift.tuning.usual_priors`): twenty rows know little of
either, and a bias that is free to follow their class frequencies costs a quarter of a nat a row where all tasks have
the same. A task of hundreds of rows still has the width that they choose (:data:`~pyro_lift.models.heads.SURE`).
Regressions share a head of their values likewise, and how near to it their own are: where all tasks are one, twenty
rows do not know it. In any case they share what their rows say together of how strong a ridge it takes
(:func:`~pyro_lift.models.value_head.best_width`).

A network that is read before its own last layer (:mod:`~pyro_lift.tuning.class_layer`) has such a head already: where
heads around that predict left-out rows better, it is the one.

Meta-training's tasks see the shared head itself: theta is moved to where one head serves all of them, as in a network
that ends in its class layer, and a new task has a head of its own around it. What joint training of one half is judged
by is the head of that half, which has not seen the rows of the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median_high
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.head_choice import choose_head
from pyro_lift.models.head_problem import HeadModel, apply_head
from pyro_lift.models.heads import FewRows, UsualPrior, choose_prior_sd, solve_head
from pyro_lift.models.observation import head_features_of
from pyro_lift.models.target_families import families_of
from pyro_lift.models.task import Task, head_outputs
from pyro_lift.models.value_head import best_width, choose_value_head, columns_of
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.tuning.halves import FEWEST_TASKS, is_above_zero, paired
from pyro_lift.tuning.head_share import best_share, with_share
from pyro_lift.tuning.held_out import dealt, drawn_rows
from pyro_lift.tuning.usual_priors import CHOICE_ROWS, Asked, by_number_of_rows, scores_of, under, usual_prior

__all__ = [
    "HeadMean",
    "OfParts",
    "alike",
    "asked_at",
    "asked_of_parts",
    "head_mean",
    "pooled_head",
    "read_tasks",
    "shared_classes",
]

log = logging.getLogger("pyro_lift")

#: Tasks of each half that are judged, rows that the head is solved on, and rows that choose its width, at most.
JUDGED, ROWS, CHOOSING = 32, 20_000, 1_000
#: Parts that tasks are dealt into where a head is of few rows: that of half of them is worth less than the one of all.
PARTS = 5
#: Classes of all tasks over those of the largest, at most, where they go by their names.
MOST_CLASSES = 2
#: A feature that varies by less than this over the usual one's spread says nothing.
DEAD = 1e-3
#: Nats a row that a regression counts for at most: of exact targets they have no limit.
MOST = 1.0


class HeadMean(NamedTuple):
    """A head of all tasks.

    Attributes:
        head: on the untouched network's features; of regressions that share none one without rows.
        gain: mean over tasks of the log probability of left-out rows that it adds, nats a row.
        error: its standard error.
        halves: the heads of both halves of the tasks, with the names of these; none leaves theta to heads of the
            tasks' own, as in runs of before.
    """

    head: ClassHead
    gain: float
    error: float
    halves: tuple[tuple[frozenset[str], ClassHead], ...] = ()

    def of(self, tasks: Sequence[Task]) -> ClassHead:
        """Return the head of the half that has the tasks; that of all where they are of both."""
        return next((head for names, head in self.halves if all(task.name in names for task in tasks)), self.head)

    def unseen_by(self, tasks: Sequence[Task]) -> ClassHead:
        """Return the head of the half that has none of the tasks; that of all where they are of both."""
        return next((head for names, head in self.halves if not any(task.name in names for task in tasks)), self.head)

    def with_few(self, few: FewRows) -> HeadMean:
        """Return the same with what tasks say of heads of few rows after joint training; none leaves what they said."""
        return self._replace(head=self.head.with_few(few)) if few else self

    def with_one_sureness(self) -> HeadMean:
        """Return the same with a prior of heads that weighs the same for any number of rows, as in runs of before."""
        halves = tuple((names, head._replace(kept=0)) for names, head in self.halves)
        return self._replace(head=self.head._replace(kept=0), halves=halves)

    def results(self) -> dict[str, float]:
        """Measures for the prior's folder and card; none where no head is shared."""
        if len(self.head.head) == 0:
            return {}
        return {"gain of heads around one of all tasks, nats a row": self.gain}


def shared_classes(tasks: Sequence[Task]) -> list[str] | int | None:
    """Return the names of the classes that tasks may have in common, or their number; None where they have others.

    Of regressions it is the number of their values.

    Classes go by their names where all tasks have names, in whatever order: there may be twice as many in all as in the
    largest task. Without names all tasks need as many classes. With names in some of the tasks only, all of these need
    the same in one order too.
    """
    kinds = {task.kind for task in tasks}
    if len(tasks) < FEWEST_TASKS or kinds not in ({"classification"}, {"regression"}):
        return None
    if kinds == {"regression"}:
        outputs = {head_outputs(task) for task in tasks}
        return outputs.pop() if len(outputs) == 1 else None
    named = [task.labels for task in tasks if task.labels is not None]
    numbers = {task.num_classes for task in tasks}
    if len(named) == len(tasks):
        names = list(dict.fromkeys(name for labels in named for name in labels))
        return names if len(names) <= MOST_CLASSES * max(map(len, named)) else None
    if len(numbers) > 1 or len({tuple(labels) for labels in named}) > 1:
        return None
    return tasks[0].num_classes


@torch.no_grad()
def head_mean(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    *,
    widths: bool = True,
    around: bool = True,
    few_rows: bool = True,
    layer: bool = True,
    few_values: bool = True,
    share: bool = True,
) -> HeadMean | None:
    """Solve one head on the rows of all tasks, and let them choose the prior of their heads together.

    Args:
        adapter: the network as a function of theta; its output is features.
        tasks: of meta-training, on its device.
        widths: whether tasks of classes choose the prior's widths together; as runs of before, each by itself.
        around: the same of regressions, of how near to the head of all theirs are.
        few_rows: whether tasks of classes say what prior heads of few rows have too; as runs of before, all have one.
        layer: whether the layer that the network is read before may be the shared head; in runs of before it is not.
        few_values: whether regressions of few rows go by all tasks; in runs of before each goes by its own rows.
        share: whether heads may stand around a share of that of all tasks; in runs of before around all of it.

    Returns:
        None where nothing is shared. A head without rows leaves heads of the tasks' own around zero.
    """
    classes = shared_classes(tasks)
    if tasks[0].kind == "classification" and widths:
        known = _layer(adapter, tasks) if layer else None
        return _of_classes(adapter, tasks, classes, few_rows, known, share and few_rows)
    if classes is None:
        log.info("heads of the tasks' own stand around zero: the tasks are few, or have other classes or values.")
        return None
    tasks = alike(tasks)
    values = tasks[0].kind == "regression"
    usual = median_high(len(task.train) for task in tasks) if values and few_values else 0
    halves = dealt(read_tasks(adapter, tasks, adapter.initial), 2)
    gains: list[float] = []
    found = []
    for seen, unseen in (halves, halves[::-1]):
        head = pooled_head(seen, classes)._replace(rows=usual)
        if values and around:
            of = [(features, target) for _, features, target in unseen[:JUDGED]]
            head = head._replace(around_width=best_width(of, head.feature_sd, head.head))
        found.append((_names(seen), head))
        gains += [_gain(task, x, y, head) for task, x, y in unseen[:JUDGED]]
    told = torch.tensor(gains, dtype=torch.float64)
    helps = _helps(told, tasks[0].kind)
    if not helps and not values:
        return None
    whole = pooled_head(_whole(halves), classes)._replace(rows=usual)
    if not helps:
        alone = tuple((names, head._replace(head=head.head[:0])) for names, head in found)
        return HeadMean(whole._replace(head=whole.head[:0]), 0.0, 0.0, alone)
    between = [head.around_width for _, head in found if head.around_width is not None]
    if between:
        whole = whole._replace(around_width=math.exp(sum(map(math.log, between)) / len(between)))
    return HeadMean(whole, *paired(told), tuple(found))


#: A task's name and classes, the features and the targets of some of its rows.
Read = tuple[Task, Tensor, Tensor]


class _Candidate(NamedTuple):
    """A head that those of tasks may stand around.

    Attributes:
        around: its rows for each task that is judged, from tasks without this one; None where it is of other classes.
        heads: gives it as all tasks have it, and then as either half has it.
    """

    around: list[Tensor | None]
    heads: Callable[[], Sequence[ClassHead]]


class _Told(NamedTuple):
    """What judged tasks say of heads around a candidate."""

    candidate: _Candidate
    asked: list[Asked]
    usual: UsualPrior | None
    told: Tensor


def _of_classes(
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    classes: list[str] | int | None,
    few: bool,
    layer: ClassHead | None,
    share: bool,
) -> HeadMean | None:
    """Find what classifications share: the prior of their heads, and perhaps one head."""
    if len(tasks) < FEWEST_TASKS or {task.kind for task in tasks} != {"classification"}:
        log.info("heads of the tasks' own stand around zero, under priors of their own: the tasks are few or differ.")
        return None
    reads = read_tasks(adapter, tasks, adapter.initial)
    halves = dealt(reads, 2)
    judged = [read for half in halves[::-1] for read in half[:JUDGED]]
    candidates = []
    if classes is not None and share:
        judged, one = _of_share(reads, classes)
        candidates.append(one)
    elif classes is not None:
        candidates.append(_of_halves(halves, classes))
    if layer is not None:
        candidates.append(_Candidate([layer.of(task) for task, *_ in judged], lambda: [layer] * 3))
    alone = [_asked(*read, None) for read in judged]
    usual, own = usual_prior([scores_of(task, drawn=few) for task in alone])
    if candidates:
        best = max((_told(one, alone, few) for one in candidates), key=lambda each: float(each.told.mean()))
        if _helps(best.told - own, "classification"):
            _tell(best.usual)
            whole, *of_halves = best.candidate.heads()
            told = under(whole, best.usual)
            told = by_number_of_rows(told, best.asked) if few else told
            pairs = zip(halves, of_halves, strict=True)
            each = tuple((_names(half), told._replace(head=head.head)) for half, head in pairs)
            return HeadMean(told, *paired(best.told - own), each)
    if usual is None:
        return None
    _tell(usual)
    _, features, _ = reads[0]
    none = under(ClassHead(features.new_zeros(0, features.shape[-1] + 1)), usual)
    return HeadMean(by_number_of_rows(none, alone) if few else none, 0.0, 0.0)


def _of_share(reads: Sequence[Read], classes: list[str] | int) -> tuple[list[Read], _Candidate]:
    """Return tasks to be judged, and a share of the head of all tasks, for each of them without those of its fifth."""
    of_parts = asked_of_parts(reads, classes)
    pairs = spread_evenly(list(zip(of_parts.judged, of_parts.asked, strict=True)), 2 * JUDGED)
    fit = [task for _, task in pairs if task.around is not None]
    share = best_share(fit)[0] if fit else 1.0

    def heads() -> list[ClassHead]:
        of = [pooled_head(some, classes) for some in (of_parts.reads, *dealt(reads, 2))]
        return [head._replace(head=share * head.head) for head in of]

    around = [with_share(task, share).around for _, task in pairs]
    return [read for read, _ in pairs], _Candidate(around, heads)


def _of_halves(halves: Sequence[Sequence[Read]], classes: list[str] | int) -> _Candidate:
    """Return the head of all tasks, for each that is judged of the half that it is not in."""
    pooled = [pooled_head(half, classes) for half in halves]
    around = [head.of(task) for head, half in zip(pooled, halves[::-1], strict=True) for task, *_ in half[:JUDGED]]
    return _Candidate(around, lambda: [pooled_head(_whole(halves), classes), *pooled])


def _told(candidate: _Candidate, alone: Sequence[Asked], few: bool) -> _Told:
    asked = [task._replace(around=around) for task, around in zip(alone, candidate.around, strict=True)]
    return _Told(candidate, asked, *usual_prior([scores_of(task, drawn=few) for task in asked]))


def _layer(adapter: RandomAdapter, tasks: Sequence[Task]) -> ClassHead | None:
    """Return the layer that the network is read before as a head of the tasks' classes, by their numbers."""
    layer = None if adapter.before_head is None else adapter.before_head.layer
    if layer is None or any(task.num_classes != len(layer) for task in tasks):
        return None
    return ClassHead(layer.to(adapter.initial))


@torch.no_grad()
def asked_at(adapter: RandomAdapter, tasks: Sequence[Task], vector: Tensor, mean: ClassHead) -> list[Asked]:
    """Return what tasks have to say of the prior of their heads where phi is another than at the start.

    Args:
        adapter: the network as a function of theta.
        tasks: classifications, on its device; those of other classes than a shared head's are left out.
        vector: theta, ``[D]``.
        mean: that their heads stand around.
    """
    shared, found = len(mean.head) > 0, []
    for task in tasks[: 2 * JUDGED]:
        around = mean.of(task) if shared else None
        if around is not None or not shared:
            found.append(_asked(task, *_read(adapter, task, CHOICE_ROWS, vector), around))
    return found


class OfParts(NamedTuple):
    """Tasks dealt into parts.

    Attributes:
        reads: all of them.
        judged: some of each part.
        asked: what these have to say of the head of all tasks of the other parts.
    """

    reads: list[Read]
    judged: list[Read]
    asked: list[Asked]


@torch.no_grad()
def asked_of_parts(reads: Sequence[Read], classes: list[str] | int) -> OfParts:
    """Deal tasks into parts, and find what those of each part have to say of the head of all others.

    Args:
        reads: classifications, as :func:`read_tasks` gives them.
        classes: what they share (:func:`shared_classes`).
    """
    parts = dealt(reads, min(PARTS, len(reads)))
    judged, asked = [], []
    for k, unseen in enumerate(parts):
        head = pooled_head(_whole(parts[:k] + parts[k + 1 :]), classes)
        judged += unseen[:JUDGED]
        asked += [_asked(*read, head.of(read[0])) for read in unseen[:JUDGED]]
    return OfParts(_whole(parts), judged, asked)


def _asked(task: Task, x: Tensor, y: Tensor, around: Tensor | None) -> Asked:
    classes = head_outputs(task)
    assert classes is not None
    return Asked(x, y, classes, around).at_most(CHOICE_ROWS)


def _tell(usual: UsualPrior | None) -> None:
    if usual is not None:
        log.info("the tasks' heads have a prior of sd %.3g a logit and %.3g a bias.", usual.width, usual.bias_sd)


def read_tasks(adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor) -> list[Read]:
    """Read the features of some rows of each task at a vector ``[D]``."""
    share = max(ROWS // len(tasks), 1)
    return [(task, *_read(adapter, task, share, theta)) for task in tasks]


def _whole(halves: Sequence[Sequence[Read]]) -> list[Read]:
    return [read for half in halves for read in half]


def _names(half: Sequence[Read]) -> frozenset[str]:
    return frozenset(task.name for task, *_ in half)


def _helps(told: Tensor, kind: str) -> bool:
    """Whether one head of all tasks helps those that it has not seen, by what it adds to each; says which."""
    gain, error = paired(told)
    gained = f"{gain:+.3f} ± {error:.3f} nats a row, on tasks that it has not seen"
    if not is_above_zero(told):
        log.info("heads of the tasks' own stand around zero: one head of all tasks does not help (%s).", gained)
        return False
    what = "what they predict" if kind == "regression" else "their classes"
    log.info("the tasks share %s: heads of their own stand around one head of all tasks (%s).", what, gained)
    return True


def alike(tasks: Sequence[Task]) -> Sequence[Task]:
    """Leave out regressions whose targets are in another unit than most, or all equal; all stay where few are left.

    One of them would decide for all. What tasks are unlike the others is warned of elsewhere.
    """
    if tasks[0].kind != "regression":
        return tasks
    found = families_of(tasks)
    equal = {k for k, task in enumerate(tasks) if len(task.train) > 1 and len(task.train.target.unique(dim=0)) == 1}
    alike = [task for k, task in enumerate(tasks) if k not in {*found.units, *found.offsets, *equal}]
    return alike if len(alike) >= FEWEST_TASKS else tasks


def _gain(task: Task, x: Tensor, y: Tensor, around: ClassHead) -> float:
    """Compute what a head adds to the log probability of a task's left-out rows; a single row is left out from none."""
    head, classes = around.of(task), head_outputs(task)
    assert classes is not None
    if head is None:
        return 0.0
    if task.kind == "regression":
        if len(x) == 1:
            return 0.0
        choose = partial(choose_value_head, x, y, feature_sd=around.feature_sd)
        own, shared = choose(width=around.width).score, choose(width=around.around_width, around=head).score
        return min(max(shared - own, -MOST), MOST)
    if len(x) == 1:
        told = apply_head(x.double(), head.double()).log_softmax(-1)[0, int(y)]
        return float(told) + math.log(classes)
    own, shared = (choose_head(x, y, classes, around=where).score for where in (None, head))
    return shared - own


def _read(adapter: RandomAdapter, task: Task, most: int, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Read the features and the targets of some rows of a task; of more rows than these they are drawn."""
    rows = drawn_rows(task.train, most)
    return head_features_of(adapter, task, rows, theta), rows.target


def pooled_head(read: Sequence[tuple[Task, Tensor, Tensor]], classes: list[str] | int) -> ClassHead:
    """Solve one head on the rows of several tasks, their classes numbered alike."""
    names = () if isinstance(classes, int) else tuple(classes)
    x = torch.cat([features for _, features, _ in read])
    y = torch.cat([_numbered(task, target, names) for task, _, target in read])
    spread = x.double().std(0)
    dead = spread < DEAD * spread.median()
    x = torch.where(dead, x.mean(0), x)  # as a constant it has no slope, else one that is beyond all proportion
    some = _drawn(x, CHOOSING)
    if read[0][0].kind == "regression":
        model, sd, _ = choose_value_head(x[some], y[some])
        width = best_width([(features, target) for _, features, target in read[:JUDGED]], spread)
        head = solve_head(x, columns_of(y), model, prior_sd=sd).head
        return ClassHead(head, width=width, feature_sd=spread.to(head))
    model = HeadModel(len(names) or int(classes))  # type: ignore[arg-type]
    width = choose_prior_sd(x[some], y[some], model).sd
    return ClassHead(solve_head(x, y, model, prior_sd=width).head, names)


def _drawn(x: Tensor, most: int) -> Tensor:
    """Draw the numbers of some rows, on their device."""
    return torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most].to(x.device)


def _numbered(task: Task, target: Tensor, names: tuple[str, ...]) -> Tensor:
    if not names or task.labels is None:
        return target
    return torch.tensor([names.index(name) for name in task.labels], device=target.device)[target]
