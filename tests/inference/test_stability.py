"""Step limits against the eigenvalues they come from, and the words about a step that is past its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift.inference import stability
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.stability import (
    CURVATURE_DIMENSIONS,
    DEFAULT_SHARE,
    check_curvature,
    check_prior_steps,
    clears,
    curvature_limit,
    default_step,
    largest_curvature,
    measured_curvature,
    step_too_large,
    surely_below,
)


def quadratic(matrix: Tensor, leaves: list[Tensor]) -> Tensor:
    x = torch.cat([leaf.reshape(-1) for leaf in leaves])
    return -0.5 * x @ matrix @ x


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_curvature_is_the_largest_eigenvalue_of_minus_the_hessian(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((2, 2), (2,))]
    measured = largest_curvature(quadratic(matrix, leaves), leaves, iterations=500)
    assert measured == pytest.approx(float(torch.linalg.eigvalsh(matrix).max()), rel=1e-6)


def test_the_curvature_of_a_convex_density_is_negative() -> None:
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert largest_curvature(0.5 * leaf.square().sum(), [leaf]) == pytest.approx(-1.0)


def test_a_linear_density_has_no_curvature_and_no_limit() -> None:
    leaf = torch.ones(3, requires_grad=True)
    assert largest_curvature(leaf.sum(), [leaf]) == 0.0
    assert curvature_limit(0.0) == curvature_limit(None) == curvature_limit(-1.0) == math.inf


@pytest.mark.parametrize(("share", "grows"), [(0.99, False), (1.01, True)])
def test_the_euler_step_grows_just_past_its_limit(share: float, grows: bool) -> None:
    curvature, x = 7.0, 1.0
    eta = share * curvature_limit(curvature)
    for _ in range(2000):
        x = x - 0.5 * eta * curvature * x
    assert (abs(x) > 1.0) is grows


def test_a_default_step_is_a_share_of_the_limit() -> None:
    assert default_step(8.0)(0) == default_step(8.0)(10**6) == pytest.approx(DEFAULT_SHARE * 0.5)


def evaluation(model: Callable[[], None]) -> Evaluation:
    return Program(model, None, (), {}, pyro.infer.autoguide.init_to_mean).run({}, {}, None, None)


def normal(dim: int = 2, scale: float = 0.5) -> Callable[[], None]:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), scale).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.ones(()))

    return model


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_a_programs_curvature_is_prior_and_likelihood_together(power: float) -> None:
    """Precision 1 / 0.25 of the prior; the sum of two coordinates adds 2 x power in the stiffest direction."""
    assert measured_curvature(evaluation(normal()), power, wanted=True) == pytest.approx(4.0 + 2.0 * power, rel=1e-5)


def test_a_large_program_is_measured_where_a_step_is_wanted() -> None:
    """A prior of precision 4, and a sum of D coordinates, which adds D in one direction."""
    run = evaluation(normal(CURVATURE_DIMENSIONS + 1))
    assert measured_curvature(run, 1.0, wanted=False) is None
    assert measured_curvature(run, 1.0, wanted=True) == pytest.approx(4.0 + CURVATURE_DIMENSIONS + 1, rel=1e-5)


def test_a_density_without_curvature_gives_no_step() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("slope", 2.0 * x)

    with pytest.raises(ValueError, match="pass a value for step_size"):
        measured_curvature(evaluation(model), 1.0, wanted=True)


def test_the_largest_of_many_curvatures_is_found_by_a_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them up to 1, one of 3, and a density that curves up by 5 along one direction more."""
    spectrum = torch.cat([torch.linspace(0.0, 1.0, 1000), torch.tensor([3.0, -5.0])]).double()
    leaf = torch.zeros(1002, dtype=torch.float64, requires_grad=True)
    products = counted(monkeypatch)
    assert largest_curvature(-0.5 * (spectrum * leaf**2).sum(), [leaf]) == pytest.approx(3.0, rel=1e-4)
    assert len(products) < 25


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    products: list[int] = []
    times = stability._MinusHessian.times

    def count(self: stability._MinusHessian, v: Tensor) -> Tensor:
        products.append(self.size)
        return times(self, v)

    monkeypatch.setattr(stability._MinusHessian, "times", count)
    return products


@pytest.mark.parametrize("power", [1, 3])
def test_a_limit_is_cleared_wrongly_as_seldom_as_is_said(power: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hardest case is a single direction that curves: the bound then rests on the draw of v alone."""
    size, wrong, rounds = 20, 0, 2000
    leaf = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    stream = torch.Generator().manual_seed(1)

    def unit(self: stability._MinusHessian) -> Tensor:
        v = torch.randn(size, generator=stream, dtype=torch.float64)
        unit_vector: Tensor = v / v.norm()
        return unit_vector

    monkeypatch.setattr(stability._MinusHessian, "random_unit", unit)
    for _ in range(rounds):
        wrong += surely_below(-0.5 * leaf[0] ** 2 * 1.0, [leaf], 1.0 - 1e-9, power)
    assert wrong <= 0.001 * rounds + 3.0 * math.sqrt(0.001 * rounds)
    assert surely_below(-0.5 * leaf[0] ** 2, [leaf], 1e4, power)


def test_a_default_step_is_cleared_by_three_products_at_a_tasks_first_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluation(normal(20))
    curvature = measured_curvature(run, 1.0, wanted=True)
    products = counted(monkeypatch)
    assert clears(run, 1.0, default_step(curvature)(0), {})
    assert len(products) <= 3
    assert not clears(run, 1.0, 1.001 * curvature_limit(curvature), {})
    assert not clears(run, 1.0, 0.6 * curvature_limit(curvature), {"x": 2.0})


def test_a_prior_alone_limits_the_euler_step() -> None:
    run = evaluation(normal(scale=0.5))
    check_prior_steps(run, 0.99, {})
    for eta, scale in ((1.0, {}), (0.6, {"x": 2.0})):
        with pytest.raises(ValueError, match=r"step_size \(site 'x'\)=.* is past its stability limit 1 = 4 β²"):
            check_prior_steps(run, eta, scale)


def test_the_message_names_value_limit_and_the_ways_out() -> None:
    message = step_too_large("step_size", 2.0, 1.0, "4 β²")
    for part in ("step_size=2", "limit 1 = 4 β²", 'integrator="exponential"', "check_stability=False", "0.05"):
        assert part in message


@pytest.mark.parametrize("curvature", [math.inf, math.nan, None])
def test_a_curvature_that_is_no_number_is_left_to_the_step(curvature: float | None) -> None:
    check_curvature(evaluation(normal()), curvature, 0.1, "exponential", 1.0, {})
