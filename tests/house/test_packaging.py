"""The repository as a house: packaging, floors, and what an import may cost."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT


def test_every_folder_of_ours_is_packaged() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    homes = {
        "pyro_lift": ROOT / "pyro_lift",
        "pyro_lift.models": ROOT / "models",
        "pyro_lift.inference": ROOT / "inference",
    }
    found = set()
    for package, folder in homes.items():
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            if package == "pyro_lift" and parts[:1] in (("models",), ("inference",)):
                continue
            found.add(".".join((package, *parts)))
    assert found == declared


@pytest.mark.parametrize("link", ["models", "inference"])
def test_links_for_tools_are_relative(link: str) -> None:
    path = ROOT / "pyro_lift" / link
    assert path.is_symlink()
    assert str(path.readlink()) == f"../{link}"


@pytest.fixture(scope="module")
def imported() -> list[set[str]]:
    """Modules of a fresh interpreter after the import, and after the first use of what needs none of the heavy ones."""
    code = "import json, sys, pyro_lift; print(json.dumps(list(sys.modules)))"
    code += "; pyro_lift.SGLDGibbs; pyro_lift.Task; print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return [set(json.loads(line)) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "package", ["transformers", "timm", "datasets", "arviz", "matplotlib", "peft", "huggingface_hub"]
)
def test_importing_pyro_lift_is_light(package: str, imported: list[set[str]]) -> None:
    at_first, in_use = imported
    assert "pyro_lift" in at_first and package not in at_first
    assert "pyro" in in_use and package not in in_use


def test_unknown_names_are_refused() -> None:
    import pyro_lift

    with pytest.raises(AttributeError, match="SGLDGibbs"):
        _ = pyro_lift.SGLDGibb  # type: ignore[attr-defined]
    assert set(pyro_lift.__all__) <= set(dir(pyro_lift))
    for name in pyro_lift.__all__:
        assert getattr(pyro_lift, name) is not None


def test_the_three_lists_of_public_names_are_equal() -> None:
    import pyro_lift

    tree = ast.parse((ROOT / "pyro_lift" / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.asname: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == {name: f"pyro_lift.{module}" for name, module in pyro_lift._HOME.items()}
    assert sorted(pyro_lift.__all__) == sorted(["__version__", *pyro_lift._HOME])


def test_mypy_knows_a_misspelt_public_name(tmp_path: Path) -> None:
    # The roof alone, so that mypy need not read what stands below it.
    (tmp_path / "pyro_lift").mkdir()
    (tmp_path / "pyro_lift" / "__init__.py").write_text((ROOT / "pyro_lift" / "__init__.py").read_text("utf-8"))
    (tmp_path / "user.py").write_text("from pyro_lift import LiFTPrior, LiFTPriors\n")
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--cache-dir=cache", "user.py"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'has no attribute "LiFTPriors"' in answer.stdout, answer.stdout + answer.stderr
    assert answer.stdout.count("error") == 2, answer.stdout  # the name's, and the count at the end
