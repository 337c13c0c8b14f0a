"""Rows: inputs by keyword and targets, as tensors, from whatever form users hold them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_lift.models.plain import plain

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "as_rows", "label_names", "some_rows"]

#: What a target column may be called.
TARGETS = ("labels", "label")
#: Of the spread of targets, what rounding to PyTorch's default type may move them by; and, of their size, a spread that
#: is itself rounding of float64.
ROUNDED, ROUNDING = 0.1, 1e-12
#: What to do with strings among inputs, and among targets.
ENCODE = 'encode them first: tokenizer(texts, padding=True, return_tensors="pt")'
NUMBER = "number the classes from 0 and pass their names as labels=[...]"
#: Whole-number types of NumPy that PyTorch can hold but hardly compute with.
_UNSIGNED = (torch.uint16, torch.uint32)


@dataclass(frozen=True)
class Rows:
    """Examples: inputs by keyword of the backbone (the empty name is its first positional input), and targets.

    Attributes:
        inputs: tensors with one leading row per example.
        target: ``[n]`` class numbers or values, ``[n, L]`` token numbers.
        shared: further inputs that all rows share, such as the label texts of a matching task; not indexed by row.
        classes: how many of the network's outputs are classes of the task, where it says so: the others have no
            probability. None counts all.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    classes: int | None = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def take(self, index: Tensor | slice) -> Rows:
        """Select some of the rows; an index on the host goes to the rows' device once, and nobody waits for it."""
        if isinstance(index, Tensor) and index.device != self.target.device:
            index = index.to(self.target.device, non_blocking=True)
        return Rows({name: x[index] for name, x in self.inputs.items()}, self.target[index], self.shared, self.classes)

    def to(self, device: torch.device | str) -> Rows:
        """Move the rows to a device."""
        inputs, shared = ({name: x.to(device) for name, x in d.items()} for d in (self.inputs, self.shared))
        return Rows(inputs, self.target.to(device), shared, self.classes)

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """Inputs that the backbone takes by position."""
        return (self.inputs[""],) if "" in self.inputs else ()

    @property
    def named(self) -> dict[str, Tensor]:
        """Inputs that the backbone takes by name."""
        return {name: x for name, x in self.inputs.items() if name} | dict(self.shared)


def as_rows(data: Any, where: str) -> Rows:
    """Make :class:`Rows` of tensors, arrays, a mapping, a data set or a loader; ``where`` begins the error messages.

    Raises:
        TypeError: another form, or values that are no numbers.
        ValueError: no rows, unequal numbers of rows, values not finite; float64 targets that float32 would round away.
    """
    if isinstance(data, Rows):
        rows = data
    elif isinstance(data, tuple) and len(data) == 2:
        inputs, target = data
        inputs = inputs if isinstance(inputs, Mapping) else {"": inputs}
        if not inputs:
            raise ValueError(f"{where}: no inputs.")
        rows = Rows({k: _tensor(v, where, _quoted(k)) for k, v in inputs.items()}, _target(target, where, "targets"))
    elif isinstance(data, Mapping):
        rows = _from_columns(data, where)
    elif hasattr(data, "column_names") and hasattr(data, "with_format"):
        rows = _from_dataset(data, where)
    elif isinstance(data, (DataLoader, Dataset)):
        rows = _from_items(data, where)
    else:
        raise TypeError(
            f"{where}: {type(data).__name__} given; expected (inputs, targets), a mapping of tensors with 'labels', "
            "a datasets.Dataset, or a torch Dataset or DataLoader of pairs."
        )
    return _checked(rows, where)


def _checked(rows: Rows, where: str) -> Rows:
    for label, x in {"the targets": rows.target, **{_quoted(k): x for k, x in rows.inputs.items()}}.items():
        if x.dim() == 0:
            raise ValueError(f"{where}: {label} have shape []; expected one row an example, [n, ...].")
    if len(rows) == 0:
        raise ValueError(f"{where}: no rows. A task needs at least one example; leave it out of the list.")
    for key, x in rows.inputs.items():
        label = _quoted(key)
        if x.shape[0] != len(rows):
            raise ValueError(f"{where}: {label} has {x.shape[0]} rows, the targets {len(rows)}.")
        if x.is_complex():
            raise ValueError(f"{where}: {label} is complex; give real and imaginary parts as two features.")
        if x.is_floating_point() and not torch.isfinite(x).all():
            row = int((~torch.isfinite(x)).nonzero()[0, 0])
            raise ValueError(f"{where}: {label} holds values that are not finite (row {row}).")
    return rows


def _quoted(key: str) -> str:
    return repr(key) if key else "inputs"


def _tensor(value: Any, where: str, label: str, *, strings: str = ENCODE) -> Tensor:
    """Convert to a tensor without gradient; NumPy's unsigned types become int64, its float64 PyTorch's default."""
    value = plain(value, f"{where}: {label}")
    if isinstance(value, Tensor):
        x = value.detach()
    else:
        try:
            x = _converted(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = _reason(value, error, strings)
            ragged = "expected sequence of length" in str(error)
            hint = " Bring the rows to one length: tokenizer(texts, padding=True)." if ragged else ""
            raise TypeError(f"{where}: {label} cannot be made a tensor of numbers ({reason}).{hint}") from error
        x = x.to(torch.get_default_dtype()) if x.dtype == torch.float64 else x
    if x.is_inference():  # made under inference_mode, and of no use where there are gradients
        with torch.inference_mode(False):
            x = x.clone()
    return x.long() if x.dtype in _UNSIGNED else x


def _target(value: Any, where: str, label: str) -> Tensor:
    """Convert targets as :func:`_tensor` does; refuse those that lie so far from zero that their digits would go.

    A tensor keeps its type, and so its digits.
    """
    target = _tensor(value, where, label, strings=NUMBER)
    if isinstance(value, Tensor) or not target.is_floating_point() or target.dim() == 0 or len(target) == 0:
        return target
    try:
        exact = torch.as_tensor(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):  # lists of tensors, say, which have a type of their own
        return target
    exact = exact.reshape(len(target), -1)
    spread, off = exact.std(0, correction=0), (target.double().reshape(exact.shape) - exact).square().mean(0).sqrt()
    lost = (off > ROUNDED * spread) & (spread > ROUNDING * exact.abs().amax(0))
    if lost.any():
        k = int(lost.nonzero()[0])
        raise ValueError(
            f"{where}: {label} lie around {float(exact[:, k].mean()):.10g} and vary by {float(spread[k]):.3g}, and "
            f"{target.dtype}, in which a network computes, moves them by {float(off[k]):.3g} there. Subtract their "
            "mean first, y - y.mean(), and add it to predictions again."
        )
    return target


def _converted(value: Any) -> Tensor:
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"a {type(value).__name__}")
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        # Byte order, negative strides and read-only memory are NumPy's own affair; PyTorch refuses or warns.
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, Tensor) for x in value):
        return torch.stack([x.detach() for x in value])
    return torch.as_tensor(list(value) if isinstance(value, Sequence) else value)


def _reason(value: Any, error: Exception, strings: str) -> str:
    """Say why a value is no tensor, in the user's terms where we know them, and what to do with ``strings``."""
    first = value
    while isinstance(first, (list, tuple)) and first:
        if any(x is None for x in first):
            return "a value is missing: None"
        first = first[0]
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if isinstance(first, str) or kind in ("U", "S"):
        return f"strings; {strings}"
    if kind == "O":
        return "an array of objects; are the rows of unequal length?"
    return f"{error}"


def _from_columns(data: Mapping[str, Any], where: str) -> Rows:
    names = [name for name in TARGETS if name in data]
    if not names:
        hint = " Pass one of its splits." if type(data).__name__ == "DatasetDict" else ""
        raise ValueError(f"{where}: no column 'labels' or 'label' among {sorted(map(str, data))}.{hint}")
    if len(names) > 1:
        raise ValueError(f"{where}: both 'labels' and 'label' are there; keep the one that is the target.")
    columns = {str(k): _tensor(v, where, f"column {k!r}") for k, v in data.items() if k != names[0]}
    target = _target(data[names[0]], where, f"column {names[0]!r}")
    if not columns:
        raise ValueError(f"{where}: no input column beside {names[0]!r}.")
    return Rows(columns, target)


def _from_dataset(data: datasets.Dataset, where: str) -> Rows:
    if isinstance(data, Mapping) or not hasattr(data, "__getitem__"):
        raise TypeError(f"{where}: a {type(data).__name__}; pass one split that lies in memory, a datasets.Dataset.")
    columns: dict[str, Any] = {}
    for name in data.column_names:
        values: Any = data.with_format("torch")[name][:]
        # A number that is missing comes as NaN here, and makes whole numbers floating-point ones.
        gaps = isinstance(values, Tensor) and values.is_floating_point() and bool(values.isnan().any())
        missing = [value is None for value in (data.with_format(None)[name][:] if gaps else values)]
        if any(missing):
            raise ValueError(f"{where}: column {name!r}, row {missing.index(True)}: the value is missing (None).")
        if isinstance(values, Tensor):
            columns[name] = values
        elif len(values) and all(isinstance(value, str) for value in values):
            if name in TARGETS:
                raise ValueError(
                    f"{where}: column {name!r} holds strings; number the classes (class_encode_column) or use a "
                    "TextTask."
                )
            continue  # text beside its own tokens; a backbone takes numbers
        else:
            raise ValueError(f"{where}: column {name!r} has rows of unequal shape; pad it to one length first.")
    return _from_columns(columns, where)


def _from_items(data: Any, where: str) -> Rows:
    """Join the pairs (or mappings) of a torch data set, or the batches of a loader."""
    loader = isinstance(data, DataLoader)
    in_turn = loader or isinstance(data, IterableDataset)
    items: Iterable[Any] = data if in_turn else (data[i] for i in range(len(data)))
    # A loader draws a seed for its workers, and its order, from the caller's stream.
    with torch.random.fork_rng(devices=[]):
        listed = list(items)
    if not listed:
        raise ValueError(f"{where}: no rows. A task needs at least one example; leave it out of the list.")
    columns: dict[str, list[Any]] = {}
    for number, item in enumerate(listed):
        for key, value in _fields(item, f"{where}, {'batch' if loader else 'item'} {number}").items():
            columns.setdefault(key, []).append(value)
    join = torch.cat if loader else torch.stack
    joined = {}
    for key, values in columns.items():
        label = _quoted(key)
        tensors = [_tensor(value, where, label) for value in values]
        try:
            joined[key] = join(tensors)
        except RuntimeError as error:
            raise ValueError(f"{where}: {label} has rows of unequal shape; bring them to one shape first.") from error
    rows = _from_columns(joined, where)
    size = len(data.dataset) if loader and data.drop_last and hasattr(data.dataset, "__len__") else len(rows)
    if size != len(rows):
        raise ValueError(f"{where}: the loader drops {size - len(rows)} of {size} rows; use drop_last=False.")
    return rows


def _fields(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {str(key): value for key, value in item.items()}
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"{where}: {type(item).__name__} given; expected a pair (input, label) or a mapping.")
    if type(item[0]).__module__.startswith("PIL."):
        raise TypeError(f"{where}: a PIL picture; give the data set transform=ToTensor(), or read the folder itself.")
    return {"": item[0], "labels": item[1]}


def label_names(data: Any) -> tuple[str, ...] | None:
    """Return the names of a data set's classes: a ``ClassLabel`` column's, or ``.classes`` of torchvision's."""
    if isinstance(data, DataLoader):
        data = data.dataset
    features = getattr(data, "features", None)
    if isinstance(features, Mapping):
        named = next((features[name] for name in TARGETS if name in features), None)
        names = getattr(named, "names", None)
        return None if names is None else tuple(names)
    classes = getattr(data, "classes", None) if isinstance(data, Dataset) else None
    return tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else None


def some_rows(rows: Rows, most: int | None) -> Rows:
    """Take at most so many rows, evenly over a task: neighbours are often of one class."""
    if most is None or len(rows) <= most:
        return rows
    return rows.take(torch.arange(most) * len(rows) // most)
