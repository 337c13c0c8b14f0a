"""Whether a network's outputs are scores of a row alone: no probabilities, and the same whatever rows are beside it."""

from __future__ import annotations

from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import NEVER
from pyro_lift.models.task import Rows

__all__ = ["ACROSS_ROWS", "are_probabilities", "mixing_of", "needs_several_rows", "note_alone"]

#: Largest difference of a row's probabilities from one in all, by rounding of float32 and of half precision.
ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.02}
#: Of a row's output, what other rows beside it may change it by: rounding of float32; that of half precision, or of
#: numbers that are rounded by the largest of a batch.
MIXED, MIXED_ROUNDED = 1e-3, 0.05
#: What mixes rows, and what to do about it.
ACROSS_ROWS = (
    "Its predictions depend on what is predicted with it, and a minibatch is other data than the task's. Take out what "
    "looks across rows: nn.BatchNorm with track_running_stats=False or F.batch_norm(training=True), a mean over the "
    "batch, attention in which rows stand where places should."
)
#: How PyTorch's normalisations by the batch begin where they are given a row alone.
_ALONE_REFUSED = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")
#: Rows that show it: one alone may be of such numbers by chance.
LEAST_ROWS = 4
#: The output of a task's first row alone, where the network was called with it: rows and output by network.
_ALONE: WeakKeyDictionary[RandomAdapter, tuple[ReferenceType[Rows], Tensor]] = WeakKeyDictionary()


def are_probabilities(output: Tensor) -> bool:
    """Tell whether outputs are probabilities, as behind a softmax: no row has a negative one, and each sums to one.

    Args:
        output: of several rows, ``[n, ..., C]``.
    """
    if output.dim() < 2 or output.shape[-1] < 2 or len(output) < LEAST_ROWS:
        return False
    off = (output.sum(-1) - 1.0).abs().max()
    return bool((output.min() >= 0.0) & (off <= ROUNDING.get(output.dtype, 1e-4)))


def needs_several_rows(error: ValueError) -> bool:
    """Tell whether a network failed because it normalises by the rows of the batch, and was given one row alone."""
    return str(error).startswith(_ALONE_REFUSED)


def note_alone(adapter: RandomAdapter, rows: Rows, output: Tensor) -> None:
    """Keep what the network gave, where it begins, for the first of some rows alone: :func:`mixing_of` asks for it."""
    _ALONE[adapter] = (ref(rows), output.detach())


def mixing_of(adapter: RandomAdapter, rows: Rows, output: Tensor) -> float:
    """Return by how much other rows in a batch change the output of the first, relative to it.

    Zero where it is no more than rounding, and where nobody knows.

    Args:
        adapter: the network.
        rows: of which the first was looked at alone (:func:`note_alone`).
        output: of several of them where the network begins, the first one first.
    """
    of, alone = _ALONE.get(adapter, (None, None))
    if of is None or alone is None or of() is not rows or len(output) < 2 or alone.shape[1:] != output.shape[1:]:
        return 0.0
    one, beside = alone[0].float(), output[0].float()
    kept = one.isfinite() & beside.isfinite() & (beside > NEVER)  # scores of classes that the task has not are that
    one, beside = torch.where(kept, one, 0.0), torch.where(kept, beside, 0.0)
    size = torch.maximum(one.norm(), beside.norm()).clamp_min(torch.finfo(torch.float32).tiny)
    off = float((one - beside).norm() / size)
    exact = {p.dtype for p in adapter.backbone.parameters()} <= {torch.float32, torch.float64}
    return off if off > (MIXED if exact else MIXED_ROUNDED) else 0.0
