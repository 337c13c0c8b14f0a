"""The first hour with a GPU: every part's short form on the CPU, its files, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyro_lift.bench import first_hour
from pyro_lift.bench.first_hour import PARTS, CudaSettings, table
from pyro_lift.bench.gpu_parts import Measured, Sizes


def silent(text: str) -> None:
    del text


#: The others take seconds more each, and are run by the slow test; a rank is a number.
QUICK = [part for part in PARTS if part not in ("tests", "demo", "steps-bart-64", "steps-vit-64")]


@pytest.mark.filterwarnings("default")  # what PyTorch's compiler warns of is not ours to mend
@pytest.mark.parametrize("part", QUICK)
def test_the_short_form_of_a_part_writes_its_records(part: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    records = first_hour.run(tmp_path, CudaSettings((part,), "cpu", smoke=True), log=silent)
    assert json.loads((tmp_path / f"cuda-{part}.json").read_text()) == records
    assert {record["part"] for record in records} == {part}
    failed = [record["failed"] for record in records if "failed" in record]
    assert not failed
    assert any("value" in record for record in records)
    assert part in (tmp_path / "cuda.txt").read_text()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_whole_short_form_runs_on_a_cpu(tmp_path: Path) -> None:
    records = first_hour.run(tmp_path, CudaSettings((), "cpu", smoke=True), log=silent)
    assert {record["part"] for record in records} == set(PARTS)
    assert not [record for record in records if "failed" in record]


def test_a_part_that_fails_says_so_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(sizes: Sizes, measured: Measured) -> None:
        measured.value("first", 1.0)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PARTS, "laws", breaks)
    monkeypatch.setitem(PARTS, "memory", lambda sizes, measured: measured.value("second", 2.0))
    records = first_hour.run(tmp_path, CudaSettings(("laws", "memory"), "cpu", smoke=True), log=silent)
    text = table([{**record, "most": 1.5} if record.get("what") == "second" else record for record in records])
    assert "failed: RuntimeError: no such kernel" in text and "second" in text and "MISSED" in text
    assert [record.get("value") for record in records if "what" in record] == [1.0, 2.0]


def test_parts_run_before_stay_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("laws", "memory"):
        monkeypatch.setitem(PARTS, part, lambda sizes, measured: measured.value("a number", 1.0, least=0.5))
        first_hour.run(tmp_path, CudaSettings((part,), "cpu", smoke=True), log=silent)
    lines = (tmp_path / "cuda.txt").read_text().splitlines()
    assert lines[0] == "cpu" and [line.split()[0] for line in lines[3:]] == ["laws", "memory"]


def test_a_part_that_takes_too_long_is_stopped_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda-laws.json").write_text('[\n{"part": "laws", "what": "first", "value": 1.0}\n]\n')
    monkeypatch.setattr(first_hour, "PART_SECONDS", 0.0)
    first_hour._in_a_process("laws", Sizes.smoke("cpu"), tmp_path / "cuda-laws.json")
    text = table(json.loads((tmp_path / "cuda-laws.json").read_text()))
    assert "first" in text and "stopped after 0" in text


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'memory'"):
        CudaSettings(("memroy",))
