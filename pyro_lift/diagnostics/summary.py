"""Convergence diagnostics of a run as one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.ops.stats import split_gelman_rubin

from pyro_lift.diagnostics.container import plain_data
from pyro_lift.inference.movement import Mixing, doubts_of, judged, reach_of, told_by

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Coordinate", "Summary", "summarise"]


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
        divergences: draws at which a trajectory diverged, over all chains; one that leaves the numbers ends the run.
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
    data = plain_data(mcmc, max_size, coordinates)
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
        _doubts(mcmc, rows, (chains, draws), reports),
    )


def _doubts(mcmc: Any, rows: list[Coordinate], shape: tuple[int, int], reports: list[dict[str, Any]]) -> list[str]:
    """Return the words of the run's log; of a run that kept no draws, what its projections say."""
    if getattr(mcmc, "_samples", None) is not None:
        return doubts_of(mcmc)
    mixing = [Mixing(c.name, c.r_hat, c.ess_bulk if c.sd > 0.0 else math.nan) for c in rows]
    return judged(mixing, *shape, *told_by(reports))


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
        bulk, tail = float(az.ess(x, method="bulk")), float(az.ess(x, method="tail", prob=(0.05, 0.95)))
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
