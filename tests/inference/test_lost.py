"""A chain whose loss climbs back to chance is stopped; one that never was better than chance is not."""

from __future__ import annotations

import pytest
import torch

from pyro_lift.inference.lost import EVERY, WINDOW, ChainLostError, LossWatch


def watched(losses: list[float], rows: int = 5, chance: float = 1.0) -> LossWatch:
    watch = LossWatch([rows, rows], [chance, chance], "Do this.")
    for k, loss in enumerate(losses):
        watch.see(torch.tensor(-loss * rows), (k % 2,))
    return watch


def test_a_loss_that_comes_back_to_chance_stops_the_chain_and_says_so() -> None:
    with pytest.raises(
        ChainLostError, match=r"loss of the tasks is 1\.0\d\d a row.*has 1\.000, and it was 0\.500.*Do this"
    ) as e:
        watched([0.5] * WINDOW + [1.05] * 2 * WINDOW)
    assert WINDOW < e.value.step <= 2 * WINDOW


@pytest.mark.parametrize(
    "losses",
    [
        [0.5] * WINDOW + [0.9] * 2 * WINDOW,  # worse, but not lost
        [1.0] * 3 * WINDOW,  # never better than chance
        [0.5] * WINDOW + [1.5] * EVERY + [0.5] * WINDOW,  # a bad patch
    ],
)
def test_others_go_on(losses: list[float]) -> None:
    watched(losses)


def test_tasks_with_nothing_to_be_lost_are_not_watched() -> None:
    watched([0.1] * WINDOW + [2.0] * 2 * WINDOW, chance=0.0)
