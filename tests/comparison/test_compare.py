"""The whole comparison on tiny tasks: held out in turn, stopped and gone on with, of every kind, and as a command."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_files import KINDS, prepare, write_task
from tiny_backbones import FAMILIES
from tiny_methods import tiny_adapter, tiny_tasks
from typer.testing import CliRunner

import pyro_lift
from pyro_lift import Task
from pyro_lift.cli import app
from pyro_lift.comparison import run as comparing
from pyro_lift.comparison import turns
from pyro_lift.comparison.cells import OutOfTimeError, Work, run_cell
from pyro_lift.comparison.plan import Costs, Plan
from pyro_lift.comparison.problem import (
    Problem,
    chance_loss,
    chance_losses,
    folds_of,
    told_of_one_class,
    unexplained,
    without_unjudged,
)
from pyro_lift.comparison.settings import CompareSettings, entrant
from pyro_lift.data.collection import TaskCollection
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.task import Rows
from pyro_lift.support.durations import seconds_of
from pyro_lift.tuning.held_out import judged
from pyro_lift.tuning.methods import tune_method

SMALL: dict[str, Any] = {
    "gradients": 20,
    "steps": 8,
    "draws": 2,
    "batch_size": 6,
    "rates": (1.0, 4.0),
    "progress": False,
}


def test_every_task_is_held_out_once_and_all_methods_get_the_same(tmp_path: Path) -> None:
    tasks = tiny_tasks(4)
    result = pyro_lift.compare(tasks, tiny_adapter(), budget="1 h", folds=2, out=tmp_path, **SMALL)
    summary = result.summary
    assert list(summary.results) == list(CompareSettings().names)
    for results in summary.results.values():
        assert sorted(r.task for r in results) == [task.name for task in tasks]
        assert all(math.isfinite(r.values["loss"]) and r.values["bytes"] > 0 for r in results)
        assert all(math.isfinite(r.values["loss_t"]) for r in results)
    assert result.advice and result.advice in str(result)
    assert (tmp_path / "comparison.png").stat().st_size > 5_000
    assert (tmp_path / "table.txt").read_text() == f"{result}\n"
    assert json.loads((tmp_path / "records.json").read_text())["records"] == result.records
    for record in result.records:  # nobody is judged by a task that it learned from
        assert record["task"] not in [t.name for k, t in enumerate(tasks) if k % 2 != record["fold"]]


def test_one_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, adapter = tiny_tasks(3), tiny_adapter()
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("linear-probe", "union-train", "lift"), "budget": "1 h"}
    made: list[str] = []

    def stopping(work: Any, *, method: str, seed: int, fold: int) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(method)
        return run_cell(work, method=method, seed=seed, fold=fold)

    monkeypatch.setattr(comparing, "run_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        pyro_lift.compare(tasks, adapter, out=tmp_path / "stopped", **options)
    shutil.copytree(tmp_path / "stopped", tmp_path / "whole")  # the same plan, none of the cells
    for cell in (tmp_path / "whole" / "cells").glob("seed*"):
        cell.unlink()
    monkeypatch.undo()
    first = tmp_path / "stopped" / "cells" / "seed0-fold0-linear-probe.json"
    before = first.stat().st_mtime_ns
    gone_on = pyro_lift.compare(tasks, adapter, out=tmp_path / "stopped", **options)
    assert first.stat().st_mtime_ns == before
    whole = pyro_lift.compare(tasks, adapter, out=tmp_path / "whole", **options)
    assert gone_on.summary.losses == whole.summary.losses
    with pytest.raises(ValueError, match="holds another comparison"):
        pyro_lift.compare(tiny_tasks(4), adapter, out=tmp_path / "whole", **options)
    others = [pyro_lift.Task(t.name, (-t.train.inputs[""], t.train.target), num_classes=t.num_classes) for t in tasks]
    with pytest.raises(ValueError, match="holds another comparison"):  # of other inputs under the same labels
        pyro_lift.compare(others, adapter, out=tmp_path / "whole", **options)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    another = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"])).to(torch.float64)
    with pytest.raises(ValueError, match="holds another comparison"):  # of another network of the same shapes
        pyro_lift.compare(tasks, another, out=tmp_path / "whole", **options)
    plan = tmp_path / "whole" / "plan.json"
    stored = json.loads(plan.read_text())
    mark = stored["mark"]
    for words in (" network ", " data "):  # of versions that knew no digest of the network, or none of the rows
        stored["mark"], _, digest = mark.partition(words)
        assert digest
        plan.write_text(json.dumps(stored))
        pyro_lift.compare(tasks, adapter, out=tmp_path / "whole", **options)
    assert pyro_lift.compare(tasks, adapter, out=tmp_path / "whole", **options).summary.losses == whole.summary.losses


def test_one_regression_over_all_tasks_is_a_row_where_they_share_their_classes() -> None:
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("linear-probe", "pooled-probe"), "budget": "1 h"}
    both = pyro_lift.compare(tiny_tasks(4), tiny_adapter(), **options)
    assert list(both.summary.results) == ["linear-probe", "pooled-probe"] and "Pooled Probe" in both.table
    named = [replace(task, labels=(task.name, "b", "c")) for task in tiny_tasks(4)]
    alone = pyro_lift.compare(named, tiny_adapter(), **options)
    assert list(alone.summary.results) == ["linear-probe"]
    assert any(re.match("no pooled probe: tasks 't.' and 't.' have not the same classes", n) for n in alone.notes)
    assert "pooled-probe" in CompareSettings().names


def test_when_time_is_up_it_ends_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(work: Any, *, method: str, seed: int, fold: int) -> Any:
        if method == "lift" and fold == 1:
            work = work._replace(deadline=time.monotonic() - 1.0)
        return run_cell(work, method=method, seed=seed, fold=fold)

    monkeypatch.setattr(comparing, "run_cell", late)
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("linear-probe", "lift"), "budget": "1 h"}
    result = pyro_lift.compare(tiny_tasks(4), tiny_adapter(), out=tmp_path, **options)
    assert any("time ran out after 3 of 4 runs" in note for note in result.notes)
    assert [r.task for r in result.summary.results["lift"]] == ["t0", "t2"]  # the turn that all have finished
    monkeypatch.undo()
    again = pyro_lift.compare(tiny_tasks(4), tiny_adapter(), out=tmp_path, **options)
    assert [r.task for r in again.summary.results["lift"]] == ["t0", "t1", "t2", "t3"]


def test_a_budget_far_too_small_is_answered_by_one_that_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "load_all", lambda: None)
    monkeypatch.setattr(comparing, "measured", lambda *told: Costs(gradient=1.0, setup=1.0, step=1.0, adaptation=1.0))
    result = pyro_lift.compare(tiny_tasks(4), tiny_adapter(), folds=2, methods=("lift",), budget=0.01)
    least = re.search(r"nothing to advise\. Give a budget of (.+) or more\.$", result.advice)
    assert least is not None, result.advice
    assert seconds_of(least[1]) > 20 * 1.0  # twenty gradients at a second each
    assert seconds_of(least[1]) >= 2 * 0.01
    assert not any("needs a budget" in note for note in result.notes)  # the advice says how much


@pytest.mark.parametrize("budget", [2.0, 30.0])
def test_what_is_finished_is_shown_where_some_method_is_not(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(work: Any, *, method: str, seed: int, fold: int) -> Any:
        deadline = time.monotonic() + (-1.0 if method == "lift" else 100.0)
        return run_cell(work._replace(deadline=deadline), method=method, seed=seed, fold=fold)

    monkeypatch.setattr(comparing, "run_cell", late)
    monkeypatch.setattr(comparing, "load_all", lambda: None)
    monkeypatch.setattr(comparing, "measured", lambda *told: Costs(gradient=0.02, setup=0.0, step=0.02, adaptation=0.1))
    result = pyro_lift.compare(
        tiny_tasks(4), tiny_adapter(), folds=2, methods=("linear-probe", "union-train", "lift"), budget=budget
    )
    assert list(result.summary.results) == ["linear-probe", "union-train"]
    assert "Linear Probe" in result.table and "Union Train" in result.table
    told = re.match(r"Time ran out before LiFT was finished, .* Give a budget of (.+) or more\.$", result.advice)
    assert told is not None, result.advice
    assert seconds_of(told[1]) >= 2.0 * budget


def test_a_cell_gives_up_at_its_deadline_in_the_midst_of_meta_training(tmp_path: Path) -> None:
    problem = Problem(
        tiny_tasks(4), (), (), lambda seed: tiny_adapter(), pyro_lift.LiFTSettings(), pyro_lift.AdaptSettings()
    )
    told: list[int] = []
    settings = CompareSettings(**SMALL)
    plan = Plan(1000, 8, (1e-3,), 2, 1, 0.0)
    work = Work(problem, folds_of(problem, 2), settings, plan, tmp_path, told.append, time.monotonic() + 0.3)
    with pytest.raises(OutOfTimeError):
        run_cell(work, method="union-train", seed=0, fold=0)
    assert 0 < sum(told) < 1000


def test_given_tasks_to_be_judged_by_are_the_ones_and_choices_are_made_on_others() -> None:
    tasks = tiny_tasks(6)
    parts = TaskCollection("parts", tuple(tasks[:4]), (), tuple(tasks[4:]))
    options: dict[str, Any] = {**SMALL, "methods": ("no-meta-train", "union-train"), "budget": "1 h"}
    result = pyro_lift.compare(parts, tiny_adapter(), **options)
    assert [r.task for r in result.summary.results["union-train"]] == ["t4", "t5"]
    assert {r["task"] for r in result.records if r["part"] == "dev"} == {"t0"}
    assert all(value is not None for value in result.summary.temperatures.values())


def test_methods_are_tuned_on_tasks_that_nobody_is_judged_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def tuned(method: Any, tasks: Any, **options: Any) -> Any:
        seen.append(tuple(task.name for task in (*tasks, *options["held_out"])))
        assert options["trials"] == 2 and options["seconds"] > 1.0
        return tune_method(method, tasks, **{**options, "seconds": None})

    monkeypatch.setattr("pyro_lift.comparison.cells.tune_method", tuned)
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("linear-probe", "union-train"), "budget": "1 h"}
    result = pyro_lift.compare(tiny_tasks(6), tiny_adapter(), out=tmp_path, trials=2, **options)
    assert seen == [("t1", "t3", "t5"), ("t0", "t2", "t4")]
    by_method = {m: [r for r in result.records if r["method"] == m] for m in ("linear-probe", "union-train")}
    assert all("settings" in r and r["rate"] == 0 for r in by_method["union-train"])
    assert not any("settings" in r for r in by_method["linear-probe"])
    assert any(note.startswith("settings chosen among 2 a method") for note in result.notes)
    turns_made = json.loads((tmp_path / "plan.json").read_text())["turns"]
    assert all(turn["seconds"] > 0.0 for turn in turns_made)


def test_regression_is_judged_by_its_unexplained_variance_and_has_a_probe() -> None:
    tasks = []
    for task in tiny_tasks(3):
        assert task.test is not None
        train, test = (
            (rows.inputs[""], rows.inputs[""].sum(-1, keepdim=True).expand(-1, 3).clone())
            for rows in (task.train, task.test)
        )
        tasks.append(Task(task.name, train, "regression", test=test))
    options: dict[str, Any] = {**SMALL, "folds": 3, "methods": ("linear-probe", "lift"), "budget": "1 h"}
    result = pyro_lift.compare(tasks, tiny_adapter(), **options)
    assert result.summary.measure == "unexplained"
    assert "unexplained" in result.table and "accuracy" not in result.table
    assert result.summary.chance is not None and "guess" in result.table
    assert all(math.isfinite(loss) for losses in result.summary.losses.values() for loss in losses)


def test_of_tokens_there_is_no_probe_and_it_says_so() -> None:
    from pyro_lift.models.backbones import recipe

    torch.manual_seed(0)
    backbone = FAMILIES["gpt2"].make()
    tasks = [FAMILIES["gpt2"].task(f"t{k}") for k in range(3)]
    options: dict[str, Any] = {**SMALL, "folds": 3, "methods": ("linear-probe", "union-train", "lift"), "budget": "1 h"}
    result = pyro_lift.compare(tasks, backbone, recipe(backbone, 1), **options)
    assert list(result.summary.results) == ["union-train", "lift"]
    assert any("no linear probe: task 't0'" in note for note in result.notes)
    assert "nothing without meta-learning was compared" in result.advice


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_command_compares_a_folder_of_tasks(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepare(family, tmp_path)
    torch.manual_seed(1)
    for name in ("tasks/c", "tasks/d"):
        write_task(FAMILIES[family].task(name), tmp_path / name)
    assert KINDS[family] in ("encoder", "vision")
    small = partial(Plan, 20, 8, (1e-3,), 2, 1)
    for module in (comparing, turns):  # of the first turn, and of those after it
        monkeypatch.setattr(module, "solve", lambda *_: small(1.0))
    arguments = ["compare", str(config), "--out", str(tmp_path / "out"), "--budget", "1 h", "--folds", "2"]
    bar = {"bert": "linear-probe", "vit": "no-meta-train"}[family]
    result = CliRunner().invoke(app, [*arguments, "--methods", f"{bar},lift"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert entrant(bar).title in result.output and "LiFT" in result.output and "guess" in result.output
    assert (tmp_path / "out" / "comparison.png").is_file()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == len(set(said))  # what holds in every part is said once


def test_what_cannot_be_compared_is_refused_before_any_training() -> None:
    tasks, adapter = tiny_tasks(3), tiny_adapter()
    with pytest.raises(ValueError, match="none to learn from beside the one that is held out"):
        pyro_lift.compare(tasks[:1], adapter)
    mixed = [tasks[0], Task("r", (torch.zeros(4, 4), torch.rand(4)), "regression")]
    with pytest.raises(ValueError, match="several kinds"):
        pyro_lift.compare(mixed, adapter)
    with pytest.raises(ValueError, match=r"option.*'stepz'.*steps"):
        pyro_lift.compare(tasks, adapter, stepz=3)
    with pytest.raises(ValueError, match="lift"):
        pyro_lift.compare(tasks, adapter, methods=("lifft",))
    with pytest.raises(ValueError, match="no length of time"):
        pyro_lift.compare(tasks, adapter, budget="soon")


def test_rows_that_a_task_is_judged_by_are_none_that_it_learns_from() -> None:
    x = torch.arange(12.0).unsqueeze(-1)
    task = Task("t", (x, torch.arange(12) % 2), num_classes=2)
    split = judged(task, 100)
    assert split.test is not None and len(split.test) == 4
    both = torch.cat([split.train.inputs[""], split.test.inputs[""]]).squeeze(-1)
    assert sorted(both.tolist()) == x.squeeze(-1).tolist()
    assert judged(replace(task, dev=Rows({"": x + 100.0}, task.train.target)), 3).test.inputs[""].min() >= 100.0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="one row"):
        judged(Task("s", (x[:1], torch.zeros(1).long()), num_classes=2), 10)


def test_the_guess_is_that_of_the_class_frequencies_or_of_the_mean() -> None:
    task = Task("t", (torch.zeros(8, 1), torch.tensor([0] * 6 + [1] * 2)), num_classes=2,
                test=(torch.zeros(2, 1), torch.tensor([0, 1])))  # fmt: skip
    assert chance_loss(task) == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    y = torch.tensor([1.0, 3.0])
    values = Task("v", (torch.zeros(2, 1), y), "regression", test=(torch.zeros(2, 1), y))
    assert chance_loss(values) == pytest.approx(1.0)
    assert unexplained(y, values) == 0.0


def judged_task(name: str, train: list[int], test: list[int], classes: int = 2) -> Task:
    rows = [(torch.zeros(len(y), 1), torch.tensor(y)) for y in (train, test)]
    return Task(name, rows[0], num_classes=classes, test=rows[1])


def test_the_guess_is_the_best_of_own_even_and_common_frequencies_for_all_tasks() -> None:
    coins = [judged_task("a", [0, 0, 0, 1], [0, 1]), judged_task("b", [1, 1, 1, 0], [0, 1])]
    assert list(chance_losses(coins, coins).values()) == pytest.approx([math.log(2.0)] * 2)  # own frequencies mislead
    odd = [judged_task("a", [0] * 9, [0, 0]), judged_task("b", [1] * 9, [1, 1])]
    assert chance_losses(odd, odd)["a"] == pytest.approx(-math.log(10 / 11)) == chance_loss(odd[0])
    common = [judged_task(name, [0, 0, 1], [0, 0, 0, 1]) for name in "ab"]
    more = [*common, judged_task("c", [0] * 30 + [1] * 10, [0])]
    expected = -(3.0 * math.log(35 / 48) + math.log(13 / 48)) / 4
    assert chance_losses(common, more)["a"] == pytest.approx(expected)
    mixed = [*common, judged_task("d", [0, 1, 2], [0, 1, 2], 3)]  # no class is another task's
    assert chance_losses(mixed, mixed)["d"] == pytest.approx(math.log(3.0))


def test_a_method_that_diverges_is_named_and_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(self: Any, tasks: Any, *, on_step: Any = None) -> Any:
        raise pyro_lift.DivergedError("step 3: the loss is nan", 3)

    monkeypatch.setattr("pyro_lift.inference.baselines.union_train.UnionTrain.meta_train", diverging)
    monkeypatch.setattr(comparing, "measured", lambda *_: Costs(1e-3, 1e-3, 1e-3, 1e-3))
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("no-meta-train", "union-train"), "budget": "1 h"}
    result = pyro_lift.compare(tiny_tasks(4), tiny_adapter(), **options)
    assert "Union Train: no finite NLL" in result.advice
    assert any("meta-training: step 3" in note for note in result.notes)


def one_row(name: str) -> Task:
    return Task(name, (torch.ones(1, 4, dtype=torch.float64), torch.zeros(1).long()), num_classes=3)


def test_a_task_of_one_row_is_left_out_before_anything_is_run_and_named(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("no-meta-train", "union-train"), "budget": "1 h"}
    tasks = [Task(t.name, t.train, num_classes=3) for t in tiny_tasks(4)]
    result = pyro_lift.compare([*tasks[:2], one_row("short"), *tasks[2:]], tiny_adapter(), **options)
    said = "task 'short' has one row, and no test rows: there is none left to be judged by. It is left out."
    assert said in caplog.text and any(note.startswith(said) for note in result.notes)
    assert [r.task for r in result.summary.results["union-train"]] == ["t0", "t1", "t2", "t3"]
    with pytest.raises(ValueError, match=r"'a', 'b' have one row.*all that there is to be judged by"):
        pyro_lift.compare(
            TaskCollection("f", tuple(tasks), (), (one_row("a"), one_row("b"))), tiny_adapter(), **options
        )


def test_tasks_of_one_row_are_learned_from_where_others_are_judged() -> None:
    tasks = [one_row("short"), *(Task(t.name, t.train, num_classes=3) for t in tiny_tasks(5))]
    problem = Problem(
        tasks, tiny_tasks(1), [], lambda seed: tiny_adapter(), pyro_lift.LiFTSettings(), pyro_lift.AdaptSettings()
    )
    problem, notes = without_unjudged(problem)
    (fold,) = folds_of(problem._replace(test=[replace(tiny_tasks(1)[0], name="new")]), 3)
    assert not notes and "short" in [t.name for t in fold.train] and [t.name for t in fold.dev] == ["t0"]


def labelled(name: str, labels: list[int], test: list[int] | None = None) -> Task:
    x = torch.zeros(len(labels), 4, dtype=torch.float64)
    rows = None if test is None else (torch.zeros(len(test), 4, dtype=torch.float64), torch.tensor(test))
    return Task(name, (x, torch.tensor(labels)), num_classes=3, test=rows)


def test_tasks_of_one_class_cannot_tell() -> None:
    options: dict[str, Any] = {**SMALL, "folds": 2, "methods": ("no-meta-train", "union-train"), "budget": "1 h"}
    result = pyro_lift.compare([labelled(f"c{k}", [1] * 6) for k in range(4)], tiny_adapter(), **options)
    assert result.advice.startswith("These tasks cannot tell which method is better: the rows that tasks are judged by")
    assert "pays" not in str(result)
    each = [labelled("a", [0, 0], [0]), labelled("b", [1, 1], [1])]
    advice, note = told_of_one_class(each)
    assert advice is not None and "each task that is judged has one class only" in advice and note is None
    same = [labelled("a", [0, 1], [2]), labelled("b", [1, 0], [2])]
    assert "the rows that tasks are judged by have one class only" in (told_of_one_class(same)[0] or "")
    several = [labelled("a", [0, 1], [2]), labelled("b", [1, 0], [0]), labelled("c", [1, 1], [1])]
    assert told_of_one_class(several) == (
        None,
        "1 of 3 judged tasks have one class only, and tell little of any method: 'c'.",
    )
    assert told_of_one_class(several[:2]) == (None, None) == told_of_one_class([])
    values = Task("v", (torch.zeros(2, 1), torch.ones(2)), "regression", test=(torch.zeros(2, 1), torch.ones(2)))
    assert told_of_one_class([values, values]) == (None, None)
