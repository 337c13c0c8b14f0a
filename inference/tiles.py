"""Vectors of millions of numbers, worked on a piece at a time.

A chain of elementwise operations on a long vector runs at the speed of memory, once per operation, and every temporary
of a new allocation costs the system's page faults on top (four times a copy, measured). In pieces that fit the cache,
with buffers that are kept, the chain reads its inputs once and writes its result once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["TILE", "Buffers", "split", "tile_size", "total"]

#: Numbers in a piece: a few of them together fit a core's own cache. A multiple of 16, so that normal noise drawn
#: piece by piece is the noise drawn at once (torch fills by sixteens).
TILE = 1 << 17


def tile_size(like: Tensor) -> int:
    """Numbers in a piece: all of them on an accelerator, where each operation costs a launch instead."""
    return TILE if like.device.type == "cpu" else max(like.shape[-1], 1)


def split(x: Tensor, tile: int) -> tuple[Tensor, ...]:
    """Views of a vector's pieces, in order."""
    pieces: tuple[Tensor, ...] = x.split(tile)
    return pieces


class Buffers:
    """A few working vectors of one piece's length each, kept between calls.

    Args:
        count: how many.
        like: of which dtype and device.
        tile: their length.
    """

    def __init__(self, count: int, like: Tensor, tile: int) -> None:
        self._whole = [torch.empty(tile, dtype=like.dtype, device=like.device) for _ in range(count)]

    def of(self, size: int) -> Iterator[Tensor]:
        """The buffers, cut to ``size``."""
        return (buffer[:size] for buffer in self._whole)


def total(parts: list[Tensor]) -> Tensor:
    """Sum of many scalars in float64, in order, without bringing each to the host."""
    return torch.stack(parts).double().sum()
