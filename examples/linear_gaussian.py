"""The analytic check of Appendix A (Fig. 4): does the chain over phi reach the exact posterior, and how fast?

Runs `MCMC(SGLDGibbs(program))` on the linear-Gaussian toy, whose posterior p(phi | D) is known in closed form, and
follows the KL divergence of the draws' Gaussian fit from it against the number of visits.

    python examples/linear_gaussian.py --out linear-gaussian-output
    python examples/linear_gaussian.py --smoke
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC
from torch import Tensor

from pyro_lift import SGLDGibbs
from pyro_lift.models.linear_gaussian import LinearGaussian, fit, gaussian_kl


def kl_curve(toy: LinearGaussian, draws: Tensor, checkpoints: list[int]) -> list[float]:
    """KL(fit of the draws so far, the first tenth left out || exact posterior), at each checkpoint."""
    exact = toy.posterior()
    return [gaussian_kl(fit(draws[n // 10 : n]), exact) for n in checkpoints]


def run(num_tasks: int, iterations: int, step_size: float, seeds: int) -> list[dict[str, float]]:
    """One record per seed and checkpoint."""
    checkpoints = [int(n) for n in np.unique(np.geomspace(max(iterations // 100, 50), iterations, 15).astype(int))]
    records = []
    for seed in range(seeds):
        toy = LinearGaussian(num_tasks, seed=seed)
        pyro.set_rng_seed(seed)
        mcmc = MCMC(SGLDGibbs(toy, step_size=step_size), num_samples=iterations, warmup_steps=0)
        mcmc.run()
        curve = kl_curve(toy, mcmc.get_samples()["phi"], checkpoints)
        records += [
            {"tasks": num_tasks, "seed": seed, "iterations": n, "kl": kl}
            for n, kl in zip(checkpoints, curve, strict=True)
        ]
    return records


def plot_figure(records: list[dict[str, float]], path: Path) -> None:
    """KL against visits: the median over seeds, and every seed in pale."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, tasks in enumerate(sorted({r["tasks"] for r in records})):
        mine = [r for r in records if r["tasks"] == tasks]
        visits = sorted({r["iterations"] for r in mine})
        for seed in sorted({r["seed"] for r in mine}):
            one = sorted((r["iterations"], r["kl"]) for r in mine if r["seed"] == seed)
            axes.loglog(*zip(*one, strict=True), color=f"C{colour}", alpha=0.25, linewidth=0.8)
        median = [float(np.median([r["kl"] for r in mine if r["iterations"] == n])) for n in visits]
        axes.loglog(visits, median, color=f"C{colour}", linewidth=2, label=f"N = {tasks:g} tasks")
    axes.axhline(0.01, color="0.5", linestyle=":", linewidth=1)
    axes.annotate("0.01 nats", (1, 0.01), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
    axes.set(xlabel="visits (one task each)", ylabel="KL(draws || exact posterior of φ), nats")
    axes.set_title("SGLD-Gibbs on the linear-Gaussian toy: median and single seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100], help="numbers of tasks N")
    parser.add_argument("--iterations", type=int, default=40_000, help="visits")
    parser.add_argument("--step-size", type=float, default=0.005, help="eta of theta's step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("linear-gaussian-output"))
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.iterations, options.seeds = [5, 10], 300, 2
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for tasks in options.tasks:
        mine = run(tasks, options.iterations, options.step_size, options.seeds)
        last = sorted(r["kl"] for r in mine if r["iterations"] == options.iterations)
        median = float(np.median(last))
        print(f"N = {tasks:5d}: KL after {options.iterations} visits, median of {len(last)} seeds: {median:.5f}")
        records += mine
    (options.out / "linear_gaussian.json").write_text(json.dumps(records, indent=1))
    plot_figure(records, options.out / "linear_gaussian.png")
    print(f"written: {options.out / 'linear_gaussian.json'}, {options.out / 'linear_gaussian.png'}")


if __name__ == "__main__":
    main()
