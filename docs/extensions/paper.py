"""Where the paper's equations, tables and figures are in the code: docs/paper.toml, as a page and as links."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["INVENTORY", "Entry", "add_links", "entries", "page"]

INVENTORY = Path(__file__).resolve().parent.parent / "paper.toml"
TITLES = {"equation": "Equations", "table": "Tables", "figure": "Figures", "section": "Sections with a procedure"}
SHORT = {"equation": "Eq.", "table": "Table", "figure": "Figure", "section": "Section"}


class Entry(NamedTuple):
    """One place of the paper."""

    kind: str
    numbers: list[str]
    what: str
    code: list[str]
    tests: list[str]
    note: str

    @property
    def label(self) -> str:
        """How it is called, ``Eq. 9-11``."""
        first, last = self.numbers[0], self.numbers[-1]
        return f"{SHORT[self.kind]} {first}" + (f"-{last}" if first != last else "")


def entries() -> list[Entry]:
    """Read the list; ``numbers`` may be one number or a range ``[first, last]`` of whole numbers."""
    found = []
    for kind in TITLES:
        for raw in tomllib.loads(INVENTORY.read_text("utf-8")).get(kind, []):
            given = raw["number"]
            numbers = [str(k) for k in range(given[0], given[1] + 1)] if isinstance(given, list) else [str(given)]
            found.append(
                Entry(kind, numbers, raw["what"], raw.get("code", []), raw.get("tests", []), raw.get("note", ""))
            )
    return found


def page() -> str:
    """Write the reference page."""
    lines = [
        "# Where is Eq. N?\n",
        "Every numbered equation, table and figure of *LiFT: Learning to Fine-Tune via Bayesian Parameter Efficient "
        "Meta Fine-Tuning* (Kim and Hospedales), the code that implements it and the tests that hold the code to it. "
        "The objects' own pages link back here. A test keeps the list complete and the names right.\n",
    ]
    for kind, title in TITLES.items():
        lines += [f"## {title}\n", "| number | what | code | test |", "|---|---|---|---|"]
        for entry in entries():
            if entry.kind == kind:
                code = "<br>".join(_link(name) for name in entry.code) or entry.note
                tests = "<br>".join(f"`{test.split('::')[0]}` {_sentence(test)}".strip() for test in entry.tests)
                what = entry.what + (f" ({entry.note})" if entry.note and entry.code else "")
                lines.append(f"| {_anchors(entry)}{entry.label} | {_escaped(what)} | {code} | {tests} |")
        lines.append("")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _anchors(entry: Entry) -> str:
    return "".join(f'<a id="{entry.kind}-{number}"></a>' for number in entry.numbers)


def _sentence(test: str) -> str:
    name = test.partition("::")[2]
    return f"({name.removeprefix('test_').replace('_', ' ')})" if name else ""


def _link(name: str) -> str:
    if name.startswith("pyro_lift.bench."):  # benchmarks are no part of the reference: their file is named instead
        module, _, thing = name.rpartition(".")
        return f"`{thing}` in `{module.replace('.', '/')}.py`"
    if name.startswith("pyro_lift"):
        return f"{{py:obj}}`~{name}`"
    return f"`{name}`"


def add_links(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Say at the end of an object's docstring what of the paper it implements."""
    del app, what, obj, options
    places = [entry for entry in entries() if name in entry.code]
    if places:
        named = ", ".join(entry.label for entry in places)
        lines += ["", f":In the paper: {named}; see :doc:`/generated/paper`.", ""]
