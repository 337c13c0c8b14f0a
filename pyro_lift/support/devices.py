"""Devices by name: whether this machine has them."""

from __future__ import annotations

import torch

__all__ = ["check_device"]


def check_device(device: torch.device | str) -> None:
    """Refuse a device that cannot be used here.

    Raises:
        ValueError: no device of that name, or none of that kind in this machine.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({why}).") from error
