"""Predictions of written answers, one line a row: the text, how probable it is, and how sure the draws are of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.data.text import CHOICES, TextRow
from pyro_lift.generation.scoring import TextScores
from pyro_lift.metrics.text import METRICS, score
from pyro_lift.models.task import Rows

__all__ = [
    "Writer",
    "label_probabilities_of",
    "measures_of",
    "text_measures",
    "text_predictions",
    "token_predictions",
]


class Writer(Protocol):
    """A posterior, as texts are predicted by it."""

    encoding: TextEncoding | None

    def generate(self, inputs: Any, which: Any = "mean", **options: Any) -> Any:
        """Write a text for each input."""
        ...

    def score(self, inputs: Any, outputs: Any, *, batch_size: int = 16) -> TextScores:
        """Score given texts."""
        ...


def text_predictions(
    posterior: Writer, rows: Sequence[TextRow], which: Any = "mean", options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Predict the answers of some rows.

    Args:
        posterior: of a task with an encoding.
        rows: with or without outputs.
        which: the adapter that writes, as ``generate`` has it.
        options: of ``generate``.

    Returns:
        A record a row: ``row``, ``text``; ``log_prob``, the log of the text's probability averaged over the draws, and
        ``log_prob_per_token``; ``entropy`` and ``mutual_information``, means over its tokens, in nats. Where an answer
        is one of the row's options or the task's labels, ``label``, the most probable of them, and ``probabilities``.
        Where the row has an answer, ``accepted``.
    """
    encoding = posterior.encoding
    assert encoding is not None
    prompts = encoding.new_prompts([row.input for row in rows])
    tokens = posterior.generate(prompts, which, **dict(options or {}))
    tokens = tokens[:: len(tokens) // len(rows)]  # of several texts an input the first
    texts = encoding.decode(tokens)
    measures = measures_of(posterior.score(prompts, tokens))
    lines = []
    for number, row in enumerate(rows):
        line: dict[str, Any] = {"row": number, "text": texts[number], **measures[number]}
        if encoding.form in CHOICES:
            answers = row.options or encoding.labels
            p = label_probabilities_of(posterior, row.input, answers)
            named = dict(zip(answers, p, strict=True))
            line |= {"label": max(named, key=named.__getitem__), "probabilities": named}
        if row.outputs:
            line["accepted"] = list(row.outputs)
        lines.append(line)
    return lines


def token_predictions(
    posterior: Writer, rows: Rows, which: Any = "mean", options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Predict the answers of rows that are tensors: as :func:`text_predictions`, with ``tokens`` in place of text."""
    tokens = posterior.generate(rows, which, **dict(options or {}))
    tokens = tokens[:: len(tokens) // len(rows)]
    measures = measures_of(posterior.score(rows, tokens))
    return [{"row": number, "tokens": written, **measures[number]} for number, written in enumerate(tokens.tolist())]


def measures_of(scores: TextScores) -> list[dict[str, float]]:
    """List how probable each text is and how sure the draws are of it, in nats: sums first, then means over tokens."""
    columns = {
        "log_prob": scores.log_prob,
        "log_prob_per_token": scores.per_token,
        "entropy": scores.entropy.sum(-1) / scores.lengths.clamp_min(1),
        "mutual_information": scores.mutual_information.sum(-1) / scores.lengths.clamp_min(1),
    }
    values = {name: column.tolist() for name, column in columns.items()}
    return [{name: column[k] for name, column in values.items()} for k in range(len(scores.log_prob))]


def label_probabilities_of(posterior: Writer, given: Any, answers: Sequence[str]) -> list[float]:
    r"""Compute probabilities of answers that may be given, each scored as a text.

    .. math:: p(y_c) \propto \tfrac1S \sum_s p(y_c \mid x, \theta^{(s)})
    """
    log_prob = posterior.score([given] * len(answers), list(answers)).log_prob
    return [float(p) for p in torch.softmax(log_prob, -1)]


def text_measures(lines: Sequence[Mapping[str, Any]], metric: str | None) -> dict[str, float]:
    """Score predictions against accepted answers; empty where a row has none, or the metric is not one of texts.

    Args:
        lines: of :func:`text_predictions`.
        metric: of :data:`~pyro_lift.metrics.text.METRICS`.

    Returns:
        ``score`` of what was written, and of choices ``score_of_options``, that of the most probable option.
    """
    if metric not in METRICS or not all(line.get("accepted") for line in lines):
        return {}
    accepted = [line["accepted"] for line in lines]
    measures = {"score": score(metric, [line["text"] for line in lines], accepted)}
    if all("label" in line for line in lines):
        measures["score_of_options"] = score(metric, [line["label"] for line in lines], accepted)
    return measures
