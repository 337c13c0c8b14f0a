r"""Memory that a chain's state will take, reckoned before the run and held against what is free.

.. math:: \underbrace{N \cdot \text{row}}_{\theta,\ \text{in its store}} \;+\;
          \underbrace{D\,(2b + 3\cdot 8 + b\,[\text{RMS}])}_{\phi,\ S,\ \text{mean square}} \;+\;
          \underbrace{4 B D b}_{\text{a visit's } \theta,\ \nabla,\ \xi,\ \theta'} \;+\;
          \underbrace{4 K D b + \text{buffer}}_{\text{mixture and its average}}

with b bytes a weight. The network and what it keeps for its gradient come on top: they grow with the rows of a pass,
and only running it tells (:mod:`~pyro_lift.inference.baselines.peak_memory` does for the baselines).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import Chain
from pyro_lift.inference.mixture.batch_em import MANY
from pyro_lift.inference.mixture.online_em import DOUBLE_UP_TO, OnlineGaussianMixture
from pyro_lift.inference.stores.memory import DeviceStore, HostStore
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.support.memory import free_bytes

__all__ = ["Need", "chain_needs", "check_fits", "mixture_need"]

GIB = 2**30


class Need(NamedTuple):
    """Memory that one part of a run takes.

    Attributes:
        what: the part.
        nbytes: that it takes at its peak.
        on_host: whether on the host, where the chain is on a device.
        way_out: what makes it smaller.
    """

    what: str
    nbytes: int
    on_host: bool = False
    way_out: str = ""


def chain_needs(chain: Chain, phi: Mapping[str, Tensor], row_bytes: int) -> list[Need]:
    """Reckon what a chain keeps from visit to visit, and the vectors of one visit.

    Args:
        chain: at its start.
        phi: the global sites.
        row_bytes: of one task's row.
    """
    structure, N, B = chain.structure, chain.structure.num_tasks, chain.structure.block_size
    numbers = sum(value.numel() for value in phi.values())
    width = sum(value.numel() * value.element_size() for value in phi.values())
    pinned = next(iter(phi.values())).device.type == "cuda"
    needs = _rows(chain.store, f"theta of {N} tasks", N, row_bytes, pinned)
    moments = width if chain.settings.decay is not None else 0
    needs.append(Need("phi and S", 2 * width + 3 * 8 * numbers + moments, False, "a lower rank"))
    needs.append(Need("a visit's vectors", 4 * B * row_bytes, False, "a smaller block_size"))
    if chain.cache.table is not None:
        table = structure.num_tasks // B * width
        needs.append(Need("the table of gradients", table, False, 'accumulator="exact" or a larger block_size'))
    if chain.translation is not None:
        needs.append(Need("the translation", 4 * 8 * numbers, False, 'translation="none"'))
        needs += _rows(chain.translation.table, "the translation's control variates", N, width, pinned)
    needs += _rows(chain.momenta, "velocities", N, row_bytes, pinned)
    needs += _rows(chain.variates and chain.variates.store, "the rows' control variates", N, 2 * row_bytes, pinned)
    return needs


def _rows(store: ThetaStore | None, what: str, count: int, nbytes: int, pinned: bool) -> list[Need]:
    """Reckon the rows of a store that is in memory."""
    if isinstance(store, HostStore):
        return [Need(what, count * (_pinned(nbytes) if pinned else nbytes), True, 'store="disk"')]
    if isinstance(store, DeviceStore):
        return [Need(what, count * nbytes, False, 'store="host" or store="disk"')]
    return []


def mixture_need(mixture: OnlineGaussianMixture, like: Tensor, draws: int) -> Need:
    """Reckon what an online mixture over ``[D]`` takes: its moments and their average, or the draws it begins with.

    Args:
        mixture: before its first draw.
        like: a vector ``[D]`` as it will be given.
        draws: that it will be given.
    """
    D, K, covariance = len(like), mixture.components, mixture.covariance
    variance = {"diag": D, "spherical": 1, "full": D * D}[covariance]
    streaming = 2 * K * (D + variance) + 3 * D
    # The fit of the first draws has them once more, and three vectors of each on the way; of each component at once,
    # where that is not much.
    buffered = min(mixture.buffer_limit(D), draws) * D
    starting = 5 * buffered + (4 * K * buffered if K * buffered <= MANY else 0) + 2 * K * (D + variance)
    itemsize = 8 if D * K <= DOUBLE_UP_TO else like.element_size()
    nbytes = itemsize * max(streaming, starting)
    return Need(f"the mixture of {K} components", nbytes, False, "fewer components or a spherical covariance")


def check_fits(needs: Iterable[Need], device: torch.device) -> None:
    """Refuse a run whose state cannot fit.

    Raises:
        MemoryError: with the parts, what they take, what is free, and the way out of the largest.
    """
    needs = list(needs)
    host = torch.device("cpu")
    for place, parts in (
        (device, [need for need in needs if not need.on_host or device.type == "cpu"]),
        (host, [need for need in needs if need.on_host and device.type != "cpu"]),
    ):
        total = sum(need.nbytes for need in parts)
        if not parts or total <= (free := free_bytes(place)):
            continue
        parts.sort(key=lambda need: -need.nbytes)
        listed = ", ".join(f"{need.what} {need.nbytes / GIB:.2f}" for need in parts)
        ways = "; ".join(dict.fromkeys(need.way_out for need in parts if need.way_out and need.nbytes > 0.1 * total))
        raise MemoryError(
            f"the chain's state takes about {total / GIB:.2f} GiB on {place} ({listed}), and {free / GIB:.2f} GiB are "
            f"free; the network and its activations come on top. What makes it smaller, the largest part first: {ways}."
        )


def _pinned(nbytes: int) -> int:
    """Round as PyTorch's allocator of pinned memory does, to a power of two."""
    return 1 << max(nbytes - 1, 0).bit_length()
