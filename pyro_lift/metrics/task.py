"""Scores of one task's predictions: accuracy, likelihood, calibration, and the task's own metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.data.text import TextRow
from pyro_lift.metrics.probabilities import class_scores
from pyro_lift.metrics.text import METRICS, score
from pyro_lift.models.likelihoods import IGNORED, shaped_as
from pyro_lift.models.task import Rows, Task

__all__ = ["Judged", "scores"]


def scores(probabilities: Tensor, rows: Rows, task: Task, texts: Sequence[TextRow] | None = None) -> dict[str, float]:
    """Score class predictions, predictions of tokens that are not ignored, or those of a regression.

    Args:
        probabilities: ``[n, C]``, of tokens ``[n, L, V]``, already averaged over draws; of a regression its mean
            ``[n]`` or ``[n, 1]``.
        rows: what they predict.
        task: for its kind, its labels and its metric.
        texts: the same rows as strings; they bring further accepted answers, and the options of multiple choice.

    Returns:
        ``accuracy``, ``nll`` in nats, ``ece`` and ``chance``, the frequency of the most common class; of tokens
        ``perplexity``, :math:`e^{\\mathrm{nll}}` with the end of a line counted as a token; of classes with a metric by
        CrossFit's names ``score``. Of a regression ``mse``, the mean squared error.
    """
    p, y = probabilities.cpu(), rows.target.cpu()
    if task.kind == "regression":
        p = shaped_as(p, y)
        if p.shape != y.shape:
            raise ValueError(f"task {task.name!r}: means have shape {list(p.shape)}, the targets {list(y.shape)}.")
        return {"mse": float((p - y).square().mean())}
    special: dict[str, float] = {}
    if task.kind == "tokens":
        p, y = p[y != IGNORED], y[y != IGNORED]
    elif task.metric in METRICS:
        special["score"] = score(task.metric, *_strings(p.argmax(-1), y, task, texts))
    common = class_scores(p, y)
    if task.kind == "tokens":
        special["perplexity"] = math.exp(common["nll"])
    return {**special, **common, "chance": float(torch.bincount(y).max()) / len(y)}


def _strings(
    guess: Tensor, target: Tensor, task: Task, texts: Sequence[TextRow] | None
) -> tuple[list[str], list[list[str]]]:
    """Return class numbers as the strings that they stand for; as numbers where nothing says what that is."""
    if texts is not None and task.labels is None:
        predictions = [row.options[k] for row, k in zip(texts, guess.tolist(), strict=True)]
    else:
        predictions = [_label(task, k) for k in guess.tolist()]
    if texts is not None:
        return predictions, [list(row.outputs) for row in texts]
    return predictions, [[_label(task, k)] for k in target.tolist()]


def _label(task: Task, k: int) -> str:
    # A shared head may have more outputs than the task has classes.
    return task.labels[k] if task.labels and k < len(task.labels) else str(k)


class Judged(NamedTuple):
    """One method's predictions for one task's test rows: ``[n, C]`` and ``[n]``."""

    method: str
    seed: int
    task: str
    probabilities: Tensor
    target: Tensor

    def record(self) -> dict[str, Any]:
        """Return a record: name, seed, task and the three scores."""
        scored = class_scores(self.probabilities, self.target)
        return {"method": self.method, "seed": self.seed, "task": self.task, **scored}
