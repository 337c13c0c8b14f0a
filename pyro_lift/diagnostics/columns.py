"""Draws of a run as columns for ArviZ: sites as they are, or what stands for those too large to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pyro_lift.inference.projections import ProjectedTrace, project
from pyro_lift.models.adapters import RandomAdapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Column", "adapter_of", "named_columns", "numpy_of", "posterior_columns"]


class Column(NamedTuple):
    """Draws of one site, or of a summary of it, ``[chains, draws, ...]``, with names of its dimensions, if any."""

    name: str
    values: NDArray[Any]
    dims: list[str] | None = None


def named_columns(columns: list[Column]) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]], dict[str, str]]:
    """Values and dimensions by names that ArviZ can hold, and the sites' own names where those are others."""
    dimensions = {"chain", "draw"} | {dim for column in columns for dim in column.dims or ()}
    dimensions |= {f"{c.name}_dim_{k}" for c in columns for k in range(c.values.ndim - 2)}
    own = {column.name for column in columns}
    posterior: dict[str, NDArray[Any]] = {}
    dims, sites = {}, {}
    for column in columns:
        name = column.name.replace("/", ".")
        while name in dimensions or name in posterior or (name != column.name and name in own):
            name += "_"
        posterior[name] = column.values
        if column.dims is not None:
            dims[name] = column.dims
        if name != column.name:
            sites[name] = column.name
    return posterior, dims, sites


def posterior_columns(
    mcmc: Any,
    adapter: RandomAdapter | None,
    max_size: int,
    coordinates: int,
    seed: int,
    leave: frozenset[str] = frozenset(),
) -> tuple[list[Column], dict[str, Any]]:
    """Return the posterior's columns but for those of ``leave``, and coordinates of the dimensions made for them."""
    if getattr(mcmc, "_samples", None) is None:
        return _streamed(mcmc)
    columns: list[Column] = []
    coords: dict[str, Any] = {}
    for name, draws in mcmc.get_samples(group_by_chain=True).items():
        if name in leave:
            continue
        if draws[0, 0].numel() <= max_size:
            columns.append(Column(name, numpy_of(draws)))
            continue
        flat = draws.flatten(2)
        norms = {"all": flat.norm(dim=-1)}
        if adapter is not None and flat.shape[-1] == adapter.dim:
            norms = adapter.norms(flat)
        columns += _summaries(name, project(flat, coordinates, seed), torch.stack(list(norms.values()), -1))
        coords[f"{name}_module"] = list(norms)
    return columns, coords


def _summaries(name: str, projection: torch.Tensor, norm: torch.Tensor) -> list[Column]:
    return [
        Column(f"{name}_projection", numpy_of(projection), ["coordinate"]),
        Column(f"{name}_norm", numpy_of(norm), [f"{name}_module"]),
    ]


def _streamed(mcmc: Any) -> tuple[list[Column], dict[str, Any]]:
    stats = getattr(getattr(mcmc, "_statistics", None), "stats", {})
    traces: dict[str, list[ProjectedTrace]] = {}
    for key, value in stats.items():
        for trace in [value, *getattr(value, "parts", {}).values()]:
            if isinstance(trace, ProjectedTrace) and trace.projections:
                traces.setdefault(key[1], []).append(trace)
    if not traces:
        raise ValueError(
            "this run keeps no draws: it has not been run, or it is a StreamingMCMC without a trace. Give it "
            "statistics=StatsOfDict(default=ProjectedTrace), or use MCMC."
        )
    columns: list[Column] = []
    coords: dict[str, Any] = {}
    for name, chains in traces.items():
        got = [chain.get() for chain in chains]
        columns += _summaries(name, *(torch.stack([g[part] for g in got]) for part in ("projection", "norm")))
        coords[f"{name}_module"] = got[0]["modules"]
    return columns, coords


def adapter_of(mcmc: Any) -> RandomAdapter | None:
    """Return the adapter of a run's model, if it has one."""
    model = getattr(getattr(mcmc, "kernel", None), "model", None)
    adapter = getattr(model, "adapter", model)
    return adapter if isinstance(adapter, RandomAdapter) else None


def numpy_of(value: Any) -> NDArray[Any]:
    """Return a tensor, or what NumPy takes for an array, as an array on the host."""
    return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
