r"""Many chains of the linear-Gaussian toy at once, by the sampler's own step functions.

A visit through a Pyro program costs about a millisecond, nearly all of it in handlers. The gradient of the toy is
known in closed form, so here the functions that the kernels call (:func:`~pyro_lift.inference.sgld.exponential`,
:func:`~pyro_lift.inference.gibbs.conjugate.draw`, the accumulators) are driven without the program, for many step
sizes and
seeds side by side. With the same noise a chain is the kernel's to the last digit (tests/bench/test_sampler.py).

Shapes: P step sizes, R seeds (each with data of its own), N tasks, d coordinates; a chain's phi is ``[P, R, d]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.accumulator import GradientTable, exact, literal_update
from pyro_lift.inference.gibbs.conjugate import NormalPair, draw
from pyro_lift.inference.gibbs.state import Translation
from pyro_lift.inference.gibbs.task_curvature import sampled_tasks
from pyro_lift.inference.gibbs.translation import block_start
from pyro_lift.inference.schedules import constant
from pyro_lift.inference.sgld import euler, exponential
from pyro_lift.models.linear_gaussian import Gaussian, LinearGaussian, gaussian_kl
from pyro_lift.models.priors import LocalGaussian

__all__ = ["Curve", "Toys", "Update", "chain", "checkpoints", "curve", "generator_noise", "second_half_kl"]

Update = Literal["gibbs", "exact", "table", "single", "single, scale 1", "literal", "sgld", "saga"]
#: Noise for a number of visits: ``[visits, vectors, P, R, d]``; two vectors a visit, three with a translation, N + 1 an
#: iteration of full SGLD.
Noise = Callable[[int, int], Tensor]


class Toys(NamedTuple):
    """R data sets of one kind.

    Attributes:
        gram: :math:`X_i^\\top X_i/\\alpha^2`, ``[N, R, d, d]``.
        pull: :math:`X_i^\\top y_i/\\alpha^2`, ``[N, R, d]``.
        pair: what phi's updates know.
        posterior: of phi, one a data set.
    """

    gram: Tensor
    pull: Tensor
    pair: NormalPair
    posterior: list[Gaussian]

    @classmethod
    def of(cls, toys: Sequence[LinearGaussian], device: str = "cpu") -> Toys:
        """Stack programs that differ in their data alone."""
        first = toys[0]
        gram = torch.stack([t.x.mT @ t.x for t in toys], 1) / first.alpha**2
        pull = torch.stack([(t.x.mT @ t.y.unsqueeze(-1)).squeeze(-1) for t in toys], 1) / first.alpha**2
        number = torch.ones((), dtype=torch.float64, device=device)
        pair = NormalPair("phi", "theta", 0.0 * number, number / first.sigma**2, number * first.beta**2)
        return cls(gram.to(device), pull.to(device), pair, [t.posterior() for t in toys])

    @property
    def curvature(self) -> float:
        """Largest curvature of a theta_i's density given phi."""
        return float(torch.linalg.eigvalsh(self.gram).max()) + 1.0 / float(self.pair.local_variance)

    @property
    def shift_limit(self) -> float:
        """Largest stable step of a translation, as the kernel measures it on some tasks; a mean over data sets."""
        N = len(self.gram)
        largest = torch.linalg.eigvalsh(self.gram[sampled_tasks(N, 1)])[..., -1].mean()
        return 4.0 / (N * float(largest) + float(self.pair.prior_precision))


def generator_noise(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Noise:
    """Make the standard normal noise of a seed, for chains of shape ``[P, R, d]``."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def noise(visits: int, vectors: int) -> Tensor:
        return torch.randn(visits, vectors, *shape, generator=generator, dtype=torch.float64, device=device)

    return noise


def chain(
    toys: Toys, update: Update, theta_step: Tensor, phi_step: Tensor, noise: Noise, seed: int = 0
) -> Iterator[Tensor]:
    """Yield phi ``[P, R, d]`` without end, one a visit (one an iteration over all tasks for ``"sgld"``).

    Args:
        toys: the data.
        update: how phi moves.
        theta_step: eta of theta, ``[P, 1, 1]``.
        phi_step: eta of phi, ``[P, 1, 1]`` or ``[P, R, 1]``; that of the shift for ``"saga"``; ``"gibbs"`` has none.
        noise: standard normal.
        seed: of the order of visits, for ``"saga"``.
    """
    if update == "saga":
        return _translated(toys, theta_step, phi_step, noise, seed)
    if update == "sgld":
        return _full_sgld(toys, theta_step, noise)
    return _visits(toys, update, theta_step, phi_step, noise)


def _visits(toys: Toys, update: Update, theta_step: Tensor, phi_step: Tensor, noise: Noise) -> Iterator[Tensor]:
    N, R, d = toys.pull.shape
    pair, variance, precision = toys.pair, toys.pair.local_variance, 1.0 / toys.pair.local_variance
    table = GradientTable(N)
    zero = torch.zeros(len(theta_step), R, d, dtype=torch.float64, device=toys.pull.device)
    theta = [zero] * N
    phi, S, J = zero, zero, zero
    while True:
        for i, (for_theta, for_phi) in enumerate(noise(N, 2)):
            old = theta[i]
            gradient = toys.pull[i] - (toys.gram[i] * old.unsqueeze(-2)).sum(-1)  # a small product, faster than matmul
            # Step sizes that differ by chain stand where the preconditioner does: eta P in both formulas.
            theta[i] = new = exponential(
                old,
                gradient,
                LocalGaussian(phi, precision),
                step_size=1.0,
                temperature=1.0,
                noise=for_theta,
                preconditioner=theta_step,
            )
            if update == "gibbs":
                S = S + (new - old)
                phi = draw(pair, S, N, 1.0, for_phi)
                yield phi
                continue
            if update == "exact":
                S = S + (new - old)
                J = exact(pair, phi, S, N)
            elif update == "literal":
                J = literal_update(J, old, new, phi, variance)
            else:
                gradient = (new - phi) * precision
                if update == "table":
                    J = J + table.change(i, gradient)
                    table.store(i, gradient)
                else:
                    J = gradient * (N if update == "single" else 1)
            drift = J - phi * pair.prior_precision
            phi = euler(phi, drift, None, step_size=1.0, temperature=1.0, noise=for_phi, preconditioner=phi_step)
            yield phi


def _translated(toys: Toys, theta_step: Tensor, shift_step: Tensor, noise: Noise, seed: int) -> Iterator[Tensor]:
    """Exact draws of phi with the translation move (:mod:`~pyro_lift.inference.gibbs.translation`)."""
    N, R, d = toys.pull.shape
    pair, precision = toys.pair, 1.0 / toys.pair.local_variance
    plan = Translation("saga", constant(1.0), 0, N, float(N))
    h = toys.gram[sampled_tasks(N, 1)].diagonal(dim1=-2, dim2=-1).mean(0)
    zero = torch.zeros(len(theta_step), R, d, dtype=torch.float64, device=toys.pull.device)
    stored, table = [zero] * N, [zero] * N
    phi, S, total, offset = zero, zero, zero, zero
    for round_ in count():
        for place, (for_theta, for_shift, for_phi) in enumerate(noise(N, 3)):
            step = round_ * N + place
            first = block_start(plan, N, 1, step, seed)
            i = place if first is None else first
            old = stored[i] + offset
            gradient = toys.pull[i] - (toys.gram[i] * old.unsqueeze(-2)).sum(-1)
            new = exponential(
                old,
                gradient,
                LocalGaussian(phi, precision),
                step_size=1.0,
                temperature=1.0,
                noise=for_theta,
                preconditioner=theta_step,
            )
            control = gradient + h * old
            estimate = N * gradient if round_ == 0 else total - h * S + N * (control - table[i])
            m = torch.expm1(-0.5 * shift_step * pair.prior_precision)
            noisy = (-m * (2.0 + m) / pair.prior_precision).sqrt() * for_shift
            shift = m * (phi - pair.prior_mean - estimate / pair.prior_precision) + noisy
            total, table[i] = total + (control - table[i]), control
            S, stored[i], offset = S + (new - old) + N * shift, new - offset, offset + shift
            phi = draw(pair, S, N, 1.0, for_phi)
            yield phi


def _full_sgld(toys: Toys, step: Tensor, noise: Noise) -> Iterator[Tensor]:
    N, R, d = toys.pull.shape
    precision = 1.0 / toys.pair.local_variance
    phi = torch.zeros(len(step), R, d, dtype=torch.float64, device=toys.pull.device)
    theta = torch.zeros(N, len(step), R, d, dtype=torch.float64, device=toys.pull.device)
    gram, pull = toys.gram.unsqueeze(1), toys.pull.unsqueeze(1)
    while True:
        (drawn,) = noise(1, N + 1)
        gap = (theta - phi) * precision
        for_theta = pull - (gram * theta.unsqueeze(-2)).sum(-1) - gap
        for_phi = gap.sum(0) - phi * toys.pair.prior_precision
        theta = euler(theta, for_theta, None, step_size=1.0, temperature=1.0, noise=drawn[1:], preconditioner=step)
        phi = euler(phi, for_phi, None, step_size=1.0, temperature=1.0, noise=drawn[0], preconditioner=step)
        yield phi


class Curve(NamedTuple):
    """KL of the draws' second half from the exact posterior, median over seeds: ``kl[p][k]`` after ``visits[k]``."""

    visits: list[int]
    kl: Tensor

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """For each checkpoint the smallest KL of all step sizes, and which step size has it."""
        least = self.kl.min(0)
        return least.values, least.indices


def checkpoints(limit: int) -> list[int]:
    """List numbers of visits in steps of the fourth root of two; the half of each (from the fifth on) is one, too."""
    numbers = [base << octave for octave in range(40) for base in (32, 38, 45, 54)]
    return [n for n in numbers if n <= limit]


def curve(phis: Iterator[Tensor], toys: Toys, limit: int, stop_at: float = 0.0) -> Curve:
    """Follow chains until the best step size's median KL falls to ``stop_at``, or for ``limit`` visits."""
    visits: list[int] = []
    sums: list[tuple[Tensor, Tensor]] = []
    kls: list[Tensor] = []
    seen = 0
    for n in checkpoints(limit):
        kept = torch.stack(list(islice(phis, n - seen)))
        first, second = kept.sum(0), torch.einsum("spri,sprj->prij", kept, kept)
        sums.append((first, second) if not sums else (sums[-1][0] + first, sums[-1][1] + second))
        visits.append(n)
        seen = n
        before = sums[-5] if len(sums) > 4 else (torch.zeros_like(first), torch.zeros_like(second))
        count = n - (visits[-5] if len(sums) > 4 else 0)
        kls.append(_median_kl((sums[-1][0] - before[0]) / count, (sums[-1][1] - before[1]) / count, toys.posterior))
        if float(kls[-1].min()) <= stop_at:
            break
    return Curve(visits, torch.stack(kls, 1))


def second_half_kl(draws: Tensor, posterior: Gaussian) -> float:
    """Compute the KL of the Gaussian fit to the second half of draws ``[S, d]`` from the posterior."""
    half = draws[len(draws) // 2 :]
    return gaussian_kl(Gaussian(half.mean(0), torch.cov(half.T, correction=0)), posterior)


def _median_kl(mean: Tensor, square: Tensor, posterior: Sequence[Gaussian]) -> Tensor:
    """Compute the median over seeds for each step size; infinite where a chain has diverged."""
    covariance = (square - mean.unsqueeze(-1) * mean.unsqueeze(-2)).cpu()
    mean = mean.cpu()
    kl = torch.full(mean.shape[:2], torch.inf, dtype=torch.float64)
    for p, r in torch.cartesian_prod(*(torch.arange(size) for size in mean.shape[:2])).tolist():
        fit = Gaussian(mean[p, r], covariance[p, r])
        if bool(torch.isfinite(fit.covariance).all()) and float(torch.linalg.det(fit.covariance)) > 0.0:
            kl[p, r] = gaussian_kl(fit, posterior[r])
    return kl.quantile(0.5, dim=1)
