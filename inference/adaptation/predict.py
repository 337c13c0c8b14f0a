r"""Bayesian prediction: the average of *probabilities* over draws of the weights.

.. math:: p(y \mid x, D) \approx \frac1S \sum_s p(y \mid x, \theta^{(s)})

Averaging logits or weights instead would give one network's confidence back; it is the disagreement of the draws that
calibrates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.door import check_inputs
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.likelihoods import LossKind, among_classes, probabilities, shaped_as
from pyro_lift.models.observation import head_inputs_of, naming_inputs, outputs, shapes_of
from pyro_lift.models.plain import plain, refuse_items
from pyro_lift.models.readouts import LabelScoring
from pyro_lift.models.rows import ENCODE
from pyro_lift.models.task import Rows, Task, as_rows

__all__ = ["Ensemble", "label_probabilities", "predict", "predict_inputs", "rows_of"]


#: Rows of a pass up to which a CPU gains from taking several draws at once: past it, stacked products are no larger
#: than each draw's own and lose the caches (MiniLM at 250 rows: 3.5 times slower).
STACKED_ON_CPU = 64


@torch.no_grad()
def predict(
    adapter: RandomAdapter,
    thetas: Tensor,
    rows: Rows,
    kind: LossKind = "classification",
    *,
    heads: Tensor | None = None,
    batch_size: int = 512,
) -> Tensor:
    r"""Average probabilities ``[n, C]`` (regression: means) over S draws.

    .. math:: p(y \mid x, D) \approx \tfrac1S \sum_s p(y \mid x, \theta^{(s)})

    Args:
        adapter: the network as a function of theta.
        thetas: draws ``[S, D]``.
        rows: the inputs; their targets are not looked at.
        kind: of the likelihood.
        heads: draws of the task's own head ``[S, C, width + 1]``, or None.
        batch_size: rows of one forward pass. Where the rows are fewer, several draws share a pass. Draws that equal
            the one before, such as those that stay at the start, share its pass too.
    """
    if thetas.dim() != 2 or len(thetas) == 0:
        raise ValueError(f"thetas has shape {tuple(thetas.shape)}; expected at least one draw, [S, {adapter.dim}].")
    adapter.check_use()
    draws = len(thetas)
    thetas, heads, times = _without_repeats(thetas, heads)
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows.take(slice(start, start + batch_size))
        room = batch_size if thetas.device.type != "cpu" else min(batch_size, STACKED_ON_CPU)
        together = max(room // len(part), 1)
        total: Tensor | None = None
        for s in range(0, len(thetas), together):
            some = slice(s, s + together)
            own = None if heads is None else heads[some]
            summed = _summed(adapter, thetas[some], part, kind, own, times[some])
            total = summed if total is None else total + summed
        assert total is not None
        parts.append(total / draws)
    return torch.cat(parts)


def _without_repeats(thetas: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Leave out draws that equal the one before, and count how often each of the others is meant."""
    again = (thetas[1:] == thetas[:-1]).all(1)
    if heads is not None:
        again &= (heads[1:] == heads[:-1]).flatten(1).all(1)
    firsts = [0, *(s for s, repeats in enumerate(again.tolist(), 1) if not repeats)]
    if len(firsts) == len(thetas):
        return thetas, heads, [1] * len(thetas)
    times = [after - first for first, after in pairwise([*firsts, len(thetas)])]
    return thetas[firsts], None if heads is None else heads[firsts], times


def _summed(
    adapter: RandomAdapter, thetas: Tensor, rows: Rows, kind: LossKind, heads: Tensor | None, times: Sequence[int]
) -> Tensor:
    """Sum probabilities ``[n, C]`` over a few draws, each as often as it is meant, which share one pass."""
    if len(thetas) == 1:
        p = probabilities(kind, outputs(adapter, rows, thetas[0], None if heads is None else heads[0]))
        return p if times[0] == 1 else p * times[0]
    S = len(thetas)
    named = {name: x.expand(S, *x.shape) for name, x in rows.named.items()}
    own = {} if heads is None else head_inputs_of(rows)
    output: Tensor = adapter(*(x.expand(S, *x.shape) for x in rows.positional), theta=thetas, **named, **own)
    output = among_classes(output, rows.classes) if heads is None else apply_head(output, heads)
    p = probabilities(kind, output)
    return p.sum(0) if max(times) == 1 else torch.einsum("s...,s->...", p, p.new_tensor(times))


@torch.no_grad()
def label_probabilities(
    adapter: RandomAdapter,
    thetas: Tensor,
    rows: Rows,
    label_texts: Mapping[str, Tensor],
    scoring: LabelScoring,
    *,
    batch_size: int = 64,
) -> Tensor:
    """Average class probabilities ``[n, C]`` of a text-to-text model over S draws, by scoring each label string.

    Args:
        adapter: an encoder-decoder as a function of theta, however it was trained.
        thetas: draws ``[S, D]``.
        rows: the encoder's inputs; targets and decoder inputs are not looked at.
        label_texts: ``{"input_ids": [C, L], "attention_mask": [C, L]}``, as the decoder would write them.
        scoring: how a string is scored.
        batch_size: rows of one forward pass, which reads each of them C times.
    """
    if thetas.dim() != 2 or len(thetas) == 0:
        raise ValueError(f"thetas has shape {tuple(thetas.shape)}; expected at least one draw, [S, {adapter.dim}].")
    adapter.check_use()
    labels = {f"label_{name}": x.to(thetas.device) for name, x in label_texts.items()}
    parts = []
    for start in range(0, len(rows), batch_size):
        named = rows.take(slice(start, start + batch_size)).named | labels
        draws = []
        for theta in thetas:
            with adapter.bound(theta):
                draws.append(torch.softmax(scoring(adapter.network, named), -1))
        parts.append(torch.stack(draws).mean(0))
    return torch.cat(parts)


@dataclass(frozen=True)
class Ensemble:
    """Draws or late iterates of one task's weights; predictions average their probabilities.

    Attributes:
        thetas: ``[S, D]``.
        heads: ``[S, C, width + 1]``, or None.
        losses: of the minibatches on the way, for a look at convergence.
    """

    adapter: RandomAdapter
    task: Task
    thetas: Tensor
    heads: Tensor | None = None
    losses: tuple[float, ...] = ()

    def predict(self, inputs: Any) -> Tensor:
        """Compute probabilities ``[n, C]``, averaged over the draws."""
        return predict_inputs(self.adapter, self.thetas, inputs, self.task, self.heads)


def predict_inputs(adapter: RandomAdapter, thetas: Tensor, inputs: Any, task: Task, heads: Tensor | None) -> Tensor:
    """Average probabilities ``[n, C]`` over draws, for inputs in any form (regression: means, shaped as targets).

    Args:
        adapter: the network as a function of theta.
        thetas: draws ``[S, D]``.
        inputs: as of :func:`rows_of`.
        task: that the draws are of.
        heads: draws of its own head ``[S, C, width + 1]``, or None.

    Raises:
        TypeError, ValueError: as of :func:`rows_of`; rows that the network would misread
            (:mod:`~pyro_lift.models.door`); rows that it cannot be called with, whose shape then stands beside that of
            the task's own rows.
    """
    rows = rows_of(inputs, task)
    check_inputs(adapter, rows)
    rows = rows.to(thetas.device)
    own = f" The rows of task {task.name!r} are {shapes_of(task.train.take(slice(0, 1)))}." if task.train.inputs else ""
    with naming_inputs("the network cannot be called with these inputs", rows, adapter, own):
        p = predict(adapter, thetas, rows, task.kind, heads=heads)
    return shaped_as(p, task.train.target) if task.kind == "regression" else p


def rows_of(inputs: Any, task: Task) -> Rows:
    """Return inputs in any form as rows of a task; targets, where there are none, are zeros.

    Args:
        inputs: a tensor, an array or nested lists of numbers, where the task has one input; any mapping of these by
            input name, such as a tokenizer's ``BatchEncoding``; or :class:`Rows`.
        task: whose network reads them.

    Raises:
        TypeError: strings, a pair, or another form.
        ValueError: no input, no row, inputs of different lengths, one that the task's rows have and these lack, token
            types of pairs that the task's rows have not, rows of more or fewer dimensions than the task's own.
    """
    if isinstance(inputs, Rows):
        _check_dimensions(inputs, task)
        return replace(inputs, shared=inputs.shared or task.train.shared, classes=task.train.classes)
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(hasattr(x, "shape") for x in inputs):
        raise TypeError("inputs: a pair given; predictions take the inputs without the targets.")
    columns = getattr(inputs, "column_names", None)
    if columns and not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs: a data set with the columns {', '.join(map(repr, columns))}; give one of them: "
            f"data[{columns[0]!r}], or a mapping of tensors by input name."
        )
    if not isinstance(inputs, Mapping):
        refuse_items(inputs, "inputs")
        inputs = plain(inputs, "inputs")
        _check_form("inputs", inputs)
    named = dict(inputs) if isinstance(inputs, Mapping) else {_only_name(inputs, task): inputs}
    if not named:
        raise ValueError("inputs: an empty mapping; expected tensors by input name.")
    for name, value in named.items():
        where = f"inputs[{name!r}]" if name else "inputs"
        refuse_items(value, where)
        named[name] = plain(value, where)
        _check_form(where, named[name])
    _check_lengths({name: len(value) for name, value in named.items()}, "inputs")
    known = set(task.train.inputs)
    if known and "token_type_ids" not in known:  # tokenizers of BERT's kind bring them for a single text too
        types = named.pop("token_type_ids", None)
        if types is not None and bool(torch.as_tensor(types).any()):
            raise ValueError(
                f"inputs: 'token_type_ids' of pairs of texts, but the rows of task {task.name!r} have {sorted(known)}. "
                "Give them in training too, or leave them out."
            )
    if missing := sorted(known - {"", *named}):
        raise ValueError(f"inputs: {missing[0]!r} is missing; task {task.name!r} was given {sorted(known)}.")
    rows = as_rows((named, torch.zeros(len(next(iter(named.values()))))), "inputs")
    _check_dimensions(rows, task)
    cast = {name: _as_trained(name, x, task.train.inputs.get(name)) for name, x in rows.inputs.items()}
    return replace(rows, inputs=cast, shared=task.train.shared, classes=task.train.classes)


def _only_name(inputs: Any, task: Task) -> str:
    """Name the input that a bare tensor is: the task's only one.

    Raises:
        ValueError: a task whose rows have several inputs by name.
    """
    names = sorted(task.train.inputs)
    if len(names) < 2 or "" in names:
        return names[0] if len(names) == 1 else ""
    raise ValueError(
        f"inputs: a {type(inputs).__name__} given, but the rows of task {task.name!r} have {len(names)} inputs: "
        f"{', '.join(map(repr, names))}. Give a mapping by these names: {{{names[0]!r}: ..., {names[1]!r}: ...}}."
    )


def _check_dimensions(rows: Rows, task: Task) -> None:
    """Refuse rows of more or fewer dimensions than the task's own; sizes may differ: of texts, and of pictures."""
    for name, x in rows.inputs.items():
        known = task.train.inputs.get(name)
        if known is None or x.dim() == known.dim():
            continue
        single = f" Give a single row as {name or 'x'}.unsqueeze(0)." if x.dim() == known.dim() - 1 else ""
        raise ValueError(
            f"{_called(name)} of shape {list(x.shape)}; expected n rows of {list(known.shape[1:])}, as "
            f"those of task {task.name!r}.{single}"
        )


def _called(name: str) -> str:
    return f"inputs: {name!r}" if name else "inputs"


def _as_trained(name: str, x: Tensor, trained: Tensor | None) -> Tensor:
    """Return an input in the type of the task's own rows: NumPy's numbers are float64 and a network's are not.

    Raises:
        TypeError: numbers with a point, where rows have whole ones.
        ValueError: a number that this type does not hold; it would come back as another one.
    """
    if trained is None or x.dtype == trained.dtype:
        return x
    if x.is_floating_point() and not trained.is_floating_point():
        raise TypeError(f"{_called(name)} of {x.dtype}, but the task's own rows are {trained.dtype}.")
    cast = x.to(trained.dtype)
    wrong = cast.isinf() & ~x.isinf() if trained.is_floating_point() else cast.long() != x.long()
    if trained.dtype is not torch.bool and bool(wrong.any()):
        raise ValueError(
            f"{_called(name)}: {x[wrong][0].item()} does not fit into {trained.dtype}, the type of the task's own rows."
        )
    return cast


def _check_form(where: str, value: Any) -> None:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(first, str):
        raise TypeError(f"{where}: strings; {ENCODE}.")
    if not hasattr(value, "__len__") or isinstance(value, (bytes, set)):
        raise TypeError(f"{where}: a {type(value).__name__}; expected a tensor, an array or lists of numbers.")
    if getattr(value, "shape", None) == ():
        raise ValueError(f"{where}: shape []; expected one row an example, [n, ...].")


def _check_lengths(lengths: Mapping[str, int], where: str) -> None:
    first, *_ = lengths.items()
    for name, length in lengths.items():
        if length == 0:
            raise ValueError(f"{where}: {name!r} has no rows." if name else f"{where}: no rows.")
        if length != first[1]:
            raise ValueError(f"{where}: {name!r} has {length} rows, {first[0]!r} {first[1]}.")
