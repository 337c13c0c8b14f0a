"""What meta-training will take at its peak, reckoned before the run: refused with numbers where it cannot fit.

The activations that one forward pass keeps for its gradient are measured on one minibatch of the task whose rows are
longest; everything else is a multiple of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.inner_loop import Weights, mean_loss
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.observation import check_width
from pyro_lift.models.task import Task

__all__ = ["BACKWARD_GRAPH", "check_memory", "free_bytes", "graph_bytes"]

#: A gradient that can be differentiated again keeps about this many times the activations of its forward pass: those
#: themselves, and what the products of its own backward pass need. Measured on ViT and BART; see docs/baselines.md.
BACKWARD_GRAPH = 3.0


def graph_bytes(adapter: RandomAdapter, task: Task, budget: Budget) -> int:
    """Bytes that autograd keeps of one minibatch's loss, the network's own tensors not counted."""
    own = {x.untyped_storage().data_ptr() for x in (*adapter.backbone.parameters(), *adapter.backbone.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = task.train.take(slice(0, budget.batch_size))
    head = budget.heads.fresh(task, check_width(adapter, [task], budget.heads.scale), adapter.initial)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = mean_loss(adapter, task, rows, Weights(adapter.initial, head).leaves())
    del loss
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def check_memory(
    adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, *, graphs: float, vectors: float, way_out: str
) -> int:
    """The bytes that meta-training will take.

    Args:
        adapter: the network.
        tasks: the one with the longest rows is measured.
        budget: its ``memory_limit``, or what the device has free, is the limit.
        graphs: forward graphs alive at once.
        vectors: vectors of length D alive at once.
        way_out: what a user can change.

    Raises:
        MemoryError: more than the limit; both numbers in the message.
    """
    device = adapter.initial.device
    longest = max(tasks, key=lambda task: _row_size(task) * min(budget.batch_size, len(task.train)))
    one = graph_bytes(adapter, longest.to(device), budget)
    wanted = int(graphs * one + vectors * adapter.dim * adapter.initial.element_size())
    limit = budget.memory_limit if budget.memory_limit is not None else free_bytes(device)
    if limit is not None and wanted > limit:
        raise MemoryError(
            f"about {wanted / 2**20:.0f} MiB are needed ({graphs:g} graphs of {one / 2**20:.1f} MiB, {vectors:g} "
            f"vectors of {adapter.dim} weights), {limit / 2**20:.0f} MiB may be taken. {way_out}"
        )
    return wanted


def _row_size(task: Task) -> int:
    per_row = sum(x.numel() // len(task.train) for x in task.train.inputs.values())
    return per_row + sum(x.numel() for x in task.train.shared.values())
