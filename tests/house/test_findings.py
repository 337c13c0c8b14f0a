"""The page of findings: every figure on it is one that its script draws, from numbers that are in the repository."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from conftest import ROOT


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("make_findings", ROOT / "docs" / "make_findings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_of_the_findings_is_drawn_by_the_script_and_committed(tmp_path: Path) -> None:
    numbers = json.loads((ROOT / "docs" / "findings.json").read_text())
    drawn = _script().draw(numbers, tmp_path)
    shown = re.findall(r"\(figures/(finding-[\w-]+\.png)\)", (ROOT / "docs" / "findings.md").read_text())
    assert sorted(shown) == sorted(path.name for path in drawn) and len(shown) == 7
    assert all(path.stat().st_size > 5_000 for path in drawn)
    assert all((ROOT / "docs" / "figures" / name).is_file() for name in shown)
