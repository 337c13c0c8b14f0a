"""Predictions of rows as records, one a row, for files that other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_lift.data.text import TextRow
from pyro_lift.models.task import Task

__all__ = ["records_of_rows"]


def records_of_rows(task: Task, p: Tensor, texts: Sequence[TextRow] = ()) -> list[dict[str, Any]]:
    """Write what is predicted of each row: of classes the most probable label and all probabilities.

    Args:
        task: for its kind and its labels.
        p: probabilities ``[n, C]``, of tokens ``[n, L, V]``; of a regression means.
        texts: the same rows as strings, which bring the accepted answers and the option that is chosen.

    Returns:
        A record a row: ``row`` and ``mean``; or ``tokens`` and ``probabilities`` of these; or ``label`` and
        ``probabilities``, with ``option`` and ``accepted`` where the row has any.
    """
    p = p.cpu()
    records = [{"row": number} | _predicted(task, of_row) for number, of_row in enumerate(p)]
    for record, row, of_row in zip(records, texts, p, strict=False):
        if row.options:
            record["option"] = row.options[int(of_row[: len(row.options)].argmax())]
        if row.outputs:
            record["accepted"] = list(row.outputs)
    return records


def _predicted(task: Task, p: Tensor) -> dict[str, Any]:
    if task.kind == "regression":
        return {"mean": p.tolist()}
    if task.kind == "tokens":
        return {"tokens": p.argmax(-1).tolist(), "probabilities": p.amax(-1).tolist()}
    best, labels = int(p.argmax()), task.labels or ()
    label = labels[best] if best < len(labels) else best  # a shared head may be wider than the task
    return {"label": label, "probabilities": p.tolist()}
