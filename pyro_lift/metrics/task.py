"""What one task's predictions are worth: accuracy, likelihood, calibration, and the task's own metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.data.text import TextRow
from pyro_lift.metrics import probabilities as measures
from pyro_lift.metrics.text import METRICS, score
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task

__all__ = ["Judged", "scores"]


def scores(probabilities: Tensor, rows: Rows, task: Task, texts: Sequence[TextRow] | None = None) -> dict[str, Any]:
    """Of the classes, or of the tokens that count; ``chance`` is the share of the commonest.

    Args:
        probabilities: ``[n, C]``, of tokens ``[n, L, V]``, already averaged over draws.
        rows: what they predict.
        task: for its kind, its labels and its metric.
        texts: the same rows as strings; they bring further accepted answers, and the options of multiple choice.

    Returns:
        ``accuracy``, ``nll`` in nats, ``ece`` and ``chance``; of tokens ``perplexity``, :math:`e^{\\mathrm{nll}}` with
        the end of a line counted as a token; of classes with a metric by CrossFit's names ``score``.
    """
    p, y = probabilities.cpu(), rows.target.cpu()
    found: dict[str, Any] = {}
    if task.kind == "tokens":
        p, y = p[y != IGNORED], y[y != IGNORED]
    elif task.metric in METRICS:
        found["score"] = score(task.metric, *_strings(p.argmax(-1), y, task, texts))
    nll = measures.nll(p, y)
    if task.kind == "tokens":
        found["perplexity"] = math.exp(nll)
    return {
        **found,
        "accuracy": measures.accuracy(p, y),
        "nll": nll,
        "ece": measures.expected_calibration_error(p, y),
        "chance": float(torch.bincount(y).max()) / len(y),
    }


def _strings(
    guess: Tensor, target: Tensor, task: Task, texts: Sequence[TextRow] | None
) -> tuple[list[str], list[list[str]]]:
    """Class numbers as the strings that they stand for; as numbers where nothing says what that is."""
    if texts is not None and task.labels is None:
        predictions = [row.options[k] for row, k in zip(texts, guess.tolist(), strict=True)]
    else:
        predictions = [_label(task, k) for k in guess.tolist()]
    if texts is not None:
        return predictions, [list(row.outputs) for row in texts]
    return predictions, [[_label(task, k)] for k in target.tolist()]


def _label(task: Task, k: int) -> str:
    return task.labels[k] if task.labels else str(k)


class Judged(NamedTuple):
    """One method's predictions for one task's test rows: ``[n, C]`` and ``[n]``."""

    method: str
    seed: int
    task: str
    probabilities: Tensor
    target: Tensor

    def record(self) -> dict[str, Any]:
        """Name, seed, task and the three numbers."""
        p, y = self.probabilities, self.target
        return {
            "method": self.method,
            "seed": self.seed,
            "task": self.task,
            "accuracy": measures.accuracy(p, y),
            "nll": measures.nll(p, y),
            "ece": measures.expected_calibration_error(p, y),
        }
