r"""Joint training on trial: what one half of the tasks teaches is judged on the other half.

Joint training moves phi at a rate that is set by the size of the weights, whatever the tasks are. Where they have much
in common that is the best start there is; where they have nothing in common, phi learns what is peculiar to the tasks
it has seen, and every later task begins at a worse network than the untouched one. Only tasks that were not trained on
can tell the two apart. So the tasks are dealt into two halves, one vector is trained on each from the common start
:math:`\phi_0`, and each task is judged by the vector of the half that it is not in,

.. math:: d_i = \ell_i(\phi_{\text{other half}}) - \ell_i(\phi_0), \qquad
          t = \bar d \,\Big/ \sqrt{\textstyle\sum_i (d_i - \bar d)^2 / (N (N - 1))},

with :math:`\ell_i` the mean log probability of the task's rows: of left-out rows, where its head is solved. Where the
one-sided test of :math:`\bar d > 0` is significant at 5 %, a rate three times as large is tried, for twice the steps.
It is taken where it helps too, unless it gains less by the same test: a short trial on half of the tasks favours small
rates, and at those joint training may take more steps than it gets; but tasks that are few are learned by heart at a
large rate, which shows after more steps alone. Where the first rate does not help, a smaller one is tried, and where
that does not help either, phi stays where it was.

**One odd task.** A task that is none of the kind (labels of another meaning, rows of another source) may lose more than
all others gain. It does not decide for them: where the mean without the task that loses most is above zero at
:data:`PLAIN`, joint training begins all the same, and which task it harms is said. A new task of that sort begins at
the untouched network, if its own rows say so.

The trial is short, a twelfth of the steps for each vector, since what harms does so at once; it comes before the steps
of joint training, which begin anew after it. Where a twelfth would say nothing, each vector gets
:data:`FEWEST_STEPS`, and where that leaves no room for a second rate, one is tried alone. To go on from the mean of the
halves' vectors would save steps, and costs more than it saves: 0.17 nats on digits, where the halves are twelve tasks
of ten rows.

**Few passes.** Where joint training sees the rows but a few times (:func:`~pyro_lift.tuning.joint_run.few_passes`),
nothing can be known by heart. There the halves are looked at after :data:`EARLY` steps already, and where the gain is
significant at :data:`PLAIN`, the trial ends with the first rate. What the rest would cost is better spent on joint
training, and no family of that kind (of fourteen) took the larger rate.

**Scarce steps.** Where the trial's steps are among those of joint training (``sgd_includes_trial``), it takes a third
of them. Where passes are not few but fewer than :data:`SOME_PASSES`, so that a large rate does not know the rows by
heart either, the larger rate is tried first, looked at after :data:`FEWEST_STEPS` steps already, and taken without
another trial where its gain is significant at :data:`PLAIN`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student_t
from torch import Tensor

from pyro_lift.inference.checkpoint.before import Work, WorkBefore
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.flat import FlatAdapter
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.task import Task
from pyro_lift.tuning.held_out import dealt
from pyro_lift.tuning.joint_run import JointRun

__all__ = [
    "FEWEST_TASKS",
    "SOME_PASSES",
    "TASKS",
    "Joint",
    "Score",
    "Vectors",
    "has_trial",
    "is_above_zero",
    "joint_on_trial",
    "log_probs_at",
    "paired",
    "steps_beside_trial",
    "trial_steps",
]

log = logging.getLogger("pyro_lift")

#: Two a half: the least that has an error of its own.
FEWEST_TASKS = 4
#: Rates that are tried, over the one that the weights call for, where that one helps and where it does not.
LARGER, SMALLER = 3.0, 0.2
#: Level of the one-sided test, and that at which a gain is plain.
LEVEL, PLAIN = 0.05, 0.0005
#: Share of trials that call a task odd where all are of a kind.
ODD = 0.01
#: Of the joint training's steps, those that each half gets.
SHARE = 1.0 / 12.0
#: Times as many for the larger rate.
LONGER = 2
#: Fewer steps than this a half say nothing.
FEWEST_STEPS = 20
#: Of the joint training's steps, those that the trial costs at most, both halves at every rate.
MOST_COST = 0.5
#: Tasks and rows that are judged at most: more would cost as much as the training.
TASKS, ROWS = 64, 48
#: Passes over the rows from which on they may be known by heart at the larger rate.
SOME_PASSES = 10.0
#: Steps of each half after which the first rate is looked at where nothing can be known by heart.
EARLY = (5, FEWEST_STEPS)

#: Joint training of some tasks, at a rate, for so many steps at most.
Begin = Callable[[Sequence[Task], float, int], JointRun]
#: Mean log probability a row, for each of some tasks, at one vector ``[D]``.
Score = Callable[[Tensor, Sequence[Task]], Tensor]


class Vectors(NamedTuple):
    """What is known of the vectors that are trained.

    Attributes:
        few: whether joint training makes few passes over the rows.
        parts: numbers of weights that their parts have, one for each adapter tensor; none takes them whole.
        scarce: whether the trial's steps are among those of joint training, and rows are seen too seldom to be learned
            by heart at the larger rate.
        one_may_lose: whether one odd task leaves the decision to the others; not in runs of before.
    """

    few: bool = False
    parts: Sequence[int] = ()
    scarce: bool = False
    one_may_lose: bool = True


class Tried(NamedTuple):
    """A rate on trial.

    Attributes:
        rate: of joint training.
        gain: mean of d over tasks, in nats a row.
        error: its standard error.
        helps: whether the gain is above zero by the test.
    """

    rate: float
    gain: float
    error: float
    helps: bool

    def gained(self) -> str:
        """Say how much."""
        return f"{self.gain:+.3f} ± {self.error:.3f}"


class Joint(NamedTuple):
    """What the trial of joint training has found.

    Attributes:
        rate: that helps; the last one that was tried where none does.
        steps: of all tasks' joint training; none where it does not help.
        gain: mean of d over tasks, in nats a row; of the rate that was taken, else of the last one.
        error: its standard error.
        helps: whether it begins.
        tried: the rates, in the order in which they were tried; empty of a run that was saved before they were kept.
        spent: gradients that the trial took; zero of a run that was saved before they were counted.
        against: the one task without which joint training helps, and with which it does not; empty where there is none.
        vectors: root mean square of what the halves' vectors moved by, by adapter tensor, after ``looked`` steps; empty
            of a run that was saved before it was kept.
        looked: steps of each half.
    """

    rate: float
    steps: int
    gain: float
    error: float
    helps: bool
    tried: tuple[Tried, ...] = ()
    spent: int = 0
    against: str = ""
    vectors: tuple[float, ...] = ()
    looked: int = 0

    def widths(self, steps: int) -> tuple[float, ...]:
        r"""Return how far n steps of joint training will move a weight, by adapter tensor; nothing where it is unknown.

        .. math:: \sqrt{\overline{(\phi_h - \phi_0)^2}\; n / n_h},

        for the :math:`n_h` steps of the halves: the path of a stochastic optimiser grows at least as the square root of
        its steps.
        """
        if not self.helps or not self.looked:
            return ()
        return tuple(x * math.sqrt(max(steps / self.looked, 1.0)) for x in self.vectors)

    def results(self) -> dict[str, float]:
        """Measures for the prior's folder and card."""
        return {"gain of joint training, nats a row": self.gain, "its standard error": self.error}

    def sentence(self) -> str:
        """Say it in words: what was tried, and which rate was taken for what reason."""
        tried = self.tried or (Tried(self.rate, self.gain, self.error, self.helps),)
        if not self.helps:
            return (
                f"joint training of the network is left out: it was tried at the {_rates(tried)}, where unseen tasks "
                f"gain no more than chance by it ({' and '.join(each.gained() for each in tried)} nats a row). So phi "
                f"stays at the untouched network, and nothing need be done. {self._against()}"
                "Another rate may still help: give one as sgd_learning_rate=, which is not put on trial. `pyro-lift "
                "compare` says what other methods make of these tasks."
            )
        by_rate = sorted(tried, key=lambda each: each.rate)
        lower = [each for each in by_rate if each.rate < self.rate]
        higher = [each for each in by_rate if each.rate > self.rate]
        why = ""
        if lower and lower[-1].helps:
            why = f"; of the rates that help it is the larger, and does not gain less than {lower[-1].rate:.2g} "
            why += f"({lower[-1].gained()}) by more than chance"
        elif higher:
            less = "gains less by more than chance" if higher[0].helps else "does not help by more than chance"
            why = f"; the larger rate, {higher[0].rate:.2g}, {less}"
        gained = f"{self.gain:+.3f} ± {self.error:.3f} nats a row on tasks that it has not seen"
        if self.against:
            gained += f", which {self.against!r} takes away: all others gain"
            why += f". Look at the rows of {self.against!r}, or leave it out"
        return f"joint training at {self.rate:.2g} helps ({gained}){why}. It begins, over all tasks."

    def _against(self) -> str:
        if not self.against:
            return ""
        return f"One task decides that: without {self.against!r} it would help. Look at its rows, or leave it out. "


def _rates(tried: Sequence[Tried]) -> str:
    return f"rate{'s' * (len(tried) > 1)} {' and '.join(f'{each.rate:.2g}' for each in tried)}"


def trial_steps(steps: int, tasks: int) -> int:
    """Return the steps of each half; 0 where there is no trial: too few tasks, or too little training."""
    each = _each(steps)
    return each if tasks >= FEWEST_TASKS and 2 * each <= MOST_COST * steps else 0


def has_trial(steps: int, tasks: int) -> bool:
    """Tell whether joint training can be put on trial, and say so in the log where it cannot: a warning of few tasks.

    Args:
        steps: of joint training.
        tasks: of meta-training.
    """
    if steps and not trial_steps(steps, tasks):
        least = math.ceil(2 * FEWEST_STEPS / MOST_COST)
        log.log(
            logging.WARNING if tasks < FEWEST_TASKS else logging.INFO,
            "joint training is not tried on unseen tasks, which takes %d steps and %d tasks (there are %d and %d): it "
            "begins, whether it helps or not.", least, FEWEST_TASKS, steps, tasks,
        )  # fmt: skip
    return trial_steps(steps, tasks) > 0


def _each(steps: int) -> int:
    return max(int(SHARE * steps), FEWEST_STEPS)


def _has_second(steps: int) -> bool:
    """Whether a second rate can be tried: both halves at the first, then at the larger one."""
    return 2 * (1 + LONGER) * _each(steps) <= MOST_COST * steps


def steps_beside_trial(gradients: int, tasks: int) -> int:
    """Return the most steps of joint training that fit into some gradients together with their trial.

    Args:
        gradients: of both.
        tasks: of meta-training.
    """
    for steps in range(gradients, 0, -1):
        dearest = 2 * (1 + LONGER * _has_second(steps)) * trial_steps(steps, tasks)
        if steps + dearest <= gradients:
            return steps
    return 0


def joint_on_trial(
    tasks: Sequence[Task],
    start: Tensor,
    rate: float,
    steps: int,
    begin: Begin,
    score: Score,
    kept: WorkBefore | None = None,
    *,
    of: Vectors | None = None,
) -> Joint:
    """Find whether joint training helps tasks that it has not seen, and at which rate.

    Args:
        tasks: of meta-training, four or more.
        start: where phi begins, ``[D]``.
        rate: that the size of the weights calls for.
        steps: of joint training, if it is to be; those of the trial come before them.
        begin: begins the training of one vector.
        score: judges one.
        kept: where vectors and the verdict are kept, for a run that goes on.
        of: what is known of the vectors; None takes them whole, and many passes.
    """
    of = of or Vectors()
    kept = kept or WorkBefore(None)
    data = kept.data("joint", lambda: _Trial(tasks, start, rate, steps, begin, score, kept, of).joint()._asdict())
    tried, vectors = tuple(Tried(*each) for each in data.get("tried", ())), tuple(data.get("vectors", ()))
    joint = Joint(**{**data, "tried": tried, "vectors": vectors})
    log.log(logging.INFO if joint.helps else logging.WARNING, "%s", joint.sentence())
    return joint


class _Trial:
    """The halves of the tasks, and what was tried on them so far."""

    def __init__(
        self,
        tasks: Sequence[Task],
        start: Tensor,
        rate: float,
        steps: int,
        begin: Begin,
        score: Score,
        kept: WorkBefore,
        of: Vectors,
    ) -> None:
        self.parts, self.of = list(of.parts) or [len(start)], of
        self.start, self.rate, self.steps, self.score, self.kept = start, rate, steps, score, kept
        self.begin, self.each = begin, trial_steps(steps, len(tasks))
        self.halves = dealt(tasks, 2)
        self.judged = [half[: TASKS // 2] for half in self.halves]
        before = torch.cat([score(start, half) for half in self.judged])
        self.told = before.isfinite()  # a task of one row has none to judge its head by
        self.before, self.against = before[self.told], ""
        self.tried: list[Tried] = []
        self.spent = 0

    def joint(self) -> Joint:
        """Try rates and return the verdict."""
        second, larger = _has_second(self.steps), None
        if self.of.scarce and second:
            larger = self._at(LARGER, [FEWEST_STEPS])
            if is_above_zero(larger[1] - self.before, PLAIN):
                return larger[0]._replace(tried=tuple(self.tried), spent=self.spent)
        taken, after = self._at(1.0, [look for look in EARLY if look < self.each] if self.of.few else [])
        if second and not taken.helps and not (larger and larger[0].helps):
            taken = self._at(SMALLER)[0]
        elif larger or (second and self.spent == 2 * self.each):
            larger = larger or self._at(LARGER)
            if larger[0].helps and not is_above_zero(after - larger[1]):
                taken = larger[0]
        against = taken.against if taken.helps else self.against
        return taken._replace(tried=tuple(self.tried), spent=self.spent, against=against)

    def _at(self, factor: float, looks: Sequence[int] = ()) -> tuple[Joint, Tensor]:
        """Try a rate for all its steps, or up to the first of some looks at which it gains plainly."""
        most = (LONGER if factor > 1.0 else 1) * self.each
        runs: list[JointRun | None] = [None for _ in self.halves]

        def vector(k: int, steps: int) -> Work:
            run = runs[k] = runs[k] or self.begin(self.halves[k], factor * self.rate, most)
            return run.to(steps).vector, {}

        for steps in [*looks, most]:
            name = f"{factor:g}" if steps == most else f"{factor:g}-{steps}"
            vectors = [self.kept.result(f"half-{k}-{name}", partial(vector, k, steps))[0] for k in range(2)]
            after = torch.cat([self.score(vectors[1 - k].to(self.start), half) for k, half in enumerate(self.judged)])
            after = after[self.told]
            gains = after - self.before
            if steps == most or is_above_zero(gains, PLAIN):
                break
        self.spent += 2 * steps
        (gain, error), helps = paired(gains), is_above_zero(gains)
        against = ""
        if not helps:
            against, helps = self._without_the_worst(gains)
            self.against = against or self.against
        log.info("joint training at %.2g on trial: %+.3f ± %.3f nats a row", factor * self.rate, gain, error)
        self.tried.append(Tried(factor * self.rate, gain, error, helps))
        verdict = Joint(factor * self.rate, self.steps if helps else 0, gain, error, helps, against=against)
        return verdict._replace(vectors=self._moved(vectors), looked=steps), after

    def _without_the_worst(self, gains: Tensor) -> tuple[str, bool]:
        """Name the task that alone keeps gains within chance, if there is one, and tell whether it may lose."""
        worst = int(gains.argmin())
        rest = torch.cat([gains[:worst], gains[worst + 1 :]])
        if len(rest) <= FEWEST_TASKS or not is_above_zero(rest):
            return "", False
        plain = is_above_zero(rest, PLAIN)
        if not plain and not _is_odd(float(gains[worst]), rest):
            return "", False
        names = [task.name for half in self.judged for task in half]
        return names[int(self.told.nonzero()[worst])], self.of.one_may_lose and plain

    def _moved(self, vectors: Sequence[Tensor]) -> tuple[float, ...]:
        """Return the root mean square of what both halves moved by, for each part of the vector."""
        square = torch.stack([(vector.to(self.start) - self.start).double().square() for vector in vectors]).mean(0)
        return tuple(float(part.mean().sqrt()) if len(part) else 0.0 for part in square.split(self.parts))


def _is_odd(least: float, rest: Tensor) -> bool:
    """Whether the least of some gains is no draw from the normal law of the rest, ``[N]``: one in a hundred says so.

    Of tasks that are all of a kind one loses most, and without it the others often gain by the test.
    """
    mean, error = paired(rest)
    of_one = error * math.sqrt(len(rest) + 1)  # standard error of a new value minus the mean
    return mean - least > of_one * float(student_t.isf(ODD / (len(rest) + 1), len(rest) - 1))


def is_above_zero(difference: Tensor, level: float = LEVEL) -> bool:
    """Whether a mean over tasks is above zero, by the one-sided test; ``[N]``."""
    mean, error = paired(difference)
    return mean > error * float(student_t.isf(level, len(difference) - 1))


def paired(difference: Tensor) -> tuple[float, float]:
    """Return the mean of differences ``[N]`` and its standard error."""
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def log_probs_at(
    adapter: RandomAdapter, theta: Tensor, tasks: Sequence[Task], *, head_scale: float | None, **options: Any
) -> Tensor:
    """Compute the mean log probability a row of each task at one vector, ``[N]`` in float64.

    Where a task's head is solved, each row is predicted by a head that other rows have solved, its width chosen anew;
    else the network as it stands predicts some of its rows.

    Args:
        adapter: the network as a function of theta.
        theta: weights ``[D]``.
        tasks: each with its training rows.
        head_scale: standard deviation of heads of their own; None where there are none.
        options: ``scale`` of label matching, ``noise_scale`` of regression, ``head_mean`` of heads of their own.
    """
    noise_scale, scale, mean = options.get("noise_scale", 1.0), options.get("scale"), options.get("head_mean")
    values = []
    for task in tasks:
        if has_solved_head(adapter, task, head_scale):
            heads = SolvedHeads(adapter, [task], theta, scale=scale, mean=mean, noise_scale=noise_scale)
            values.append(heads.score(0))
            continue
        prior = torch.distributions.Independent(torch.distributions.Normal(theta, 1.0), 1)
        program = FlatAdapter(adapter, task, prior, noise_scale=noise_scale)
        with torch.no_grad():
            values.append(float(program.log_likelihood(theta, most=ROWS)) / len(task.train))
    return torch.tensor(values, dtype=torch.float64)
