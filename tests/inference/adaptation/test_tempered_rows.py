"""A temperature below 1 holds for tasks of as many rows as it was found at, and of no more classes without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import LiFT, LiFTPrior, TaskPosterior
from pyro_lift.inference.adaptation.tempered_rows import MANY_MORE, TemperedRows, tempered_rows
from pyro_lift.models.task import Task
from pyro_lift.support.archive import DamagedError, sealed

OPTIONS: dict[str, Any] = {"steps": 4, "draws": 2}


def of_rows(rows: int, classes: int = 3, seen: int = 3) -> Task:
    return Task("t", (torch.randn(rows, 4), torch.arange(rows) % seen), num_classes=classes)


def test_it_holds_whole_from_the_rows_that_it_was_found_at_and_not_at_all_for_half_of_them() -> None:
    at = TemperedRows(20.0, 0.0)
    assert at.holds(0.3, of_rows(20)) == at.holds(0.3, of_rows(500)) == 0.3
    assert at.holds(0.3, of_rows(10)) == at.holds(0.3, of_rows(3)) == 1.0
    between = at.holds(0.3, of_rows(15))
    assert between == pytest.approx(0.3 ** (1.0 + torch.tensor(15 / 20).log2().item()))


def test_a_class_without_a_row_has_what_it_came_with_unless_tasks_had_such() -> None:
    assert TemperedRows(20.0, 0.0).holds(0.3, of_rows(24, 4)) == 1.0
    assert TemperedRows(20.0, 0.25).holds(0.3, of_rows(24, 4)) == 0.3
    assert TemperedRows(20.0, 0.25).holds(0.3, of_rows(24, 4, seen=2)) == 1.0


@given(st.floats(1.0, 5.0), st.integers(3, 40))
def test_one_above_holds_for_all(temperature: float, rows: int) -> None:
    assert TemperedRows(20.0, 0.0).holds(temperature, of_rows(rows, 4)) == temperature


@given(st.floats(1.0, 5.0), st.integers(1, 4000))
def test_one_above_holds_less_for_many_more_rows(temperature: float, rows: int) -> None:
    found = TemperedRows(20.0, 0.0, MANY_MORE).holds(temperature, of_rows(rows, 4))
    assert found == pytest.approx(temperature ** min(1.0, MANY_MORE * 20.0 / rows))
    assert TemperedRows(20.0, 0.0).holds(temperature, of_rows(rows)) == temperature  # a prior of before


def test_of_a_regression_it_holds_for_all() -> None:
    task = Task("r", (torch.randn(3, 4), torch.randn(3)), "regression")
    assert TemperedRows(20.0, 0.0).holds(0.4, task) == 0.4


def test_what_tasks_have_is_their_median() -> None:
    found = tempered_rows([of_rows(9), of_rows(20), of_rows(60, 4)])
    assert found == TemperedRows(20.0, 0.0, MANY_MORE)
    assert tempered_rows([of_rows(8, 4)] * 3, fades=False) == TemperedRows(8.0, 0.25)
    assert tempered_rows([]) is None


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(tiny_adapter(), sgd_steps=4, burn_in=4, samples=8, seed=0).meta_train(tiny_tasks(3), progress=False)


def test_a_new_task_of_fewer_rows_is_not_predicted_surer_than_it_comes(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.prediction_temperature, prior.tempered_rows = 0.4, TemperedRows(12.0, 0.0)
    many, few = of_rows(12), of_rows(4)
    many, few = (Task(t.name, (t.train.positional[0].double(), t.train.target), num_classes=3) for t in (many, few))
    assert prior.adapt(many, **OPTIONS).prediction_temperature == 0.4
    posterior = prior.adapt(few, **OPTIONS)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert posterior.prediction_temperature == 1.0
    assert torch.equal(posterior.predict(x), posterior.predict(x, calibrated=False))
    prior.save_pretrained(tmp_path)
    assert (
        "Predictions of tasks of 12 rows or more are brought to the temperature 0.4."
        in (tmp_path / "README.md").read_text()
    )
    again = LiFTPrior.from_pretrained(tmp_path, tiny_adapter())
    assert again.tempered_rows == prior.tempered_rows
    assert torch.equal(again.adapt(few, **OPTIONS).predict(x), posterior.predict(x))
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("tempered_rows", "sha256")}
    (tmp_path / "config.json").write_text(json.dumps(sealed(kept)))
    before = LiFTPrior.from_pretrained(tmp_path, tiny_adapter())  # a folder of before: for all tasks
    assert before.tempered_rows is None and before.adapt(few, **OPTIONS).prediction_temperature == 0.4


def test_a_posterior_is_saved_with_the_temperature_that_holds_for_it(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.prediction_temperature, prior.tempered_rows = 0.4, TemperedRows(12.0, 0.0)
    few = of_rows(4)
    few = Task("few", (few.train.positional[0].double(), few.train.target), num_classes=3)
    prior.adapt(few, **OPTIONS).save_pretrained(tmp_path)
    assert TaskPosterior.from_pretrained(tmp_path, tiny_adapter()).prediction_temperature == 1.0


@pytest.mark.parametrize("value", ["many", [1.5], [0.0, 0.1], [3.0, 2.0], [float("inf"), 0.0], [3.0, 0.5, -1.0]])
def test_rows_that_are_no_numbers_are_refused(prior: LiFTPrior, tmp_path: Path, value: object) -> None:
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "tempered_rows": value})))
    with pytest.raises(DamagedError, match="'tempered_rows'"):
        LiFTPrior.from_pretrained(tmp_path, tiny_adapter())


def test_calibration_says_what_rows_it_was_made_at(prior: LiFTPrior) -> None:
    prior.calibrate(tiny_tasks(5)[3:], **OPTIONS)
    assert prior.tempered_rows == tempered_rows(tiny_tasks(5)[3:])
