"""Online EM against batch EM (Fig. 2): one pass over 3,000 samples of a mixture of three Gaussians in the plane.

Every sample is seen once. What is compared, by the KL divergence from the true mixture (by quadrature): our online EM,
Eq. 14's counts from the same start, the paper's recipe (n_j = 100), and batch EM on all samples from the same start.

    python examples/online_em.py --out online-em-output
    python examples/online_em.py --smoke
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lift import OnlineGaussianMixture
from pyro_lift.bench.figures import COLOURS, new_figure, save_figure
from pyro_lift.bench.records import format_table
from pyro_lift.inference.mixture.batch_em import Moments, Stopping, fit, log_densities

TRUTH = Moments(
    torch.tensor([1 / 3, 1 / 3, 1 / 3], dtype=torch.float64),
    torch.tensor([[-3.0, -1.0], [2.5, -2.0], [0.5, 3.0]], dtype=torch.float64),
    torch.tensor([[[1.0, 0.6], [0.6, 1.0]], [[1.5, -0.5], [-0.5, 0.6]], [[0.7, 0.0], [0.0, 1.2]]], dtype=torch.float64),
)
#: The streams; all begin from the same buffer of draws.
STREAMS: dict[str, dict[str, Any]] = {
    "online EM": {},
    "online EM, counts": {"schedule": "counts"},
    "paper's recipe, n_j = 100": {"schedule": "counts", "count": 100},
}
NAMES = (*STREAMS, "batch EM, same start")


def sample(n: int, seed: int) -> Tensor:
    """Draws of the true mixture ``[n, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (n,), generator=generator)
    noise = torch.randn(n, 2, 1, generator=generator, dtype=torch.float64)
    x: Tensor = TRUTH.mean[which] + (torch.linalg.cholesky(TRUTH.variance)[which] @ noise).squeeze(-1)
    return x


def log_density(mixture: Moments, x: Tensor) -> Tensor:
    total: Tensor = log_densities(mixture, x, "full").logsumexp(-1)
    return total


def grid() -> tuple[Tensor, float]:
    """Points ``[M, 2]`` and the area that each stands for."""
    side = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
    return torch.cartesian_prod(side, side), float(side[1] - side[0]) ** 2


def kl_from_truth(mixture: Moments) -> float:
    """KL(truth || mixture) in nats, by quadrature."""
    points, area = grid()
    true = log_density(TRUTH, points)
    return float((true.exp() * (true - log_density(mixture, points))).sum()) * area


def stream(x: Tensor, seed: int, every: int, **options: Any) -> tuple[OnlineGaussianMixture, list[dict[str, float]]]:
    """One pass; the mean log likelihood of all samples is looked at ``every`` so many."""
    mixture, curve = OnlineGaussianMixture(3, "full", seed=seed, **options), []
    for i, row in enumerate(x, start=1):
        mixture.update(row)
        if i % every == 0 and i >= 100:
            curve.append({"seen": float(i), "log_likelihood": float(log_density(mixture.moments, x).mean())})
    return mixture, curve


def run(seed: int, n: int = 3_000, every: int = 100) -> list[dict[str, Any]]:
    """One record a method: KL from the truth, mean log likelihood, and the learning curve."""
    x = sample(n, seed)
    records: list[dict[str, Any]] = []
    for name, options in STREAMS.items():
        mixture, curve = stream(x, seed, every, **options)
        records.append({"method": name, "seed": seed, "mixture": mixture.moments, "curve": curve})
    buffer = OnlineGaussianMixture(3, "full", seed=seed)
    for row in x[:300]:
        buffer.update(row)
    batch, _ = fit(x, 3, "full", start=buffer.moments, stopping=Stopping(1_000, 1e-9))
    records.append({"method": NAMES[-1], "seed": seed, "mixture": batch, "curve": []})
    for record in records:
        record["kl"] = kl_from_truth(record["mixture"])
        record["log_likelihood"] = float(log_density(record["mixture"], x).mean())
    return records


def table(records: list[dict[str, Any]], n: int) -> str:
    rows = []
    for name in NAMES:
        kl = sorted(r["kl"] for r in records if r["method"] == name)
        rows.append([name, f"{np.median(kl):.4f}", f"{kl[-1]:.4f}", f"{kl[0]:.4f}"])
    limit = 17 / (2 * n)
    return f"{format_table(['method', 'median KL', 'worst', 'best'], rows)}\nparameters / (2 n) = {limit:.4f}"


def plot_figure(records: list[dict[str, Any]], n: int, path: Path) -> None:
    """Left: the samples of one seed and the components found. Right: its learning curve."""
    seed = min(r["seed"] for r in records)
    x = sample(n, seed)
    figure, (left, right) = new_figure(1, 2, width=9.6, height=4.2)
    left.scatter(*x.T.numpy(), s=2, color="0.75", zorder=0)
    angle = torch.linspace(0, 2 * torch.pi, 120, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for colour, name in zip(("#000000", *COLOURS), ("truth", *NAMES), strict=False):
        found = next((r["mixture"] for r in records if r["method"] == name and r["seed"] == seed), TRUTH)
        for k in range(3):
            ring = found.mean[k, :, None] + 2.0 * torch.linalg.cholesky(found.variance[k]) @ circle
            style = {"linewidth": 1.4} if name != "truth" else {"linewidth": 2.2, "linestyle": ":", "zorder": 9}
            left.plot(*ring.numpy(), color=colour, **style)
    left.set(xlabel="x₁", ylabel="x₂", title=f"{n:,} samples, two standard deviations", aspect="equal")
    for colour, name in zip(COLOURS, NAMES, strict=False):
        record = next(r for r in records if r["method"] == name and r["seed"] == seed)
        if record["curve"]:
            seen = [c["seen"] for c in record["curve"]]
            right.plot(seen, [c["log_likelihood"] for c in record["curve"]], color=colour, linewidth=1.6, label=name)
        else:
            right.axhline(record["log_likelihood"], color=colour, linestyle="--", linewidth=1.2, label=name)
    right.axhline(float(log_density(TRUTH, x).mean()), color="#000000", linestyle=":", linewidth=2.0, label="truth")
    right.set(xlabel="samples seen, each once", ylabel="mean log likelihood of all samples, nats")
    right.set_title("Learning curve of one seed")
    right.legend(frameon=False, fontsize=8, loc="center right")
    save_figure(figure, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3_000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("online-em-output"))
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.seeds = 600, 2
    torch.set_num_threads(1)
    records = [r for seed in range(options.seeds) for r in run(seed, options.samples)]
    print(table(records, options.samples))
    options.out.mkdir(parents=True, exist_ok=True)
    flat = [{k: v for k, v in r.items() if k not in ("mixture", "curve")} for r in records]
    (options.out / "online_em.json").write_text(json.dumps(flat, indent=1))
    plot_figure(records, options.samples, options.out / "online_em.png")
    print(f"written: {options.out / 'online_em.json'}, {options.out / 'online_em.png'}")


if __name__ == "__main__":
    main()
