"""Estimate the peak memory of meta-training and raise, with both numbers, if it does not fit.

The activations that one forward pass keeps for its gradient are measured on one minibatch of the task whose rows are
longest; everything else is a multiple of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.gradients import Weights
from pyro_lift.inference.adaptation.inner_loop import mean_loss
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import check_width
from pyro_lift.models.task import Task
from pyro_lift.support.memory import free_bytes

__all__ = ["BACKWARD_GRAPH", "PeakMemory", "check_memory", "graph_bytes"]

#: A gradient that can be differentiated again keeps about this many times the activations of its forward pass: those
#: themselves, and what the products of its own backward pass need. Measured on ViT and BART (docs/results/methods.md).
BACKWARD_GRAPH = 3.0


class PeakMemory(NamedTuple):
    """The memory of a method at its peak, as multiples of what one pass and one weight vector take.

    Attributes:
        graphs: forward graphs alive at once.
        vectors: vectors of length D alive at once.
        advice: the settings that a user can change if it does not fit.
    """

    graphs: float
    vectors: float
    advice: str


def graph_bytes(adapter: RandomAdapter, task: Task, budget: Budget) -> int:
    """Measure the bytes that autograd keeps of one minibatch's loss, the network's own tensors not counted."""
    network = {x.untyped_storage().data_ptr() for x in (*adapter.backbone.parameters(), *adapter.backbone.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in network:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = task.train.take(slice(0, budget.batch_size))
    heads = budget.heads.fitted(adapter, [task])
    head = heads.fresh(task, check_width(adapter, [task], heads.scale), adapter.initial)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = mean_loss(adapter, task, rows, Weights(adapter.initial, head).leaves())
    del loss
    return sum(kept.values())


def check_memory(adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, peak: PeakMemory) -> int:
    r"""Estimate the bytes that meta-training will take.

    .. math:: \text{bytes} = \text{graphs} \cdot \text{activations} + \text{vectors} \cdot D \cdot
              \text{bytes of a weight}

    Args:
        adapter: the network.
        tasks: the one with the longest rows is measured.
        budget: its ``memory_limit``, or else the free memory of the device, is the limit.
        peak: the method's multiples.

    Raises:
        MemoryError: more than the limit; both numbers in the message.
    """
    device = adapter.initial.device
    longest = max(tasks, key=lambda task: _row_size(task) * min(budget.batch_size, len(task.train)))
    activations = graph_bytes(adapter, longest.to(device), budget)
    needed = int(peak.graphs * activations + peak.vectors * adapter.dim * adapter.initial.element_size())
    limit = budget.memory_limit if budget.memory_limit is not None else free_bytes(device)
    if needed > limit:
        raise MemoryError(
            f"about {needed / 2**20:.0f} MiB are needed ({peak.graphs:g} graphs of {activations / 2**20:.1f} MiB, "
            f"{peak.vectors:g} vectors of {adapter.dim} weights), {limit / 2**20:.0f} MiB may be taken. {peak.advice}"
        )
    return needed


def _row_size(task: Task) -> int:
    per_row = sum(x.numel() // len(task.train) for x in task.train.inputs.values())
    return per_row + sum(x.numel() for x in task.train.shared.values())
