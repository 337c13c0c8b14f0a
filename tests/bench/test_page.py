"""The page of results: ranks and tests against their definitions, and what a reader finds first."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, ttest_ind, ttest_rel

from pyro_lift.bench.page.command import command
from pyro_lift.bench.page.drawing import ticks
from pyro_lift.bench.page.evidence import read_evidence
from pyro_lift.bench.page.findings import Case, by_task, observations, row_tests, shortfalls, verdict_of
from pyro_lift.bench.page.ranks import Ranking, critical_difference, ranked
from pyro_lift.bench.page.statements import statement_of
from pyro_lift.bench.paper.tables import TABLES, Column

COLUMN = Column("diabetes", "regressions", "diabetes")


def test_ranks_friedman_and_nemenyi_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(0)
    losses = {
        name: dict(enumerate(shift + rng.normal(size=14))) for name, shift in zip("abcd", (0, 1, 2, 3), strict=True)
    }
    found = ranked({name: {str(k): v for k, v in of.items()} for name, of in losses.items()})
    assert found is not None and found.methods == ["a", "b", "c", "d"] and found.cases == 14
    table = np.array([[losses[m][k] for m in "abcd"] for k in range(14)])
    ranks = table.argsort(1).argsort(1) + 1
    assert found.mean_ranks == pytest.approx(ranks.mean(0).tolist())
    assert found.p_value == pytest.approx(friedmanchisquare(*table.T).pvalue)
    # Demšar 2006, section 3.2.3: four classifiers, fourteen data sets, q = 2.569.
    assert found.difference == pytest.approx(2.569 * (4 * 5 / (6 * 14)) ** 0.5, abs=2e-3)
    assert critical_difference(10, 30) == pytest.approx(3.164 * (10 * 11 / 180) ** 0.5, abs=3e-3)


def test_only_cases_that_all_methods_have_are_ranked_and_ties_share_a_rank() -> None:
    found = ranked({"a": {"x": 1.0, "y": 1.0}, "b": {"x": 1.0, "y": 2.0, "z": 0.0}, "c": {"x": 3.0, "y": 3.0}})
    assert found is not None and found.cases == 2
    assert dict(zip(found.methods, found.mean_ranks, strict=True)) == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert ranked({"a": {"x": 1.0}}) is None and ranked({"a": {"x": 1.0}, "b": {"y": 1.0}}) is None


def test_bars_are_the_longest_runs_of_neighbours_within_the_difference() -> None:
    ranking = Ranking(["a", "b", "c", "d"], [1.0, 1.8, 2.6, 4.0], 9, 0.01, 1.0)
    assert ranking.groups() == [(0, 1), (1, 2)]
    assert Ranking(["a", "b"], [1.0, 2.0], 9, None, None).groups() == []


def test_ticks_are_round_and_between_the_ends() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.13, 0.71, 3) == [0.2, 0.4, 0.6]
    assert ticks(4.0, 4.0) == [4.0]


def _folder(path: Path, losses: dict[str, list[list[float]]]) -> Path:
    """Cells of the regressions with given losses, by contestant: a list a seed, of a number a task."""
    path.mkdir()
    manifest = []
    for contestant, by_seed in losses.items():
        for seed, values in enumerate(by_seed):
            cell = {"scale": "small", "family": "regressions", "split": "diabetes", "group": contestant, "seed": seed}
            cell |= {"root": None, "smoke": False}
            name = f"{contestant}-{seed}"
            manifest.append({"name": name, "arguments": cell})
            tasks = {
                f"task{k}": {"unexplained": v, "mse": v, "rows": 9, "adapt_seconds": 0.5} for k, v in enumerate(values)
            }
            about: dict[str, Any] = {"rate": 0.01, "rates": {"0.01": 1.0}, "temperature": None, "meta_seconds": 2.0}
            result = {
                "cell": cell, "versions": {"torch": "2"}, "commit": "abc", "seconds": 3.0, "peak_bytes": 2**30,
                "tasks": {"train": [], "dev": [], "test": list(tasks)}, "missing": {"test": ["gone"]}, "notes": [],
                "backbone": "net<1>", "measure": "unexplained",
                "contestants": {contestant: {**about, "settings": {"method": contestant}, "tasks": tasks}},
            }  # fmt: skip
            (path / f"{name}.json").write_text(json.dumps(result))
    manifest.append({"name": "later", "arguments": {}})
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


LOSSES = {
    "lift": [[0.50, 0.60, 0.70, 0.81], [0.52, 0.61, 0.72, 0.80]],
    "union-train": [[0.60, 0.71, 0.80, 0.92], [0.61, 0.70, 0.83, 0.91]],
    "linear-probe": [[0.90, 0.60, 0.72, 0.70], [0.90, 0.61, 0.72, 0.70]],
}


def test_tests_are_paired_over_tasks_and_pooled_over_seeds(tmp_path: Path) -> None:
    evidence = read_evidence(_folder(tmp_path / "cells", LOSSES))
    found = row_tests(evidence, [COLUMN], "union-train", "lift")
    ours, theirs = (np.array(LOSSES[name]) for name in ("lift", "union-train"))
    assert found.paired is not None
    assert found.paired.p_value == pytest.approx(ttest_rel(theirs.mean(0), ours.mean(0)).pvalue)
    means = ours.mean(1), theirs.mean(1)
    assert found.pooled == pytest.approx(ttest_ind(*means).pvalue)
    assert found.welch == pytest.approx(ttest_ind(*means, equal_var=False).pvalue)


def test_the_average_of_a_table_is_over_its_columns_and_only_of_rows_that_have_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    folder.mkdir()
    manifest = []
    for split, row, value in (
        ("play-80/10/10", "maml", 90.0),
        ("play-60/10/30", "maml", 100.0),
        ("random-80/10/10", "maml", 91.0),
        ("random-60/10/30", "maml", 99.0),
        ("play-80/10/10", "lift", 80.0),
        ("play-60/10/30", "lift", 81.0),
        ("random-80/10/10", "lift", 82.0),
    ):
        cell = {"scale": "small", "family": "shakespeare", "split": split, "group": row, "seed": 0, "smoke": False}
        name = f"{row}-{value:g}"
        manifest.append({"name": name, "arguments": {}})
        tasks = {"Hamlet": {"perplexity": value, "nll": 4.0, "adapt_seconds": 1.0}}
        about = {"rate": 0.1, "rates": {}, "temperature": None, "meta_seconds": 1.0, "settings": {"method": row}}
        result = {
            "cell": cell,
            "seconds": 1.0,
            "measure": "perplexity",
            "contestants": {row: {**about, "tasks": tasks}},
        }
        (folder / f"{name}.json").write_text(json.dumps(result))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    statement = statement_of(read_evidence(folder), TABLES[3])
    assert statement is not None and statement.columns[-1] == "Avg"
    shown = {row: places[-1] for row, places in zip(statement.rows, statement.places, strict=True)}
    assert (shown["maml"].ours, shown["maml"].theirs) == ("95.0", "11.78")
    assert shown["lift"].ours == ""


def test_the_summary_is_of_seed_means(tmp_path: Path) -> None:
    summary = read_evidence(_folder(tmp_path / "cells", LOSSES)).summary(COLUMN, "lift")
    by_seed = np.array(LOSSES["lift"]).mean(1)
    assert summary is not None and summary.tasks == 4
    assert (summary.mean, summary.sd) == pytest.approx((by_seed.mean(), by_seed.std(ddof=1)))


def test_a_family_is_led_only_by_more_than_chance(tmp_path: Path) -> None:
    verdict = verdict_of(read_evidence(_folder(tmp_path / "one", LOSSES)), "regressions")
    assert verdict.runner_up == "linear-probe" and not verdict.leads
    assert "do not tell apart" in verdict.sentence()
    clear = {name: losses for name, losses in LOSSES.items() if name != "linear-probe"}
    verdict = verdict_of(read_evidence(_folder(tmp_path / "two", clear)), "regressions")
    assert verdict.leads and verdict.place == 1 and "0.10" in verdict.sentence()
    behind = {"lift": LOSSES["union-train"], "union-train": LOSSES["lift"]}
    verdict = verdict_of(read_evidence(_folder(tmp_path / "three", behind)), "regressions")
    assert not verdict.leads and verdict.place == 2 and "behind" in verdict.sentence()


def test_tasks_that_lift_was_not_judged_by_leave_its_place_as_it_is(tmp_path: Path) -> None:
    alone = verdict_of(read_evidence(_folder(tmp_path / "alone", LOSSES)), "regressions")
    more = {name: [[*seed, 9.0] if name != "lift" else seed for seed in by_seed] for name, by_seed in LOSSES.items()}
    beside = verdict_of(read_evidence(_folder(tmp_path / "beside", more)), "regressions")
    assert beside.place is not None and beside == alone


def test_a_family_on_which_nothing_was_learned_is_not_led(tmp_path: Path) -> None:
    worse = {name: [[1.0 + x for x in seed] for seed in LOSSES[name]] for name in ("lift", "union-train")}
    verdict = verdict_of(read_evidence(_folder(tmp_path / "cells", worse)), "regressions")
    assert verdict.against["union-train"].difference < 0 and verdict.no_better and not verdict.leads
    assert shortfalls([verdict])[0].endswith("Guessing costs 1.000: LiFT has learned nothing here.")


def test_what_falls_short_names_the_probe_where_another_method_is_the_best(tmp_path: Path) -> None:
    losses = {"lift": LOSSES["lift"], "union-train": [[0.1] * 4] * 2, "linear-probe": [[0.5] * 4] * 2}
    told = shortfalls([verdict_of(read_evidence(_folder(tmp_path / "cells", losses)), "regressions")])
    assert len(told) == 2 and "Union Train 0.100" in told[0] and "behind the linear probe" in told[1]
    alone = {"union-train": LOSSES["union-train"]}  # LiFT was not run: that is no shortfall
    assert shortfalls([verdict_of(read_evidence(_folder(tmp_path / "alone", alone)), "regressions")]) == []


def test_a_split_that_shows_another_ones_cells_has_its_own_measure(tmp_path: Path) -> None:
    evidence = read_evidence(_folder(tmp_path / "cells", LOSSES))
    assert evidence.measure(Column("CLS-23", "crossfit", "CLS-23")) == "score"
    assert evidence.measure(Column("x", "toy", "sgld-gibbs")) == "nll"


def test_tasks_that_a_seed_makes_are_cases_of_their_own(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "cells", LOSSES)
    for path in folder.glob("*-*.json"):
        result = json.loads(path.read_text())
        result["cell"] |= {"family": "digits", "split": "10 labels"}
        path.write_text(json.dumps(result).replace("unexplained", "nll"))
    verdict = verdict_of(read_evidence(folder), "digits")
    assert verdict.cases == 8
    assert verdict.guessing is None and "Guessing" not in verdict.sentence()  # records that do not say what it costs
    assert verdict_of(read_evidence(_folder(tmp_path / "shared", LOSSES)), "regressions").cases == 4


def test_a_task_that_several_splits_judge_by_is_one_observation() -> None:
    a, b, of_one = Case("CLS-45", "a", None), Case("CLS-0", "a", None), Case("CLS-45", "b", None)
    assert by_task({a: 1.0, b: 3.0, of_one: 5.0}) == {"a": 2.0, "b": 5.0}
    scanners = {Case(split, "a", seed): 1.0 for split in ("10 labels", "25 labels") for seed in (0, 1)}
    assert by_task(scanners) == scanners


def test_tasks_that_a_seed_makes_are_one_observation_of_a_test(tmp_path: Path) -> None:
    cells = {Case("10 labels", task, seed): float(seed + place) for seed in (0, 1) for place, task in enumerate("ab")}
    assert observations(cells) == {Case("10 labels", "", 0): 0.5, Case("10 labels", "", 1): 1.5}
    alone = {case: value for case, value in cells.items() if case.seed == 0}
    assert observations(alone) == alone, "of one seed the tasks are all there is"
    shared = {Case("CLS-45", "a", None): 1.0, Case("CLS-0", "a", None): 3.0}
    assert observations(shared) == {"a": 2.0}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def test_the_page_stands_alone_is_well_formed_and_names_what_falls_short_first(tmp_path: Path) -> None:
    html = command(_folder(tmp_path / "cells", LOSSES), tmp_path / "out").read_text()
    parsed = _Page()
    parsed.feed(html)
    assert not parsed.faults and not parsed.open
    assert all(link.startswith("#") for link in parsed.links)
    assert html.index("Where LiFT falls short") < html.index("Where LiFT leads") < html.index("<table>")
    assert "net&lt;1&gt;" in html and "later" in html and "missing: gone" in html and "prefers-color-scheme" in html
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| Union Train | 0.760 ± 0.004" in markdown and "## What was not run" in markdown


def test_cells_of_two_scales_are_not_put_into_one_table(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "cells", LOSSES)
    result = json.loads((folder / "lift-0.json").read_text())
    result["cell"]["scale"] = "paper"
    (folder / "lift-0.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="give --scale"):
        command(folder)
    summary = read_evidence(folder, "small").summary(COLUMN, "lift")
    assert summary is not None and list(summary.by_seed) == [1]


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json here"):
        command(tmp_path)
