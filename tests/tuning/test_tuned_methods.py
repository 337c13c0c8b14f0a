"""Every method of the registry in the one tuner: spaces, the same number of trials, shorter runs, and a choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks

from pyro_lift.inference.baselines.no_meta_train import NoMetaTrain
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, Tunable
from pyro_lift.inference.baselines.union_train import UnionTrain
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.settings import LiFTSettings
from pyro_lift.tuning.methods import TRIALS, method_candidates, shortened_method, space_of, tune_method, with_changes

#: They choose on each task's own rows.
CHOOSE = ("linear-probe", "pooled-probe", "lora-tuned")
FEW = replace(SMALL, warm_up=20, visits=60, steps=40, draws=5)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_method_has_a_space_of_the_same_number_of_trials(name: str) -> None:
    method = BASELINES[name](tiny_adapter(), FEW)
    assert isinstance(method, Tunable)
    candidates = method_candidates(method)
    assert len(candidates) == (1 if name in CHOOSE else TRIALS)
    assert candidates[0].name == "as given" and candidates[0].meta == candidates[0].adapt == {}
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    made = [with_changes(method, {**candidate.meta, **candidate.adapt}) for candidate in candidates]
    assert made[0] == method
    for other in made[1:]:
        assert other != method
        budget = other.budget
        assert budget.warm_up + budget.visits <= 80 and budget.steps <= 40, "nobody is given more than the others"
        assert (budget.draws, budget.batch_size, budget.heads) == (FEW.draws, FEW.batch_size, FEW.heads)


@pytest.mark.parametrize("name", ["union-train", "reptile", "maml", "lift", "fixed-theta", "protonet", "shared-peft"])
def test_candidates_of_one_meta_training_differ_in_adaptation_alone(name: str) -> None:
    candidates = method_candidates(BASELINES[name](tiny_adapter(), FEW))
    trainings: dict[str, list[Any]] = {}
    for candidate in candidates:
        trainings.setdefault(repr(sorted(candidate.meta.items())), []).append(candidate.adapt)
    assert len(trainings) == 8
    for adapt in trainings.values():
        rates = {a.get("learning_rate", FEW.learning_rate) / FEW.learning_rate for a in adapt}
        assert rates == {1.0, 0.25, 4.0}
        if name == "lift":  # whose prior pulls back by the rate: the larger one comes with a larger power
            assert {a["power"] for a in adapt if a.get("learning_rate", 0.0) > FEW.learning_rate} == {100.0}


def test_a_shorter_method_has_both_parts_in_proportion_and_no_warm_start() -> None:
    method = UnionTrain(tiny_adapter(), replace(FEW, warm_up=100, visits=200, warm_start=torch.zeros(1)))
    short = shortened_method(method, 0.25).budget
    assert (short.warm_up, short.visits, short.warm_start) == (25, 50, None)
    assert shortened_method(method, 1e-3).budget.visits == 8
    assert shortened_method(method, 1.0) is method


def test_changes_reach_the_budget_the_method_and_the_fields_of_its_fields() -> None:
    method = BASELINES["lift"](tiny_adapter(), FEW)
    changed: Any = with_changes(method, {"learning_rate": 0.5, "settings.beta": 0.2, "settings.sigma": 0.4})
    assert (changed.budget.learning_rate, changed.settings) == (0.5, LiFTSettings(beta=0.2, sigma=0.4))
    assert with_changes(BASELINES["reptile"](tiny_adapter(), FEW), {"inner_steps": 3}).inner_steps == 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="nowhere"):
        with_changes(method, {"nowhere": 1})


@dataclass(frozen=True)
class Silent:
    """A method of a user's own that tells no space."""

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)


def test_a_method_that_tells_no_space_has_its_rate_and_steps() -> None:
    space = space_of(Silent(tiny_adapter(), FEW))  # type: ignore[arg-type]
    assert space.meta == {} and set(space.adapt) == {"rate", "steps"}
    assert space_of(BASELINES["linear-probe"](tiny_adapter(), FEW)) == SearchSpace()


def test_the_rate_that_learns_is_found_by_the_search() -> None:
    tasks = tiny_tasks(4)
    slow = NoMetaTrain(tiny_adapter(), replace(SMALL, steps=16, learning_rate=1e-3))
    tuned, tuning = tune_method(slow, tasks[:2], held_out=tasks[2:], trials=9)
    assert tuned.budget.learning_rate == pytest.approx(1e-2)  # ten times as fast: the edge of its space
    assert tuned == with_changes(slow, {**tuning.meta, **tuning.adapt})
    losses = {trial.settings: trial.loss for trial in tuning.trials if trial.rung == 0}
    assert losses[tuning.chosen] < losses["as given"] and all(map(math.isfinite, losses.values()))
    assert len(losses) == 9 and tuning.held_out == ("t2", "t3")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_method_is_tuned_and_runs_with_what_was_chosen(name: str) -> None:
    tasks = tiny_tasks(6)
    method = BASELINES[name](tiny_adapter(), replace(SMALL, visits=24))
    tuned, tuning = tune_method(method, tasks[:4], held_out=tasks[4:], trials=6)
    assert {trial.rung for trial in tuning.trials} == ({0} if name in CHOOSE else {0, 1, 2})
    assert tuning.temperature is not None
    posterior = tuned.adapt(tuned.meta_train(tasks[:4]), tasks[5])
    assert torch.isfinite(posterior.predict(tasks[5].test)).all()
