"""The import graph of the package, read from its source: who imports whom, imports inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "pyro_lift.models": ROOT / "models",
    "pyro_lift.inference": ROOT / "inference",
    "pyro_lift": ROOT / "pyro_lift",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "pyro_lift" and parts[0] in ("models", "inference"):
                continue  # links to the two folders at the top
            names[".".join([package, *parts]).removesuffix(".__init__")] = path
    return names


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports, anywhere in its text."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= submodules & set(known)
            if not submodules <= set(known):
                targets.add(node.module)
    return (targets & set(known)) - {name}


def import_graph() -> dict[str, set[str]]:
    """For each module, the modules that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}
