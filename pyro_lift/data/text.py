"""What a task is: named examples to learn from, perhaps some to be judged by, and the kind of its loss.

:class:`Task` holds tensors and is what the samplers see. :class:`TextTask` and :class:`ImageTask` are what data comes
as, strings and pictures, before it is encoded for one backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from pyro_lift.support.options import check_literal

if TYPE_CHECKING:
    pass

__all__ = ["TextForm", "TextRow", "TextTask", "check_answer"]

TextForm = Literal["classification", "multiple_choice", "text_to_text", "next_token"]


class TextRow(NamedTuple):
    """One example of a text task, as strings.

    Attributes:
        input: what is read.
        outputs: accepted answers; the first is what is learnt, a score may take the best of them.
        options: of multiple choice, this row's own; empty elsewhere.
    """

    input: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextTask:
    """A task of strings, before any tokenizer; :mod:`pyro_lift.data.encode` turns it into a :class:`Task`.

    Attributes:
        name: for messages, records, figures, and the prefix ``[name]`` of text-to-text inputs.
        train: what to learn from; at least one row.
        dev: what choices may be made on.
        test: what to be judged by.
        form: ``"classification"`` (one set of labels for all rows), ``"multiple_choice"`` (options by row),
            ``"text_to_text"``, or ``"next_token"`` (the input is context, the output what follows).
        metric: a name of :data:`pyro_lift.metrics.text.METRICS`, or ``"Perplexity"``.
        labels: of classification, every label string in its fixed order.

    Raises:
        ValueError: no training row; a first answer that is not among the labels or options.
    """

    name: str
    train: tuple[TextRow, ...]
    dev: tuple[TextRow, ...] = ()
    test: tuple[TextRow, ...] = ()
    form: TextForm = "text_to_text"
    metric: str = "EM"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_literal("form", self.form, TextForm)
        if not self.train:
            raise ValueError(f"task {self.name!r}: the train split is empty.")
        if self.form == "classification" and not self.labels:
            raise ValueError(f"task {self.name!r}: a classification without labels; pass labels=[...].")
        for part, rows in self.parts.items():
            for number, row in enumerate(rows):
                check_answer(row, self.form, self.labels, f"task {self.name!r}, {part} row {number}")

    @property
    def parts(self) -> dict[str, tuple[TextRow, ...]]:
        """The rows by the name of their part."""
        return {"train": self.train, "dev": self.dev, "test": self.test}


def check_answer(row: TextRow, form: str, labels: Sequence[str], where: str) -> None:
    """Refuse a row without an answer, or whose first answer is not among what may be answered."""
    if not row.outputs:
        raise ValueError(f"{where}: no output.")
    known = labels if form == "classification" else row.options if form == "multiple_choice" else None
    if known is None or row.outputs[0] in known:
        return
    if not known:
        raise ValueError(f"{where}: multiple choice without options.")
    shown = ", ".join(map(repr, known[:8])) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
    what = "label" if form == "classification" else "answer"
    raise ValueError(f"{where}: {what} {row.outputs[0]!r} is not one of {shown}.")
