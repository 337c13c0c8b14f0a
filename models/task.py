"""Tasks in tensors: named rows to learn from, perhaps some to be judged by, and the kind of their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED, LossKind
from pyro_lift.support.options import check_literal

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "Task", "as_rows"]


@dataclass(frozen=True)
class Rows:
    """Examples: inputs by keyword of the backbone (the empty name is its first positional input), and targets.

    Attributes:
        inputs: tensors with one leading row per example.
        target: ``[n]`` class numbers or values, ``[n, L]`` token numbers.
        shared: further inputs that all rows share, such as the label texts of a matching task; not indexed by row.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.target.shape[0]

    def take(self, index: Tensor | slice) -> Rows:
        """Select some of the rows."""
        return Rows({name: x[index] for name, x in self.inputs.items()}, self.target[index], self.shared)

    def to(self, device: torch.device | str) -> Rows:
        """Move the rows to a device."""
        inputs, shared = ({name: x.to(device) for name, x in d.items()} for d in (self.inputs, self.shared))
        return Rows(inputs, self.target.to(device), shared)

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """Inputs that the backbone takes by position."""
        return (self.inputs[""],) if "" in self.inputs else ()

    @property
    def named(self) -> dict[str, Tensor]:
        """Inputs that the backbone takes by name."""
        return {name: x for name, x in self.inputs.items() if name} | dict(self.shared)


@dataclass(frozen=True)
class Task:
    """A task: training rows, perhaps test rows, and the kind of its likelihood.

    Args:
        name: for messages, records and figures.
        train: what to learn from: ``(inputs, targets)`` tensors, a mapping of tensors with ``"labels"``, a
            ``datasets.Dataset`` with a column ``"label"`` or ``"labels"``, or :class:`Rows`.
        kind: ``"classification"``, ``"matching"``, ``"regression"`` or ``"tokens"``. Matching is classification by
            the similarity of the encoded input to encoded label texts: those in ``label_texts``, or, where every row
            has options of its own (multiple choice), the rows' inputs ``option_input_ids`` and
            ``option_attention_mask`` ``[n, C, L]``, an absent option having a mask of zeros.
        num_classes: width of the head; None takes the number of labels where these are given, else the largest label
            plus one. Of matching, the number of label texts or of options.
        test: what to be judged by, never trained on; in any form of ``train``.
        dev: what choices may be made on, never trained on; in any form of ``train``.
        metric: name of the score that the task is judged by, of :data:`pyro_lift.metrics.text.METRICS`.
        labels: names of the classes, in the order of the targets.
        label_texts: encoded label texts by keyword of the backbone, ``{"input_ids": [C, L], "attention_mask": ...}``.

    Raises:
        ValueError: no rows, unequal numbers of rows, labels outside ``0 .. num_classes - 1``, values not finite;
            matching with nothing to match; label names or texts that are not as many as the classes.

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
    ) -> None:
        check_literal("kind", kind, LossKind)
        parts = {
            where: as_rows(data, f"task {name!r}, {where} data")
            for where, data in (("train", train), ("test", test), ("dev", dev))
            if data is not None
        }
        if label_texts is not None:
            shared = {f"label_{key}": x for key, x in label_texts.items()}
            parts = {where: replace(rows, shared=shared) for where, rows in parts.items()}
        labels = None if labels is None else tuple(labels)
        num_classes = _classes(name, parts["train"], kind, num_classes, labels, label_texts)
        for where, rows in parts.items():
            _check_target(name, where, rows.target, kind, num_classes)
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
        )


def as_rows(data: Any, where: str) -> Rows:
    """Convert tensors, a mapping, or a ``datasets.Dataset`` to :class:`Rows`; ``where`` begins the error messages."""
    if isinstance(data, Rows):
        rows = data
    elif isinstance(data, tuple) and len(data) == 2:
        inputs, target = data
        inputs = inputs if isinstance(inputs, Mapping) else {"": inputs}
        rows = Rows({k: torch.as_tensor(v) for k, v in inputs.items()}, torch.as_tensor(target))
    elif isinstance(data, Mapping):
        rows = _from_columns(data, where)
    elif hasattr(data, "column_names") and hasattr(data, "with_format"):
        rows = _from_dataset(data, where)
    else:
        raise TypeError(
            f"{where}: {type(data).__name__} given; expected (inputs, targets), a mapping of tensors with 'labels', "
            "or a datasets.Dataset."
        )
    if len(rows) == 0:
        raise ValueError(f"{where}: no rows. A task needs at least one example; leave it out of the list.")
    for key, x in rows.inputs.items():
        label = repr(key) if key else "inputs"
        if x.shape[0] != len(rows):
            raise ValueError(f"{where}: {label} has {x.shape[0]} rows, the targets {len(rows)}.")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"{where}: {label} holds values that are not finite.")
    return rows


def _from_columns(data: Mapping[str, Any], where: str) -> Rows:
    columns = {k: torch.as_tensor(v) for k, v in data.items()}
    names = [name for name in ("labels", "label") if name in columns]
    if not names:
        raise ValueError(f"{where}: no column 'labels' or 'label' among {sorted(columns)}.")
    target = columns.pop(names[0])
    if not columns:
        raise ValueError(f"{where}: no input column beside {names[0]!r}.")
    return Rows(columns, target)


def _from_dataset(data: datasets.Dataset, where: str) -> Rows:
    columns: dict[str, Any] = {}
    for name in data.column_names:
        values: Sequence[Any] = data.with_format("torch")[name][:]
        if isinstance(values, Tensor):
            columns[name] = values
        elif values and isinstance(values[0], str):
            continue  # text beside its own tokens; a backbone takes numbers
        else:
            raise ValueError(f"{where}: column {name!r} has rows of unequal shape; pad it to one length first.")
    return _from_columns(columns, where)


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
    return next(iter(said.values())) if said else int(train.target.max()) + 1


def _check_target(name: str, where: str, target: Tensor, kind: LossKind, num_classes: int | None) -> None:
    if kind == "regression":
        if not torch.isfinite(target).all():
            raise ValueError(f"task {name!r}, {where} data: targets that are not finite.")
        return
    if target.is_floating_point():
        raise ValueError(f"task {name!r}, {where} data: {kind} needs whole-number targets, not {target.dtype}.")
    low = int(target[target != IGNORED].min()) if kind == "tokens" else int(target.min())
    high = int(target.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = f"0 .. {num_classes - 1}" if num_classes is not None else "0 and above"
        wrong = low if low < 0 else high
        raise ValueError(
            f"task {name!r}, {where} data: label {wrong} is outside the head's range {limit}. "
            "Raise num_classes or mend the labels."
        )
