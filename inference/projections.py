"""A chain of a hundred thousand coordinates, seen through a few: fixed random projections and norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter

__all__ = ["ProjectedTrace", "project", "projection", "signs", "sketched"]


#: From this many coordinates on each falls into one projection only, and a projection costs one pass over the vector.
SPARSE_FROM = 50_000


def projection(dim: int, coordinates: int, seed: int = 0) -> Tensor:
    r"""A fixed matrix ``[D, M]`` with entries :math:`\mathcal N(0, 1/D)`, the same for every chain and every run.

    A projection of a vector has, on average over matrices, the variance of one of its coordinates. R-hat and ESS of
    the projections speak for the directions of the whole space, at a cost that does not grow with D.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, coordinates, generator=generator) / math.sqrt(dim)


def signs(dim: int, coordinates: int, seed: int = 0) -> Tensor:
    """Random signs ``[ceil(D / M)]``, one for M neighbouring coordinates, each of which goes to another projection."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (-(-dim // coordinates),), generator=generator).float() * 2.0 - 1.0


def project(value: Tensor, coordinates: int, seed: int = 0) -> Tensor:
    r"""Projections ``[..., M]`` of vectors ``[..., D]``.

    Short vectors are multiplied by :func:`projection`. Long ones are sketched: coordinate :math:`rM + j` goes to
    projection j with the sign of row r,

    .. math:: P_j = \sqrt{M/D}\, \sum_r s_r\, x_{rM + j},

    which has, on average over signs, the mean variance of its coordinates again: one pass over the vector, where the
    dense matrix is 32 times as long as the vector and read at every draw.
    """
    D = value.shape[-1]
    if D < SPARSE_FROM:
        return value @ projection(D, coordinates, seed).to(value)
    return sketched(value, coordinates, signs(D, coordinates, seed).to(value))


def sketched(value: Tensor, coordinates: int, sign: Tensor) -> Tensor:
    """Compute the sketch of :func:`project`, with its signs at hand."""
    D = value.shape[-1]
    whole = D // coordinates
    table = value[..., : whole * coordinates].unflatten(-1, (whole, coordinates))
    sketch: Tensor = (table.mT @ sign[:whole].unsqueeze(-1)).squeeze(-1)
    rest = value[..., whole * coordinates :]
    if rest.shape[-1]:
        sketch = sketch + sign[-1] * torch.nn.functional.pad(rest, (0, coordinates - rest.shape[-1]))
    scaled: Tensor = sketch * math.sqrt(coordinates / D)
    return scaled


class ProjectedTrace(StreamingStats):
    """Keeps M projections and the norms of the adapted modules for each draw, in order, and drops the draw.

    ``update`` mutates and depends on the order of draws, as a trace must; ``merge`` concatenates.

    Args:
        coordinates: M.
        adapter: gives the norms their modules; None keeps one norm of the whole vector.
        seed: of the projection.
    """

    def __init__(self, coordinates: int = 32, adapter: RandomAdapter | None = None, seed: int = 0) -> None:
        self.coordinates, self.adapter, self.seed = coordinates, adapter, seed
        self.projections: list[Tensor] = []
        self.norms: list[Tensor] = []
        self._matrix: Tensor | None = None

    def update(self, sample: Tensor) -> None:
        """Add one draw, flattened."""
        flat = sample.detach().reshape(-1)
        if self._matrix is None:
            make = projection if flat.numel() < SPARSE_FROM else signs
            self._matrix = make(flat.numel(), self.coordinates, self.seed).to(flat)
        dense = self._matrix.dim() == 2
        projected = flat @ self._matrix if dense else sketched(flat, self.coordinates, self._matrix)
        self.projections.append(projected)
        norms = {"all": flat.norm()} if self.adapter is None else self.adapter.norms(flat)
        self.norms.append(torch.stack(list(norms.values())))

    def merge(self, other: ProjectedTrace) -> ProjectedTrace:
        """This trace followed by the other."""
        merged = ProjectedTrace(self.coordinates, self.adapter, self.seed)
        merged.projections = self.projections + other.projections
        merged.norms = self.norms + other.norms
        return merged

    def state_dict(self) -> dict[str, Tensor]:
        """The trace so far."""
        if not self.projections:
            return {}
        return {"projections": _on_host(self.projections), "norms": _on_host(self.norms)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a trace."""
        self.projections = list(state["projections"].cpu()) if state else []
        self.norms = list(state["norms"].cpu()) if state else []

    @property
    def modules(self) -> list[str]:
        """Names of the columns of ``norms``."""
        if self.adapter is None:
            return ["all"]
        return list(self.adapter.norms(self.adapter.initial))

    def get(self) -> dict[str, Any]:
        """``projection`` ``[S, M]``, ``norm`` ``[S, modules]`` and the modules' names."""
        return {
            "projection": _on_host(self.projections),
            "norm": _on_host(self.norms),
            "modules": self.modules,
        }


def _on_host(rows: list[Tensor]) -> Tensor:
    """Stack rows, which stay where they were computed until now; those of an earlier run are on the host already."""
    devices = {row.device for row in rows}
    return torch.stack(rows).cpu() if len(devices) == 1 else torch.stack([row.cpu() for row in rows])
