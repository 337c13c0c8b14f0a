"""SGLD against SGLD-Gibbs on the toy of Appendix A (Fig. 4), with every update of phi as a curve.

For each number of tasks N, the KL divergence of a Gaussian fit to the draws' second half from the exact posterior of
phi, against the number of task gradients: a visit of SGLD-Gibbs costs one, an iteration of full SGLD costs N. Eq. 11
read to the letter is among the curves: it has no stationary law and runs away.

    python examples/sampler_toy.py --out sampler-toy-output
    python examples/sampler_toy.py --smoke
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pyro_lift.bench.figures import COLOURS, new_figure, save_figure
from pyro_lift.bench.toy_chains import Toys, Update, chain, curve, generator_noise
from pyro_lift.inference.gibbs.accumulator import Accumulator, langevin_limit
from pyro_lift.models.linear_gaussian import LinearGaussian

#: The curve's name and, of its step size, the share of the largest stable one.
UPDATES: dict[Update, tuple[str, float]] = {
    "gibbs": ("SGLD-Gibbs, exact draw", 0.4),
    "exact": ("Langevin, exact J", 0.05),
    "table": ("Langevin, stored J (the paper's)", 0.05),
    "single": ("Langevin, one task × N", 0.1),
    "literal": ("Eq. 11 to the letter", 0.05),
    "sgld": ("full SGLD", 0.1),
}


def run(update: Update, num_tasks: int, gradients: int, seeds: int) -> list[dict[str, Any]]:
    """One record a checkpoint: task gradients so far, and the median KL over seeds."""
    toys = Toys.of([LinearGaussian(num_tasks, seed=seed) for seed in range(seeds)])
    share = UPDATES[update][1]
    accumulator: Accumulator = "exact" if update in ("exact", "sgld") else "table"
    theta, phi = 4.0 / toys.curvature, langevin_limit(accumulator, toys.pair, num_tasks)
    steps = (share * min(theta, phi) if update == "sgld" else 0.4 * theta, share * phi)
    theta_step, phi_step = (torch.full((1, 1, 1), step, dtype=torch.float64) for step in steps)
    phis = chain(toys, update, theta_step, phi_step, generator_noise((1, seeds, 2), seed=num_tasks))
    cost = num_tasks if update == "sgld" else 1
    found = curve(phis, toys, max(gradients // cost, 64))
    return [
        {"update": update, "tasks": num_tasks, "gradients": cost * n, "kl": float(kl)}
        for n, kl in zip(found.visits, found.kl[0], strict=True)
    ]


def plot_figure(records: list[dict[str, Any]], path: Path) -> None:
    """One panel for each N."""
    sizes = sorted({r["tasks"] for r in records})
    figure, axes = new_figure(1, len(sizes), width=1.0 + 3.2 * len(sizes), height=4.2, sharey=True, squeeze=False)
    for axis, N in zip(axes[0], sizes, strict=True):
        for colour, (update, (name, _)) in zip(COLOURS, UPDATES.items(), strict=False):
            mine = [r for r in records if r["update"] == update and r["tasks"] == N]
            x, y = [r["gradients"] for r in mine], [min(r["kl"], 1e6) for r in mine]
            axis.loglog(x, y, color=colour, linewidth=1.6, label=name, linestyle=":" if update == "literal" else "-")
        axis.axhline(0.01, color="0.75", linestyle=":", linewidth=1, zorder=0)
        axis.set(xlabel="task gradients", title=f"N = {N} tasks", ylim=(5e-4, 2e4))
    axes[0, 0].set_ylabel("KL(draws || exact posterior of φ), nats")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center"
    )
    save_figure(figure, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 200, 1000], help="numbers of tasks N")
    parser.add_argument("--gradients", type=int, default=60_000, help="task gradients a curve")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("sampler-toy-output"))
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.gradients, options.seeds = [5, 10], 300, 2
    torch.set_num_threads(1)
    records = []
    for N in options.tasks:
        for update, (name, _) in UPDATES.items():
            mine = run(update, N, options.gradients, options.seeds)
            records += mine
            print(f"N = {N:5d}  {name:<34} KL {mine[-1]['kl']:.4g} after {mine[-1]['gradients']:,} task gradients")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampler_toy.json").write_text(json.dumps(records, indent=1))
    plot_figure(records, options.out / "sampler_toy.png")
    print(f"written: {options.out / 'sampler_toy.json'}, {options.out / 'sampler_toy.png'}")


if __name__ == "__main__":
    main()
