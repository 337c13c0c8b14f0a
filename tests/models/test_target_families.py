"""A task whose targets vary, or lie, unlike those of most tasks is told by name before training, with the way out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch

from pyro_lift import LiFT, Task
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.target_families import families_of
from pyro_lift.models.target_units import of_one_unit, warn_of_units
from pyro_lift.tuning.whose_heads import RULES, run_config


def network(outputs: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


CONFIG = peft.LoraConfig(r=1, target_modules=["0", "2"])


def family(units: Sequence[float], offsets: Sequence[float] = (), rows: int = 20, columns: int = 1) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for k, unit in enumerate(units):
        x = torch.randn(rows, 3, generator=generator)
        y = x.sum(1, keepdim=True).repeat(1, columns) / 3**0.5
        y[:, -1] = (offsets[k] if offsets else 0.0) + unit * y[:, -1]
        tasks.append(Task(f"t{k}", (x, y), "regression"))
    return tasks


def said_of(tasks: Sequence[Task], caplog: pytest.LogCaptureFixture, outputs: int = 1) -> list[str]:
    adapter: RandomAdapter = adapt_backbone(network(outputs), CONFIG, seed=0)
    caplog.clear()
    warn_of_units(adapter, tasks)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("unit", [100.0, 1000.0, 0.01])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_one_task_in_another_unit_is_named(unit: float, place: int, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = said_of(family([unit if k == place else 1.0 for k in range(12)]), caplog)
    assert said.startswith(f"the targets of task 't{place}' are in another unit than those of most tasks")
    assert "leave out the tasks of another unit" in said and "undo that in its predictions" in said


@pytest.mark.parametrize("large", [2, 6, 10])
def test_two_units_are_told(large: int, caplog: pytest.LogCaptureFixture) -> None:
    said = said_of(family([1e3 if k < large else 1.0 for k in range(12)]), caplog)
    minority = range(large) if large <= 6 else range(large, 12)
    assert f"'t{minority[0]}'" in said[0] and f"({len(minority)} of 12)" in said[0] and "another unit" in said[0]


@pytest.mark.parametrize(
    ("units", "offsets"),
    [
        ([1.0, 3.0] * 6, ()),
        ([0.5, 1.0, 2.0] * 4, ()),
        ([1.0] * 12, [-3.0, 0.0, 3.0] * 4),
        ([0.0] * 2 + [1.0] * 10, ()),  # constant targets have no unit
        ([0.0] * 12, ()),
        ([1.0], ()),
    ],
)
def test_honest_families_are_not_warned_of(
    units: list[float], offsets: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    assert not [each for each in said_of(family(units, offsets), caplog) if "most tasks" in each]


def test_few_rows_that_lie_close_together_are_no_unit() -> None:
    tasks = family([1.0] * 11 + [1e-3], rows=4)
    assert not families_of(tasks).units
    assert list(families_of(family([1.0] * 11 + [1e-3], rows=8)).units) == [11]


def test_tasks_with_means_of_their_own_are_told_to_subtract_these(caplog: pytest.LogCaptureFixture) -> None:
    said = said_of(family([1.0] * 12, [1e3 * k for k in range(12)]), caplog)
    assert len(said) == 1 and "Subtract from each task's targets their own mean" in said[0]
    assert "(11 of 12)" in said[0] and "lie around 3.66e-0" not in said[0]
    (alone,) = said_of(family([1.0] * 12, [0.0] * 11 + [500.0]), caplog)
    assert "the targets of task 't11' lie around 500, those of most tasks around" in alone


def test_the_others_are_still_held_against_the_outputs(caplog: pytest.LogCaptureFixture) -> None:
    said = said_of(family([100.0] * 11 + [1e5]), caplog)
    assert len(said) == 2 and "'t11'" in said[0] and "vary within a task by 9" in said[1]


def test_each_column_of_targets_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    said = said_of(family([1.0] * 5 + [500.0], columns=2), caplog, outputs=2)
    assert "task 't5' are in another unit" in said[0]


def test_a_number_to_subtract_has_the_digits_that_targets_need(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [
        Task(t.name, (t.train.inputs[""], t.train.target.double() + 170_345_678.0), "regression")
        for t in family([1.0] * 4)
    ]
    (said,) = said_of(tasks, caplog)
    number = said.split("(target - ")[1].split(")")[0]
    assert abs(float(number) - 170_345_678.0) < 1.0


def test_meta_training_says_it_once_and_gives_no_second_reason(caplog: pytest.LogCaptureFixture) -> None:
    lift = LiFT(network(), CONFIG, sgd_steps=20, burn_in=2, samples=4, seed=0)
    lift.meta_train(family([1.0] * 7 + [1e3]), progress=False)
    said = [r.getMessage() for r in caplog.records if "'t7'" in r.getMessage() and r.levelno >= logging.WARNING]
    assert len([each for each in said if "another unit than those of most tasks" in each]) == 1
    assert not [each for each in said if "before training the loss is" in each]


@pytest.mark.parametrize("columns", [1, 2])
def test_few_tasks_in_a_larger_unit_are_left_out(columns: int, caplog: pytest.LogCaptureFixture) -> None:
    left = of_one_unit(family([1.0] * 5 + [100.0] + [1.0] * 5 + [0.001], columns=columns))
    assert [task.name for task in left] == [f"t{k}" for k in range(12) if k != 5]
    (said,) = caplog.messages
    assert said.startswith("the targets of task 't5' are in another unit") and "they are left out" in said


def test_tasks_whose_columns_are_unlike_are_left_out_together() -> None:
    tasks = family([1.0] * 11 + [100.0], columns=2)
    x, y = tasks[0].train.inputs[""], tasks[0].train.target.clone()
    y[:, 0] *= 50.0
    tasks[0] = Task("t0", (x, y), "regression")
    assert [task.name for task in of_one_unit(tasks)] == [f"t{k}" for k in range(1, 11)]


@pytest.mark.parametrize(
    "units",
    [
        [1.0] * 8 + [100.0] * 4,  # a third: it is not clear who is right
        [1.0] * 3 + [100.0],  # few would be left
        [1.0] * 11 + [25.0],
        [1.0] * 11 + [0.01],
        [0.0] * 12,
        [],
    ],
)
def test_others_are_kept_without_a_word(units: list[float], caplog: pytest.LogCaptureFixture) -> None:
    tasks = family(units)
    assert of_one_unit(tasks) is tasks and not caplog.messages


def test_tasks_of_many_rows_are_not_held_against_those_of_two() -> None:
    made = torch.Generator().manual_seed(0)
    near = [Task(f"n{k}", (torch.zeros(2, 3), 0.01 * torch.randn(2, generator=made)), "regression") for k in range(11)]
    many = [Task(f"m{k}", (torch.zeros(30, 3), torch.randn(30, generator=made)), "regression") for k in range(3)]
    assert len(of_one_unit(near + many)) == 14
    more = [Task(f"m{k}", (torch.zeros(30, 3), torch.randn(30, generator=made)), "regression") for k in range(8)]
    odd = Task("odd", (torch.zeros(30, 3), 100.0 * torch.randn(30, generator=made)), "regression")
    assert [task.name for task in (*near, *more, odd) if task not in of_one_unit([*near, *more, odd])] == ["odd"]


def test_a_temperature_is_fitted_without_them() -> None:
    tasks = [
        Task(task.name, task.train, "regression", test=(task.train.inputs[""], task.train.target))
        for task in family([1.0] * 8 + [1e3])
    ]
    lift = LiFT(network(), CONFIG, sgd_steps=20, burn_in=2, samples=4, seed=0)
    some, every = (lift.meta_train(made, progress=False, calibrate=True) for made in (tasks[:8], tasks))
    assert some.prediction_temperature == every.prediction_temperature


def test_a_prior_does_not_learn_from_them_and_a_run_of_before_does(tmp_path: Path) -> None:
    tasks = family([1.0] * 8 + [1e3])
    lift = LiFT(network(), CONFIG, sgd_steps=20, burn_in=2, samples=4, seed=0)
    alone, all_of_them = (lift.meta_train(some, progress=False) for some in (tasks[:8], tasks))
    assert list(all_of_them.tasks) == list(alone.tasks) == [f"t{k}" for k in range(8)]
    assert torch.equal(alone.mixture.get().mean, all_of_them.mixture.get().mean)
    then = {name: value for name, value in RULES.items() if name != "other units"}
    config = run_config(lift.settings, lift.seed, lift.adapter, tasks, rules=then)
    session = Session(tmp_path, config=config)
    (before,) = lift.meta_train_many(tasks, (1,), session=session, crossed=True, progress=False)
    assert len(before.tasks) == 9
