"""From Pyro's MCMC to ArviZ, on ArviZ 0.23 and 1.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lift.inference.trace import ProjectedTrace, project
from pyro_lift.models.adapters import RandomAdapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["from_mcmc"]

#: sample_stats that our kernels report for each draw, under ArviZ's names.
SAMPLE_STATS = ("log_likelihood", "grad_norm", "step_size", "diverging", "task")


def from_mcmc(mcmc: Any, *, max_size: int = 64, coordinates: int = 32, seed: int = 0) -> Any:
    """ArviZ's container for a finished run of ``MCMC`` or ``StreamingMCMC``, of any kernel.

    The model is not run again, as ``az.from_pyro`` would (four times).

    Args:
        mcmc: a finished run. ``StreamingMCMC`` keeps no draws: give it a
            :class:`~pyro_lift.inference.trace.ProjectedTrace` among its statistics.
        max_size: sites with more coordinates are replaced by ``<site>_projection``, a fixed random projection, and
            ``<site>_norm``, one norm per adapted module where the model has an adapter.
        coordinates: of that projection.
        seed: of that projection.

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior`` and ``sample_stats``.

    Raises:
        ValueError: the run has not happened, or kept nothing.
    """
    adapter = _adapter_of(mcmc)
    posterior, dims, coords = _posterior(mcmc, adapter, max_size, coordinates, seed)
    groups = {"posterior": posterior}
    if stats := _sample_stats(mcmc, next(iter(posterior.values())).shape[:2]):
        groups["sample_stats"] = stats
    return _container(groups, dims, coords)


def _container(groups: dict[str, Any], dims: dict[str, list[str]], coords: dict[str, Any]) -> Any:
    import arviz as az

    from pyro_lift import __version__

    attrs = {"inference_library": "pyro_lift", "inference_library_version": __version__}
    if az.__version__.startswith("0."):
        data = az.from_dict(**groups, dims=dims, coords=coords)
    else:
        data = az.from_dict(groups, dims=dims, coords=coords)
    data["posterior"].attrs.update(attrs)
    return data


def _posterior(
    mcmc: Any, adapter: RandomAdapter | None, max_size: int, coordinates: int, seed: int
) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]], dict[str, Any]]:
    if getattr(mcmc, "_samples", None) is None:
        return _streamed(mcmc)
    posterior: dict[str, NDArray[Any]] = {}
    dims: dict[str, list[str]] = {}
    coords: dict[str, Any] = {}
    for name, draws in mcmc.get_samples(group_by_chain=True).items():
        if draws[0, 0].numel() <= max_size:
            posterior[name] = _numpy(draws)
            continue
        flat = draws.flatten(2)
        posterior[f"{name}_projection"] = _numpy(project(flat, coordinates, seed))
        dims[f"{name}_projection"] = ["coordinate"]
        norms = {"all": flat.norm(dim=-1)}
        if adapter is not None and flat.shape[-1] == adapter.dim:
            norms = adapter.norms(flat)
        posterior[f"{name}_norm"] = _numpy(torch.stack(list(norms.values()), -1))
        dims[f"{name}_norm"] = [f"{name}_module"]
        coords[f"{name}_module"] = list(norms)
    return posterior, dims, coords


def _streamed(mcmc: Any) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]], dict[str, Any]]:
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
    posterior: dict[str, NDArray[Any]] = {}
    dims: dict[str, list[str]] = {}
    coords: dict[str, Any] = {}
    for name, chains in traces.items():
        got = [chain.get() for chain in chains]
        posterior[f"{name}_projection"] = _numpy(torch.stack([g["projection"] for g in got]))
        posterior[f"{name}_norm"] = _numpy(torch.stack([g["norm"] for g in got]))
        dims |= {f"{name}_projection": ["coordinate"], f"{name}_norm": [f"{name}_module"]}
        coords[f"{name}_module"] = got[0]["modules"]
    return posterior, dims, coords


def _sample_stats(mcmc: Any, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    chains, draws = shape
    reports = [report or {} for report in mcmc._diagnostics]
    if all("sample_stats" in report for report in reports):
        stats = {name: np.array([report["sample_stats"][name] for report in reports]) for name in SAMPLE_STATS}
        return {name: value for name, value in stats.items() if value.shape == (chains, draws)}
    if all("divergences" in report for report in reports):
        diverging = np.zeros((chains, draws), dtype=bool)
        for chain, report in enumerate(reports):
            diverging[chain, list(report["divergences"])] = True
        return {"diverging": diverging}
    return {}


def _adapter_of(mcmc: Any) -> RandomAdapter | None:
    model = getattr(getattr(mcmc, "kernel", None), "model", None)
    adapter = getattr(model, "adapter", model)
    return adapter if isinstance(adapter, RandomAdapter) else None


def _numpy(value: torch.Tensor) -> NDArray[Any]:
    return np.asarray(value.detach().cpu())
