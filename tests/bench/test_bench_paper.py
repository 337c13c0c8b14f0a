"""The paper's tables by a command: what they are made of, that each runs, and that a cell run again is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift.bench.page.command import command as report
from pyro_lift.bench.paper import cells as cells_module
from pyro_lift.bench.paper.again import run_again
from pyro_lift.bench.paper.cells import PaperCell, run_cell
from pyro_lift.bench.paper.command import PaperOptions, command, plan
from pyro_lift.bench.paper.contestants import ALONE, CONTESTANTS
from pyro_lift.bench.paper.costs import RANKS, TIMED
from pyro_lift.bench.paper.dry_run import dry_run, shapes_of
from pyro_lift.bench.paper.families import FAMILIES, Setting, setting_of
from pyro_lift.bench.paper.problems import PaperProblem, load_collection
from pyro_lift.bench.paper.published import published
from pyro_lift.bench.paper.scoring import _gaps, brier, calibration, intervals
from pyro_lift.bench.paper.sizes import Sizes
from pyro_lift.bench.paper.tables import FIGURES, OURS, TABLES, cells_of, family_table, table_named
from pyro_lift.bench.paper.training import adaptations_of, method_of, rates_of
from pyro_lift.data.collection import TaskCollection
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.probabilities import expected_calibration_error, nll
from pyro_lift.metrics.significance import pooled_t_test
from pyro_lift.tuning.methods import method_candidates, with_changes

EVERY = [*(f"table {k}" for k in TABLES), *(f"figure {k}" for k in FIGURES), *OURS]


def _tiny_problem(*_: Any, **__: Any) -> PaperProblem:
    tasks = tiny_tasks(8)
    tasks[0] = _renamed(tasks[0], "ethos-race")
    tasks[1] = _renamed(tasks[1], "superglue-cb")
    sizes = Sizes(seeds=1, warm_up=2, visits=9, steps=4, draws=2, batch_size=4, dev_tasks=1, test_rows=12)
    collection = TaskCollection("tiny", tuple(tasks[3:]), (tasks[2],), tuple(tasks[:2]))
    return PaperProblem(tiny_adapter(), collection, None, Setting("tiny", "timm", "pictures", sizes), sizes)


def _renamed(task: Any, name: str) -> Any:
    return replace(task, name=name)


_judged: dict[str, dict[str, Any]] = {}


def _judge_once(problem: PaperProblem, group: str, seed: int, wanted: Any = None) -> dict[str, Any]:
    """Every family being the same tiny one, a group is run once for all tables."""
    del wanted
    if group not in _judged:
        _judged[group] = JUDGE(problem, group, seed)
    return _judged[group]


JUDGE = cells_module.judge


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family is a tiny one, and iterations are not timed."""
    monkeypatch.setattr(cells_module, "_problem", _tiny_problem)
    monkeypatch.setattr(cells_module, "judge", _judge_once)
    costs = {"costs": {"lift-k5": 2.0, "union-train": 1.0, "maml": 3.0}, "stages": {"warm-up": 4.0, "burn-in": 5.0}}
    monkeypatch.setattr("pyro_lift.bench.paper.costs.run_costs", lambda *_, **__: costs)
    monkeypatch.setattr("pyro_lift.bench.paper.command.check_data", lambda *_: None)


def _options(name: str, **more: Any) -> PaperOptions:
    kind, _, number = name.partition(" ")
    chosen: dict[str, Any] = {f"{kind}s": (int(number),)} if number else {"families": (kind,)}
    return PaperOptions(**chosen, smoke=True, **more)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.usefixtures("tiny")
def test_every_table_and_figure_runs_and_is_reported(name: str, tmp_path: Path) -> None:
    splits = FAMILIES["crossfit"].splits[:1] if name in ("table 1", "table 5", "figure 3") else None
    ran = command(_options(name, splits=splits), tmp_path)
    assert ran
    results = [json.loads((tmp_path / f"{cell}.json").read_text()) for cell in ran]
    assert [r["reason"] for r in results if "reason" in r] == []
    page = report(tmp_path).read_text()
    table = table_named(name)
    assert escape(f"{table.name.capitalize()}: {table.title}") in page
    for row in (row for row in table.rows if row in CONTESTANTS):
        assert escape(CONTESTANTS[row].title) in page


def test_development_tasks_are_judged_by_and_none_of_them_is_chosen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tiny_tasks(8)
    loaded = TaskCollection("tiny", tuple(tasks[4:]), tuple(tasks[2:4]), tuple(tasks[:2]))
    monkeypatch.setattr("pyro_lift.bench.paper.problems.load_tasks", lambda *_, **__: loaded)
    monkeypatch.setattr("pyro_lift.bench.paper.problems._with_labels", lambda tasks: tasks)
    setting = setting_of("small", "development", "CLS-45")
    found = load_collection(setting, "development", "CLS-45", None, 0)
    assert [task.name for task in found.test] == [task.name for task in loaded.dev]
    assert len(found.dev) == 2 and len(found.train) == 2
    assert {task.name for task in (*found.dev, *found.train)} == {task.name for task in loaded.train}


@pytest.mark.usefixtures("tiny")
def test_a_cell_run_again_has_the_same_numbers_and_says_all_that_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "judge", JUDGE)
    cell = PaperCell("small", "crossfit", "CLS-45", "lift", 3)
    first, again = (run_cell(**cell.cell.arguments) for _ in range(2))
    assert list(first["contestants"]) == list(FAMILIES["crossfit"].orders)
    for name in first["contestants"]:
        one, two = first["contestants"][name], again["contestants"][name]
        assert one["rate"] == two["rate"] and one["temperature"] == two["temperature"]
        for task, record in one["tasks"].items():
            assert {k: v for k, v in record.items() if k != "adapt_seconds"} == {
                k: v for k, v in two["tasks"][task].items() if k != "adapt_seconds"
            }
            assert {"accuracy", "nll", "ece", "ece_pooled", "brier", "nll_t", "bins", "intervals"} <= set(record)
    assert {"cell", "versions", "commit", "seconds", "peak_bytes", "sizes", "tasks", "measure"} <= set(first)
    assert "root" not in first["cell"]
    assert len(first["contestants"]["lift"]["rates"]) == 3 and len(first["contestants"]["lift-k3"]["rates"]) == 1
    assert first["contestants"]["lift"]["rate"] == first["contestants"]["lift-k3"]["rate"]
    assert first["contestants"]["lift-k3"]["settings"]["lift"]["components"] == 3
    assert json.loads(json.dumps(first))["contestants"] == first["contestants"]


@pytest.mark.usefixtures("tiny")
def test_cells_run_again_are_compared_number_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "judge", JUDGE)
    (name,) = command(_options("regressions", methods=("union-train",)), tmp_path)
    before = (tmp_path / f"{name}.json").read_text()
    assert run_again(tmp_path, [name]) == {name: []}
    assert (tmp_path / f"{name}.json").read_text() == before
    record = json.loads(before)
    task = next(iter(record["contestants"]["union-train"]["tasks"].values()))
    task["nll"] += 1e-12
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    ((place,),) = run_again(tmp_path, [name]).values()
    assert "/nll: " in place
    with pytest.raises(ValueError, match="nowhere"):
        run_again(tmp_path, ["nowhere"])


@pytest.mark.usefixtures("tiny")
def test_a_second_table_adds_to_the_folder_what_is_new_and_runs_nothing_twice(tmp_path: Path) -> None:
    first = command(_options("table 12"), tmp_path)
    second = command(_options("table 13"), tmp_path)
    assert len(first) == 3 and set(second) == {n for n in second if "maml-" in n} and len(second) == 3
    assert command(_options("table 13"), tmp_path) == []
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [cell["name"] for cell in manifest] == [*first, *second]


@pytest.mark.usefixtures("tiny")
def test_what_a_method_refuses_is_a_reason_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("a linear probe needs classes")

    monkeypatch.setattr(BASELINES["linear-probe"], "meta_train", refuses)
    monkeypatch.setattr(cells_module, "judge", JUDGE)
    command(_options("regressions", methods=("linear-probe", "union-train")), tmp_path)
    assert "a linear probe needs classes" in report(tmp_path).read_text()


def test_without_data_a_family_is_left_out_with_a_message(tmp_path: Path) -> None:
    said: list[str] = []
    assert command(PaperOptions(tables=(1,), root=tmp_path / "nowhere"), tmp_path / "out", said.append) == []
    assert any("crossfit CLS-45" in line and "give --root FOLDER" in line for line in said)
    cells, absent = plan(PaperOptions(figures=(2,), root=None))
    assert len(cells) == 1 and not absent


def test_a_family_of_ours_has_no_papers_scale() -> None:
    cells, absent = plan(PaperOptions(families=("digits",), scale="paper"))
    assert not cells and "it has no paper's scale" in absent[0]
    with pytest.raises(ValueError, match="table"):
        plan(PaperOptions(tables=(15,)))


# ------------------------------------------------------------------------------------------------ the registry


def test_every_row_is_a_contestant_of_a_method_that_exists() -> None:
    for contestant in CONTESTANTS.values():
        assert contestant.method in BASELINES
    for table in (*TABLES.values(), *FIGURES.values(), *map(family_table, OURS)):
        unknown = set(table.rows) - set(CONTESTANTS)
        assert unknown <= {"toy", "warm-up", "burn-in"}, table.name


def test_every_number_that_the_paper_prints_has_a_place_in_our_table() -> None:
    for number, table in TABLES.items():
        printed = published(number)
        assert printed is not None
        assert set(printed.rows) <= set(table.rows), table.name
        if number not in (3, 14):  # of these the paper's columns are an average, and a mean with its deviation
            keys = {column.key for column in table.columns}
            assert len(keys & set(printed.columns)) >= 1
        assert all(len(values) == len(printed.columns) for values in printed.rows.values())


def test_the_papers_averages_are_those_of_its_rows() -> None:
    first, second = published(1), published(2)
    assert first is not None and second is not None
    for row, v in first.rows.items():
        assert sum(v[:7]) / 7 == pytest.approx(v[7], abs=0.011), row  # type: ignore[arg-type]
    for row, v in second.rows.items():
        for start, end in ((0, 7), (8, 12), (13, 21)):
            assert sum(v[start:end]) / (end - start) == pytest.approx(v[end], abs=0.061), (row, end)  # type: ignore[arg-type]


def test_the_papers_p_values_are_a_pooled_t_test_of_five_runs() -> None:
    table = published(14)
    assert table is not None
    mean, sd, _ = table.rows["lift-k5"]
    for row, (other, spread, p) in table.rows.items():
        if p is not None:
            assert mean is not None and sd is not None and other is not None and spread is not None
            ours = pooled_t_test(mean, sd, 5, other, spread, 5).p_value
            # Union Train's printed mean and p do not fit each other (2.5e-8 and 3.6e-8); the others do, to rounding.
            assert (0.68 if row == "union-train" else 0.89) < ours / p < 1.05, row


def test_who_learns_nothing_from_other_tasks_is_run_once_for_the_splits_with_the_same_tests() -> None:
    cells = cells_of(TABLES[1], "small", None, seeds=[0])
    splits = {group: {c.split for c in cells if c.group == group} for group in ("no-meta-train", "maml")}
    assert {"CLS-23", "CLS-0"} & splits["no-meta-train"] == set() and "CLS-45" in splits["no-meta-train"]
    assert splits["maml"] == set(FAMILIES["crossfit"].splits)
    assert "taskwise-peft" in ALONE


def test_the_first_seed_of_all_cells_comes_before_the_second_of_any_and_names_are_files() -> None:
    cells = cells_of(TABLES[3], "small", "data")
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    names = [c.cell.name for c in cells]
    assert len(set(names)) == len(names) and not any("/" in name or " " in name for name in names)
    assert {c.split for c in cells_of(TABLES[10], "small", None)} == {f"rank-{rank}" for rank in RANKS}


def test_cells_run_in_an_order_of_which_any_prefix_is_worth_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.bench.paper.command.check_data", lambda *_: None)
    cells, absent = plan(PaperOptions(root=Path("data")))
    assert not absent and len(set(cells)) == len(cells)
    alone = {cell for number in (5, 7, 8, 9, 12, 13) for cell in cells_of(TABLES[number], "small", "data")}
    alone |= {cell for figure in (3, 7) for cell in cells_of(FIGURES[figure], "small", "data")}
    shown = {cell for number in (1, 2, 3, 4, 6, 10, 14) for cell in cells_of(TABLES[number], "small", "data")}
    late = [cell in alone - shown for cell in cells]
    assert late == sorted(late) and {cell.seed for cell in cells if cell in alone - shown} == {0}
    main = [cell for cell in cells if cell.group in ("linear-probe", "union-train", "lift", "bmaml")]
    assert cells[0].group == "linear-probe" and [c.seed for c in main] == sorted(c.seed for c in main)
    first = main[: sum(cell.seed == 0 for cell in main)]
    assert {cell.family for cell in first} == {c.family for c in cells if c.family not in ("toy", "cost")}
    places = [(cell.family, cell.split, cell.seed) for cell in main]
    assert sum(one != two for one, two in pairwise(places)) + 1 == len(set(places))


def test_the_rates_of_a_cell_are_the_first_trials_of_the_one_tuner() -> None:
    problem = _tiny_problem()
    for name in ("union-train", "maml", "reptile", "abml", "lift"):
        method = method_of(CONTESTANTS[name], problem, 0)
        tried = [with_changes(method, c.adapt) for c in method_candidates(method, 3)]
        asked = [with_changes(method, changes) for changes in adaptations_of(method, problem.sizes, problem.adapter)]
        assert tried == asked
        assert [each.budget.learning_rate for each in tried] == list(rates_of(problem.sizes, problem.adapter))
        assert [getattr(each, "power", 1.0) for each in tried] == [1.0, 1.0, 100.0 if name == "lift" else 1.0]
        assert all(not c.meta for c in method_candidates(method, 3))


@pytest.mark.parametrize(("losses", "expected"), [((1.0, 1.2, 0.995), 0), ((1.0, 1.2, 0.9), 2), ((1.0, 0.905, 0.9), 1)])
def test_a_rate_is_changed_only_for_more_than_a_hundredth_of_a_nat(
    losses: tuple[float, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _tiny_problem()
    rates = rates_of(problem.sizes, problem.adapter)
    at = dict(zip(rates, losses, strict=True))
    now: list[float] = []

    class Fixed:
        name, state = "maml", None

        def at(self, changes: dict[str, float]) -> Any:
            now.append(changes["learning_rate"])
            return self

        def adapt(self, *_: Any, **__: Any) -> None:
            return None

    def fixed(_: Any, task: Any, rows: Any) -> torch.Tensor:
        return torch.full((len(rows), task.num_classes), 1.0 / task.num_classes)

    monkeypatch.setattr(cells_module, "predicted", fixed)
    monkeypatch.setattr(cells_module, "nll", lambda *_: at[now[-1]])
    adaptations = [{"learning_rate": rate} for rate in rates]
    assert cells_module._chosen(problem, Fixed(), 0, adaptations)["rate"] == rates[expected]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ scores


def test_brier_is_the_squared_distance_from_the_right_corner() -> None:
    p = torch.rand(40, 5, dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)
    y = torch.arange(40) % 5
    corners = torch.nn.functional.one_hot(y, 5)
    assert brier(p, y) == pytest.approx(float((p - corners).square().sum(-1).mean()), rel=1e-12)


def test_calibration_has_both_errors_and_the_bins_of_the_diagram() -> None:
    p = torch.softmax(torch.randn(200, 3), -1)
    y = torch.multinomial(p, 1).squeeze(-1)
    found = calibration(p, y)
    assert found["ece_pooled"] == expected_calibration_error(p, y, pooled=True)
    bins = found["bins"]
    assert sum(bins["cases"]) == 200
    gap = sum(n * abs(c - r) for n, c, r in zip(bins["cases"], bins["confidence"], bins["right"], strict=True)) / 200
    assert gap == pytest.approx(expected_calibration_error(p, y), abs=1e-4)
    assert calibration(torch.full((4, 2000), 1 / 2000), torch.zeros(4, dtype=torch.long))["ece_pooled"] is None


def test_a_bootstrap_interval_holds_the_score_and_narrows_with_rows() -> None:
    p = torch.softmax(torch.randn(800, 2, generator=torch.Generator().manual_seed(0)), -1)
    y = (torch.rand(800, generator=torch.Generator().manual_seed(1)) < p[:, 1]).long()
    few, many = intervals(p[:50], y[:50]), intervals(p, y)
    for name, score in (
        ("brier", brier(p, y)),
        ("nll", nll(p, y)),
        ("ece", expected_calibration_error(p, y)),
        ("ece_pooled", expected_calibration_error(p, y, pooled=True)),
    ):
        low, high = many[name]
        # An ECE of resampled rows is biased upwards: its interval need not hold the rows' own.
        assert 0.5 * low < score < high, name
    low, high = many["brier"]
    assert high - low < 0.5 * (few["brier"][1] - few["brier"][0])


def test_the_sums_by_bin_give_the_calibration_errors() -> None:
    p = torch.softmax(torch.randn(300, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)
    y = torch.arange(300) % 4
    top, best = p.max(-1)
    guo = _gaps(((best == y).double() - top).unsqueeze(-1), top.unsqueeze(-1), up=True).sum(0).abs().sum() / 300
    pooled = _gaps(torch.nn.functional.one_hot(y, 4) - p, p, up=False).sum(0).abs().sum() / (4 * 300)
    assert float(guo) == pytest.approx(expected_calibration_error(p, y), abs=1e-12)
    assert float(pooled) == pytest.approx(expected_calibration_error(p, y, pooled=True), abs=1e-12)


# ------------------------------------------------------------------------------------------------ dry runs


def test_a_dry_run_of_the_papers_scale_builds_bart_base_at_its_size() -> None:
    shapes = shapes_of("facebook/bart-base", 4, 16, 128)
    assert (shapes.weights, shapes.adapter) == (139_420_416, 442_368)
    assert shapes.output == (16, 8, 50265)
    assert shapes.operations > 4 * 16 * 128 * 40e6  # the encoder alone has 43 M weights that every token meets
    told = dry_run(cells_of(TABLES[9], "paper", None))
    assert "hub name: facebook/bart-base" in told and "442,368 of the adapter" in told and "lift-table" in told


@pytest.mark.slow
@pytest.mark.parametrize("number", list(TABLES))
def test_every_table_passes_its_dry_run_at_the_papers_scale(number: int) -> None:
    told = dry_run(cells_of(TABLES[number], "paper", None))
    assert "hub name" in told and "on the meta device" in told and "GiB" in told


def test_a_dry_run_of_the_cost_tables_builds_the_network_at_both_ranks() -> None:
    told = dry_run(cells_of(TABLES[10], "paper", None))
    assert "442,368 of the adapter" in told and "7,077,888 of the adapter" in told
    assert all(name in told for name in TIMED)


def test_a_dry_run_of_the_small_scale_tells_the_configuration_and_runs_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    command(PaperOptions(families=("novels",), dry=True), tmp_path / "out", said.append)
    assert "backbones/bart-novels" in said[0] and "3 seeds" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "split"),
    [("crossfit", "CLS-45"), ("crossfit", "CLS-0"), ("crossfit", "MCQA"), ("crossfit", "MRC"), ("vtab", "structured"),
     ("shakespeare", "random-80/10/10"), ("novels", "authors"), ("shifts", "sign_digits"), ("digits", "10 labels")],
)  # fmt: skip
def test_real_families_run_small(family: str, split: str, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for group in ("union-train", "lift"):
        result = run_cell(**PaperCell("small", family, split, group, 0, str(data_root), smoke=True).cell.arguments)
        assert "reason" not in result


# ------------------------------------------------------------------------------------------------ cases by seed


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("scanners", ("10 labels", "25 labels")),
        ("roles", ("random-80/10/10", "play-80/10/10")),
        ("shakespeare", ("random-80/10/10", "random-60/10/30")),
        ("crossfit", ("CLS-45", "CLS-0")),
        ("development", ("CLS-45", "CLS-45")),
    ],
)
def test_a_task_of_one_name_is_another_in_each_seed_and_split_exactly_where_it_is_counted_so(
    name: str, splits: tuple[str, str], data_root: Path
) -> None:
    family = FAMILIES[name]

    def judged(split: str, seed: int) -> dict[str, Any]:
        tasks = load_collection(setting_of("small", name, split), name, split, data_root / family.folder, seed).test
        return {task.name: task.test for task in tasks}

    first = judged(splits[0], 0)
    for other in (judged(splits[0], 1), judged(splits[1], 0)):
        shared = sorted(set(first) & set(other))
        assert shared
        for task in shared:
            mine, theirs = first[task], other[task]
            if family.by_seed:  # tensors, under whatever name the network takes them
                pairs = zip(mine.inputs.values(), theirs.inputs.values(), strict=True)
                same = all(torch.equal(x, y) for x, y in pairs)
            else:
                same = mine == theirs
            assert same is not family.by_seed


def test_the_families_whose_tasks_a_seed_makes() -> None:
    assert [name for name, family in FAMILIES.items() if family.by_seed] == ["digits", "scanners", "shifts"]
