"""A chain whose loss climbs back to chance is stopped; one that never was better than chance is not."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_lift.inference.lost import EVERY, WINDOW, ChainLostError, LossWatch
from pyro_lift.models.chance import chance_loss
from pyro_lift.models.target_units import advice_on_units
from pyro_lift.models.task import Task


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


def seen_with_stops(losses: list[float], stops: list[int]) -> None:
    watch = watched([])
    for k, loss in enumerate(losses):
        if k in stops:
            state = json.loads(json.dumps(watch.state_dict()))
            watch = watched([])
            watch.load_state_dict(state)
        watch.see(torch.tensor(-loss * 5), (k % 2,))


@pytest.mark.parametrize("stops", [[1, 30, 199, 205], [WINDOW, WINDOW + 60]])
def test_what_it_has_seen_is_brought_back(stops: list[int]) -> None:
    losses = [0.5] * WINDOW + [1.05] * 2 * WINDOW

    def told(stops: list[int]) -> ChainLostError:
        with pytest.raises(ChainLostError) as error:
            seen_with_stops(losses, stops)
        return error.value

    through, again = told([]), told(stops)
    assert (again.step, str(again)) == (through.step, str(through))
    assert "it was 0.500 before" in str(again)


def test_tasks_with_nothing_to_be_lost_are_not_watched() -> None:
    watched([0.1] * WINDOW + [2.0] * 2 * WINDOW, chance=0.0)


def small(unit: float) -> list[Task]:
    y = torch.tensor([1.0, -1.0] * 4)
    return [Task(f"t{k}", (y[:, None], unit * y), "regression") for k in range(4)]


@pytest.mark.parametrize("phase", ["sgd", "sample"])
def test_of_tiny_targets_it_says_first_that_they_are_to_be_standardised(phase: str) -> None:
    tasks = small(0.02)
    watch = LossWatch.of(tasks, 1.0, "Do this.", advice_on_units(tasks))
    chance = chance_loss(tasks[0], 1.0)
    visits = [0.5] * WINDOW + [1.2] * 2 * WINDOW
    with pytest.raises(ChainLostError, match=r"before: The targets are small: they vary by 0\.02 .*Standardise them"):
        see_all(watch, [8 * chance * visit for visit in visits], phase)


def see_all(watch: LossWatch, losses: list[float], phase: str) -> None:
    for k, loss in enumerate(losses):
        watch.see(torch.tensor(-loss), (k % 4,), phase)


def test_targets_of_an_ordinary_size_and_classes_get_no_such_advice() -> None:
    assert advice_on_units(small(1.0)) == "" and "large" in advice_on_units(small(1e3))
    assert advice_on_units(small(0.0)) == ""
    assert advice_on_units([Task("c", (torch.zeros(4, 2), torch.arange(4) % 2))]) == ""
