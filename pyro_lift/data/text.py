"""Tasks of strings, before they are encoded for one backbone, and what may stand in their rows."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pyro_lift.data.chats import Conversation
from pyro_lift.support.options import check_choice, check_distinct, check_literal, check_ordered
from pyro_lift.support.wording import some_names

__all__ = [
    "TEXT_METRICS",
    "TextForm",
    "TextRow",
    "TextTask",
    "check_answer",
    "check_text",
    "infer_labels",
    "read_as_classes",
    "tidy",
]

log = logging.getLogger("pyro_lift")

#: Rows from which on it is told that each has a label of its own: fewer may be one of each class.
OWN_LABELS_FROM = 6

TextForm = Literal["classification", "multiple_choice", "text_to_text", "next_token", "completion", "chat"]
#: Forms whose answers are names: of one set of labels, or of a row's own options.
CHOICES = ("classification", "multiple_choice")
#: Names of scores; the functions are in :mod:`pyro_lift.metrics`, which stands on a higher floor.
TEXT_METRICS = (
    "ACC",
    "Classification-F1",
    "EM",
    "QA-F1",
    "Rouge-L",
    "Matthew-Correlation",
    "Pearson-Correlation",
    "Perplexity",
)


class TextRow(NamedTuple):
    """One example of a text task, as strings.

    Attributes:
        input: what is read; of a chat a :class:`~pyro_lift.data.chats.Conversation`.
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
            ``"text_to_text"``, ``"next_token"`` (the input is context, the output what follows), ``"completion"``
            (prompt and completion are read as they stand, with nothing put before or between them) or ``"chat"``
            (messages, by the tokenizer's template).
        metric: a name of :data:`TEXT_METRICS`.
        labels: of classification, every label string in its fixed order, each once.
        system: what every input begins with: a chat's system message, or a line before other inputs.

    Labels, options and answers of a choice are names, so blanks at their ends are taken off, and an option that stands
    twice in a row is one option.

    Raises:
        ValueError: no training row; an answer that is not among the labels or options, or is blank; a label that
            stands twice; a string that is no text.
    """

    name: str
    train: tuple[TextRow, ...]
    dev: tuple[TextRow, ...] = ()
    test: tuple[TextRow, ...] = ()
    form: TextForm = "text_to_text"
    metric: str = "EM"
    labels: tuple[str, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        check_literal("form", self.form, TextForm)
        check_choice(f"{where}: metric", self.metric, TEXT_METRICS)
        check_text(self.name, f"{where}: the name")
        check_text(self.system, f"{where}: the system prompt")
        if not self.train:
            raise ValueError(f"{where}: the train split is empty.")
        if self.form == "classification":
            object.__setattr__(self, "labels", check_labels(self.labels, where))
        for part, rows in self.parts.items():
            for number, row in enumerate(rows):
                if isinstance(row.outputs, str) or isinstance(row.options, str):
                    raise TypeError(
                        f"{where}, {part} row {number}: outputs and options are tuples of strings, not strings."
                    )
            rows = tuple(tidy(row, self.form) for row in rows)
            object.__setattr__(self, part, rows)
            for number, row in enumerate(rows):
                check_answer(row, self.form, self.labels, f"{where}, {part} row {number}")

    @property
    def parts(self) -> dict[str, tuple[TextRow, ...]]:
        """The rows by the name of their part."""
        return {"train": self.train, "dev": self.dev, "test": self.test}


def check_text(text: object, where: str) -> None:
    """Refuse what is no text: half a character (a lone surrogate), which no tokenizer or file can hold, and NUL."""
    if not isinstance(text, str):
        raise TypeError(f"{where} is {text!r}; expected a string.")
    if "\0" in text:
        raise ValueError(f"{where} holds a NUL character at place {text.index(chr(0))}; is it UTF-16, or binary?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character at place {error.start} (the surrogate U+{ord(text[error.start]):04X}); "
            "was the text cut inside an emoji?"
        ) from None


def check_labels(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Strip the labels; refuse none, blank ones, and one that stands twice."""
    if isinstance(labels, str):
        raise TypeError(f"{where}: labels={labels!r}: expected a list of strings.")
    check_ordered(f"{where}: labels", labels)
    for label in (listed := tuple(labels)):
        check_text(label, f"{where}: label {label!r}")
    stripped = tuple(label.strip() for label in listed)
    if not stripped:
        raise ValueError(f"{where}: a classification without labels; pass labels=[...].")
    if "" in stripped:
        raise ValueError(f"{where}: label {stripped.index('')} is blank.")
    check_distinct(f"{where}, labels", stripped)
    return stripped


def infer_labels(answers: Sequence[str], where: str) -> tuple[str, ...]:
    """Take the distinct answers in order as labels, which nobody has named; warn where each row has one of its own.

    Raises:
        ValueError: two of them that differ in letter case, inner blanks or Unicode form alone: an uncased tokenizer and
            the accuracy of strings take them for one, so they are a slip more often than two classes.
    """
    labels = tuple(sorted(set(answers)))
    if len(labels) == len(answers) >= OWN_LABELS_FROM:
        log.warning(
            "%s: each of the %d rows has a label of its own, such as %r. Is the label's column in the place of the "
            "text's?", where, len(labels), answers[0],
        )  # fmt: skip
    alike: dict[str, str] = {}
    for label in labels:
        key = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        if key in alike:
            raise ValueError(
                f"{where}: labels {alike[key]!r} and {label!r} differ in letter case or blanks alone. Write them "
                "alike, or name both as labels."
            )
        alike[key] = label
    return labels


def read_as_classes(task: TextTask) -> TextTask:
    """Read a text-to-text task as a classification, where its answers are few and come again.

    Only for what can read nothing else (label matching): at least two distinct answers, at most one for two training
    rows, each row with one. Labels are those answers in order (:func:`infer_labels`); the metric of strings, EM,
    becomes ACC.

    Raises:
        ValueError: another form; one answer, or more than one for two rows; several accepted answers; a dev or test
            row's answer that no training row has.
    """
    answers = [row.outputs[0].strip() for row in task.train]
    distinct = len(set(answers))
    several = any(len(row.outputs) > 1 for row in task.train)
    if task.form != "text_to_text" or several or not 2 <= distinct <= len(answers) / 2:
        raise ValueError(
            f"task {task.name!r} is {task.form}: label matching needs labels or options to match, or answers that come "
            f"again; its {len(answers)} training rows have {distinct} distinct ones. If these are classes, say "
            '"form": "classification" in its task.json, or TextTask(form="classification", labels=[...]).'
        )
    labels = infer_labels(answers, f"task {task.name!r}")
    log.info("task %r: its %d distinct answers are read as classes: %s", task.name, distinct, some_names(labels))
    metric = "ACC" if task.metric == "EM" else task.metric
    return replace(task, form="classification", labels=labels, metric=metric)


def tidy(row: TextRow, form: TextForm) -> TextRow:
    """Drop blank further answers of a row; of a choice strip the names, and keep each option once."""
    outputs, options = tuple(row.outputs), tuple(row.options)
    if not all(isinstance(text, str) for text in (*outputs, *options)):
        return row  # for check_answer, which knows the place
    if form in CHOICES:
        outputs = tuple(output.strip() for output in outputs)
        options = tuple(dict.fromkeys(option.strip() for option in options))
    if len(outputs) > 1:
        outputs = tuple(output for output in outputs if output.strip()) or outputs[:1]
    return row if (outputs, options) == (row.outputs, row.options) else TextRow(row.input, outputs, options)


def check_answer(row: TextRow, form: str, labels: Sequence[str] | None, where: str) -> None:
    """Refuse a row without an answer, with one that is blank or may not be given, or with strings that are no text.

    Args:
        row: after :func:`tidy`.
        form: of the task.
        labels: of a classification; None for any.
        where: begins the message.
    """
    if form == "chat" and not isinstance(row.input, Conversation):
        raise ValueError(f"{where}: a chat without messages; its input is a Conversation([Message(...), ...]).")
    for name, strings in (("input", (row.input,)), ("output", row.outputs), ("option", row.options)):
        for text in strings:
            check_text(text, f"{where}: the {name}")
    if not row.outputs:
        raise ValueError(f"{where}: no output.")
    if not row.outputs[0].strip():
        raise ValueError(f"{where}: the output is {row.outputs[0]!r}; expected a string that is not blank.")
    if form == "multiple_choice" and not row.options:
        raise ValueError(f"{where}: multiple choice without options.")
    if form in CHOICES and "" in row.options:
        raise ValueError(f"{where}: option {row.options.index('')} is blank.")
    known = labels if form == "classification" else row.options if form == "multiple_choice" else None
    if known is None:
        return
    name = "label" if form == "classification" else "answer"
    _check_known(name, row.outputs, known, where)
    if form == "classification":
        _check_known("option", row.options, known, where)


def _check_known(name: str, strings: Sequence[str], known: Sequence[str], where: str) -> None:
    for text in strings:
        if text not in known:
            shown = ", ".join(map(repr, known[:8])) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
            raise ValueError(f"{where}: {name} {text!r} is not one of {shown}.")
