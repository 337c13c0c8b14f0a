"""The demo in its short form: what it writes, what it counts, and that its comparison is fair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from scipy.stats import ttest_rel

from pyro_lift import LiFTPrior
from pyro_lift.bench import demo, report
from pyro_lift.bench.demo import CHOSEN, GRIDS, METHODS, DemoSettings, FamilyRun
from pyro_lift.data.digits import digit_backbone


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(DemoSettings.smoke(), out, progress=False)


def test_it_writes_a_record_per_method_seed_and_task(finished: tuple[Path, list[dict[str, object]]]) -> None:
    out, records = finished
    assert json.loads((out / "results.json").read_text()) == records
    assert [r["method"] for r in records] == [m for m in METHODS for _ in range(4)]
    assert len({(r["method"], r["seed"], r["task"]) for r in records}) == len(records) == 24
    for record in records:
        assert 0.0 <= float(str(record["accuracy"])) <= 1.0
        assert float(str(record["nll"])) > 0.0


def test_it_writes_the_chain_the_prior_and_the_pictures(finished: tuple[Path, list[dict[str, object]]]) -> None:
    import arviz as az

    out, _ = finished
    prior = LiFTPrior.from_pretrained(out / "prior", digit_backbone())
    assert prior.mixture.components == 3
    pictures = {"mixture.png", "reliability.png", "scores.png", "tasks.png", "traces.png"}
    assert pictures <= {path.name for path in out.iterdir()}
    data = az.from_netcdf(str(out / "chain.nc"))
    visits = 24 - 24 // 2
    draws = visits - visits // 3
    assert data["posterior"]["phi_projection"].shape[:2] == (1, draws)
    assert data["sample_stats"]["visit_log_likelihood"].shape == (1, draws)


def test_it_gives_the_same_numbers_again_and_in_other_processes(
    finished: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    _, records = finished
    settings = DemoSettings.smoke()
    runs = [FamilyRun(0, ((group, CHOSEN[group]),)) for group in ("lift", "union-train")]  # there they are one run
    results = demo.run_families(replace(settings, workers=2), runs, description="", progress=False)
    again = [judged.record() for of_run in results for of_choice in of_run for judged in of_choice]
    assert sorted(again, key=str) == sorted((r for r in records if r["seed"] == 0 and r in again), key=str)
    assert len(again) == 6


@pytest.mark.parametrize(
    "groups",
    [("no-meta-train",), ("linear-probe", "lora-tuned", "no-meta-train"), ("union-train", "lift"), ("lift",)],
    ids="+".join,
)
@pytest.mark.parametrize("part", ["dev", "test"])
def test_the_bar_ends_where_it_said(groups: tuple[demo.Group, ...], part: Literal["dev", "test"]) -> None:
    settings = DemoSettings.smoke()
    counted: list[int] = []
    run = FamilyRun(0, tuple((group, CHOSEN[group]) for group in groups), part)
    demo.run_family(settings, run, counted.append)
    assert sum(counted) == demo.steps_of(settings, run)


def test_every_method_is_tuned_alike_and_spends_alike() -> None:
    assert {len(grid) for grid in GRIDS.values()} == {12}
    assert all(CHOSEN[group] in grid for group, grid in GRIDS.items())
    settings = DemoSettings()
    adapter = demo.demo_adapter(settings, 0)
    budgets = {
        group: demo.method_of(settings, group, CHOSEN[group], 0, adapter, adapter.initial).budget for group in GRIDS
    }
    for name in ("steps", "draws", "batch_size", "seed"):
        assert len({getattr(budget, name) for budget in budgets.values()}) == 1, name
    assert len({budgets[group].warm_up + budgets[group].visits for group in ("union-train", "lift")}) == 1


@pytest.mark.slow
def test_it_tunes_each_method_among_its_own_settings_by_the_one_tuner(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {group: grid[:3] for group, grid in GRIDS.items()}
    monkeypatch.setattr(demo, "GRIDS", few)
    settings = replace(DemoSettings.smoke(), num_dev=2)
    chosen = demo.tune(settings, progress=False)
    assert set(chosen) == set(GRIDS) and all(choice in few[group] for group, choice in chosen.items())
    rows = capsys.readouterr().out.splitlines()[2:]
    for group in GRIDS:  # three settings, then two of them
        assert sum(row.startswith(group) for row in rows) == 5


def test_the_table_holds_means_and_paired_p_values() -> None:
    generator = torch.Generator().manual_seed(0)
    records = [
        {
            "method": method,
            "seed": seed,
            "task": task,
            **{key: float(torch.rand((), generator=generator)) for key in ("accuracy", "nll", "ece")},
        }
        for method in ("a", "b")
        for task in ("x", "y")
        for seed in range(4)
    ]
    table = report.comparison(records, ("a", "b"), "b").splitlines()
    by = {m: sorted((r["seed"], r["task"], r["nll"]) for r in records if r["method"] == m) for m in "ab"}
    p = ttest_rel([v for *_, v in by["a"]], [v for *_, v in by["b"]]).pvalue
    assert f"{p:.1e}" in table[2]
    mean = sum(v for *_, v in by["a"]) / 8  # type: ignore[misc]
    assert f"{mean:.3f} ±" in table[2]
    assert "p (" in table[0] and table[3].startswith("b")


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds=0"):
        DemoSettings(seeds=0)
