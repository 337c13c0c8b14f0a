"""What a task is: named tensors to learn from, perhaps some to be judged by, and the kind of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lift.models.likelihoods import IGNORED, LossKind
from pyro_lift.options import check_choice

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "Task", "as_rows"]


@dataclass(frozen=True)
class Rows:
    """Examples: inputs by keyword of the backbone (the empty name is its first positional input), and targets.

    Attributes:
        inputs: tensors with one leading row per example.
        target: ``[n]`` class numbers or values, ``[n, L]`` token numbers.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    def take(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        return Rows({name: x[index] for name, x in self.inputs.items()}, self.target[index])

    def to(self, device: torch.device | str) -> Rows:
        """The rows on a device."""
        return Rows({name: x.to(device) for name, x in self.inputs.items()}, self.target.to(device))

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """Inputs that the backbone takes by position."""
        return (self.inputs[""],) if "" in self.inputs else ()

    @property
    def named(self) -> dict[str, Tensor]:
        """Inputs that the backbone takes by name."""
        return {name: x for name, x in self.inputs.items() if name}


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: for messages, records and figures.
        train: what to learn from: ``(inputs, targets)`` tensors, a mapping of tensors with ``"labels"``, a
            ``datasets.Dataset`` with a column ``"label"`` or ``"labels"``, or :class:`Rows`.
        kind: ``"classification"``, ``"regression"`` or ``"tokens"``.
        num_classes: width of the head; None takes the largest label plus one.
        test: what to be judged by, never trained on; in any form of ``train``.

    Raises:
        ValueError: no rows, unequal numbers of rows, labels outside ``0 .. num_classes - 1``, values not finite.

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

    def __init__(
        self,
        name: str,
        train: Any,
        kind: LossKind = "classification",
        num_classes: int | None = None,
        test: Any = None,
    ) -> None:
        check_choice("kind", kind, ["classification", "regression", "tokens"])
        rows = as_rows(train, f"task {name!r}, train data")
        held_out = None if test is None else as_rows(test, f"task {name!r}, test data")
        if kind == "classification" and num_classes is None:
            num_classes = int(rows.target.max()) + 1
        for part, where in ((rows, "train"), (held_out, "test")):
            if part is not None:
                _check_target(name, where, part.target, kind, num_classes)
        for key, value in (("name", name), ("train", rows), ("kind", kind), ("test", held_out)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "num_classes", num_classes if kind == "classification" else None)

    def to(self, device: torch.device | str) -> Task:
        """The task with its tensors on a device."""
        test = None if self.test is None else self.test.to(device)
        return Task(self.name, self.train.to(device), self.kind, self.num_classes, test)


def as_rows(data: Any, where: str) -> Rows:
    """Tensors, a mapping, or a ``datasets.Dataset`` as :class:`Rows`; ``where`` begins the error messages."""
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
