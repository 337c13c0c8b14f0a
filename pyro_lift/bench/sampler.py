"""``pyro-lift bench sampler``: visits and seconds until phi's draws have the exact posterior, for every update.

On the linear-Gaussian toy (Appendix A) with N tasks, the KL divergence of a Gaussian fit to the draws' second half from
the exact posterior is followed against the number of visits: a median over seeds, each with data of its own, at the
best of several stable step sizes. Beside them stand full SGLD (Eq. 6) and Pyro's NUTS. The translation move takes its
default step. Another data set has weak data, where the exact draw alone is slow.

Visits are counted on chains of the sampler's own step functions (:mod:`~pyro_lift.bench.toy_chains`); seconds are those
visits times what a visit of the kernel costs in ``pyro.infer.MCMC``, measured in the same run. NUTS runs as it is, for
at most ``nuts_seconds``. On the CPU all seconds are those of one process on one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS

from pyro_lift.bench.records import Record, format_table
from pyro_lift.bench.toy_chains import Toys, Update, chain, checkpoints, curve, generator_noise, second_half_kl
from pyro_lift.inference.gibbs.accumulator import langevin_limit
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.gibbs.translation_plan import default_share
from pyro_lift.inference.sgld_kernel import SGLD
from pyro_lift.models.linear_gaussian import LinearGaussian

__all__ = ["TARGETS", "Plan", "plot", "run", "table"]

#: KL divergences (nats) that the table asks for.
TARGETS = (0.01, 0.001)
#: Candidate step sizes, as shares of the largest stable one.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
#: theta's step where phi has a step of its own, as a share of the largest stable one.
THETA_SHARE = 0.4
#: Standard deviations of the observations' noise: of the data sets that every update is held against, and of weak data.
ALPHA, WEAK_ALPHA = 0.5, 20.0
#: What is promised of the translation move: N, alpha, visits, and the KL divergence by then.
PROMISES = (
    (100, WEAK_ALPHA, 3_750, 0.02),
    (100, WEAK_ALPHA, 60_000, 0.006),
    (1_000, ALPHA, 6_250, 0.02),
    (100, ALPHA, 5_760, 0.01),
    (100, ALPHA, 46_080, 0.001),
)
NAMES = {
    "saga": "gibbs, translation",
    "gibbs": "gibbs",
    "exact": "langevin, exact J",
    "table": "langevin, table J",
    "single": "langevin, single x N",
    "single, scale 1": "langevin, single x 1",
    "sgld": "full SGLD",
    "nuts": "NUTS",
}
UPDATES: tuple[Update, ...] = ("saga", "gibbs", "exact", "table", "single", "single, scale 1", "sgld")


class Plan(NamedTuple):
    """Length of the runs: visits per update (``other`` for those not named), seeds, NUTS's budget, visits to time.

    ``weak`` are numbers of tasks with weak data, for ``weak_visits``, with and without the translation move.
    """

    tasks: tuple[int, ...]
    weak: tuple[int, ...]
    weak_visits: int
    limits: dict[tuple[str, int], int]
    other: int
    seeds: int
    nuts_seconds: float
    nuts_draws: int
    timed: int


FULL = Plan(
    tasks=(10, 100, 1000),
    weak=(100,),
    weak_visits=60_000,
    limits={
        ("saga", 1000): 200_000,
        ("table", 100): 320_000,
        ("gibbs", 1000): 450_000,
        ("exact", 1000): 100_000,
        ("single, scale 1", 10): 5_000,
        ("single, scale 1", 100): 5_000,
        ("single, scale 1", 1000): 20_000,
        ("sgld", 100): 25_000,
        ("sgld", 1000): 5_000,
    },
    other=50_000,
    seeds=8,
    nuts_seconds=35.0,
    nuts_draws=4_000,
    timed=300,
)
SMOKE = Plan((5,), (5,), 200, {}, other=200, seeds=2, nuts_seconds=20.0, nuts_draws=40, timed=20)


def run(*, smoke: bool = False, device: str = "cpu", log: Any = print) -> list[Record]:
    """Return records ``update, tasks, iterations, seconds, kl`` with the step sizes, one per checkpoint of every curve.

    Args:
        smoke: seconds instead of minutes.
        device: of the chains; NUTS stays on the CPU.
        log: told of every finished curve.
    """
    plan = SMOKE if smoke else FULL
    records: list[Record] = []
    for N in plan.tasks:
        for update in UPDATES:
            points = _chains(plan, update, N, ALPHA, device)
            records += points
            _tell(log, points)
        points = _nuts(plan, N)
        records += points
        if points:
            _tell(log, points)
    for N, update in product(plan.weak, UPDATES[:2]):
        records += _chains(plan, update, N, WEAK_ALPHA, device)
        _tell(log, records)
    return records


def _tell(log: Any, points: Sequence[Record]) -> None:
    last = points[-1]
    weak = f", alpha = {last['alpha']:g}" if last["alpha"] != ALPHA else ""
    log(
        f"N = {last['tasks']:5d}{weak}  {NAMES[last['update']]:<22} KL {last['kl']:.5f} after "
        f"{last['iterations']:,} iterations"
    )


def _chains(plan: Plan, update: Update, N: int, alpha: float, device: str) -> list[Record]:
    toys = Toys.of([LinearGaussian(N, alpha=alpha, seed=seed) for seed in range(plan.seeds)], device)
    theta, phi = _steps(toys, update, N)
    noise = generator_noise((len(SHARES), plan.seeds, toys.pull.shape[-1]), seed=N, device=device)
    theta_step, phi_step = (torch.tensor(s, dtype=torch.float64, device=device).view(-1, 1, 1) for s in (theta, phi))
    phis = chain(toys, update, theta_step, phi_step, noise)
    limit = plan.limits.get((update, N), plan.other) if alpha == ALPHA else plan.weak_visits
    averaged = curve(phis, toys, limit, stop_at=min(TARGETS))
    kl, which = averaged.best
    seconds = _seconds_a_visit(update, (N, alpha), (theta[0], phi[0]), plan.timed, device)
    return [
        {
            "update": update,
            "tasks": N,
            "alpha": alpha,
            "iterations": n,
            "seconds": n * seconds,
            "kl": float(kl[k]),
            "step_size": theta[int(which[k])],
            "phi_step_size": None if update in ("gibbs", "sgld") else phi[int(which[k])],
            "seconds_per_iteration": seconds,
            "seeds": plan.seeds,
            "device": device,
        }
        for k, n in enumerate(averaged.visits)
        if math.isfinite(float(kl[k]))
    ]


def _steps(toys: Toys, update: Update, N: int) -> tuple[list[float], list[float]]:
    """Return candidate steps of theta and of phi."""
    theta_limit = 4.0 / toys.curvature
    if update == "gibbs":
        return [share * theta_limit for share in SHARES], [0.0] * len(SHARES)
    if update == "saga":
        shift = default_share(1, N, subsampled=False) * toys.shift_limit
        return [share * theta_limit for share in SHARES], [shift] * len(SHARES)
    if update == "sgld":
        # The joint density's largest curvature is phi's N / beta^2 + 1 / sigma^2, or a task's own.
        limit = min(theta_limit, langevin_limit("exact", toys.pair, N))
        return [share * limit for share in SHARES], [0.0] * len(SHARES)
    limit = langevin_limit("exact" if update == "exact" else "table", toys.pair, N)
    return [THETA_SHARE * theta_limit] * len(SHARES), [share * limit for share in SHARES]


def _kernel(update: Update, toy: LinearGaussian, theta: float, phi: float) -> SGLD | SGLDGibbs:
    if update == "sgld":
        return SGLD(toy, step_size=theta)
    if update == "gibbs":
        return SGLDGibbs(toy, step_size=theta, translation="none")
    if update == "saga":
        return SGLDGibbs(toy, step_size=theta, translation="saga", translation_step_size=phi)
    accumulator, _, scale = update.partition(", scale ")
    return SGLDGibbs(
        toy,
        step_size=theta,
        phi_update="langevin",
        phi_step_size=phi,
        accumulator=accumulator,  # type: ignore[arg-type]
        single_scale="1" if scale else "N",
    )


def _seconds_a_visit(
    update: Update, data: tuple[int, float], steps: tuple[float, float], visits: int, device: str
) -> float:
    """Measure the median time of a visit of the kernel in ``pyro.infer.MCMC``, without its set-up."""
    N, alpha = data
    toy = LinearGaussian(N, alpha=alpha, seed=0, block_size=None if update == "sgld" else 1).to(device)
    stamps: list[float] = []
    pyro.set_rng_seed(0)
    MCMC(
        _kernel(update, toy, *steps),
        num_samples=visits,
        warmup_steps=10,
        hook_fn=lambda *_: stamps.append(_clock(device)),
        disable_progbar=True,
    ).run()
    gaps = torch.tensor(stamps[10:], dtype=torch.float64).diff()
    return float(gaps.median())


def _clock(device: str) -> float:
    """Read the clock: this process's on the CPU, so that others on the machine do not count, else the wall's."""
    return time.process_time() if device == "cpu" else time.perf_counter()


class _BudgetSpentError(Exception):
    """NUTS's budget is spent."""


def _nuts(plan: Plan, N: int) -> list[Record]:
    """Run one chain of NUTS on the whole program; its warm-up counts, and its draws' second half is judged."""
    toy = LinearGaussian(N, seed=0, block_size=None)
    posterior = toy.posterior()
    warm_up = min(100, plan.nuts_draws)
    draws: list[torch.Tensor] = []
    stamps: list[float] = []
    began = _clock("cpu")

    def hook(kernel: Any, params: dict[str, torch.Tensor], stage: str, i: int) -> None:
        del kernel, i
        if stage.lower().startswith("sample"):
            draws.append(params["phi"].detach().clone())
            stamps.append(_clock("cpu") - began)
        if _clock("cpu") - began > plan.nuts_seconds:
            raise _BudgetSpentError

    pyro.set_rng_seed(0)
    with suppress(_BudgetSpentError):
        MCMC(NUTS(toy), num_samples=plan.nuts_draws, warmup_steps=warm_up, hook_fn=hook, disable_progbar=True).run()
    if len(draws) < 8:
        return []
    phi = torch.stack(draws)
    return [
        {
            "update": "nuts",
            "tasks": N,
            "alpha": ALPHA,
            "iterations": warm_up + n,
            "seconds": stamps[n - 1],
            "kl": second_half_kl(phi[:n], posterior),
            "step_size": None,
            "phi_step_size": None,
            "seconds_per_iteration": stamps[n - 1] / (warm_up + n),
            "seeds": 1,
            "device": "cpu",
        }
        for n in checkpoints(len(draws))
    ]


# --------------------------------------------------------------------------------------------- what is shown


def curve_of(records: Iterable[Record], update: str, tasks: int, alpha: float = ALPHA) -> list[Record]:
    """List the records of one curve; those that name no alpha are of the usual one."""
    own = (r for r in records if r["update"] == update and r["tasks"] == tasks)
    return [r for r in own if r.get("alpha", ALPHA) == alpha]


def reached(records: Iterable[Record], update: str, tasks: int, target: float, alpha: float = ALPHA) -> Record | None:
    """Find the first record of a curve at or below a KL; None where it was not reached."""
    close = (r for r in curve_of(records, update, tasks, alpha) if r["kl"] <= target)
    return min(close, key=lambda r: int(r["iterations"]), default=None)


def within(records: Iterable[Record], update: str, tasks: int, alpha: float, visits: int) -> Record | None:
    """Find the record of a curve with the least KL within a number of visits; None where there is none so early."""
    early = (r for r in curve_of(records, update, tasks, alpha) if r["iterations"] <= visits)
    return min(early, key=lambda r: float(r["kl"]), default=None)


def _data_sets(records: Iterable[Record]) -> list[tuple[int, float]]:
    """Numbers of tasks with their alpha: the usual ones first."""
    return sorted({(r["tasks"], r.get("alpha", ALPHA)) for r in records}, key=lambda pair: (pair[1], pair[0]))


def table(records: Sequence[Record]) -> str:
    """Format iterations and seconds to each target, for every update and N; then what the translation move keeps."""
    header = [
        "N",
        "alpha",
        "update",
        *(f"{what} to {t:g}" for t in TARGETS for what in ("iterations", "s")),
        "least KL",
        "by",
    ]
    rows = []
    for N, alpha in _data_sets(records):
        for update, name in NAMES.items():
            points = curve_of(records, update, N, alpha)
            if not points:
                continue
            cells = []
            for target in TARGETS:
                hit = reached(points, update, N, target, alpha)
                cells += [f"{hit['iterations']:,}", f"{hit['seconds']:.3g}"] if hit else ["-", "-"]
            least = min(points, key=lambda r: float(r["kl"]))
            rows.append([f"{N}", f"{alpha:g}", name, *cells, f"{least['kl']:.5f}", f"{least['iterations']:,}"])
    promised = promises(records)
    return format_table(header, rows) + (f"\n\n{promised}" if promised else "")


def promises(records: Sequence[Record]) -> str:
    """Format the least KL within some numbers of visits, with and without the translation move."""
    rows = []
    for N, alpha, visits, promised in PROMISES:
        found = [within(records, update, N, alpha, visits) for update in ("saga", "gibbs")]
        if all(found):
            shown = ["-" if r is None else f"{r['kl']:.4f}" for r in found]
            rows.append([f"{N}", f"{alpha:g}", f"{visits:,}", *shown, f"{promised:g}"])
    header = ["N", "alpha", "visits", "KL with translation", "exact draw alone", "promised"]
    return format_table(header, rows) if rows else ""


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot KL against iterations and against seconds, one column per N."""
    from pyro_lift.bench.figures import COLOURS, new_figure, save_figure

    sizes = _data_sets(records)
    figure, axes = new_figure(
        2, len(sizes), width=1.2 + 3.7 * len(sizes), height=6.4, sharey=True, squeeze=False, sharex=False
    )
    for column, (N, alpha) in enumerate(sizes):
        for row, x in enumerate(("iterations", "seconds")):
            axis = axes[row, column]
            for colour, (update, name) in zip(COLOURS, NAMES.items(), strict=False):
                points = sorted((r[x], r["kl"]) for r in curve_of(records, update, N, alpha))
                if points:
                    axis.loglog(*zip(*points, strict=True), color=colour, linewidth=1.6, label=name)
            for target in TARGETS:
                axis.axhline(target, color="0.7", linestyle=":", linewidth=1, zorder=0)
            axis.set(xlabel=x, ylim=(3e-4, 300.0))
        weak = f", weak data (α = {alpha:g})" if alpha != ALPHA else ""
        axes[0, column].set_title(f"N = {N} tasks{weak}")
    for row in range(2):
        axes[row, 0].set_ylabel("KL(draws || exact), nats")
    shown = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.suptitle("Draws of φ against its exact posterior, each update at its best stable step", fontsize=11)
    save_figure(figure, path)
