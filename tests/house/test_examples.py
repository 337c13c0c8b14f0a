"""Every example runs in its short form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT

BENCHMARKS = ("crossfit", "vtab", "shakespeare")  # looked at more closely below
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in BENCHMARKS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example), "--smoke"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "measure", "tasks"), [("crossfit", "score", 2), ("vtab", "accuracy", 2), ("shakespeare", "perplexity", 1)]
)
def test_a_benchmark_compares_its_methods_and_lists_what_is_missing(
    name: str, measure: str, tasks: int, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--smoke", "--out", str(tmp_path / "out")]
    env = {key: value for key, value in os.environ.items() if key != "CI"}  # where CI is set, no bar is drawn
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    methods = ["Tuned LoRA", "No Meta Train", "Union Train", "LiFT"]
    methods = methods if name == "shakespeare" else ["Linear Probe", *methods]
    assert len(records) == len(methods) * tasks
    assert [r["method"] for r in records[::tasks]] == methods
    for record in records:
        assert record[measure] == record[measure] and 0.0 <= record["accuracy"] <= 1.0
        assert (record["rate"] in (1e-3, 3e-3)) == (record["method"] not in ("Linear Probe", "Tuned LoRA"))
    assert all(method in result.stdout for method in methods)
    assert "development tasks" in result.stdout and "step/s" in result.stderr
    summary = (tmp_path / "out" / "tasks.txt").read_text()
    assert summary in result.stdout
    missing = {"crossfit": "scicite", "vtab": "dmlab", "shakespeare": "12 roles of 3 plays"}
    assert missing[name] in summary
    assert (tmp_path / "out" / "scores.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "told"),
    [
        ("crossfit", "", ("train 41 of 45 tasks", "dev   9 of 10 tasks", "test  8 of 10 tasks; missing: dbpedia_14")),
        ("vtab", "vision", ("not of VTAB", "test  4 of 12 tasks", "held out of train")),
        ("shakespeare", "", ("train 122 of 122 tasks", "152 roles of 36 plays", "211 lines")),
    ],
)
def test_a_benchmark_runs_on_the_real_data(name: str, folder: str, told: tuple[str, ...], tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"needs the benchmark data in {DATA}, which is not part of the project")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--root", str(DATA / folder), "--out", "out"]
    command += ["--warm-up", "3", "--visits", "6", "--steps", "4", "--draws", "1", "--rates", "1e-3"]
    command += ["--test-tasks", "1", "--test-rows", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = (tmp_path / "out" / "tasks.txt").read_text()
    assert all(words in summary for words in told), summary
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 3
