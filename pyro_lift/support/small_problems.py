"""Solving small problems on one thread: many short products, each too short to be shared out between cores.

PyTorch gives each product of matrices to all of its threads, and waits for the last. Where another process is on one of
the cores, that is until the system lets the thread run there: four milliseconds, say, for a product of forty
microseconds. A head is solved by hundreds of such products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["SMALL", "on_one_thread"]

#: Values of the features up to which a problem is small: its products take less than a millisecond.
SMALL = 2**17

Solve = TypeVar("Solve", bound=Callable[..., Any])


def on_one_thread(solve: Solve) -> Solve:
    """Let a function run on one thread where its first argument, features, is on the CPU and small.

    The number of threads is afterwards what it was, whatever the function does.

    Args:
        solve: called with a tensor of features, and with anything beside it.
    """

    @functools.wraps(solve)
    def solved(features: Tensor, *args: Any, **options: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1 or features.device.type != "cpu" or features.numel() > SMALL:
            return solve(features, *args, **options)
        torch.set_num_threads(1)
        try:
            return solve(features, *args, **options)
        finally:
            torch.set_num_threads(threads)

    return cast(Solve, solved)
