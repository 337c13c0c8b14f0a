"""Memory of a call and of the process: peaks on either device, and what the process holds now."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["high_water_mark", "peak_bytes", "reset_high_water_mark", "resident_bytes"]


class _Watch(TorchDispatchMode):
    """Counts every new storage when an operator returns it, and again when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in given:
            return

        def gone(_: Any) -> None:
            self.alive -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes of tensors that a call had alive at its peak, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with _Watch() as watch:
        function()
    return int(watch.peak)


def reset_high_water_mark() -> None:
    """Forget the peak memory so far; on the CPU by Linux's ``clear_refs``."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water_mark(device: str) -> int | None:
    """Return the peak since :func:`reset_high_water_mark`, of device or process; None where it is not told."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM") if os.access("/proc/self/clear_refs", os.W_OK) else None


def resident_bytes() -> int | None:
    """Return the bytes that this process has in memory now; None where it is not told."""
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """Read an entry of Linux's ``/proc/self/status``, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
