"""The repository as a house: packaging, floors, and what an import may cost."""

from __future__ import annotations

import subprocess
import sys
import tomllib

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


@pytest.mark.parametrize(
    "package", ["transformers", "timm", "datasets", "arviz", "matplotlib", "peft", "huggingface_hub"]
)
def test_importing_pyro_lift_is_light(package: str) -> None:
    code = f"import sys, pyro_lift; assert {package!r} not in sys.modules; pyro_lift.SGLDGibbs; pyro_lift.Task"
    code += f"; assert {package!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_names_are_refused() -> None:
    import pyro_lift

    with pytest.raises(AttributeError, match="SGLDGibbs"):
        _ = pyro_lift.SGLDGibb
    assert set(pyro_lift.__all__) <= set(dir(pyro_lift))
    for name in pyro_lift.__all__:
        assert getattr(pyro_lift, name) is not None
