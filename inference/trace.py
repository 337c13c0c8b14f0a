"""A chain of a hundred thousand coordinates, seen through a few: fixed random projections and norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter

__all__ = ["ProjectedTrace", "project", "projection"]


def projection(dim: int, coordinates: int, seed: int = 0) -> Tensor:
    r"""A fixed matrix ``[D, M]`` with entries :math:`\mathcal N(0, 1/D)`, the same for every chain and every run.

    A projection of a vector has, on average over matrices, the variance of one of its coordinates. R-hat and ESS of
    the projections speak for the directions of the whole space, at a cost that does not grow with D.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, coordinates, generator=generator) / math.sqrt(dim)


def project(value: Tensor, coordinates: int, seed: int = 0) -> Tensor:
    """Projections ``[..., M]`` of vectors ``[..., D]``."""
    matrix = projection(value.shape[-1], coordinates, seed)
    return value @ matrix.to(value)


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
            self._matrix = projection(flat.numel(), self.coordinates, self.seed).to(flat)
        self.projections.append((flat @ self._matrix).cpu())
        norms = {"all": flat.norm()} if self.adapter is None else self.adapter.norms(flat)
        self.norms.append(torch.stack(list(norms.values())).cpu())

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
        return {"projections": torch.stack(self.projections), "norms": torch.stack(self.norms)}

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
            "projection": torch.stack(self.projections),
            "norm": torch.stack(self.norms),
            "modules": self.modules,
        }
