"""A cell of a comparison: one method, meta-trained without the held-out tasks and adapted to each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.bench.records import Record
from pyro_lift.comparison.plan import Plan
from pyro_lift.comparison.problem import Fold, Problem, heads_of, measure_of, unexplained
from pyro_lift.comparison.settings import REFERENCE, CompareSettings, entrant
from pyro_lift.defaults import for_targets, resolved
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.inference.lost import ChainLostError
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.lift import asks_unseen
from pyro_lift.methods.registry import BASELINES, CHOOSING
from pyro_lift.metrics.probabilities import class_scores
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.archive import read_tensors, write_tensors
from pyro_lift.tuning.candidates import adaptations
from pyro_lift.tuning.held_out import judged
from pyro_lift.tuning.methods import tune_method, with_changes

__all__ = [
    "OutOfTimeError",
    "Work",
    "adaptations_of",
    "method_of",
    "predict_rows",
    "rate_of",
    "read_predictions",
    "run_cell",
]

#: Rows of a prediction's pass: a CPU likes few at a time, and text is padded to the longest of its pass.
PASS_ROWS = 32


class OutOfTimeError(Exception):
    """The budget is used up; cells that are done stay."""


class Work(NamedTuple):
    """What all cells share.

    Attributes:
        problem: tasks and network.
        folds: how the tasks are held out.
        settings: of the comparison.
        plan: the sizes.
        folder: for predictions.
        on_step: told the number of gradients made.
        deadline: seconds of ``time.monotonic`` at which a cell gives up; None for none.
        tuning_seconds: that a cell may choose its method's settings for; 0 for none.
    """

    problem: Problem
    folds: Sequence[Fold]
    settings: CompareSettings
    plan: Plan
    folder: Path
    on_step: Callable[[int], None]
    deadline: float | None = None
    tuning_seconds: float = 0.0

    def step(self, count: int = 1) -> None:
        """Tell of gradients made, and give up where time is up.

        Raises:
            OutOfTimeError: it is.
        """
        self.on_step(count)
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTimeError


def adaptations_of(method: str, plan: Plan) -> list[dict[str, float]]:
    """Return what a method chooses its adaptation from: multiples of LiFT's own rate, by the budget's field.

    One, without a meaning, where it chooses by itself. With rates that nobody gave, LiFT's largest comes with another
    power on the likelihood, as in the tuner (:func:`~pyro_lift.tuning.candidates.adaptations`).
    """
    rates = plan.rates[:1] if method in CHOOSING else plan.rates
    if method == REFERENCE and rates == tuple(CompareSettings.rates)[: len(rates)]:
        return [{"learning_rate": rate, "power": power} for rate, power in adaptations(plan.steps)[: len(rates)]]
    return [{"learning_rate": rate} for rate in rates]


def method_of(
    name: str, adapter: RandomAdapter, problem: Problem, settings: CompareSettings, sizes: Plan, **options: Any
) -> Baseline[Any]:
    """Set up a method of the registry with the plan's sizes.

    Args:
        name: of the registry.
        adapter: the network as a function of theta.
        problem: for LiFT's settings.
        settings: draws and minibatches.
        sizes: gradients and steps.
        options: further fields of the budget, such as the seed.
    """
    s = resolved(for_targets(problem.settings, problem.train), adapter)
    joint = s.sgd_steps / max(s.sgd_steps + s.burn_in + s.samples * s.thinning, 1) if name == REFERENCE else 0.5
    warm_up = min(round(joint * sizes.gradients), sizes.gradients - 1)
    visits = sizes.gradients - warm_up
    on_trial = name == REFERENCE and problem.settings.sgd_learning_rate is None
    if on_trial and problem.settings.noise_scale is None and asks_unseen(problem.train):
        warm_up = max(warm_up // 2, 1)  # the rest goes to halves of the tasks, which say what others cannot
    values: dict[str, Any] = {
        "warm_up": warm_up,
        "visits": visits,
        "warm_up_learning_rate": s.sgd_learning_rate,
        "learning_rate": sizes.rates[0] * rate_of(adapter, problem),
        "steps": sizes.steps,
        "batch_size": settings.batch_size,
        "draws": settings.draws,
        "heads": heads_of(problem),
        "noise_scale": s.noise_sd,
    }
    own: dict[str, Any] = {}
    if name == REFERENCE:
        values["meta_learning_rate"] = s.learning_rate
        own |= {"settings": problem.settings, "on_trial": on_trial}
    elif name == "union-train":
        values["meta_learning_rate"] = s.sgd_learning_rate
    elif name == "lora-tuned":  # chooses on the task's own rows, from as many rates as the others
        own["rates"] = tuple(rate * rate_of(adapter, problem) for rate in sizes.rates)
    elif name == "reptile":  # an outer step no longer than its share of the gradients
        own["tasks_per_step"] = 2
    return BASELINES[name](adapter, Budget(**{**values, **options}), **own)


def rate_of(adapter: RandomAdapter, problem: Problem) -> float:
    """Return LiFT's own rate of adaptation, of which the rates that are tried are multiples."""
    rate = problem.adapt.learning_rate or resolved(problem.settings, adapter).learning_rate
    assert rate is not None
    return rate


def run_cell(work: Work, *, method: str, seed: int, fold: int) -> dict[str, Any]:
    """Meta-train a method, adapt it to every held-out task at every rate, and score it.

    Where settings are tuned, that is done first, by tasks held out of those that the method learns from; there is one
    rate then.

    Predictions of classes are written beside the records, for temperatures that are fitted on other tasks.

    Returns:
        ``records``, one a task and rate, and ``predictions``, the table of the file written; None where none was;
        ``tuning_seconds`` where settings were tuned.

    Raises:
        OutOfTimeError: before it was done.
    """
    problem, plan, turn = work.problem, work.plan, work.folds[fold]
    work.step(0)
    adapter = problem.adapter(seed)
    first = method_of(method, adapter, problem, work.settings, plan, seed=seed)
    tuning, start = None, time.perf_counter()
    if work.settings.trials and method not in CHOOSING and len(turn.train) >= 3:
        trials, seconds = work.settings.trials, work.tuning_seconds
        first, tuning = tune_method(first, turn.train, held_out=turn.dev, trials=trials, seconds=seconds)
    tuning_seconds = time.perf_counter() - start
    start = time.perf_counter()
    state, failure = None, ""
    try:
        state = first.meta_train(turn.train, on_step=work.step)
    except (DivergedError, ChainLostError) as error:
        failure = f"meta-training: {error}"
    meta_seconds = time.perf_counter() - start
    records: list[Record] = []
    tensors: dict[str, Tensor] = {}
    own = rate_of(adapter, problem)
    for number, changes in enumerate(adaptations_of(method, plan) if tuning is None else [None]):
        contender = first
        if changes is not None:
            contender = with_changes(first, {**changes, "learning_rate": changes["learning_rate"] * own})
        for place, original in enumerate((*turn.judged, *turn.dev)):
            task = judged(original, work.settings.test_rows)
            record = {
                "method": method,
                "seed": seed,
                "fold": fold,
                "task": task.name,
                "part": "dev" if place >= len(turn.judged) else "judged",
                "rate": number,
                "meta_seconds": round(meta_seconds, 3),
                **({} if tuning is None else {"settings": tuning.chosen, "notes": list(tuning.notes)}),
            }
            if failure:
                records.append({**record, measure_of(task): None, "reason": failure})
                continue
            start = time.perf_counter()
            try:
                posterior = contender.adapt(state, task, seed=seed)
            except DivergedError as error:
                records.append({**record, measure_of(task): None, "reason": str(error)})
                continue
            seconds = time.perf_counter() - start
            scores, predicted = _scored(posterior, task)
            if predicted is not None:
                assert task.test is not None
                tensors |= {f"{number}.{place}": predicted, f"target.{place}": task.test.target}
            records.append(
                {**record, **scores, "adapt_seconds": round(seconds, 3), "bytes": _bytes(posterior), "place": place}
            )
            work.step(contender.budget.steps if entrant(method).steps else 0)
    file = work.folder / f"seed{seed}-fold{fold}-{method}.safetensors"
    told = {"records": records, "predictions": write_tensors(file, tensors) if tensors else None}
    return told if tuning is None else {**told, "tuning_seconds": round(tuning_seconds, 2)}


def _scored(posterior: Any, task: Task) -> tuple[dict[str, Any], Tensor | None]:
    """Score a posterior on the rows that its task is judged by; of classes, return the probabilities too."""
    assert task.test is not None
    p, y = predict_rows(posterior, task.test), task.test.target.cpu()
    if task.kind == "regression":
        return {"rows": len(y), "unexplained": unexplained(p, task)}, None
    if task.kind == "tokens":
        counted = y != IGNORED
        return {"rows": len(y), **class_scores(p[counted], y[counted])}, None
    return {"rows": len(y), **class_scores(p, y)}, p.float()


def predict_rows(posterior: Any, rows: Rows) -> Tensor:
    """Predict some rows, a few at a time."""
    parts = [posterior.predict(rows.take(slice(k, k + PASS_ROWS))) for k in range(0, len(rows), PASS_ROWS)]
    return torch.cat(parts).cpu()


def _bytes(posterior: Any) -> int:
    """Count what has to be kept of a task: draws of the adapter and of its head, each value once."""
    kept = getattr(posterior, "posterior", posterior)
    tensors = [getattr(kept, name, None) for name in ("thetas", "heads", "head")]
    return sum(torch.unique(x, dim=0).nbytes if x.dim() > 1 else x.nbytes for x in tensors if isinstance(x, Tensor))


def read_predictions(folder: Path, name: str, table: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Read the probabilities of a cell, by ``RATE.PLACE``, and the targets, by ``target.PLACE``.

    Raises:
        DamagedError: a file that is missing or not as it was written.
    """
    return {} if table is None else read_tensors(folder / f"{name}.safetensors", table)
