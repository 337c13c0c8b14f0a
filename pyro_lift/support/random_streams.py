"""Random streams of our own, named by a seed and a key; the global ones of torch, NumPy and Python are the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generator", "own_global_stream", "stream_seed"]


def stream_seed(seed: int, *key: int) -> int:
    """Return the seed, below 2^63, of the stream that belongs to a key, for example (visit, task).

    A hash, not a linear function: streams of neighbouring seeds and keys have nothing in common.

    Args:
        seed: of the whole, not negative.
        key: numbers that name the stream, none of them negative.

    References:
        ``numpy.random.SeedSequence``, after M. E. O'Neill's ``seed_seq`` (2015).
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of the stream that belongs to a key."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, *key))


@contextmanager
def own_global_stream(seed: int | None) -> Iterator[None]:
    """Let code that draws from torch's global CPU stream draw from one of its own; the caller's goes on untouched.

    Args:
        seed: of that stream; None leaves the global stream in place.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
