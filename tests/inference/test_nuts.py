"""The no-U-turn sampler leaves a density as it is at any step and metric, and its warm-up finds both."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats
from torch import Tensor

from pyro_lift.inference.nuts import Density, Point, reasonable_step, trajectory
from pyro_lift.inference.nuts_tuning import begun, inverse_mass_of, step_of, tuned, window_ends

SHAPE = 3.0


def log_gamma(u: Tensor) -> tuple[float, Tensor]:
    """The logarithm of a gamma variable: a skewed density on the whole line."""
    return float((SHAPE * u - u.exp()).sum()), SHAPE - u.exp()


def normal(sd: Tensor) -> Density:
    def density(x: Tensor) -> tuple[float, Tensor]:
        return -0.5 * float((x / sd).square().sum()), -x / sd.square()

    return density


def chain(density: Density, begin: Tensor, step: float, inverse_mass: Tensor, draws: int) -> Tensor:
    generator, kept = torch.Generator().manual_seed(1), []
    value, gradient = density(begin)
    here = Point(begin, value, gradient)
    for _ in range(draws):
        here = trajectory(density, here, step, inverse_mass, generator).end
        kept.append(here.position)
    return torch.stack(kept)


@pytest.mark.parametrize(("step", "inverse_mass"), [(0.9, 0.3), (0.35, 1.0)])
def test_the_draws_have_the_law_of_a_skewed_density_at_any_step_and_metric(step: float, inverse_mass: float) -> None:
    # Ten copies in one vector: a test at the end of a trajectory that favoured either end would show in each.
    begin = torch.full((10,), math.log(SHAPE), dtype=torch.float64)
    draws = chain(log_gamma, begin, step, torch.full_like(begin, inverse_mass), 250)[10::4].reshape(-1).numpy()
    law = stats.loggamma(SHAPE)
    assert stats.kstest(draws, law.cdf).pvalue > 1e-3
    assert stats.kstest(draws, stats.loggamma(1.15 * SHAPE).cdf).pvalue < 1e-3  # the test can tell
    assert draws.mean() == pytest.approx(float(special.digamma(SHAPE)), abs=0.1)


def test_a_trajectory_keeps_the_energy_better_the_smaller_its_step_and_says_where_it_diverges() -> None:
    sd = torch.tensor([1.0, 0.2], dtype=torch.float64)
    density, ones = normal(sd), torch.ones(2, dtype=torch.float64)
    here = Point(sd.clone(), *density(sd))
    accepted = []
    for step in (0.3, 0.03):
        found = [trajectory(density, here, step, ones, torch.Generator().manual_seed(k)) for k in range(10)]
        accepted.append(sum(t.acceptance for t in found) / 10)
        assert not any(t.diverged for t in found)
    assert accepted[0] < accepted[1] and accepted[1] > 0.99
    wild = trajectory(density, here, 3.0, ones, torch.Generator().manual_seed(0))
    assert wild.diverged and wild.end.position is here.position


def test_a_region_without_density_is_not_entered() -> None:
    def positive(x: Tensor) -> tuple[float, Tensor]:
        inside = bool((x > 0.0).all())
        return (-float(x.sum()), -torch.ones_like(x)) if inside else (-math.inf, torch.zeros_like(x))

    draws = chain(positive, torch.ones(1, dtype=torch.float64), 0.2, torch.ones(1, dtype=torch.float64), 500)
    assert float(draws.min()) > 0.0 and float(draws.mean()) == pytest.approx(1.0, abs=0.25)


def test_windows_double_and_the_last_takes_what_is_left() -> None:
    assert window_ends(1_000) == (75, [100, 150, 250, 450, 950])  # Stan's
    assert window_ends(10) == (10, [])
    for warmup in (20, 60, 149, 150, 151, 333, 5_000):
        begin, ends = window_ends(warmup)
        assert 0 < begin < ends[0] and ends[-1] < warmup and ends == sorted(set(ends))


def test_the_warm_up_finds_the_variances_and_a_step_of_the_wanted_acceptance() -> None:
    sd = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    density, generator = normal(sd), torch.Generator().manual_seed(3)
    here = Point(3.0 * sd, *density(3.0 * sd))
    tuning, warmup = begun(density, here, generator), 200
    for k in range(warmup):
        moved = trajectory(density, here, step_of(tuning, True), inverse_mass_of(tuning), generator)
        here, accepted = moved.end, moved.acceptance
        tuning = tuned(tuning, accepted, here, k, warmup, density, generator)
    ratio = inverse_mass_of(tuning) / sd.square()
    assert bool((ratio > 0.5).all()) and bool((ratio < 2.0).all())
    found = [
        trajectory(density, here, step_of(tuning, False), inverse_mass_of(tuning), generator).acceptance
        for _ in range(60)
    ]
    assert sum(found) / 60 == pytest.approx(0.85, abs=0.12)


def test_the_first_step_is_one_that_is_taken_about_four_times_in_five() -> None:
    sd = torch.full((1,), 0.01, dtype=torch.float64)
    density, here = normal(sd), Point(sd, *normal(sd)(sd))
    for begin in (1e-6, 10.0):
        step = reasonable_step(density, here, begin, torch.ones_like(sd), torch.Generator().manual_seed(1))
        assert 0.01 < step < 0.04
