"""Simulation-based calibration: are the posteriors right, judged without knowing them?

Draw parameters from the prior, data from the parameters, and draws from the posterior of those data: the true value's
rank among the draws is then uniform, whatever the model. A hierarchical Poisson model, for which no posterior is known
in closed form, is simulated hundreds of times; all replicates run as columns of one chain. Histograms that are flat
say that the sampler is right; a hump says that its draws are too wide, a bowl that they are too narrow.

    python examples/calibration.py --out calibration-output
    python examples/calibration.py --smoke
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_lift import SGLDGibbs
from pyro_lift.bench.figures import COLOURS, new_figure, save_figure
from pyro_lift.diagnostics.calibration import rank_counts, uniform_p_value

N, SIGMA, BETA, COUNTS = 3, 0.7, 0.5, 6
#: Ranks run from 0 to DRAWS; they are shown in BINS bins of equal width.
DRAWS, BINS = 63, 16
TABLE_LIMIT = math.pi**2 * BETA**2 / N**2
SAMPLERS: dict[str, dict[str, Any]] = {
    "gibbs": {"step_size": 0.01},
    "table J, 2 % of its limit": {
        "step_size": 0.01,
        "phi_update": "langevin",
        "accumulator": "table",
        "phi_step_size": 0.02 * TABLE_LIMIT,
    },
    "table J, 60 % of its limit": {
        "step_size": 0.01,
        "phi_update": "langevin",
        "accumulator": "table",
        "phi_step_size": 0.6 * TABLE_LIMIT,
    },
    "one task's gradient x 1": {
        "step_size": 0.01,
        "phi_update": "langevin",
        "accumulator": "single",
        "single_scale": "1",
        "phi_step_size": 0.02 * TABLE_LIMIT,
    },
}


def simulate(replicates: int, seed: int) -> dict[str, Tensor]:
    """phi ``[R]``, theta ``[N, R]`` and counts ``[N, R, COUNTS]`` from the prior."""
    generator = torch.Generator().manual_seed(seed)
    phi = SIGMA * torch.randn(replicates, generator=generator, dtype=torch.float64)
    theta = phi + BETA * torch.randn(N, replicates, generator=generator, dtype=torch.float64)
    rate = theta.exp().unsqueeze(-1).expand(-1, -1, COUNTS)
    return {"phi": phi, "theta": theta, "y": torch.poisson(rate, generator=generator)}


def program(y: Tensor) -> Callable[[], None]:
    """Log rates theta_i around phi, for R replicates at once."""
    zero = torch.zeros(y.shape[1], dtype=torch.float64)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(zero, SIGMA).to_event(1))
        with pyro.plate("tasks", N, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, BETA).to_event(1))
            rate = theta.exp().unsqueeze(-1).expand(-1, -1, COUNTS)
            pyro.sample("y", dist.Poisson(rate).to_event(2), obs=y[index])

    return model


def ranks(options: dict[str, Any], replicates: int, burn_in: int, thinning: int, seed: int) -> dict[str, Tensor]:
    """Ranks of the true phi and theta_1 among their draws, ``[R]`` each, from 0 to DRAWS."""
    truth = simulate(replicates, seed)
    pyro.set_rng_seed(seed)
    kernel = SGLDGibbs(program(truth["y"]), thinning=thinning, check_stability=False, keep_theta=True, **options)
    mcmc = MCMC(kernel, num_samples=DRAWS, warmup_steps=burn_in, disable_progbar=True)
    mcmc.run()
    drawn = mcmc.get_samples()
    draws = {"phi": drawn["phi"], "theta_1": drawn["theta"][:, 0]}
    true = {"phi": truth["phi"], "theta_1": truth["theta"][0]}
    return {site: (values < true[site]).sum(0) for site, values in draws.items()}


def histogram(found: Tensor) -> Tensor:
    """Counts of the ranks in BINS bins of equal width."""
    return rank_counts(found, DRAWS, BINS)


def plot_figure(records: list[dict[str, Any]], path: Path) -> None:
    """One histogram for each sampler and site, with the band that 99 % of uniform counts fall into."""
    from scipy.stats import binom

    names = list(dict.fromkeys(r["sampler"] for r in records))
    figure, axes = new_figure(2, len(names), width=3.1 * len(names), height=4.6, sharex=True, squeeze=False)
    for column, name in enumerate(names):
        for row, site in enumerate(("phi", "theta_1")):
            record = next(r for r in records if r["sampler"] == name and r["site"] == site)
            axis, total = axes[row, column], sum(record["counts"])
            axis.axhspan(*binom.ppf([0.005, 0.995], total, 1 / BINS), color="0.88", zorder=0)
            axis.bar(range(BINS), record["counts"], width=0.9, color=COLOURS[column], zorder=1)
            axis.set_title(f"{name}\n{site.replace('_', ' ')}: p = {record['p']:.2g}", fontsize=9)
            axis.set_xticks([0, BINS - 1], ["lowest", "highest"])
            axis.set_ylim(0, 1.15 * max(*record["counts"], 2 * total / BINS))
    figure.supxlabel("rank of the true value among the draws", fontsize=10)
    figure.supylabel("replicates", fontsize=10)
    save_figure(figure, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1_500)
    parser.add_argument("--burn-in", type=int, default=1_000, help="visits")
    parser.add_argument("--thinning", type=int, default=100, help="visits per draw: ranks want independent draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("calibration-output"))
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the ranks mean nothing")
    options = parser.parse_args()
    if options.smoke:
        options.replicates, options.burn_in, options.thinning = 50, 20, 1
    torch.set_num_threads(1)
    records = []
    for name, settings in SAMPLERS.items():
        found = ranks(settings, options.replicates, options.burn_in, options.thinning, options.seed)
        for site, values in found.items():
            counts = histogram(values)
            records.append({"sampler": name, "site": site, "counts": counts.tolist(), "p": uniform_p_value(counts)})
            print(f"{name:<28} {site:<8} chi-square p = {records[-1]['p']:.3g}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.json").write_text(json.dumps(records, indent=1))
    plot_figure(records, options.out / "calibration.png")
    print(f"written: {options.out / 'calibration.json'}, {options.out / 'calibration.png'}")


if __name__ == "__main__":
    main()
