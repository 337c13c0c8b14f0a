"""What the site is made of, looked at without building it: formulas, generated pages, the figure of the home page."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import textwrap
import typing
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("sphinx", reason="the site's own packages are not installed: pip install '.[docs]'")
sys.path.insert(0, str(ROOT / "docs"))

from extensions import home_figure, mathml, pages, tables
from extensions.public import PACKAGES, modules_of

SOURCES = sorted(
    path for home in ("pyro_lift", "models", "inference", "docs") for path in (ROOT / home).rglob("*.[pm][yd]")
)


def formulas(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return re.findall(r"^\$\$\n(.*?)\n\$\$", text, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^( *)\.\. math:: *(.*?)(?=\n *\n|\n\1\S)", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) for _, body in blocks] + re.findall(r":math:`([^`]+)`", text)


def test_every_formula_can_be_drawn() -> None:
    found = [(path, tex) for path in SOURCES if "site-packages" not in path.parts for tex in formulas(path)]
    assert len(found) > 60
    drawn = {(path.name, tex): mathml.formula(tex, block=True) for path, tex in found}
    assert not [place for place, text in drawn.items() if "<math" not in text]


def test_a_formula_that_cannot_be_drawn_stands_as_it_was_written() -> None:
    assert mathml.formula(r"\nonsense{a<b}", block=False) == r"<code>\nonsense{a&lt;b}</code>"


def test_every_key_of_a_run_is_on_the_page_of_keys() -> None:
    from pyro_lift.config import RunConfig

    page = pages.keys_page()
    for table, cls in typing.get_type_hints(RunConfig).items():
        section = page.split(f"## `[{table}]`")[1].split("\n## ")[0]
        for f in dataclasses.fields(cls):
            assert f"| `{f.name}` |" in section, (table, f.name)


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    page = pages.command_page()
    for command in ("demo", "train", "compare", "tune", "adapt", "predict", "keys", "bench sampler", "bench methods"):
        assert f"## `pyro-lift {command}`" in page
    assert "| `--budget` | time that the whole may take | `10 min` |" in page
    assert "| `PRIOR` | folder that `train` wrote | required |" in page


def test_every_public_name_has_its_place_in_the_reference() -> None:
    import pyro_lift

    made = pages.api_pages()
    front = made["part-pyro_lift.md"]
    for name in pyro_lift._HOME:
        thing = getattr(pyro_lift, name)
        home = f"{thing.__module__}.{thing.__qualname__}"
        assert f"`~{home}`" in front
        assert f":: {home}\n" in made[f"{thing.__module__}.rst"], name
    listed = (ROOT / "docs" / "reference" / "index.md").read_text("utf-8")
    for package in PACKAGES:
        assert f"/generated/api/part-{package}\n" in listed
        assert modules_of(package), package


def test_the_figure_of_the_home_page_is_readmes_table(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = dict(home_figure.rows(readme))
    assert len(rows) == 6 and all(len(values) == 3 for values in rows.values())
    assert f"{rows['LiFT K=1'][1][0]:.3f} ± {rows['LiFT K=1'][1][1]:.3f}" in readme
    home_figure.draw(readme, tmp_path / "figure.svg")
    assert all(name in (tmp_path / "figure.svg").read_text("utf-8") for name in rows)
    with pytest.raises(ValueError, match="no table"):
        home_figure.rows("nothing")


def test_no_docstring_has_a_backslash_that_python_read_as_a_control_character() -> None:
    broken = []
    for path in (path for path in SOURCES if path.suffix == ".py" and "site-packages" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node, clean=False) or ""
                broken += [f"{path.name}: {text[:60]!r}"] if re.search(r"[\t\a\b\f\v\r]", text) else []
    assert not broken


def test_a_number_and_its_error_do_not_come_apart() -> None:
    assert tables.joined("0.3 ± 0.1 and a ± b") == "0.3\u00a0±\u00a00.1 and a ± b"
