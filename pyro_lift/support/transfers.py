"""Copies from a device to the host that nobody waits for until the numbers are wanted.

As the CUDA documentation asks: a copy that does not block goes to pinned memory; the host may look at it only after an
event that was recorded behind it on the same stream; and what a later operation of that stream reads or overwrites is
in order without one. PyTorch keeps pinned memory that a copy still uses from being handed out again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Arrival", "begin_to_host", "pinned_like"]


class Arrival(NamedTuple):
    """Numbers on their way to the host.

    Attributes:
        data: on the host; in order for the stream that copies them at once, for the host after :meth:`wait`.
        event: that is over when they have arrived; None where they were on the host.
    """

    data: Tensor
    event: Any

    def wait(self) -> Tensor:
        """Wait until they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.data


def pinned_like(x: Tensor) -> Tensor:
    """Make memory on the host for a tensor's numbers, pinned where they are on a CUDA device."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")


def begin_to_host(x: Tensor) -> Arrival:
    """Begin to copy a tensor to the host."""
    data = pinned_like(x)
    data.copy_(x, non_blocking=True)
    if x.device.type != "cuda":
        return Arrival(data, None)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return Arrival(data, event)
