"""Turns of a comparison: planned from what the last ones took, within the time, and gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyro_lift.comparison.plan import Costs, solve, turn_seconds
from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.comparison.turns import Agenda, Entries, told_sizes
from pyro_lift.support.archive import read_json, write_json

COSTS = Costs(gradient=0.1, setup=0.5, step=0.1, adaptation=0.5, probe=0.5)
FOLDS, ENTRIES = [4, 4, 4], Entries(3, 1)


def agenda(path: Path, seconds: float, settings: CompareSettings | None = None) -> Agenda:
    settings = settings or CompareSettings()
    plan = solve(COSTS, settings, FOLDS, *ENTRIES, seconds)
    return Agenda(path / "plan.json", "mark", plan, COSTS, settings, FOLDS, ENTRIES)


def lived(made: Agenda, seconds: float, speed: float) -> float:
    """Let turns take what they are thought to take over a speed; return the seconds they took."""
    spent = 0.0
    while (turn := made.next(seconds - spent)) is not None:
        sizes = (len(made.plan.rates), turn.steps, turn.gradients)
        took = turn_seconds(COSTS, FOLDS[turn.fold], *ENTRIES, sizes) / speed
        made.done(took)
        spent += took
    return spent


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.7])
def test_all_parts_are_judged_and_the_time_is_used_whatever_the_first_measurement_said(
    tmp_path: Path, speed: float
) -> None:
    made = agenda(tmp_path, 1000.0)
    spent = lived(made, 1000.0, speed)
    assert [turn.fold for turn in made.turns] == [0, 1, 2]
    assert 0.75 * 1000.0 < spent <= 1000.0
    assert made.turns[-1].gradients > made.turns[0].gradients  # a fifth was left for a machine that slows down


def test_a_machine_that_is_much_quicker_gives_later_turns_all_that_was_wanted(tmp_path: Path) -> None:
    made = agenda(tmp_path, 1000.0)
    lived(made, 1000.0, 3.0)
    first, *later = [(turn.gradients, turn.steps) for turn in made.turns]
    wanted = made.settings.gradients, made.settings.steps
    assert first < wanted and later == [wanted, wanted]


def test_a_machine_that_is_much_slower_than_was_measured_judges_fewer_parts_in_the_same_time(tmp_path: Path) -> None:
    made = agenda(tmp_path, 250.0)
    assert made.plan.folds == 3
    spent = lived(made, 250.0, 0.45)
    assert 1 <= len(made.turns) < 3 and spent <= 250.0


def test_with_time_enough_nothing_is_smaller_than_was_wanted_and_no_turn_is_made_twice(tmp_path: Path) -> None:
    settings = CompareSettings(seeds=2)
    made = agenda(tmp_path, 1e6, settings)
    lived(made, 1e6, 1.0)
    assert [(turn.seed, turn.fold) for turn in made.turns] == [(s, f) for s in (0, 1) for f in (0, 1, 2)]
    assert {(turn.gradients, turn.steps) for turn in made.turns} == {(settings.gradients, settings.steps)}
    assert told_sizes(made.turns, made.plan, settings, 3, 3)["cut"] == []


def test_rates_of_adaptation_stay_the_same_over_the_turns_so_that_one_can_be_chosen_on_the_others(
    tmp_path: Path,
) -> None:
    made = agenda(tmp_path, 300.0)
    lived(made, 300.0, 4.0)
    assert len(made.plan.rates) < 3
    assert {len(made.sizes(turn.seed, turn.fold).rates) for turn in made.turns} == {len(made.plan.rates)}


def test_one_that_is_read_back_goes_on_where_it_was(tmp_path: Path) -> None:
    made = agenda(tmp_path, 1000.0)
    assert made.next(1000.0) is not None
    made.done(200.0)
    again = Agenda.read(made.path, made.settings, FOLDS, ENTRIES)
    assert again.turns == made.turns and again.plan == made.plan and again.mark == "mark"
    assert again.next(800.0) == made.next(800.0)


def test_one_of_an_earlier_version_had_turns_of_one_size(tmp_path: Path) -> None:
    made = agenda(tmp_path, 1000.0)
    made.write()
    stored = read_json(made.path)
    del stored["turns"]
    write_json(made.path, stored)
    turns = Agenda.read(made.path, made.settings, FOLDS, ENTRIES).turns
    assert [(t.fold, t.gradients, t.steps) for t in turns] == [
        (f, made.plan.gradients, made.plan.steps) for f in range(3)
    ]


def test_sizes_are_told_as_a_range_where_turns_differ(tmp_path: Path) -> None:
    made = agenda(tmp_path, 1000.0)
    lived(made, 1000.0, 2.0)
    told = told_sizes(made.turns, made.plan, made.settings, 3, 3)
    sizes = [turn.gradients for turn in made.turns]
    assert told["gradients"] == f"{min(sizes)} to {max(sizes)}"
    assert any("gradients of meta-training in place of 1200" in note for note in told["cut"])
    few = replace(made.settings, gradients=min(sizes), steps=8, rates=made.plan.rates)
    assert told_sizes(made.turns[:1], made.plan, few, 1, 3)["cut"] == []
