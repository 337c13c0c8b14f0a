"""Choosing settings: lowest mean NLL, ECE among equally good ones, and never one that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from pyro_lift.bench.tuner import Choice, choose, tune
from pyro_lift.inference.sgld import DivergedError


def scores(*values: tuple[float, float]) -> list[dict[str, float]]:
    return [{"nll": nll, "ece": ece} for nll, ece in values]


def test_the_lowest_mean_nll_is_chosen_and_the_first_of_equals() -> None:
    grid = ["a", "b", "c"]
    table = [scores((0.9, 0.1), (0.3, 0.1)), scores((0.5, 0.2), (0.5, 0.2)), scores((0.5, 0.2), (0.5, 0.2))]
    assert choose(grid, table) == ("b", [pytest.approx(0.6), 0.5, 0.5])


@pytest.mark.parametrize(("tie", "best"), [(0.0, "a"), (0.05, "a"), (0.1, "b"), (1.0, "b")])
def test_among_candidates_within_the_tie_calibration_decides(tie: float, best: str) -> None:
    table = [scores((0.50, 0.3)), scores((0.59, 0.1)), scores((1.6, 0.0))]
    assert choose(["a", "b", "c"], table, tie=tie).best == best


@pytest.mark.parametrize("after", [0, 1])
def test_a_setting_that_diverges_on_any_task_is_never_chosen(after: int) -> None:
    def judge(rate: float) -> Iterator[dict[str, float]]:
        for number in range(2):
            if rate == 1.0 and number == after:
                raise DivergedError("the loss is not finite", 0)
            yield {"nll": 5.0 - rate, "ece": 0.0}

    tuned = tune([0.1, 1.0, 0.2], judge)
    assert tuned.best == 0.2
    assert tuned.losses == [4.9, math.inf, 4.8]


def test_a_grid_that_diverges_altogether_gives_its_first() -> None:
    def judge(choice: Choice) -> list[dict[str, float]]:
        raise DivergedError("the loss is not finite", 0)

    assert tune([Choice(0.1), Choice(0.2)], judge).best == Choice(0.1)
