"""Metrics against plain loops, and against SciPy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ttest_rel

from pyro_lift.metrics.probabilities import accuracy, expected_calibration_error, nll, reliability
from pyro_lift.metrics.significance import paired_test
from pyro_lift.metrics.task import Judged, scores
from pyro_lift.models.task import Rows, Task


def predictions(seed: int, rows: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(2.0 * torch.randn(rows, classes, generator=generator), -1)
    return p, torch.randint(classes, (rows,), generator=generator)


def looped_ece(p: torch.Tensor, y: torch.Tensor, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [
            (max(row), float(row.index(max(row)) == target))
            for row, target in zip(p.double().tolist(), y.tolist(), strict=True)
            if b / bins < max(row) <= (b + 1) / bins
        ]
        if inside:
            confidence, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            total += len(inside) / len(p) * abs(confidence - right)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_is_the_loop_over_bins(bins: int) -> None:
    for seed in range(5):
        p, y = predictions(seed)
        assert expected_calibration_error(p, y, bins) == pytest.approx(looped_ece(p, y, bins), abs=1e-9)


def test_ece_of_a_calibrated_and_of_a_boastful_predictor() -> None:
    p = torch.tensor([[0.75, 0.25]] * 4)
    assert expected_calibration_error(p, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0)
    certain = torch.tensor([[1.0, 0.0]] * 4)
    assert expected_calibration_error(certain, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.75)


def test_pooled_bins_hold_every_class_of_every_row() -> None:
    p, y = predictions(0)
    pooled = reliability(p, y, bins=10, pooled=True)
    assert float(pooled.cases.sum()) == p.numel()
    # One class of each row comes true, whatever the bin.
    assert float((pooled.cases * pooled.accuracy).sum()) == pytest.approx(len(y))


def test_accuracy_and_nll() -> None:
    p, y = predictions(3)
    rows = list(zip(p.double().tolist(), y.tolist(), strict=True))
    assert accuracy(p, y) == pytest.approx(sum(row.index(max(row)) == t for row, t in rows) / len(rows))
    assert nll(p, y) == pytest.approx(-sum(math.log(row[t]) for row, t in rows) / len(rows))


def test_nll_of_an_impossible_event_is_large_and_finite() -> None:
    assert 700 < nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 710


def test_paired_test_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, generator=generator, dtype=torch.float64)
    b = a + 0.3 + 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
    found, reference = paired_test(a.tolist(), b.tolist()), ttest_rel(a.numpy(), b.numpy())
    assert found.p_value == pytest.approx(float(reference.pvalue))
    assert found.difference / found.standard_error == pytest.approx(float(reference.statistic))


def test_paired_test_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_test([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_record_of_a_comparison_has_the_scores_of_its_task() -> None:
    p, y = predictions(5)
    task = Task("t", ({"x": torch.zeros(len(y), 1)}, y), num_classes=4)
    record, scored = Judged("m", 0, "t", p, y).record(), scores(p, task.train, task)
    assert {name: record[name] for name in ("accuracy", "nll", "ece")} == {
        name: scored[name] for name in ("accuracy", "nll", "ece")
    }
    assert scored["chance"] == max((y == k).double().mean().item() for k in range(4))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_regression_is_scored_by_its_squared_error(shape: tuple[int, ...]) -> None:
    target, guess = torch.arange(6.0), torch.linspace(-1.0, 2.0, 6)
    task = Task("t", ({"x": torch.zeros(6, 1)}, target), "regression")
    expected = sum((a - b) ** 2 for a, b in zip(guess.tolist(), target.tolist(), strict=True)) / 6
    assert scores(guess.view(shape), task.train, task) == {"mse": pytest.approx(expected)}


def test_a_token_of_probability_zero_leaves_the_scores_finite() -> None:
    target = torch.tensor([[1, 0, -100]])
    task = Task("t", ({"x": torch.zeros(1, 3)}, target), "tokens")
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]])
    scored = scores(p, Rows({"x": torch.zeros(1, 3)}, target), task)
    assert scored["nll"] == pytest.approx((-math.log(2.0**-1022) + math.log(2.0)) / 2)
    assert math.isfinite(scored["perplexity"])
