"""The temperature of predictions: a convex problem solved, within bounds, the same for all kinds."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyro_lift.inference.adaptation.temperature import (
    HIGHEST,
    LOWEST,
    OWN_ROWS,
    Predicted,
    careful_temperature,
    fit_temperature,
    tempered,
)
from pyro_lift.metrics.probabilities import nll


def calibrated(n: int, sharpness: float, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Probabilities that are too sharp by a known factor, and labels drawn from the right ones."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return (sharpness * logits).softmax(-1), target


def test_it_is_the_minimum_that_scipy_finds_over_the_logarithm_of_the_temperature() -> None:
    tasks = [calibrated(40, 2.0), calibrated(60, 1.5, classes=3)]

    def mean(u: float) -> float:
        return sum(nll(tempered(p, float(torch.tensor(u).exp())), y) for p, y in tasks) / len(tasks)

    oracle = minimize_scalar(mean, bounds=(-1.6, 1.6), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(tasks) == pytest.approx(float(torch.tensor(oracle.x).exp()), rel=1e-4)


def test_around_rates_it_is_the_minimum_that_scipy_finds_too() -> None:
    rates = torch.tensor([0.85, 0.05, 0.05, 0.05], dtype=torch.float64)
    tasks = [Predicted(*calibrated(40, 2.0), rates), Predicted(*calibrated(60, 1.5, classes=3))]

    def mean(u: float) -> float:
        return sum(nll(tempered(p, float(torch.tensor(u).exp()), r), y) for p, y, r in tasks) / len(tasks)

    oracle = minimize_scalar(mean, bounds=(-1.6, 1.6), method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(tasks)
    assert found == pytest.approx(float(torch.tensor(oracle.x).exp()), rel=1e-4)
    assert found != pytest.approx(fit_temperature([task._replace(rates=None) for task in tasks]), rel=1e-3)


def test_with_rows_of_the_predictions_own_it_is_the_minimum_that_scipy_finds_too() -> None:
    rates = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    tasks = [Predicted(*calibrated(40, 0.5), rates), Predicted(*calibrated(60, 0.6, classes=3))]
    own = 30.0

    def mean(u: float) -> float:
        total = 0.0
        for p, y, r in tasks:
            q = tempered(p, float(torch.tensor(u).exp()), r)
            total += nll(q, y) - own / 100 * float((p * q.log()).sum(-1).mean())
        return total / len(tasks)

    oracle = minimize_scalar(mean, bounds=(-1.6, 1.6), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(tasks, own) == pytest.approx(float(torch.tensor(oracle.x).exp()), rel=1e-4)
    assert fit_temperature(tasks) < fit_temperature(tasks, own) < 1.0


def test_rows_of_the_predictions_own_leave_one_that_is_right_on_its_side_and_say_nothing_of_many() -> None:
    right = (torch.tensor([[0.9, 0.1]] * 5), torch.zeros(5, dtype=torch.long))
    assert LOWEST < fit_temperature([right], 36.0) < 1.0
    many = calibrated(20_000, 0.4)
    assert fit_temperature([many], 36.0) == pytest.approx(fit_temperature([many]), rel=0.01)


def test_with_care_one_above_is_as_fitted_and_one_below_is_fitted_with_own_rows() -> None:
    sharp, flat = [calibrated(40, 2.0)], [calibrated(40, 0.5)]
    assert careful_temperature(sharp) == fit_temperature(sharp) > 1.0
    assert fit_temperature(flat) < careful_temperature(flat) == fit_temperature(flat, OWN_ROWS) < 1.0


def test_a_high_temperature_leads_to_the_rates_and_even_ones_fall_out() -> None:
    p = torch.rand(6, 3).softmax(-1)
    rates = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(tempered(p, 1e9, rates), rates.expand(6, 3))
    torch.testing.assert_close(tempered(rates, 3.0, rates), rates)  # what is not sure stays as unsure
    assert tempered(p, 1.0, rates) is p
    torch.testing.assert_close(tempered(p, 2.0, torch.full((3,), 1 / 3)), tempered(p, 2.0))


def test_probabilities_that_are_too_sharp_by_a_factor_get_that_factor() -> None:
    assert fit_temperature([calibrated(20_000, 2.5)]) == pytest.approx(2.5, rel=0.05)


def test_tasks_count_alike_whatever_their_rows() -> None:
    small, large = calibrated(50, 3.0), calibrated(500, 0.7)
    twice = (torch.cat([large[0]] * 4), torch.cat([large[1]] * 4))
    assert fit_temperature([small, large]) == pytest.approx(fit_temperature([small, twice]), rel=1e-6)


def test_rows_that_are_all_right_or_all_wrong_stop_at_the_bounds() -> None:
    p = torch.tensor([[0.9, 0.1]] * 5)
    assert fit_temperature([(p, torch.zeros(5, dtype=torch.long))]) == LOWEST
    assert fit_temperature([(p, torch.ones(5, dtype=torch.long))]) == HIGHEST
    uniform = torch.full((5, 2), 0.5)
    assert fit_temperature([(uniform, torch.zeros(5, dtype=torch.long))]) == 1.0
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert fit_temperature([(certain, torch.tensor([0, 1]))]) == HIGHEST


def test_of_tokens_those_that_are_ignored_do_not_count() -> None:
    p, y = calibrated(40, 2.0)
    target = torch.stack([y, torch.full_like(y, -100)], -1)
    both = torch.stack([p, p.flip(-1)], 1)
    assert fit_temperature([(both, target)]) == pytest.approx(fit_temperature([(p, y)]))


def test_tempering_keeps_the_order_and_the_sum_and_one_changes_nothing() -> None:
    p = torch.rand(6, 5).softmax(-1)
    assert tempered(p, 1.0) is p
    flat, sharp = tempered(p, 3.0), tempered(p, 0.3)
    for q in (flat, sharp):
        torch.testing.assert_close(q.sum(-1), torch.ones(6, dtype=q.dtype))
        assert torch.equal(q.argsort(-1), p.argsort(-1))
    assert (flat.amax(-1) < p.amax(-1)).all() and (sharp.amax(-1) > p.amax(-1)).all()


def test_no_rows_and_no_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        fit_temperature([])
    with pytest.raises(ValueError, match="temperature"):
        tempered(torch.ones(1, 1), 0.0)
