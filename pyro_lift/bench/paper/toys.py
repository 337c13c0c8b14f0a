"""The toys of the paper's Figures 2 and 4, as cells: online EM on a mixture in the plane, and SGLD-Gibbs' convergence.

Figure 2: 3,000 draws of three Gaussians, each seen once by online EM; beside it batch EM. Figure 4: the KL divergence
of the draws of phi from the exact posterior of the linear-Gaussian model of the paper's Appendix A, for 10 to 1,000
tasks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_lift.bench.toy_chains import Toys, Update, chain, curve, generator_noise
from pyro_lift.inference.gibbs.accumulator import langevin_limit
from pyro_lift.inference.gibbs.translation_plan import default_share
from pyro_lift.inference.mixture.batch_em import Moments, Stopping, fit, log_densities
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.linear_gaussian import LinearGaussian

__all__ = ["TOYS", "run_toy"]

TOYS = ("online-em", "sgld-gibbs")
DRAWS, COMPONENTS = 3_000, 3
#: The paper's recipe, and ours.
STREAMS: dict[str, dict[str, Any]] = {
    "online EM": {},
    "the paper's recipe, n_j = 100": {"schedule": "counts", "count": 100},
}
TASKS = (10, 100, 200, 1000)
UPDATES: tuple[Update, ...] = ("sgld", "table", "gibbs", "saga")
#: Steps over the largest stable one, of which the best is shown; visits in all.
STEPS, VISITS = (0.02, 0.1, 0.4), 25_000
#: Of full SGLD; and theta's step where phi's is what is tried.
ITERATIONS, THETA_SHARE = 4_000, 0.1


def run_toy(name: str, seed: int, *, smoke: bool = False) -> dict[str, Any]:
    """Run one of the two toys.

    Raises:
        ValueError: another name.
    """
    if name == "online-em":
        return {"curves": _online_em(seed, 300 if smoke else DRAWS)}
    if name == "sgld-gibbs":
        return {"curves": _convergence(seed, (10,) if smoke else TASKS, 64 if smoke else VISITS)}
    raise ValueError(f"toy {name!r}: expected one of {TOYS}.")


def _truth() -> Moments:
    mean = torch.tensor([[-3.0, -1.0], [2.5, -2.0], [0.5, 3.0]], dtype=torch.float64)
    variance = torch.tensor(
        [[[1.0, 0.6], [0.6, 1.0]], [[1.5, -0.5], [-0.5, 0.6]], [[0.7, 0.0], [0.0, 1.2]]], dtype=torch.float64
    )
    return Moments(torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64), mean, variance)


def _log_density(mixture: Moments, x: Tensor) -> Tensor:
    total: Tensor = log_densities(mixture, x, "full").logsumexp(-1)
    return total


def _kl(mixture: Moments) -> float:
    """Compute KL(truth || mixture) in nats, by quadrature."""
    side = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    true = _log_density(_truth(), points)
    return float((true.exp() * (true - _log_density(mixture, points))).sum()) * float(side[1] - side[0]) ** 2


def _online_em(seed: int, draws: int) -> dict[str, Any]:
    truth, generator = _truth(), torch.Generator().manual_seed(seed)
    which = torch.randint(COMPONENTS, (draws,), generator=generator)
    noise = torch.randn(draws, 2, 1, generator=generator, dtype=torch.float64)
    x = truth.mean[which] + (torch.linalg.cholesky(truth.variance)[which] @ noise).squeeze(-1)
    found: dict[str, Any] = {"truth": {"log_likelihood": float(_log_density(truth, x).mean())}}
    start: Moments | None = None
    for name, options in STREAMS.items():
        mixture = OnlineGaussianMixture(COMPONENTS, "full", seed=seed, **options)
        seen, likelihood = [], []
        for number, row in enumerate(x, start=1):
            mixture.update(row)
            if number % 100 == 0:
                seen.append(number)
                likelihood.append(float(_log_density(mixture.moments, x).mean()))
                start = start or mixture.moments
        found[name] = {"seen": seen, "log_likelihood": likelihood, "kl": _kl(mixture.moments)}
    batch, _ = fit(x, COMPONENTS, "full", start=start, stopping=Stopping(1_000, 1e-9))
    found["batch EM"] = {"log_likelihood": float(_log_density(batch, x).mean()), "kl": _kl(batch)}
    return found


def _convergence(seed: int, tasks: tuple[int, ...], visits: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for N in tasks:
        toys = Toys.of([LinearGaussian(N, seed=10 * seed + k) for k in range(2)])
        for update in UPDATES:
            # An iteration of full SGLD costs N visits, but a single pass of vectors here.
            limit = min(visits, ITERATIONS) if update == "sgld" else max(visits, 2 * N)
            found[f"{update}, N = {N}"] = _curve(toys, update, N, limit, seed)
    return found


def _curve(toys: Toys, update: Update, N: int, limit: int, seed: int) -> dict[str, Any]:
    shares = torch.tensor(STEPS, dtype=torch.float64).view(-1, 1, 1)
    largest = 4.0 / toys.curvature
    if update == "table":
        theta, phi = torch.full_like(shares, THETA_SHARE * largest), shares * langevin_limit("table", toys.pair, N)
    elif update == "sgld":  # phi is the stiffest of the joint chain: N tasks pull at it
        theta = phi = shares * min(largest, langevin_limit("exact", toys.pair, N))
    else:
        theta = shares * largest
        phi = torch.full_like(shares, default_share(1, N, subsampled=False) * toys.shift_limit)
    noise = generator_noise((len(STEPS), toys.pull.shape[1], toys.pull.shape[2]), seed)
    followed = curve(chain(toys, update, theta, phi, noise, seed), toys, limit)
    cost = N if update == "sgld" else 1
    best = followed.best[0].tolist()
    return {"visits": [cost * n for n in followed.visits], "kl": [None if math.isinf(kl) else kl for kl in best]}
