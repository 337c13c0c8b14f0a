"""The plan of a comparison: it fits the time, it is the largest that does, and it says what was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_lift.comparison.cells import adaptations_of
from pyro_lift.comparison.plan import PLANNED, Costs, Plan, planned, solve, whole_budget
from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.support.durations import format_duration, seconds_of

COSTS = Costs(gradient=0.1, setup=0.5, step=0.1, adaptation=0.5, probe=0.5)
FOLDS = [4, 4, 4]


def seconds(plan: Plan, costs: Costs, meta: int, alone: int) -> float:
    """The cost of a plan, written out anew."""
    total = 0.0
    for _ in range(plan.seeds):
        for tasks in FOLDS[: plan.folds]:
            each = len(plan.rates) * (costs.adaptation + plan.steps * costs.step)
            total += tasks * costs.probe + meta * (costs.setup + plan.gradients * costs.gradient)
            total += (meta + alone) * tasks * each
    return total


@settings(max_examples=60, deadline=None)
@given(
    budget=st.floats(1.0, 1e5),
    gradient=st.floats(1e-3, 3.0),
    adaptation=st.floats(1e-3, 10.0),
    meta=st.integers(0, 4),
    alone=st.integers(0, 2),
    seeds=st.integers(1, 4),
)
def test_it_costs_what_it_says_and_fits_unless_nothing_does(
    budget: float, gradient: float, adaptation: float, meta: int, alone: int, seeds: int
) -> None:
    costs = Costs(gradient, 2 * gradient, gradient, adaptation, gradient)
    plan = solve(costs, CompareSettings(seeds=seeds), FOLDS, meta, alone, budget)
    spent = seconds(plan, costs, meta, alone)
    assert abs(spent - plan.seconds) <= 1e-6 * max(spent, 1.0)
    least = any("the least that means anything" in note for note in plan.cut)
    assert least or spent <= PLANNED * budget + 1e-6
    if least:
        assert (plan.folds, plan.seeds, len(plan.rates)) == (1, 1, 1) and spent > PLANNED * budget


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("before", [0.0, 7.0])
def test_the_least_budget_that_is_told_is_enough_and_not_much_more(before: float, share: float) -> None:
    wanted = CompareSettings(seeds=2)
    plan = solve(COSTS, wanted, FOLDS, 3, 1, 0.1, before, share)
    assert f"needs a budget of {format_duration(plan.least)} or more" in plan.cut[-1]
    assert seconds_of(format_duration(plan.least)) == plan.least > before + plan.seconds
    enough = solve(COSTS, wanted, FOLDS, 3, 1, share * (plan.least - before), before, share)
    assert not any("the least" in note for note in enough.cut) and enough.least == plan.least
    too_little = solve(COSTS, wanted, FOLDS, 3, 1, share * (0.6 * plan.least - before), before, share)
    assert any("the least" in note for note in too_little.cut)


@given(wanted=st.floats(0.001, 1e5))
def test_a_budget_is_told_in_round_numbers(wanted: float) -> None:
    told = whole_budget(wanted)
    assert wanted <= told <= max(5.0, 2.0 * wanted)
    assert seconds_of(format_duration(told)) == told and len(format_duration(told).split()) == 2


def test_with_time_enough_nothing_is_cut() -> None:
    wanted = CompareSettings(seeds=2)
    plan = solve(COSTS, wanted, FOLDS, 3, 1, 1e6)
    assert plan.cut == ()
    assert (plan.gradients, plan.steps, plan.rates) == (wanted.gradients, wanted.steps, tuple(wanted.rates))
    assert (plan.folds, plan.seeds) == (3, 2)


def test_sizes_that_are_wanted_small_stay_small_and_are_not_taken_for_a_lack_of_time() -> None:
    wanted = CompareSettings(gradients=5, steps=4, draws=2, rates=(1e-3,))
    plan = solve(COSTS, wanted, FOLDS, 3, 1, 1e6)
    assert (plan.gradients, plan.steps, plan.cut) == (5, 4, ())


def test_more_time_never_gives_fewer_gradients_in_all() -> None:
    totals = []
    for budget in (60, 120, 300, 600, 1200, 3600):
        plan = solve(COSTS, CompareSettings(), FOLDS, 3, 1, budget)
        totals.append(plan.folds * plan.gradients + 12 * len(plan.rates) * plan.steps)
    assert totals == sorted(totals)


def test_what_is_cut_is_said() -> None:
    plan = solve(COSTS, CompareSettings(seeds=3), FOLDS, 3, 1, 300)
    told = " ".join(plan.cut)
    assert "gradients of meta-training in place of 1200" in told
    assert ("seeds" in told) == (plan.seeds < 3)


def test_a_plan_read_back_is_the_plan_written() -> None:
    plan = solve(COSTS, CompareSettings(), FOLDS, 3, 1, 200)
    assert planned(json.loads(json.dumps(plan.to_dict()))) == plan


def test_lifts_largest_rate_comes_with_a_power_unless_rates_were_given() -> None:
    for steps, strong in ((100, {"learning_rate": 2.0, "power": 10.0}), (20, {"learning_rate": 4.0, "power": 100.0})):
        for count in (1, 2, 3):
            plan = Plan(100, steps, tuple(CompareSettings.rates[:count]), 1, 1, 0.0)
            plain = [{"learning_rate": 1.0, "power": 1.0}, {"learning_rate": 0.25, "power": 1.0}]
            assert adaptations_of("lift", plan) == [*plain, strong][:count]
            assert adaptations_of("reptile", plan) == [{"learning_rate": rate} for rate in plan.rates]
            assert adaptations_of("linear-probe", plan) == [{"learning_rate": 1.0}]
    given = Plan(100, 20, (1.0, 3.0), 1, 1, 0.0)
    assert adaptations_of("lift", given) == [{"learning_rate": 1.0}, {"learning_rate": 3.0}]
