"""Tasks in tensors: named rows to learn from, perhaps some to be judged by, and the kind of their loss."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED, LossKind
from pyro_lift.models.rows import Rows, as_rows, label_names
from pyro_lift.models.targets import CountedClasses, class_numbers, count_classes, numbered_by
from pyro_lift.support.options import check_distinct, check_literal, check_number, check_ordered

__all__ = [
    "Rows",
    "Task",
    "as_rows",
    "check_kinds",
    "check_task_names",
    "check_tasks",
    "check_to_learn_from",
    "head_outputs",
    "mean_rows",
    "shares_classes",
    "undeclared",
]

log = logging.getLogger("pyro_lift")


@dataclass(frozen=True)
class Task:
    """A task: training rows, perhaps test rows, and the kind of its likelihood.

    Args:
        name: for messages, records and figures.
        train: what to learn from: ``(inputs, targets)`` tensors or arrays, a mapping of tensors with ``"labels"``, a
            ``datasets.Dataset`` with a column ``"label"`` or ``"labels"``, a torch ``Dataset`` or ``DataLoader`` of
            pairs, or :class:`Rows`. Class numbers may be of any whole-number type; they become int64.
        kind: ``"classification"``, ``"matching"``, ``"regression"`` or ``"tokens"``. Matching is classification by
            the similarity of the encoded input to encoded label texts: those in ``label_texts``, or, where every row
            has options of its own (multiple choice), the rows' inputs ``option_input_ids`` and
            ``option_attention_mask`` ``[n, C, L]``, an absent option having a mask of zeros.
        num_classes: width of the head; None takes the number of labels where these are given, else the largest label
            plus one, with a warning where that is a single class; what learns from several tasks gives one whose rows
            lack the last classes by chance those of the others, and says so. Where it is given, by itself or by names,
            and the tasks share a head of more outputs, the others have no probability. Of matching, the number of label
            texts or of options.
        test: what to be judged by, never trained on; in any form of ``train``.
        dev: what choices may be made on, never trained on; in any form of ``train``.
        metric: name of the score that the task is judged by, of :data:`pyro_lift.metrics.text.METRICS`.
        labels: names of the classes, in the order of their numbers. With them the targets of a pair may be names.
        label_texts: encoded label texts by keyword of the backbone, ``{"input_ids": [C, L], "attention_mask": ...}``.
        encoding: how the task's strings became these tensors, a :class:`pyro_lift.data.encoding.TextEncoding`; None
            for a task that was made of tensors.
        dev_answers: of written answers, those accepted for each development row, as strings; None where only the one
            that is learnt is known.

    Raises:
        ValueError: an empty name; no rows, unequal numbers of rows, labels outside ``0 .. num_classes - 1`` or of
            another shape, names of no class, values not finite; parts with different inputs; matching with nothing to
            match; label names that stand twice; label names or texts that are not as many as the classes.
        TypeError: values that are no numbers; a set or one string as labels; a name that is no string; a number of
            classes that is not whole.

    Example:
        >>> task = Task("sevens", (torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        >>> len(task.train), task.num_classes
        (3, 2)
    """

    name: str
    train: Rows
    kind: LossKind = "classification"
    num_classes: int | None = None
    test: Rows | None = None
    dev: Rows | None = None
    metric: str | None = None
    labels: tuple[str, ...] | None = None
    label_texts: Mapping[str, Tensor] | None = None
    encoding: Any = None
    dev_answers: tuple[tuple[str, ...], ...] | None = None

    def __init__(
        self,
        name: str,
        train: Any,
        kind: LossKind = "classification",
        num_classes: int | None = None,
        test: Any = None,
        *,
        dev: Any = None,
        metric: str | None = None,
        labels: Sequence[str] | None = None,
        label_texts: Mapping[str, Tensor] | None = None,
        encoding: Any = None,
        dev_answers: Sequence[Sequence[str]] | None = None,
    ) -> None:
        _check_name(name)
        check_literal("kind", kind, LossKind)
        given = {part: data for part, data in (("train", train), ("test", test), ("dev", dev)) if data is not None}
        where = {part: f"task {name!r}, {part} data" for part in given}
        check_ordered(f"task {name!r}: labels", labels)
        if labels is not None and kind == "classification":
            given = {part: numbered_by(labels, data, where[part]) for part, data in given.items()}
        parts = {part: as_rows(data, where[part]) for part, data in given.items()}
        if label_texts is not None:
            shared = {f"label_{key}": x for key, x in label_texts.items()}
            parts = {where: replace(rows, shared=shared) for where, rows in parts.items()}
        if labels is None and num_classes is None and kind == "classification":
            labels = label_names(train)
        labels = None if labels is None else tuple(labels)
        check_distinct(f"task {name!r}, labels", labels or ())
        if num_classes is not None and not isinstance(num_classes, CountedClasses):
            num_classes = _whole_number(f"task {name!r}: num_classes", num_classes)
        num_classes = _classes(name, parts["train"], kind, num_classes, labels, label_texts)
        parts = {part: _with_target(rows, kind, num_classes, where[part]) for part, rows in parts.items()}
        declared = num_classes if kind == "classification" and not isinstance(num_classes, CountedClasses) else None
        parts = {part: replace(rows, classes=declared) for part, rows in parts.items()}
        for part, rows in parts.items():
            _check_same_inputs(parts["train"], rows, where[part])
        answers = None if dev_answers is None else tuple(tuple(accepted) for accepted in dev_answers)
        if answers is not None and "dev" in parts and len(answers) != len(parts["dev"]):
            raise ValueError(
                f"task {name!r}: dev_answers of {len(answers)} rows, and {len(parts['dev'])} rows of dev data."
            )
        values = {
            "name": name,
            "train": parts["train"],
            "kind": kind,
            "num_classes": num_classes,
            "test": parts.get("test"),
            "dev": parts.get("dev"),
            "metric": metric,
            "labels": labels,
            "label_texts": label_texts,
            "encoding": encoding,
            "dev_answers": answers,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def to(self, device: torch.device | str) -> Task:
        """Move the task's tensors to a device."""
        texts = self.label_texts
        return Task(
            self.name,
            self.train.to(device),
            self.kind,
            self.num_classes,
            None if self.test is None else self.test.to(device),
            dev=None if self.dev is None else self.dev.to(device),
            metric=self.metric,
            labels=self.labels,
            label_texts=None if texts is None else {key: x.to(device) for key, x in texts.items()},
            encoding=self.encoding,
            dev_answers=self.dev_answers,
        )


def shares_classes(task: Task) -> bool:
    """Whether the task has classes that all its rows share: not the options of each row, nor values or tokens."""
    return task.kind == "classification" or (task.kind == "matching" and task.label_texts is not None)


def _classes(
    name: str,
    train: Rows,
    kind: LossKind,
    num_classes: int | None,
    labels: tuple[str, ...] | None,
    label_texts: Mapping[str, Tensor] | None,
) -> int | None:
    """Determine the number of classes, on which all sources must agree; None for other kinds of loss."""
    if kind not in ("classification", "matching"):
        return None
    said: dict[str, int] = {} if num_classes is None else {"num_classes": num_classes}
    if labels is not None:
        said["labels"] = len(labels)
    for key, x in (label_texts or {}).items():
        said[f"label_texts[{key!r}]"] = len(x)
    if kind == "matching" and label_texts is None:
        if "option_input_ids" not in train.inputs:
            raise ValueError(
                f"task {name!r}: matching needs texts to match. Pass label_texts={{'input_ids': [C, L], ...}}, or give "
                "every row its options as inputs 'option_input_ids' and 'option_attention_mask' [n, C, L]."
            )
        said["option_input_ids"] = train.inputs["option_input_ids"].shape[1]
    if len(set(said.values())) > 1:
        raise ValueError(
            f"task {name!r}: {', '.join(f'{k} has {v}' for k, v in said.items())} classes; they must agree."
        )
    if said:
        return next(iter(said.values()))
    where = f"task {name!r}, train data"
    classes = count_classes(class_numbers(train.target, where), where)
    if classes == 1:
        log.warning(
            "%s: every label is 0, and nothing says how many classes there are: the task has one, unless the tasks "
            "beside it have more. Pass num_classes=, or the classes' names as labels=.", where,
        )  # fmt: skip
    if classes > 2 and train.target.unique().tolist() == list(range(1, classes)):
        log.warning(
            "%s: no label is 0, and all others up to %d occur: there are taken to be %d classes, the first without a "
            "row. If they begin at 1, take 1 off; else pass num_classes=%d.", where, classes - 1, classes, classes,
        )  # fmt: skip
    return classes


def _check_name(name: object) -> None:
    """Refuse what is no name: results, messages and saved weights go by it."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: the name of a task is a string; expected {str(name)!r}, say.")
    if not name.strip():
        raise ValueError(f"name={name!r}: a task needs a name, by which messages and results call it.")


def _whole_number(what: str, value: Any) -> int:
    """Return a number of at least one as an int, of whatever whole-number type it is."""
    try:
        number = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what}={value!r}: expected a whole number.") from None
    check_number(what, number, least=1, open_below=False, whole=True)
    return number


def _with_target(rows: Rows, kind: LossKind, num_classes: int | None, where: str) -> Rows:
    """Give the rows a target of the type and the shape that the kind of loss takes, or refuse them."""
    target = rows.target
    if kind == "regression":
        if target.is_complex() or not torch.isfinite(target).all():
            raise ValueError(f"{where}: targets that are not finite real numbers.")
        return rows if target.is_floating_point() else replace(rows, target=target.to(torch.get_default_dtype()))
    if kind == "tokens":
        return replace(rows, target=class_numbers(target, where, ignored=IGNORED, what="token"))
    rows = replace(rows, target=class_numbers(target, where, num_classes))
    if kind == "matching" and "option_attention_mask" in rows.inputs:
        present = rows.inputs["option_attention_mask"].flatten(2).any(-1)
        absent = present.any(-1) & ~present.gather(1, rows.target.unsqueeze(1)).squeeze(1)
        if absent.any():
            row = int(absent.nonzero()[0])
            raise ValueError(f"{where}, row {row}: the answer, option {int(rows.target[row])}, is an absent option.")
    return rows


def _check_same_inputs(train: Rows, rows: Rows, where: str) -> None:
    """Refuse a part that the network could not be called with as it was in training."""
    if set(rows.inputs) != set(train.inputs):
        raise ValueError(f"{where}: inputs {sorted(rows.inputs)}, but the train data has {sorted(train.inputs)}.")
    pairs = {name: (x, train.inputs[name]) for name, x in rows.inputs.items()} | {"target": (rows.target, train.target)}
    for name, (x, known) in pairs.items():
        if x.dim() != known.dim():
            raise ValueError(f"{where}: {name!r} has shape {list(x.shape)}, but {list(known.shape)} in the train data.")


def mean_rows(tasks: Sequence[Task]) -> float:
    """Return the training rows of a task, on average."""
    return sum(len(task.train) for task in tasks) / len(tasks)


def head_outputs(task: Task) -> int | None:
    """Return the outputs of a linear head of the task's own: its classes, or its values; None where it has neither."""
    return max(task.train.target[0].numel(), 1) if task.kind == "regression" else task.num_classes


def undeclared(task: Task) -> Task:
    """Return a task whose number of classes is taken for counted: outputs that it has no class for have probability."""
    if task.train.classes is None or task.num_classes is None:
        return task
    return replace(task, num_classes=CountedClasses(task.num_classes))


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse what are no tasks.

    Raises:
        TypeError: one task where a list of them is expected, or something else in their place; says what and where.
    """
    if isinstance(tasks, Task):
        raise TypeError(f"tasks is the one task {tasks.name!r}; expected a list of them: [task].")
    if not isinstance(tasks, Sequence):  # they are gone through more than once, and called by their places
        raise TypeError(f"tasks is a {type(tasks).__name__}; expected a list of them: list(...).")
    for place, task in enumerate(tasks):
        if isinstance(task, Task):
            continue
        where = "task" if len(tasks) == 1 else f"tasks[{place}]"
        if isinstance(task, (list, tuple)) and all(isinstance(each, Task) for each in task):
            raise TypeError(
                f"{where} is a {type(task).__name__} of tasks; expected one Task. Several: adapt_many(tasks)."
            )
        raise TypeError(f"{where} is a {type(task).__name__}; expected a Task: Task(name, (inputs, targets)).")


def check_kinds(tasks: Sequence[Task], learned: Sequence[str] | None = None) -> None:
    """Refuse regressions beside tasks of classes or of tokens: one output cannot be both values and scores.

    Classification, label matching and written answers may stand side by side: each row then has a log probability in
    nats, of one class or text among others.

    Args:
        tasks: to learn from together, or to be adapted to, each by itself.
        learned: the kinds of the tasks that the prior was learned from, to which the tasks are adapted; empty where
            nobody says. None for tasks to learn from.

    Raises:
        TypeError: what is no task.
        ValueError: names a task of each sort.
    """
    check_tasks(tasks)
    values = [task for task in tasks if task.kind == "regression"]
    scores = [task for task in tasks if task.kind != "regression"]
    both = "the network's output would be values for one and scores for the other."
    if learned is None:
        if values and scores:
            raise ValueError(
                f"task {values[0].name!r} is one of regression and task {scores[0].name!r} one of {scores[0].kind}: "
                f"{both} Train on each sort by itself."
            )
        return
    if learned and (others := scores if "regression" in learned else values):
        raise ValueError(
            f"task {others[0].name!r} is one of {others[0].kind}, and the prior was learned from tasks of "
            f"{', '.join(learned)}: {both} Give it a prior of its own sort."
        )


def check_to_learn_from(tasks: Sequence[Task]) -> None:
    """Refuse what are no tasks, no task at all, and two of one name.

    Raises:
        TypeError: as of :func:`check_tasks`.
        ValueError: no task; a name that stands twice.
    """
    check_tasks(tasks)
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to learn from.")
    check_task_names(tasks)


def check_task_names(tasks: Sequence[Any], where: str = "tasks") -> None:
    """Refuse two tasks of one name: results, adapters and folders are kept by name, and one would stand for both."""
    check_distinct(where, [getattr(task, "name", task) for task in tasks], "Give each task a name of its own.")
