"""How free biases are under label matching is what the tasks say together, by the number of rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matching_tasks import CLASSES, adapter, tasks
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.head_choice import choose_head, choose_matching_head
from pyro_lift.models.heads import BIAS_SD, BIAS_SDS, UsualPrior
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.tuning.matching_biases import NUMBERS, matching_biases
from pyro_lift.tuning.whose_heads import RULES, run_config

SHORT: dict[str, Any] = {"sgd_steps": 0, "burn_in": 2, "samples": 4, "seed": 0}


def losses(prior: LiFTPrior, new: list[Task]) -> Tensor:
    posteriors = prior.adapt_many(new, seed=0, progress=False, steps=4, draws=2)
    pairs = zip(posteriors, new, strict=True)
    return torch.tensor([float(nll(one.predict(task.test), task.test.target)) for one, task in pairs])  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(adapter(), **SHORT).meta_train(tasks(8, 24, seed=1), progress=False)


def test_tasks_of_even_classes_hold_biases_of_few_rows_and_uneven_ones_let_them_go() -> None:
    even, uneven = (matching_biases(adapter(), tasks(12, 24, seed=1, rates=r)) for r in (None, [0.9, 0.07, 0.03]))
    assert even is not None and uneven is not None
    assert even.bias_sd == BIAS_SD and even.rows == 24 and len(even.head) == 0  # of as many rows each knows by itself
    assert [rows for rows, _ in even.few] == list(NUMBERS)
    for (_, held), (_, free) in zip(even.few, uneven.few, strict=True):
        assert held.bias_sd == min(BIAS_SDS) < free.bias_sd


def test_new_tasks_of_a_row_are_no_surer_than_even_classes_let_them_be(prior: LiFTPrior) -> None:
    assert prior.head_mean is not None
    new = tasks(12, 1, seed=2)
    now = losses(prior, new)
    prior.head_mean, kept = None, prior.head_mean
    before = losses(prior, new)
    prior.head_mean = kept
    gain = before - now
    assert gain.mean() > 3.0 * gain.std() / len(gain) ** 0.5
    assert float(now.mean()) < math.log(CLASSES) + 0.05 < float(before.mean())


def test_a_task_has_the_biases_of_its_number_of_rows() -> None:
    held = ClassHead(
        torch.zeros(0, 17), bias_sd=BIAS_SD, rows=16, few=((1, UsualPrior(1.0, 0.1)), (4, UsualPrior(1.0, 0.3)))
    )

    def bias_sd(rows: int, mean: ClassHead | None) -> float | Tensor:
        return SolvedHeads(adapter(), tasks(1, rows, seed=5), adapter().initial, mean=mean).choice(0).model.bias_sd

    assert [bias_sd(rows, held) for rows in (1, 4, 16, 90)] == [0.1, 0.3, BIAS_SD, BIAS_SD]
    assert bias_sd(8, held) == pytest.approx((0.3 * BIAS_SD) ** 0.5)
    assert bias_sd(1, None) == bias_sd(8, None) == BIAS_SD


def test_a_task_of_uneven_classes_has_free_biases_where_its_rows_say_so() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(24, 16 + CLASSES, generator=generator), dim=-1)
    told = UsualPrior(1.0, 0.3)
    bound = 0.5 * math.log(BIAS_SD / told.bias_sd) ** 2
    taken = []
    for uneven in range(1, 25, 4):
        target = torch.where(torch.arange(24) < uneven, torch.arange(24) % (CLASSES - 1) + 1, 0)
        held, free = (
            choose_head(features, target, CLASSES, 10.0, usual=told._replace(bias_sd=sd)) for sd in (0.3, BIAS_SD)
        )
        found = choose_matching_head(features, target, CLASSES, 10.0, told)
        expected = free if 24 * (free.score - held.score) > bound else held
        assert found == expected
        taken.append(found.model.bias_sd)
    assert taken[0] == BIAS_SD and taken[-1] == told.bias_sd  # one row of 24 of another class; even ones
    one = choose_matching_head(features[:1], target[:1], CLASSES, 10.0, told)
    assert one.model.bias_sd == told.bias_sd


def test_few_tasks_and_runs_of_before_say_nothing(tmp_path: Path) -> None:
    made = tasks(6, 12, seed=1)
    assert matching_biases(adapter(), made[:3]) is None
    lift, found = LiFT(adapter(), **SHORT), []
    for name, rules in (("then", {k: v for k, v in RULES.items() if k != "matching biases"}), ("now", RULES)):
        session = Session(tmp_path / name, config=run_config(lift.settings, 0, lift.adapter, made, rules=rules))
        (prior,) = lift.meta_train_many(made, (1,), session=session, progress=False)
        found.append(prior.head_mean is None)
    assert found == [True, False]


def test_it_is_saved(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    read, new = LiFTPrior.from_pretrained(tmp_path, adapter()), tasks(3, 2, seed=6)
    assert read.head_mean is not None and prior.head_mean is not None
    assert read.head_mean.bias_sd == prior.head_mean.bias_sd and read.head_mean.few == prior.head_mean.few
    assert torch.equal(losses(read, new), losses(prior, new))
    assert json.loads((tmp_path / "config.json").read_text())["head_bias_sd"] == prior.head_mean.bias_sd
    one = replace(new[0], name="again")
    assert torch.equal(losses(read, [one]), losses(prior, [one]))
