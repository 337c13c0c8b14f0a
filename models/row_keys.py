r"""Fingerprints of a network's input rows, by which what was computed for a row is found again.

A row's fingerprint is a pair of random linear functions of its bits, in whole numbers modulo :math:`2^{64}`,

.. math:: h_k(x) = \sum_j c_{kj}\,\mathrm{bits}(x_j) \bmod 2^{64}, \qquad k = 1, 2

with coefficients that are fixed once. Two rows that differ have the same pair with probability
:math:`2^{-128 + 2v}`, v the number of low bits in which all their differences are zero (23 for pictures of zeros and
ones). It costs two passes over the inputs, on their device, and one small transfer a call.

References:
    Universal hashing: New hash functions and their use in authentication and set equality, Wegman and Carter, 1981.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["Key", "Keyed", "row_keys"]

#: Two sums, and what the shapes of the inputs are.
Key: TypeAlias = tuple[int, int, str]

#: Random coefficients by input name and device, as long as the longest row so far.
_COEFFICIENTS: dict[tuple[str, torch.device], Tensor] = {}


class Keyed(NamedTuple):
    """Fingerprints of some rows.

    Attributes:
        keys: one a row.
        lengths: tokens up to the last that a mask does not hide, one a row; None where no mask says so.
        width: tokens of every row, padding included; None likewise.
    """

    keys: list[Key]
    lengths: list[int] | None
    width: int | None


def row_keys(inputs: Sequence[Any], named: Mapping[str, Any], *, trimmed: bool) -> Keyed | None:
    """Compute the fingerprints of the rows of one call, without the inputs of a decoder.

    Args:
        inputs: positional inputs of the network.
        named: those by keyword.
        trimmed: whether padding behind a text's last token is left out, so that a row is found again in a batch that is
            padded to another length.

    Returns:
        None where the rows cannot be told: no tensor, tensors with other numbers of rows, other objects among them,
        inputs that gradients are taken at.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in {**{str(k): x for k, x in enumerate(inputs)}, **named}.items():
        if name.startswith("decoder_") or value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() == 0 or value.requires_grad or value.is_complex():
            return None
        tensors[name] = value
    if len({(len(x), x.device) for x in tensors.values()}) != 1:
        return None
    first = next(iter(tensors.values()))
    if len(first) == 0:
        return None
    mask = tensors.get("attention_mask")
    live = None
    if trimmed and mask is not None and mask.dim() == 2:
        live = mask.flip(-1).ne(0).cumsum(-1).flip(-1) > 0
    sums = torch.zeros(len(first), 2, dtype=torch.int64, device=first.device)
    shapes = []
    for name, x in sorted(tensors.items()):
        bits = _bits(x).flatten(1)
        if live is not None and x.shape == live.shape and not x.is_floating_point():
            bits = bits * live
            shapes.append(f"{name} {x.dtype}")
        else:
            shapes.append(f"{name} {x.dtype} {tuple(x.shape[1:])}")
        for k, coefficients in enumerate(_coefficients(name, bits.shape[1], first.device)):
            sums[:, k] += (bits * coefficients).sum(1)
    shape = ", ".join(shapes)
    columns = sums if live is None else torch.cat([sums, live.sum(1, keepdim=True)], 1)
    listed = columns.tolist()
    keys = [(row[0], row[1], shape) for row in listed]
    if live is None:
        return Keyed(keys, None, None)
    return Keyed(keys, [max(row[2], 1) for row in listed], live.shape[1])


def _bits(x: Tensor) -> Tensor:
    if x.is_floating_point():
        x = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return x.long()


def _coefficients(name: str, count: int, device: torch.device) -> Tensor:
    """Random whole numbers ``[2, count]`` that belong to an input's name; a longer row's begin with a shorter one's."""
    known = _COEFFICIENTS.get((name, device))
    if known is None or known.shape[1] < count:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        size = 1 << max(count - 1, 63).bit_length()
        drawn = [torch.randint(-(2**63), 2**63 - 1, (2, part), generator=generator) for part in _doubling(size)]
        known = _COEFFICIENTS[name, device] = torch.cat(drawn, 1).to(device)
    return known[:, :count]


def _doubling(size: int) -> list[int]:
    """List parts of a power of two from 64 on, each as large as all before; a longer list begins with a shorter."""
    parts = [64]
    while sum(parts) < size:
        parts.append(sum(parts))
    return parts
