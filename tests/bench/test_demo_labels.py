"""The demo's second panel: the lead at each number of labels is the paired difference of its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from pyro_lift.bench import demo_labels
from pyro_lift.bench.demo import DemoSettings


def test_the_lead_is_paired_over_seeds_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = DemoSettings(2, 3, visits=12, steps=4, draws=2, num_train=3, num_test=2, workers=1)
    records = demo_labels.run(settings, tmp_path, (5, 9), progress=False)
    assert json.loads((tmp_path / "labels.json").read_text()) == records
    assert len(records) == 2 * 2 * 2 * 2  # labels, methods, seeds, tasks
    assert (tmp_path / "labels.png").stat().st_size > 5_000
    for lead in demo_labels.leads(records, "nll"):
        union, lift = (
            [r["nll"] for r in records if r["labels"] == lead.labels and r["method"] == name]
            for name in ("Union Train", "LiFT K=1")
        )
        assert lead.test.p_value == pytest.approx(ttest_rel(union, lift).pvalue)
        assert lead.test.difference == pytest.approx(sum(union) / 4 - sum(lift) / 4)
    shown = capsys.readouterr().out
    assert "labels a task" in shown and "(p " in shown


def test_no_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels"):
        demo_labels.run(DemoSettings.smoke(), tmp_path, (0,))
