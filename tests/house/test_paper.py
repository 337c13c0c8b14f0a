"""Everything that the paper numbers is in docs/paper.toml, and the objects and tests that it names exist."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))

from extensions.paper import Entry, entries, page

#: How many the paper numbers. It numbers no algorithm.
COUNTS = {"equation": 40, "table": 14, "figure": 7}


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("kind", COUNTS)
def test_every_number_is_there_once(kind: str) -> None:
    numbers = [number for entry in entries() if entry.kind == kind for number in entry.numbers]
    assert sorted(map(int, numbers)) == list(range(1, COUNTS[kind] + 1))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.label)
def test_its_code_and_tests_exist(entry: Entry) -> None:
    assert entry.code and entry.tests, "an entry without code or without a test"
    for name in entry.code:
        module, thing = name, None
        while thing is None:
            module = module.rpartition(".")[0]
            try:
                thing = importlib.import_module(module)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("pyro_lift"):
                    raise
        for part in name.removeprefix(f"{module}.").split("."):
            thing = getattr(thing, part)
    for test in entry.tests:
        file, _, function = test.partition("::")
        assert function in functions(ROOT / file), test


def test_the_page_links_each_number_to_its_code() -> None:
    text = page()
    for kind, count in COUNTS.items():
        assert all(f'<a id="{kind}-{number}"></a>' in text for number in range(1, count + 1))
    assert "{py:obj}`~pyro_lift.models.priors.broadened`" in text


def test_what_the_page_links_to_has_a_place_in_the_reference() -> None:
    pytest.importorskip("sphinx", reason="the site's own packages are not installed: pip install '.[docs]'")
    from extensions.public import PACKAGES, modules_of

    listed = {module for package in PACKAGES for module in modules_of(package)}
    for name in re.findall(r"\{py:obj\}`~([^`]+)`", page()):
        parts = name.split(".")
        assert any(".".join(parts[:k]) in listed for k in range(2, len(parts))), f"{name} has no page in the reference"
    for file in re.findall(r"in `(pyro_lift/bench/[^`]+)`", page()):
        assert (ROOT / file).exists(), file
