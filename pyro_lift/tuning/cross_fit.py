r"""How long joint training goes on, and how sure its predictions may be: what tasks say that it has not seen.

A few tasks of a few rows are soon known by heart. Predictions of rows that were trained on cannot tell: they are right,
and sure of it. So the tasks are dealt into two halves as in the trial (:mod:`~pyro_lift.tuning.halves`), one vector is
trained on each at the rate that the trial chose, and each task is judged by the vector of the half that it is not in.

**Length.** A half of the tasks in half of the steps visits each as often as all of them in all the steps. At an eighth,
a quarter, a half and the whole of these steps every task is judged by the mean log probability of its rows, classes at
the temperature that is best for all of them: how sure predictions are is the other question. Joint training gets
the best of those lengths above the best one that are not worse than it by the paired one-sided test at 5 %, since
halves know their fewer tasks by heart sooner than all tasks are known; where there is none, the best length itself. The
halves end where a length is worse than a shorter one by the test.

**Temperature.** A chain of each half goes on from its vector (:mod:`~pyro_lift.tuning.half_chain`). From where it
arrives tasks of the other half are adapted to, and one temperature is fitted to predictions of rows that were set apart
(:mod:`~pyro_lift.inference.adaptation.temperature`). They are test or dev rows where tasks have them: a network that
was trained on the tasks' own rows is sure of those. Else they are a quarter of its rows, and it is adapted to on the
others. No test decides: a few rows say little. Above 1 it is taken as found, since to be too sure costs more than to be
too unsure, but half of the tasks and three quarters of the rows leave predictions surer than all of them will: it is
divided by :data:`HALVED`, down to 1, so that 4.17 is the highest. Below 1 predictions are rows of their own
(:mod:`~pyro_lift.inference.adaptation.temperature`), and it holds for tasks of as many rows
(:mod:`~pyro_lift.inference.adaptation.tempered_rows`). Where joint training does not begin, tasks are adapted to from
the untouched network; from there and on all of their rows nothing is exaggerated. Heads that stand around one head of
all tasks stand here around that of the other half.

**Draws that stay.** How many draws of an adaptation stay at its start is found from the same predictions, before the
temperature: :mod:`~pyro_lift.tuning.unmoved_share`; of tokens :mod:`~pyro_lift.tuning.share_of_tokens`.

**Heads of few rows.** On features where the chain of the other half arrives, tasks say what prior they have
(:mod:`~pyro_lift.tuning.usual_priors`).

**Noise of regressions.** In place of a temperature, where it was left open: :mod:`~pyro_lift.tuning.noise`, by
adaptations from the halves' vectors.

**Power in adaptation.** In place of a temperature where tasks are of tokens: :mod:`~pyro_lift.tuning.strength`; of
regressions beside the noise; of classes that the network has itself, before the temperature:
:mod:`~pyro_lift.tuning.class_power`.

It costs as many gradients again as joint training, and for a temperature as the chain. Where joint training makes few
passes over the rows (:func:`~pyro_lift.tuning.joint_run.few_passes`), nothing can be known by heart, and there is none;
noise is found from the untouched network then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.inference.adaptation.temperature import HIGHEST, Predicted, careful_temperature, fit_temperature
from pyro_lift.inference.adaptation.tempered_rows import TemperedRows, tempered_rows
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.dispersion import UNKNOWN, Dispersion
from pyro_lift.models.heads import FewRows, UsualPrior
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Task
from pyro_lift.tuning.class_power import at_best_power
from pyro_lift.tuning.halves import TASKS, Begin, Joint, Score, is_above_zero, paired
from pyro_lift.tuning.held_out import dealt, has_unseen_rows, judged
from pyro_lift.tuning.joint_run import Standing
from pyro_lift.tuning.noise import EXAGGERATED, Noise, fitted_noise, less_exaggerated
from pyro_lift.tuning.predictions import least_losses, loss_of
from pyro_lift.tuning.share_of_tokens import TokenLogProbs, share_of_tokens
from pyro_lift.tuning.strength import TASKS as STRENGTH_TASKS
from pyro_lift.tuning.strength import stronger_where_better

__all__ = ["MARKS", "CrossFit", "cross_fit", "helpful_temperature", "predicted", "rows_apart"]

log = logging.getLogger("pyro_lift")

#: Factor on the variance of predictions from which on it is not sureness that is wrong.
FAR_OFF = 100.0
#: Shares of the steps at which the halves are judged.
MARKS = (0.125, 0.25, 0.5, 1.0)
#: Parts of a task's rows, of which one is predicted from the others.
PARTS = 4
#: Adaptations from each half, and rows that are predicted after each, at most.
ADAPTED, ROWS = 12, 50
#: Factor by which tasks that are adapted to after a chain of half of the others, on a part of their rows, exaggerate a
#: temperature: 0.8 to 1.9 on 17 families, 1.2 in the mean of logarithms.
HALVED = 1.2

#: Posteriors of some tasks, adapted to from where joint training of others stands, at a noise (of regressions; None
#: elsewhere) and with a power on the likelihood over meta-training's.
Adapt = Callable[[Standing, Sequence[Task], float | None, float], Sequence[Any]]


class Judge(NamedTuple):
    """How tasks are judged that joint training has not seen.

    Attributes:
        score: of one vector, as in the trial.
        predict: probabilities ``[n, C]`` of some rows of a task at one vector, and their targets; None where they are
            not of classes.
        adapt: gives posteriors of tasks; None fits neither temperature, noise nor power.
        noise: of regressions to begin with, where it is to be found; None otherwise.
        strength: whether the power in adaptation is to be found, in place of a temperature or beside the noise.
        usual_share: of draws that stay at the start of an adaptation, where another one may be found: ``adapt`` then
            leaves one of several there. None finds none.
        few_rows: asked after the adaptations, where those of the chain's end say what prior heads of few rows have;
            None leaves it to the untouched network.
        powers: on the likelihood in adaptation to classes, tried beside 1; none in runs of before.
        fades: whether a temperature above 1 holds less for many more rows; in runs of before it did not.
        token_log_probs: of tokens at one vector, where the share of draws that stay is found by them; None finds none.
        dispersed: whether regressions say how unevenly they vary; in runs of before all are alike.
        few_values: asks regressions what prior heads of few rows have, at the vectors that each half of the tasks has
            not trained, under the noise that was found; None in runs of before, and of classes.
        careful: whether a temperature below 1 is fitted with care, and holds for tasks of as many rows; in runs of
            before it is taken where it is better by the test, and holds for all.
    """

    score: Score
    predict: Callable[[Tensor, Task], Predicted] | None = None
    adapt: Adapt | None = None
    noise: float | None = None
    strength: bool = False
    usual_share: float | None = None
    few_rows: Callable[[], FewRows] | None = None
    careful: bool = True
    few_values: Callable[[Sequence[Tensor], float], FewRows] | None = None
    dispersed: bool = True
    powers: Sequence[float] = ()
    fades: bool = True
    token_log_probs: TokenLogProbs | None = None

    def log_probs(self, vectors: Sequence[Tensor], halves: Sequence[Sequence[Task]]) -> Tensor:
        """Compute each task's mean log probability a row, classes at the best temperature for all.

        Args:
            vectors: ``[D]``, one for each half.
            halves: the tasks.
        """
        crossed = list(zip(vectors, halves, strict=True))
        if self.predict is None:
            return torch.cat([self.score(vector, half) for vector, half in crossed])
        pairs = [self.predict(vector, task) for vector, half in crossed for task in half]
        return -least_losses(pairs)


class CrossFit(NamedTuple):
    """What unseen tasks say of joint training.

    Attributes:
        steps: of all tasks' joint training; None leaves them as they are.
        temperature: of predictions; 1 where no other is better. Of regressions the factor on their variance.
        looks: the steps, the gain over the first look in nats a row and its standard error, for each length that was
            tried.
        noise: of regressions, standard deviation; None where it was not to be found.
        power: on the likelihood in adaptation, over meta-training's.
        unmoved: share of the draws that stay at the start of an adaptation; None leaves it as it is.
        losses: of the tasks that were adapted to, at that temperature and share, nats a row; of regressions as of
            :class:`~pyro_lift.tuning.noise.Noise`.
        few_rows: numbers of rows and the prior of heads of so many, where joint training goes on.
        rows: of the tasks that the temperature was found at, and below 1 holds for; None holds for all.
        dispersion: how unevenly regressions vary around the noise; None where they were not asked.
    """

    steps: int | None
    temperature: float
    looks: tuple[tuple[int, float, float], ...] = ()
    noise: float | None = None
    power: float = 1.0
    unmoved: float | None = None
    losses: tuple[float, ...] = ()
    few_rows: FewRows = ()
    rows: TemperedRows | None = None
    dispersion: Dispersion | None = None

    def results(self) -> dict[str, float]:
        """Measures for the prior's folder and card."""
        found = {"steps of joint training": self.steps, "noise of targets": self.noise}
        if self.power != 1.0:
            found["power in adaptation, over meta-training's"] = self.power
        found["share of draws at the start of an adaptation"] = self.unmoved
        return {name: value for name, value in found.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Return what was found as fields of :class:`~pyro_lift.settings.LiFTSettings`."""
        found = {"sgd_steps": self.steps, "noise_scale": self.noise}
        return {name: value for name, value in found.items() if value is not None}

    def doubt(self) -> str:
        """Say where widths of regressions were so far off that something else than the noise is wrong, or nothing."""
        if self.noise is None or self.temperature < FAR_OFF:
            return ""
        return (
            f"predictions of rows left out were off by {self.temperature**0.5:.3g} of their own standard deviations "
            "(root mean square), and all widths are multiplied by that. A single task can do this: look for one whose "
            "targets are in another unit, or the same in every row; and for rows that the network was trained on."
        )

    def sentence(self, tempered: bool = True) -> str:
        """Say it in words; of the temperature only where one was looked for (``tempered``)."""
        tried = ", ".join(f"{steps}: {gain:+.3f} ± {error:.3f}" for steps, gain, error in self.looks)
        length = (
            f"joint training gets {self.steps} steps (tasks that it has not seen, nats a row over the fewest steps: "
            f"{tried}; more steps than the best are taken where they are not worse than it by more than chance, since "
            "halves of the tasks, which this is of, overfit sooner than all of them)"
        )
        if self.noise is not None:
            return (
                f"{length + '; ' if self.looks else ''}targets are taken to lie around the network's output with a "
                f"standard deviation of {self.noise:.3g}; the variance of predictions is multiplied by "
                f"{self.temperature:.2f}."
            )
        sure = f"predictions are brought to the temperature {self.temperature:.2f}"
        if self.temperature >= HIGHEST / HALVED:
            sure += ", the highest there is: they were wrong and sure of it"
        if self.temperature < 1.0 and self.rows is not None:
            sure += f" of tasks of {self.rows.rows:.0f} rows or more: they were right more often than they were sure"
        if self.temperature == 1.0:
            sure = "predictions stay as they are: they are about as sure as they are right"
        parts = [length] if self.looks else []
        if self.unmoved is not None:
            parts.append(f"{self.unmoved:.0%} of the draws stay at the start of an adaptation to few rows")
        if tempered:
            parts.append(sure)
        return f"{'; '.join(parts)}." if parts else ""


def cross_fit(
    tasks: Sequence[Task],
    start: Tensor,
    joint: Joint | None,
    begin: Begin,
    judge: Judge,
    kept: WorkBefore | None = None,
) -> CrossFit:
    """Find the length of joint training, and the temperature of predictions or the noise of regressions.

    Args:
        tasks: of meta-training, four or more.
        start: the untouched adapter, ``[D]``.
        joint: what the trial said; where joint training does not help, all tasks are adapted to from the untouched
            network, and no length is found. None where its length is not in question: likewise.
        begin: begins it on some tasks.
        judge: of tasks that a vector has not seen.
        kept: where the answer is kept, for a run that goes on.
    """
    kept = kept or WorkBefore(None)
    data = kept.data("cross-fit", lambda: _cross_fit(tasks, start, joint, begin, judge)._asdict())
    looks, losses = tuple(tuple(look) for look in data["looks"]), tuple(data.get("losses", ()))
    few = tuple((rows, UsualPrior(*usual)) for rows, usual in data.get("few_rows", ()))
    rows = None if data.get("rows") is None else TemperedRows(*data["rows"])
    read = {"looks": looks, "losses": losses, "few_rows": few, "rows": rows}
    fit = CrossFit(**{**data, **read, "dispersion": Dispersion.read(data.get("dispersion"))})
    if said := fit.sentence(judge.adapt is not None and not judge.strength):
        log.info("%s", said)
    if doubt := fit.doubt():
        log.warning("%s", doubt)
    return fit


def _cross_fit(tasks: Sequence[Task], start: Tensor, joint: Joint | None, begin: Begin, judge: Judge) -> CrossFit:
    halves = dealt(tasks, 2)
    if joint is None or not joint.helps:
        return _sureness(CrossFit(None if joint is None else 0, 1.0), [Standing(start, {})] * 2, halves, judge)
    marks = [max(round(share * joint.steps / 2), 1) for share in MARKS]
    runs = [begin(half, joint.rate, marks[-1]) for half in halves]
    told: list[Tensor] = []
    standings: list[list[Standing]] = []  # each for the half that it has not seen
    best = 0
    for mark in marks:
        standings.append([run.to(mark) for run in reversed(runs)])
        told.append(judge.log_probs([s.vector for s in standings[-1]], [half[: TASKS // 2] for half in halves]))
        if told[-1].mean() > told[best].mean():
            best = len(told) - 1
        if is_above_zero(told[best] - told[-1]):
            break
    longer = [k for k in range(best + 1, len(told)) if not is_above_zero(told[best] - told[k])]
    place = max(longer, key=lambda k: float(told[k].mean()), default=best)
    looks = tuple((2 * mark, *paired(values - told[0])) for mark, values in zip(marks, told, strict=False))
    length = joint.steps if marks[place] == marks[-1] else 2 * marks[place]
    return _sureness(CrossFit(length, 1.0, looks), standings[place], halves, judge)


def _sureness(
    found: CrossFit, standings: Sequence[Standing], halves: Sequence[Sequence[Task]], judge: Judge
) -> CrossFit:
    """Find the temperature, the noise or the power by predictions of each half's tasks, unseen by joint training."""
    adapt = judge.adapt
    if adapt is None:
        return found
    tokens = judge.token_log_probs
    few = tokens is not None or (judge.strength and judge.noise is None)
    unseen = [_split(half, min(STRENGTH_TASKS, len(half))) if few else rows_apart(half, ADAPTED) for half in halves]

    apart = all(any(has_unseen_rows(task) for task in half) for half in halves)
    exact = apart and not found.looks
    if judge.noise is not None and not apart:
        log.info(
            "the noise is found on training rows that tasks are not adapted to. If the network was trained on these "
            "rows before, it knows them by heart and predictions come out too narrow: give tasks test= or dev= rows."
        )

    def adapted(noise: float | None, power: float = 1.0) -> Iterator[tuple[Any, Task]]:
        for standing, some in zip(standings, unseen, strict=True):
            yield from zip(adapt(standing, some, noise, power), some, strict=True)

    if few:
        at = cache(lambda power: list(adapted(None, power)))
        power = stronger_where_better(at, judge.score) if judge.strength else 1.0
        share = None if tokens is None else share_of_tokens(at(power), tokens)
        return found._replace(power=power, unmoved=share)
    if judge.noise is not None:
        sure = 1.0 if exact else EXAGGERATED
        asked = {"stronger": judge.strength, "dispersed": judge.dispersed}
        noise = fitted_noise(judge.noise, adapted, sure, **asked) or Noise(judge.noise, 1.0)
        found = found._replace(temperature=noise.temperature, noise=noise.scale, power=noise.power)
        found = found._replace(dispersion=(noise.dispersion or UNKNOWN) if judge.dispersed else None)
        found = found._replace(losses=noise.losses)
        if judge.few_values is None or not found.looks:  # without joint training all vectors are the start
            return found
        return found._replace(few_rows=judge.few_values([standing.vector for standing in standings], noise.scale))
    best = at_best_power(lambda power: list(adapted(None, power)), judge.powers, judge.usual_share)
    if not best.predictions:
        return found
    temperature = helpful_temperature(best.predictions, 1.0 if exact else HALVED, careful=judge.careful)
    rows = tempered_rows([task for _, task in best.adapted], fades=judge.fades) if judge.careful else None
    losses = tuple(loss_of(each, temperature) for each in best.predictions)
    few_rows = () if judge.few_rows is None else judge.few_rows()
    found = found._replace(temperature=temperature, power=best.power, unmoved=best.share, rows=rows)
    return found._replace(losses=losses, few_rows=few_rows)


def predicted(adapter: RandomAdapter, vector: Tensor, task: Task) -> Predicted:
    """Predict some rows of a task at one vector ``[D]``, without adapting to it."""
    rows = task.train.take(slice(0, ROWS))
    return Predicted(predict(adapter, vector.unsqueeze(0), rows), rows.target)


def rows_apart(tasks: Sequence[Task], most: int) -> list[Task]:
    """Set rows of tasks apart, to be predicted: test or dev rows where some of the tasks have them, else training rows.

    A network that was trained on the tasks' own rows is sure of them. Only others say how wrong it is.

    Args:
        tasks: with rows of any number.
        most: tasks to return.
    """
    unseen = [judged(task, ROWS) for task in tasks if has_unseen_rows(task)]
    return unseen[:most] or _split(tasks, most)


def _split(tasks: Sequence[Task], most: int) -> list[Task]:
    """Split tasks' training rows in four, of which each in turn is predicted.

    Args:
        tasks: those of fewer than four rows are left out.
        most: tasks to return; of fewer tasks than these the second part of each is predicted too, and so on.
    """
    split: list[Task] = []
    tasks = [task for task in tasks if len(task.train) >= PARTS]
    for part in range(PARTS):
        for task in tasks[: most - len(split)]:
            order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
            left_out = torch.arange(len(order)) % PARTS == part
            rows, others = (task.train.take(order[where].sort().values) for where in (left_out, ~left_out))
            if task.kind == "tokens" and not all((part.target != IGNORED).any() for part in (rows, others)):
                continue  # tokens that count are all on one side
            split.append(replace(task, train=others, test=rows.take(slice(0, ROWS)), dev=None))
    return split


def helpful_temperature(
    predictions: Sequence[Predicted], exaggerated: float = HALVED, *, careful: bool = True
) -> float:
    """Return the fitted temperature: above 1 less what halves exaggerate, below 1 with care.

    Args:
        predictions: of each task, of rows that it was not adapted to.
        exaggerated: factor by which a temperature above 1 is too high.
        careful: as of :func:`.careful_temperature`; else one below 1 is taken as it is, where it lowers the loss by the
            test.
    """
    temperature = (careful_temperature if careful else fit_temperature)(predictions)
    if temperature > 1.0:
        return less_exaggerated(temperature, exaggerated)
    if careful:
        return temperature
    gains = [loss_of(each, 1.0) - loss_of(each, temperature) for each in predictions]
    return temperature if is_above_zero(torch.tensor(gains, dtype=torch.float64)) else 1.0
