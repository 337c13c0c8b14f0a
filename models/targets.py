"""Class numbers and predictions: the one place where their shapes, types and ranges are looked at.

PyTorch broadcasts ``[n, 1]`` against ``[n]`` to ``[n, n]`` without a word, and a cast to whole numbers cuts 0.7 to 0.
Tasks, files, pictures and scores all pass their targets through here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEW_CLASSES", "CountedClasses", "check_predictions", "class_numbers", "count_classes", "numbered_by"]

#: Up to so many classes a largest label is believed as it stands.
FEW_CLASSES = 1000
#: How far from [0, 1] a probability may lie: rounding of a softmax in bfloat16.
PROBABILITY_SLACK = 0.02


class CountedClasses(int):
    """A number of classes that nobody has declared: the largest label plus one. There may be others."""


def class_numbers(
    target: Tensor,
    where: str,
    classes: int | None = None,
    *,
    ignored: int | None = None,
    whole_floats: bool = False,
    what: str = "label",
) -> Tensor:
    """Convert class numbers ``[n]`` to int64, or token numbers ``[n, L]`` of which some may be ignored.

    Args:
        target: of any whole-number type, or bool.
        where: begins the messages.
        classes: upper limit (exclusive); None for none.
        ignored: the number that counts for nothing; with it the shape is ``[n, L]``.
        whole_floats: whether 0.0, 1.0, ... are class numbers too. A tensor of floats is more often a regression.
        what: "label", "target" or "token", for the messages.

    Raises:
        ValueError: another number of dimensions (a column, one-hot rows), numbers that are not whole or not finite,
            or outside the classes.
    """
    dims, shape = (1, "[n]") if ignored is None else (2, "[n, L]")
    if target.dim() != dims:
        raise ValueError(
            f"{where}: {what}s have shape {list(target.shape)}; expected {what} numbers {shape}.{_way_out(target)}"
        )
    if target.is_complex() or (target.is_floating_point() and not whole_floats):
        raise ValueError(
            f"{where}: {what}s are {target.dtype}; expected whole-number targets. Use .long() if they are classes, "
            'and kind="regression" if they are values.'
        )
    if target.is_floating_point():
        wrong = target[~(torch.isfinite(target) & (target == target.round()))]
        if len(wrong):
            raise ValueError(f"{where}: {what} {float(wrong[0])} is not a whole number.")
        if len(target) and float(target.abs().max()) >= 2.0**53:
            raise ValueError(f"{where}: {what} {float(target.abs().max()):g} is too large to be a class number.")
    unsigned_past = target.dtype == torch.uint64 and bool((target.view(torch.int64) < 0).any())
    numbers = target.view(torch.int64) if target.dtype == torch.uint64 else target.long()
    counting = numbers if ignored is None else numbers[numbers != ignored]
    if counting.numel() == 0:
        if numbers.numel() and ignored is not None:
            raise ValueError(f"{where}: no {what} counts; all are {ignored}. Was every answer cut away?")
        return numbers
    low, high = int(counting.min()), int(counting.max())
    if unsigned_past:
        raise ValueError(f"{where}: a {what} of 2**63 or more; expected numbers from 0.")
    if low < 0 or (classes is not None and high >= classes):
        value = low if low < 0 else high
        if what == "target":
            raise ValueError(f"{where}: target {value} is outside the {classes} classes.")
        if ignored is not None:
            raise ValueError(f"{where}: {what} {value} is below 0. Targets that do not count are {ignored}.")
        limit = f"0 .. {classes - 1}" if classes is not None else "0 and above"
        raise ValueError(
            f"{where}: {what} {value} is outside the head's range {limit}. Raise num_classes or mend the {what}s."
        )
    return numbers


def _way_out(target: Tensor) -> str:
    if target.dim() == 2 and target.shape[1] == 1:
        values = ' Or say kind="regression", if they are values.' if target.is_floating_point() else ""
        return f" Drop the last dimension: y.squeeze(1).{values}"
    if target.dim() == 2:
        tokens = "" if target.is_floating_point() else ' If they are a token for every place, say kind="tokens".'
        return f" If the rows are one-hot, give their argmax(-1).{tokens}"
    return ""


def count_classes(numbers: Tensor, where: str) -> CountedClasses:
    """Count the classes, largest number plus one, where nothing else says how many there are.

    Raises:
        ValueError: a number so far beyond the others that it is an identifier, not a class; before a head or a list of
            names of that length is made.
    """
    highest, distinct = int(numbers.max()), len(torch.unique(numbers))
    if highest >= FEW_CLASSES and highest >= 10 * distinct:
        raise ValueError(
            f"{where}: label {highest} would make {highest + 1} classes, of which {distinct} occur. Number the classes "
            "from 0, or say how many there are."
        )
    return CountedClasses(highest + 1)


def check_predictions(probabilities: Tensor, target: Tensor, where: str, *, look: bool = True) -> Tensor:
    """Convert the targets to int64; refuse those that do not belong to the probabilities row by row.

    Args:
        probabilities: ``[..., C]``.
        target: class numbers ``[...]``.
        where: begins the messages.
        look: whether values on an accelerator are looked at too, which waits for it.

    Raises:
        ValueError: other shapes, no row, classes outside, or values that are no probabilities.
    """
    if probabilities.dim() < 2 or target.shape != probabilities.shape[:-1]:
        raise ValueError(
            f"{where}: probabilities have shape {list(probabilities.shape)} and targets {list(target.shape)}; expected "
            f"[n, C] and [n].{_way_out(target)}"
        )
    if target.numel() == 0:
        raise ValueError(f"{where}: no rows, so there is nothing to score.")
    if not probabilities.is_floating_point():
        raise ValueError(f"{where}: probabilities are {probabilities.dtype}; expected floating-point numbers.")
    if target.device.type != "cpu" and not look:
        return target.long()
    low, high = float(probabilities.min()), float(probabilities.max())
    if not (low >= -PROBABILITY_SLACK and high <= 1.0 + PROBABILITY_SLACK):  # also where they are not numbers
        raise ValueError(
            f"{where}: values from {low:g} to {high:g} are no probabilities. Take the softmax of logits first."
        )
    return class_numbers(target.flatten(), where, probabilities.shape[-1], what="target").view(target.shape)


def numbered_by(labels: Sequence[str], data: Any, where: str) -> Any:
    """Number the targets of a pair by the classes' names, where they are names; anything else is left as it is.

    Args:
        labels: names of the classes, in the order of their numbers.
        data: of a task's part.
        where: begins the message.

    Raises:
        ValueError: a target that is none of them.
    """
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], (list, tuple, np.ndarray))):
        return data
    x, names = data
    if not len(names) or not all(isinstance(name, str) for name in names):
        return data
    number = {name: k for k, name in enumerate(labels)}
    for name in names:
        if name not in number:
            raise ValueError(f"{where}: target {str(name)!r} is none of labels={list(labels)!r}.")
    return x, torch.tensor([number[name] for name in names])
