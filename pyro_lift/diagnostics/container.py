"""From Pyro's MCMC to ArviZ, on ArviZ 0.23 and 1.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lift.diagnostics.columns import adapter_of, named_columns, posterior_columns
from pyro_lift.support.archive import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SAMPLE_STATS", "from_mcmc"]

#: sample_stats that our kernels report for each draw, under ArviZ's names where they mean the same. The log likelihood
#: of the visited tasks is no pointwise one, which is what ``az.loo`` and ``az.compare`` take ``log_likelihood`` for.
SAMPLE_STATS = ("visit_log_likelihood", "grad_norm", "step_size", "clipped", "task")
#: And where steps are tested: the mean probability with which the visit's proposals were taken.
TESTED_STATS = ("acceptance",)
_REPORTED_AS = {"visit_log_likelihood": "log_likelihood"}


def from_mcmc(mcmc: Any, *, max_size: int = 64, coordinates: int = 32, seed: int = 0) -> Any:
    """Convert a finished run of ``MCMC`` or ``StreamingMCMC``, of any kernel, to ArviZ's container.

    The model is not run again, as ``az.from_pyro`` would (four times).

    Args:
        mcmc: a finished run. ``StreamingMCMC`` keeps no draws: give it a
            :class:`~pyro_lift.inference.projections.ProjectedTrace` among its statistics.
        max_size: sites with more coordinates are replaced by ``<site>_projection``, a fixed random projection, and
            ``<site>_norm``, one norm per adapted module where the model has an adapter.
        coordinates: of that projection.
        seed: of that projection.

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior`` and ``sample_stats``. A site
        whose name is that of a dimension (``chain``, ``draw``, ``x_dim_0``) or has a slash in it, which no variable of
        ArviZ's can have, stands under one with ``_`` behind it, or with dots; its attribute ``site`` has its own name.

    Raises:
        ValueError: the run has not happened, or kept nothing.
    """
    adapter = adapter_of(mcmc)
    columns, coords = posterior_columns(mcmc, adapter, max_size, coordinates, seed)
    posterior, dims, sites = named_columns(columns)
    groups = {"posterior": posterior}
    if stats := _sample_stats(mcmc, next(iter(posterior.values())).shape[:2]):
        groups["sample_stats"] = stats
    data = _container(groups, dims, coords)
    for name, site in sites.items():
        data["posterior"][name].attrs["site"] = site
    return data


def _container(groups: dict[str, Any], dims: dict[str, list[str]], coords: dict[str, Any]) -> Any:
    import arviz as az

    attrs = {"inference_library": "pyro_lift", "inference_library_version": versions().get("pyro-lift", "")}
    if az.__version__.startswith("0."):
        data = az.from_dict(**groups, dims=dims, coords=coords)
    else:
        data = az.from_dict(groups, dims=dims, coords=coords)
    data["posterior"].attrs.update(attrs)
    return data


def _sample_stats(mcmc: Any, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    chains, draws = shape
    reports = [report or {} for report in mcmc._diagnostics]
    if all("sample_stats" in report for report in reports):
        stats = {
            name: np.array([report["sample_stats"][_REPORTED_AS.get(name, name)] for report in reports])
            for name in (*SAMPLE_STATS, *TESTED_STATS)
            if all(_REPORTED_AS.get(name, name) in report["sample_stats"] for report in reports)
        }
        return {name: value for name, value in stats.items() if value.shape == (chains, draws)}
    if all("divergences" in report for report in reports):
        diverging = np.zeros((chains, draws), dtype=bool)
        for chain, report in enumerate(reports):
            diverging[chain, list(report["divergences"])] = True
        return {"diverging": diverging}
    return {}
