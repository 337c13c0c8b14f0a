"""``bench workflow``: its command, what it counts, and the posterior that both samplers have of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyro_lift.bench import workflow
from pyro_lift.cli import app


def record(sampler: str, tasks: int, ess: float | None, seconds: float) -> dict[str, object]:
    sites = {f"{what}_{site}": ess for what in ("ess", "mean", "sd") for site in workflow.SITES}
    counts = {"draws": 40, "asked": 50, "warmup": 5, "rows": 5, "limit": 9.0, "peak_bytes": 2**30}
    return {"sampler": sampler, "tasks": tasks, "seconds": seconds, "seconds_before": 3.0, **sites, **counts}


def test_the_smoke_run_writes_records_table_and_figure(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "workflow", "--smoke", "--tasks", "4", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "workflow.json").read_text())
    assert [r["sampler"] for r in records] == list(workflow.KINDS)
    assert all(r["draws"] == r["asked"] and r["ess_tau"] > 0 and r["seconds"] > 0 for r in records)
    assert "times NUTS" in result.output and (tmp_path / "workflow.png").stat().st_size > 1_000


def test_a_ratio_is_the_lesser_of_both_sites_and_may_count_the_warm_up() -> None:
    ours, nuts = record("ours", 100, 40.0, 1.0), record("nuts", 100, 10.0, 1.0)
    ours["ess_tau"] = 20.0
    assert workflow.ratios([ours, nuts]) == {100: 2.0}
    assert workflow.ratios([ours, {**nuts, "seconds_before": 7.0}], whole=True) == {100: 4.0}
    assert workflow.ratios([ours, record("nuts", 100, None, 0.0)]) == {}
    text = workflow.table([ours, record("nuts", 100, None, 0.0)])
    assert ">= 1" in text and "40 (of 50; stopped after 9 s)" in text


def test_a_cell_stops_at_its_limit_with_what_it_has() -> None:
    plan = workflow.SMOKE._replace(draws=10**6, seconds=0.5)
    cell = workflow._cell("ours", workflow.groups(4, 5), plan)
    assert 0 < cell["draws"] < 10**6 and cell["seconds"] < 5.0
    assert workflow._cell("nuts", workflow.groups(4, 5), plan._replace(seconds=1e-9))["ess_phi"] is None


@pytest.mark.slow
def test_both_samplers_have_the_same_posterior_of_the_same_data() -> None:
    plan = workflow.Plan(draws=2_000, nuts_draws=600, seconds=300.0)
    ours, nuts = (workflow._cell(kind, workflow.groups(30, 20), plan) for kind in ("ours", "nuts"))
    for site in workflow.SITES:
        error = torch.tensor([r[f"sd_{site}"] / r[f"ess_{site}"] ** 0.5 for r in (ours, nuts)]).norm()
        assert abs(ours[f"mean_{site}"] - nuts[f"mean_{site}"]) < 4.0 * float(error)
