"""``pyro-lift bench workflow``: effective draws a second of a hierarchy with an unknown scale, beside Pyro's NUTS.

The program is the one that is written first: N groups of 20 rows, theta_i ~ Normal(phi, tau), phi ~ Normal(0, 5),
tau ~ HalfCauchy(2), noise of a known scale. ``SGLDGibbs(model)`` runs it with every default, which here is the exact
draw of all sites; again with Langevin steps of theta, which is what a program gets whose likelihood is no Gaussian; and
NUTS, compiled by ``torch.jit``. All three run in one process, one after another for each N, on its processor time.

A rate is ArviZ's bulk effective sample size over the seconds of the draws; those of set-up and warm-up are beside it.
A cell that has not ended after its time limit is judged by the draws that it has.
"""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from torch import Tensor

from pyro_lift.bench.records import Record, format_table
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mcmc import MCMC

__all__ = ["KINDS", "WANTED", "Plan", "groups", "plot", "ratios", "run", "table"]

KINDS = {"ours": "SGLDGibbs(model)", "sgld": 'SGLDGibbs(model, theta_update="sgld")', "nuts": "NUTS(model)"}
SITES = ("phi", "tau")
#: Of the number of groups, how many times NUTS's rate is asked for.
WANTED = {100: 1.0, 1_000: 10.0}
#: Draws of a chain below which its effective sample size is not told.
LEAST_DRAWS = 20


class Plan(NamedTuple):
    """Numbers of groups, draws and warm-up of our chains and of NUTS, and the processor time that a cell may take."""

    tasks: tuple[int, ...] = (10, 100, 1_000, 10_000)
    rows: int = 20
    draws: int = 2_000
    warmup: int = 200
    nuts_draws: int = 500
    nuts_warmup: int = 300
    seconds: float = 120.0


SMOKE = Plan(tasks=(4, 8), rows=5, draws=30, warmup=5, nuts_draws=25, nuts_warmup=5, seconds=20.0)


def groups(num_tasks: int, rows: int, seed: int = 0) -> Tensor:
    """Draw data of groups around 1 with a spread of 0.5, and noise of 1; ``[groups, rows]``."""
    stream = torch.Generator().manual_seed(seed)
    theta = 1.0 + 0.5 * torch.randn(num_tasks, 1, generator=stream)
    return theta + torch.randn(num_tasks, rows, generator=stream)


def model(y: Tensor) -> None:
    """State the hierarchy as a user would."""
    phi = pyro.sample("phi", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("tasks", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(phi, tau))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def run(
    *, smoke: bool = False, tasks: Sequence[int] = (), seconds: float | None = None, log: Callable[[str], None] = print
) -> list[Record]:
    """Return a record for each number of groups and each sampler.

    Args:
        smoke: seconds instead of minutes; the numbers mean nothing.
        tasks: numbers of groups; none are those of the plan.
        seconds: of processor time that a cell may take; None takes the plan's.
        log: told of every cell.
    """
    plan = SMOKE if smoke else Plan()
    plan = plan._replace(tasks=tuple(tasks) or plan.tasks, seconds=seconds or plan.seconds)
    records = []
    for N in plan.tasks:
        y = groups(N, plan.rows)
        for kind in KINDS:
            records.append(_cell(kind, y, plan))
            log(_told(records[-1]))
    return records


class _TimeUpError(Exception):
    """A cell's time is up."""


def _cell(kind: str, y: Tensor, plan: Plan) -> Record:
    """Run one sampler on one data set, for its time at most."""
    stamps: list[float] = []
    draws: list[dict[str, float]] = []
    begin = time.process_time()

    def watch(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        del kernel, i
        now = time.process_time() - begin
        if stage.lower().startswith("sample"):
            draws.append({name: float(params[name].detach()) for name in SITES})
            stamps.append(now)
        elif now > plan.seconds:
            raise _TimeUpError
        else:
            warm[0] = now
        if now > plan.seconds:
            raise _TimeUpError

    warm = [0.0]
    pyro.set_rng_seed(0)
    with suppress(_TimeUpError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "nuts":
            kernel: Any = pyro.infer.NUTS(model, jit_compile=True, ignore_jit_warnings=True)
            options: dict[str, Any] = {"num_samples": plan.nuts_draws, "warmup_steps": plan.nuts_warmup}
            pyro.infer.MCMC(kernel, hook_fn=watch, disable_progbar=True, **options).run(y)
        else:
            kernel = SGLDGibbs(model, theta_update="sgld" if kind == "sgld" else "auto", seed=0)
            options = {"num_samples": plan.draws, "warmup_steps": plan.warmup}
            MCMC(kernel, hook_fn=watch, disable_progbar=True, **options).run(y)
    return {
        "sampler": kind,
        "tasks": len(y),
        "rows": y.shape[1],
        "draws": len(draws),
        "asked": options["num_samples"],
        "warmup": options["warmup_steps"],
        "seconds": stamps[-1] - warm[0] if stamps else 0.0,
        "seconds_before": warm[0],
        "limit": plan.seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **{f"{what}_{name}": value for name in SITES for what, value in _judged(draws, name).items()},
    }


def _judged(draws: list[dict[str, float]], name: str) -> dict[str, float | None]:
    """Mean, sd and bulk effective sample size of one site; None where there are too few draws for any."""
    import arviz as az

    if len(draws) < LEAST_DRAWS:
        return {"mean": None, "sd": None, "ess": None}
    x = np.array([draw[name] for draw in draws])
    return {"mean": float(x.mean()), "sd": float(x.std(ddof=1)), "ess": float(az.ess(x[None], method="bulk"))}


def rate(record: Record, site: str, *, whole: bool = False) -> float | None:
    """Effective draws of a site a second; ``whole`` counts set-up and warm-up, too."""
    if record[f"ess_{site}"] is None:
        return None
    seconds = record["seconds"] + (record["seconds_before"] if whole else 0.0)
    return float(record[f"ess_{site}"] / max(seconds, 1e-9))


def ratios(records: Sequence[Record], kind: str = "ours", *, whole: bool = False) -> dict[int, float]:
    """Return the lesser of both sites' rates over NUTS's by number of groups, where NUTS has draws enough."""
    found = {}
    for N in sorted({int(r["tasks"]) for r in records}):
        here = {r["sampler"]: r for r in records if r["tasks"] == N}
        if kind not in here or "nuts" not in here:
            continue
        pairs = [(rate(here[kind], s, whole=whole), rate(here["nuts"], s, whole=whole)) for s in SITES]
        if all(a is not None and b is not None for a, b in pairs):
            found[N] = min(a / b for a, b in pairs if a is not None and b is not None)
    return found


def _told(record: Record) -> str:
    rates = [rate(record, site) for site in SITES]
    shown = " and ".join("-" if r is None else f"{r:,.1f}" for r in rates)
    return (
        f"N = {record['tasks']:>6,}  {KINDS[record['sampler']]:<38} {record['draws']:>5,} draws in "
        f"{record['seconds']:7.2f} s after {record['seconds_before']:7.2f} s: {shown} effective a second"
    )


def table(records: Sequence[Record]) -> str:
    """Format the rates, and the lesser of the ratios to NUTS's."""
    own = {kind: (ratios(records, kind), ratios(records, kind, whole=True)) for kind in KINDS}
    rows = []
    for r in records:
        N, kind = int(r["tasks"]), r["sampler"]
        cells = [f"{x:,.1f}" if (x := rate(r, site)) is not None else "-" for site in SITES]
        times = ["-" if kind == "nuts" or N not in found else f"{found[N]:.1f}" for found in own[kind]]
        wanted = f">= {WANTED[N]:g}" if kind == "ours" and N in WANTED else ""
        cut = "" if r["draws"] == r["asked"] else f" (of {r['asked']:,}; stopped after {r['limit']:.0f} s)"
        memory = f"{r['peak_bytes'] / 2**30:.2f}"
        seconds = [f"{r['seconds']:.2f}", f"{r['seconds_before']:.2f}"]
        rows.append([f"{N:,}", KINDS[kind], f"{r['draws']:,}{cut}", *seconds, *cells, *times, wanted, memory])
    header = [
        "N",
        "sampler",
        "draws",
        "s",
        "s before",
        "phi a second",
        "tau a second",
        "times NUTS",
        "with warm-up",
        "wanted",
        "peak GiB",
    ]
    return format_table(header, rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot the lesser of both rates against the number of groups."""
    from pyro_lift.bench.figures import new_figure, save_figure

    figure, axis = new_figure(width=5.6, height=3.8)
    for kind, label in KINDS.items():
        points = []
        for r in records:
            both = [rate(r, site) for site in SITES]
            if r["sampler"] == kind and None not in both:
                points.append((r["tasks"], min(x for x in both if x is not None)))
        if points:
            axis.loglog(*zip(*sorted(points), strict=True), marker="o", linewidth=1.6, label=label)
    axis.set(xlabel="groups of 20 rows", ylabel="effective draws a second")
    axis.set_title("The slower of phi and tau, on one core", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
