"""Rates of a task's classes: the evidence for them in closed form, what they are, and whose they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_lift import Task
from pyro_lift.inference.adaptation.class_rates import EVIDENCE, class_counts, class_rates


def evidence(counts: Tensor) -> float:
    """Find log p(n | uneven) - log p(n | even) as the mean of the likelihood over draws of the uniform law, for two."""
    p = torch.linspace(0.0, 1.0, 200_001, dtype=torch.float64)
    likelihood = p ** int(counts[0]) * (1.0 - p) ** int(counts[1])
    return math.log(float(torch.trapezoid(likelihood, p))) + int(counts.sum()) * math.log(2.0)


@pytest.mark.parametrize("first", range(0, 26))
def test_two_classes_have_rates_where_the_integral_of_the_likelihood_says_so(first: int) -> None:
    counts = torch.tensor([first, 25 - first])
    rates = class_rates(counts, 2)
    assert (rates is not None) == (evidence(counts) >= EVIDENCE)
    if rates is not None:
        torch.testing.assert_close(rates, (counts + 1.0).double() / 27.0)


@pytest.mark.parametrize("counts", [[5, 5, 5], [6, 5, 4], [1, 0, 0], [0, 0, 0]])
def test_counts_as_chance_makes_them_have_none(counts: list[int]) -> None:
    assert class_rates(torch.tensor(counts), 3) is None


def test_even_classes_are_called_uneven_in_less_than_one_case_of_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    called = sum(
        class_rates(torch.bincount(torch.randint(10, (rows,), generator=generator), minlength=10), 10) is not None
        for rows in (10, 25, 100, 800)
        for _ in range(250)
    )
    assert called < 50  # Markov's bound of exp(-3) on the mean of the ratio, which is one


def test_classes_without_a_row_count_and_so_do_outputs_past_the_counts() -> None:
    counts = torch.tensor([23, 2])
    rates = class_rates(counts, 4)
    assert rates is not None
    torch.testing.assert_close(rates, torch.tensor([24.0, 3.0, 1.0, 1.0]).double() / 29.0)
    assert class_rates(None, 3) is None and class_rates(counts, 0) is None


def test_classes_are_counted_where_rows_share_them() -> None:
    x, y = torch.zeros(3, 2), torch.tensor([1, 1, 0])
    counted = class_counts(Task("t", (x, y), num_classes=3))
    assert counted is not None and counted.tolist() == [1, 2, 0]
    assert class_counts(Task("r", (x, torch.zeros(3)), "regression")) is None
    options = {f"option_{name}": torch.ones(3, 2, 4).long() for name in ("input_ids", "attention_mask")}
    assert class_counts(Task("m", ({"input_ids": torch.ones(3, 4).long(), **options}, y), "matching")) is None
