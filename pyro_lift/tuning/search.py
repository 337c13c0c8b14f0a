r"""Settings chosen on tasks that are held out, by successive halving: the one tuner of all methods.

Every rung of the ladder gets the same share of the time. In the first all candidates are meta-trained for a short
while and judged; in each of the next the better half goes on with twice as much,

.. math:: n_{r+1} = \lceil n_r / 2 \rceil,\qquad s_{r+1} = \min(1, 2 s_r),

with s the fraction of the whole length, 1 in the last rung where no time is given. A fifth of the tasks is held out,
another fifth in every rung, so that no candidate wins by luck on one of them; or tasks are given for it, all of which
judge in every rung. Candidates are compared within a rung, on the same tasks. A held-out task is
adapted to on its training rows and scored by the mean log probability of rows that it did not see. Candidates that
differ in their adaptation alone share one meta-training, and held-out tasks share passes where the method lets them.

References:
    Non-stochastic best arm identification and hyperparameter optimization, Jamieson and Talwalkar, 2016,
    arXiv:1502.07943.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_lift.inference.adaptation.class_rates import class_rates
from pyro_lift.inference.adaptation.temperature import Predicted, careful_temperature
from pyro_lift.inference.baselines.protocol import Posterior
from pyro_lift.inference.lost import ChainLostError
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.metrics.task import scores
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.task import Rows, Task
from pyro_lift.tuning.choosing import FAILED, choose
from pyro_lift.tuning.held_out import dealt, judged, that_can_be_judged
from pyro_lift.watching.watch import watch

__all__ = ["MOST_ROWS", "PARTS", "Candidate", "Contender", "Trial", "Tuning", "scored", "search", "trial_bar"]

#: Parts that the tasks are dealt into; one of them is held out at a time.
PARTS = 5
#: Fraction of the whole length that the first rung has at least.
LEAST_SHARE = 0.05
#: Rows that a held-out task is judged by, at most, and rows of a prediction's pass.
MOST_ROWS, PASS_ROWS = 64, 32


class Candidate(NamedTuple):
    """Settings to be tried.

    Attributes:
        name: in tables: what it changes.
        meta: settings of meta-training; candidates with the same share it.
        adapt: settings of adaptation.
    """

    name: str
    meta: Mapping[str, Any] = {}
    adapt: Mapping[str, Any] = {}


class Contender(Protocol):
    """A method with a candidate's settings."""

    def meta_train(self, tasks: Sequence[Task]) -> Any:
        """Learn from tasks; returns what :meth:`adapt` begins with."""
        ...

    def adapt(self, state: Any, tasks: Sequence[Task]) -> Sequence[Posterior]:
        """Learn new tasks, in one pass where that can be."""
        ...


@dataclass(frozen=True)
class Trial:
    """A candidate in one rung.

    Attributes:
        settings: the candidate's name.
        rung: 0, 1, ...
        share: of the whole length of meta-training.
        loss: mean over the held-out tasks; infinite where it diverged.
        seconds: it took, a meta-training that others share counted once, for its first.
    """

    settings: str
    rung: int
    share: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """A choice and how it was made.

    Attributes:
        chosen: name of the chosen candidate.
        meta: its settings of meta-training.
        adapt: its settings of adaptation.
        trials: every candidate in every rung.
        held_out: names of the tasks that the last rung was judged by.
        measure: ``"nll"`` in nats, or ``"mse"``.
        temperature: of predictions, fitted on the same rows; of regressions the factor on their variance that was
            found with their noise, None where that was given.
        dispersion: of regressions how unevenly they vary around their noise, found with it; else None.
        notes: what time did not allow.
    """

    chosen: str
    meta: Mapping[str, Any]
    adapt: Mapping[str, Any]
    trials: tuple[Trial, ...]
    held_out: tuple[str, ...]
    measure: str = "nll"
    temperature: float | None = None
    notes: tuple[str, ...] = field(default=())
    dispersion: Dispersion | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they are saved with a prior; a loss that is not finite becomes a large one."""
        plain = asdict(self)
        for trial in plain["trials"]:
            trial["loss"] = trial["loss"] if math.isfinite(trial["loss"]) else 1e9
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Tuning:
        """Make a choice of what :meth:`to_dict` returned; a trial that failed has the large loss.

        Example:
            >>> tuning = Tuning("as given", {}, {"rate": 1e-4}, (Trial("as given", 0, 1.0, 0.5, 2.0),), ("a", "b"))
            >>> Tuning.from_dict(tuning.to_dict()) == tuning
            True
        """
        trials = tuple(Trial(**trial) for trial in plain["trials"])
        held_out, notes = tuple(plain["held_out"]), tuple(plain["notes"])
        read = {"trials": trials, "held_out": held_out, "notes": notes}
        return cls(**{**plain, **read, "dispersion": Dispersion.read(plain.get("dispersion"))})

    def table(self) -> str:
        """Format the trials, the last rung on top, best first."""
        lines = [f"{'rung':>4}  {'share':>5}  {self.measure:>8}  settings"]
        for trial in sorted(self.trials, key=lambda trial: (-trial.rung, trial.loss)):
            mark = "*" if trial.settings == self.chosen and trial.rung == self.trials[-1].rung else " "
            loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "failed"
            lines.append(f"{trial.rung:>4}  {trial.share:>5.2f}  {loss:>8} {mark}{trial.settings}")
        failed = sum(not math.isfinite(trial.loss) for trial in self.trials)
        why = "failed: the loss stopped being finite or climbed back to chance"
        notes = [*([f"{why} ({failed} of {len(self.trials)})"] if failed else []), *self.notes]
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def search(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate, float], Contender],
    tasks: Sequence[Task],
    *,
    seconds: float | None,
    held_out: Sequence[Task] = (),
    tie: float = 0.0,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Choose among candidates, within a time or without one.

    Args:
        candidates: the first is the default: it wins ties, and stays where time allows no other.
        make: from a candidate and a fraction of the whole length to the method.
        tasks: of meta-training; those held out in a rung are not learned from in it.
        seconds: after which no trial is begun; one that is under way ends. None goes up the whole ladder, whose last
            rung has the whole length: the same choice on every machine.
        held_out: tasks to judge by, in every rung; without them ``tasks`` are held out in turn.
        tie: candidates within so many nats of a rung's best are taken for equally good; of them the one with the lowest
            ECE goes first (:func:`~pyro_lift.tuning.choosing.choose`).
        on_trial: told of each, for a bar.

    Raises:
        ValueError: no candidate; fewer than three tasks where none are given to judge by.
    """
    if not candidates:
        raise ValueError("candidates is empty: there is nothing to choose from.")
    told = on_trial or (lambda trial: None)
    return _Search(list(candidates), make, _Split(tasks, held_out), seconds, tie, told).run()


@contextmanager
def trial_bar(show: bool = True, callbacks: Any = ()) -> Iterator[Callable[[Trial], None]]:
    """Show the trials as they are made, and tell callbacks; the bar is hidden under CI and xdist, as other bars."""
    hidden = not show or "CI" in os.environ or "PYTEST_XDIST_WORKER" in os.environ
    with (
        watch(callbacks, "tune") as watchers,
        # Not before there has been time to refuse the tasks.
        tqdm(unit="trial", desc="tune", disable=hidden, dynamic_ncols=True, delay=0.5) as bar,
    ):

        def told(trial: Trial) -> None:
            bar.set_postfix_str(f"rung {trial.rung + 1}, {trial.loss:.3f}: {trial.settings}", refresh=False)
            bar.update()
            phase = f"rung {trial.rung + 1}: {trial.settings}"
            watchers.tell(phase=phase, loss=trial.loss, seconds=trial.seconds)

        yield told


class _Judged(NamedTuple):
    """A candidate's scores on held-out tasks, and the predictions that a temperature is fitted to."""

    scores: list[Mapping[str, float]]
    predictions: list[Predicted]


class _Split:
    """Tasks to learn from and tasks to be judged by, rung by rung."""

    def __init__(self, tasks: Sequence[Task], held_out: Sequence[Task] = ()) -> None:
        self.tasks, self.given = list(tasks), that_can_be_judged(held_out, "left out")
        fit = [] if self.given else that_can_be_judged(self.tasks, "learned from, and not held out")
        if not self.given and (len(tasks) < 3 or not fit):
            few = f"{len(tasks)} tasks" + (", none with two rows" if len(tasks) >= 3 else "")
            raise ValueError(f"{few}: tuning holds some out and learns from two or more. Give three or more.")
        self.parts = dealt(fit, min(PARTS, len(fit))) if fit else []
        self.kind = (self.tasks or self.given)[0].kind

    def held_out(self, rung: int) -> list[Task]:
        """Return the tasks that a rung is judged by, each with rows that adaptation does not see."""
        return [judged(task, MOST_ROWS) for task in self.given or self.parts[rung % len(self.parts)]]

    def of(self, rung: int) -> tuple[list[Task], list[Task]]:
        """Return the tasks that a rung learns from, and those that it is judged by."""
        held_out = self.held_out(rung)
        names = set() if self.given else {task.name for task in held_out}
        return [task for task in self.tasks if task.name not in names], held_out


def _rungs(candidates: int) -> int:
    """Return how many rungs so many candidates climb until one or two are left."""
    return max(math.ceil(math.log2(candidates)), 1)


def _climb(candidates: int) -> int:
    """Return what so many candidates cost from rung to rung, in trials of the first: half of them, twice as long."""
    return sum(math.ceil(candidates / 2**rung) * 2**rung for rung in range(_rungs(candidates)))


class _Search:
    """The state of a search: what is known of costs, and when it has to end."""

    def __init__(
        self,
        candidates: list[Candidate],
        make: Callable[[Candidate, float], Contender],
        split: _Split,
        seconds: float | None,
        tie: float,
        on_trial: Callable[[Trial], None],
    ) -> None:
        self.candidates, self.make, self.split, self.on_trial = candidates, make, split, on_trial
        self.start = time.monotonic()
        self.seconds, self.tie = seconds, tie
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.whole, self.adapting = 0.0, 0.0  # seconds of a meta-training of the whole length, and of an adaptation

    def run(self) -> Tuning:
        """Climb the rungs."""
        going, share, rungs = self._begin()
        last: dict[str, _Judged] = {}
        reached = 0
        for rung in range(rungs):
            if rung:
                going = going[: (len(going) + 1) // 2]
                share = min(1.0, max(2.0 * share, self._share(going, rungs - rung)))
            complete = self._rung(going, rung, share)
            if not complete:
                self.notes.append(f"time ran out in rung {rung + 1} of {rungs}")
                break
            last, reached = complete, rung
            going = self._ranked([c for c in going if c.name in last], last)
        best = going[0]
        predictions = last[best.name].predictions
        return Tuning(
            best.name,
            best.meta,
            best.adapt,
            tuple(self.trials),
            tuple(task.name for task in self.split.held_out(reached)),
            "mse" if self.split.kind == "regression" else "nll",
            careful_temperature(predictions) if predictions else None,
            tuple(self.notes),
        )

    def _begin(self) -> tuple[list[Candidate], float, int]:
        """Time the first candidate, and return the candidates, the share of the first rung, and the number of rungs."""
        going = self.candidates
        if len(going) == 1:
            return going, 1.0, 1
        rungs = _rungs(len(going))
        if self.seconds is None:
            return going, 0.5 ** (rungs - 1), rungs
        learned, held_out = self.split.of(0)
        self._judge(self.make(going[0], LEAST_SHARE), {}, "", learned, held_out)
        trainings = len({repr(sorted(c.meta.items())) for c in going})
        each = max(self.adapting + self.whole * trainings / len(going), 1e-9)
        # Fewer candidates climb fewer rungs, each of which has the more time.
        room = max((n for n in range(2, len(going) + 1) if _climb(n) * each <= self._left()), default=1)
        if room < len(going):
            self.notes.append(f"{room} of {len(going)} candidates were tried: there was no time for more")
            going = going[:room]
        rungs = _rungs(room)
        return going, min(1.0, max(LEAST_SHARE, self._share(going, rungs))), rungs

    def _rung(self, going: Sequence[Candidate], rung: int, share: float) -> dict[str, _Judged]:
        """Judge the candidates of a rung; none are returned where time ran out, but for those of the first rung."""
        learned, held_out = self.split.of(rung)
        found: dict[str, _Judged] = {}
        states: dict[str, Any] = {}
        for place, candidate in enumerate(going):
            if self._left() <= 0.0 and (rung or place):
                break
            begun = time.monotonic()
            contender = self.make(candidate, share)
            key = repr(sorted(candidate.meta.items()))
            result = self._judge(contender, states, key, learned, held_out)
            found[candidate.name] = result
            seconds = time.monotonic() - begun
            loss = statistics.fmean(score["nll"] for score in result.scores)
            trial = Trial(candidate.name, rung, share, loss, round(seconds, 2))
            self.trials.append(trial)
            self.on_trial(trial)
        return found if rung == 0 or len(found) == len(going) else {}

    def _judge(
        self,
        contender: Contender,
        states: dict[str, Any],
        key: str,
        learned: Sequence[Task],
        held_out: Sequence[Task],
    ) -> _Judged:
        try:
            if key not in states:
                begun = time.monotonic()
                states[key] = contender.meta_train(learned)
                self.whole = max(self.whole, time.monotonic() - begun)
            begun = time.monotonic()
            posteriors = contender.adapt(states[key], held_out)
            result = _Judged([], [])
            for task, posterior in zip(held_out, posteriors, strict=True):
                score, pair = scored(posterior, task)
                result.scores.append(score)
                result.predictions.extend(pair)
            self.adapting = max(self.adapting, time.monotonic() - begun)
        except (DivergedError, ChainLostError):
            return _Judged([FAILED], [])
        return result

    def _ranked(self, going: Sequence[Candidate], found: Mapping[str, _Judged]) -> list[Candidate]:
        """Order the candidates, best first: by mean NLL, the earlier of equals."""
        left, ranked = list(going), []
        while left:
            best = choose(left, [found[c.name].scores for c in left], tie=self.tie).best
            ranked.append(best)
            left.remove(best)
        return ranked

    def _share(self, going: Sequence[Candidate], rungs_left: int) -> float:
        """The fraction of the whole length that a rung's part of the time has room for; 0 where none is given."""
        if self.seconds is None:
            return 0.0
        trainings = len({repr(sorted(c.meta.items())) for c in going})
        done = max((trial.share for trial in self.trials), default=LEAST_SHARE)
        room = self._left() / rungs_left - len(going) * self.adapting
        return room / max(trainings * self.whole / done, 1e-9)

    def _left(self) -> float:
        return math.inf if self.seconds is None else self.seconds - (time.monotonic() - self.start)


def scored(posterior: Posterior, task: Task) -> tuple[Mapping[str, float], list[Predicted]]:
    """Score one task on its test rows; of classes, return what a temperature is fitted to too."""
    assert task.test is not None
    p = _predicted(posterior, task.test)
    values = scores(p, task.test, task)
    if task.kind == "regression":
        return {"nll": values["mse"], "ece": 0.0}, []
    losses = {"nll": values["nll"], "ece": values["ece"]}
    if task.kind == "tokens":
        return losses, []
    counts = getattr(posterior, "class_counts", None)
    if counts is not None:  # LiFT's predicts at a temperature around their rates, and nothing past the task's classes
        p = p[..., : task.test.classes]
    return losses, [Predicted(p, task.test.target.cpu(), class_rates(counts, p.shape[-1]))]


def _predicted(posterior: Posterior, rows: Rows) -> Tensor:
    parts = [posterior.predict(rows.take(slice(k, k + PASS_ROWS))) for k in range(0, len(rows), PASS_ROWS)]
    return torch.cat(parts).cpu()
