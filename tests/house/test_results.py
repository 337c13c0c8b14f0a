"""The committed records of the evidence: whole, of no machine's folders, and the report is the one that they make."""

from __future__ import annotations

import json
import re

from conftest import ROOT

from pyro_lift.bench.page.evidence import read_evidence
from pyro_lift.bench.page.html import page
from pyro_lift.bench.page.markdown import markdown
from pyro_lift.bench.sweep import read_manifest

FOLDER = ROOT / "docs" / "results" / "paper"
RECORDS = sorted(FOLDER.glob("small.*.json"))


def test_every_record_is_a_cell_of_the_manifest_of_real_size_and_says_what_it_was_run_with() -> None:
    names = {cell.name for cell in read_manifest(FOLDER)}
    assert len(RECORDS) >= 20 and {path.stem for path in RECORDS} <= names
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert {"cell", "commit", "versions", "seconds", "peak_bytes"} <= set(record), path.name
        assert not record["cell"]["smoke"] and record["seconds"] < 20 * 60
        assert re.fullmatch(r"[0-9a-f]{12}", record["commit"]), f"{path.name}: run from a changed checkout"


def test_no_record_names_a_folder_of_a_machine() -> None:
    for path in (*RECORDS, FOLDER / "manifest.json", FOLDER / "report.md", FOLDER / "report.html"):
        assert not re.search(r"(?<![\w.<])/(work|root|home|tmp|usr|mnt|Users)\b", path.read_text()), path.name


def test_the_report_is_the_one_that_the_records_make() -> None:
    evidence = read_evidence(FOLDER)
    assert (FOLDER / "report.md").read_text() == markdown(evidence, FOLDER.name)
    assert (FOLDER / "report.html").read_text() == page(evidence, FOLDER.name)
    assert (FOLDER / "report.html").stat().st_size < 1_500_000
