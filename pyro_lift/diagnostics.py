"""From Pyro's MCMC to ArviZ, on ArviZ 0.23 and 1.x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro.ops.stats import split_gelman_rubin

from pyro_lift.inference.movement import Mixing, judged, reach_of
from pyro_lift.inference.projections import ProjectedTrace, project
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.support.archive import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Coordinate", "Summary", "from_mcmc", "summarise"]

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
    adapter = _adapter_of(mcmc)
    columns, coords = _posterior(mcmc, adapter, max_size, coordinates, seed)
    posterior, dims, sites = _named(columns)
    groups = {"posterior": posterior}
    if stats := _sample_stats(mcmc, next(iter(posterior.values())).shape[:2]):
        groups["sample_stats"] = stats
    data = _container(groups, dims, coords)
    for name, site in sites.items():
        data["posterior"][name].attrs["site"] = site
    return data


class _Column(NamedTuple):
    """Draws of one site, or of a summary of it, ``[chains, draws, ...]``, with names of its dimensions, if any."""

    name: str
    values: NDArray[Any]
    dims: list[str] | None = None


def _named(columns: list[_Column]) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]], dict[str, str]]:
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


@dataclass(frozen=True)
class Coordinate:
    """One coordinate of the posterior. MCSE is the Monte-Carlo standard error of the mean.

    R-hat of a single chain compares its halves. An effective sample size per second is None where no time is known.
    """

    name: str
    mean: float
    sd: float
    mcse: float
    r_hat: float
    ess_bulk: float
    ess_tail: float
    ess_bulk_per_second: float | None
    ess_tail_per_second: float | None


@dataclass(frozen=True)
class Summary:
    """Convergence diagnostics of a run; ``str()`` is a table.

    Attributes:
        coordinates: one per coordinate, or projection, of every site.
        divergences: draws of Pyro's own kernels that diverged, over all chains; a chain of ours stops instead.
        clipped: draws whose gradient was scaled down to ``max_grad_norm``, over all chains.
        draws: over all chains.
        seconds: spent on draws, over all chains; None if unknown.
        steps: the first chain's step sizes without dimensions (:meth:`SGLDGibbs.report`).
        reach: how far a chain can have moved: ``visits_per_task``, and in relaxation times, 1 / a visits each, of
            theta_i towards phi (``theta``) and of phi towards its conditional (``phi``; None where phi is drawn
            exactly). Where it is not far above 1, the draws still remember the start, whatever R-hat says.
        doubts: what R-hat, effective sample sizes and reach say against the run, a sentence each, and the ways out;
            empty where nothing does, and for runs too short to tell (:mod:`~pyro_lift.inference.movement`).
    """

    coordinates: list[Coordinate]
    divergences: int
    clipped: int
    draws: int
    seconds: float | None
    steps: dict[str, float | str]
    reach: dict[str, float | None]
    doubts: Sequence[str] = ()

    @property
    def worst_r_hat(self) -> float:
        """The largest of all coordinates (NaN of a constant one is passed over)."""
        return float(np.nanmax([c.r_hat for c in self.coordinates]))

    def __str__(self) -> str:
        header = (
            f"{'':<16}{'mean':>10}{'sd':>10}{'mcse':>10}{'r_hat':>8}{'bulk':>8}{'tail':>8}{'bulk/s':>9}{'tail/s':>9}"
        )
        rows = [
            f"{c.name:<16}{c.mean:>10.4g}{c.sd:>10.4g}{c.mcse:>10.2g}{c.r_hat:>8.3f}{c.ess_bulk:>8.0f}{c.ess_tail:>8.0f}"
            f"{_rate(c.ess_bulk_per_second)}{_rate(c.ess_tail_per_second)}"
            for c in self.coordinates
        ]
        foot = f"divergences: {self.divergences}, clipped: {self.clipped} of {self.draws} draws"
        steps = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.steps.items())
        reach = ", ".join(f"{k} {'exact' if v is None else format(v, '.3g')}" for k, v in self.reach.items())
        lines = [header, *rows, foot, *([f"steps: {steps}"] if steps else []), *([f"reach: {reach}"] if reach else [])]
        if self.reach:
            lines.append("       (visits of a task; in them, how often theta and phi have forgotten where they were)")
        if self.doubts:
            lines += ["", "This run cannot be trusted yet:", *(f"- {words}" for words in self.doubts)]
        return "\n".join(lines)


def _rate(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.3g}"


def summarise(mcmc: Any, *, seconds: float | None = None, max_size: int = 64, coordinates: int = 32) -> Summary:
    """Summarise a finished run: R-hat, bulk and tail ESS (also per second), MCSE, clipped draws, step sizes and reach.

    Args:
        mcmc: a finished run, as :func:`from_mcmc` takes it.
        seconds: what the draws of all chains took; None takes what our kernels measured.
        max_size: as in :func:`from_mcmc`.
        coordinates: as in :func:`from_mcmc`.

    Raises:
        ValueError: the run has not happened, or kept nothing.
    """
    data = from_mcmc(mcmc, max_size=max_size, coordinates=coordinates)
    posterior = data["posterior"]
    reports = [report or {} for report in mcmc._diagnostics]
    if seconds is None and all(report.get("seconds") for report in reports):
        seconds = sum(report["seconds"] for report in reports)
    rows = [
        coordinate
        for name in posterior.data_vars
        for coordinate in _coordinates(str(name), np.asarray(posterior[name]), seconds)
    ]
    stats = data["sample_stats"] if "sample_stats" in _groups(data) else {}
    chains, draws = np.asarray(next(iter(posterior.data_vars.values()))).shape[:2]
    steps = dict(reports[0].get("report") or {})
    reach = reach_of(steps, draws)
    return Summary(
        rows,
        _count(stats, "diverging"),
        _count(stats, "clipped"),
        chains * draws,
        seconds,
        steps,
        reach,
        judged([Mixing(c.name, c.r_hat, c.ess_bulk if c.sd > 0.0 else math.nan) for c in rows], chains, draws, steps),
    )


def _r_hat(x: NDArray[Any]) -> float:
    """ArviZ's R-hat, and that of one chain's halves, for which ArviZ has none."""
    import arviz as az

    return float(az.rhat(x)) if len(x) > 1 or x.shape[1] < 4 else float(split_gelman_rubin(torch.from_numpy(x.copy())))


def _count(stats: Any, name: str) -> int:
    return int(np.asarray(stats[name]).sum()) if name in stats else 0


def _groups(data: Any) -> list[str]:
    groups = data.groups() if callable(data.groups) else data.groups
    return [str(group).strip("/") for group in groups]


def _coordinates(name: str, values: NDArray[Any], seconds: float | None) -> list[Coordinate]:
    import arviz as az

    flat = values.reshape(*values.shape[:2], -1)
    rows = []
    for k in range(flat.shape[-1]):
        x = flat[..., k]
        bulk, tail = (float(az.ess(x, method=method)) for method in ("bulk", "tail"))
        rows.append(
            Coordinate(
                name if flat.shape[-1] == 1 else f"{name}[{k}]",
                float(x.mean()),
                float(x.std(ddof=1)),
                float(az.mcse(x, method="mean")),
                _r_hat(x),
                bulk,
                tail,
                bulk / seconds if seconds else None,
                tail / seconds if seconds else None,
            )
        )
    return rows


def _container(groups: dict[str, Any], dims: dict[str, list[str]], coords: dict[str, Any]) -> Any:
    import arviz as az

    attrs = {"inference_library": "pyro_lift", "inference_library_version": versions().get("pyro-lift", "")}
    if az.__version__.startswith("0."):
        data = az.from_dict(**groups, dims=dims, coords=coords)
    else:
        data = az.from_dict(groups, dims=dims, coords=coords)
    data["posterior"].attrs.update(attrs)
    return data


def _posterior(
    mcmc: Any, adapter: RandomAdapter | None, max_size: int, coordinates: int, seed: int
) -> tuple[list[_Column], dict[str, Any]]:
    if getattr(mcmc, "_samples", None) is None:
        return _streamed(mcmc)
    columns: list[_Column] = []
    coords: dict[str, Any] = {}
    for name, draws in mcmc.get_samples(group_by_chain=True).items():
        if draws[0, 0].numel() <= max_size:
            columns.append(_Column(name, _numpy(draws)))
            continue
        flat = draws.flatten(2)
        norms = {"all": flat.norm(dim=-1)}
        if adapter is not None and flat.shape[-1] == adapter.dim:
            norms = adapter.norms(flat)
        columns += _summaries(name, project(flat, coordinates, seed), torch.stack(list(norms.values()), -1))
        coords[f"{name}_module"] = list(norms)
    return columns, coords


def _summaries(name: str, projection: torch.Tensor, norm: torch.Tensor) -> list[_Column]:
    return [
        _Column(f"{name}_projection", _numpy(projection), ["coordinate"]),
        _Column(f"{name}_norm", _numpy(norm), [f"{name}_module"]),
    ]


def _streamed(mcmc: Any) -> tuple[list[_Column], dict[str, Any]]:
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
    columns: list[_Column] = []
    coords: dict[str, Any] = {}
    for name, chains in traces.items():
        got = [chain.get() for chain in chains]
        columns += _summaries(name, *(torch.stack([g[part] for g in got]) for part in ("projection", "norm")))
        coords[f"{name}_module"] = got[0]["modules"]
    return columns, coords


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


def _adapter_of(mcmc: Any) -> RandomAdapter | None:
    model = getattr(getattr(mcmc, "kernel", None), "model", None)
    adapter = getattr(model, "adapter", model)
    return adapter if isinstance(adapter, RandomAdapter) else None


def _numpy(value: torch.Tensor) -> NDArray[Any]:
    return np.asarray(value.detach().cpu())
