"""The import graph of the package, read from its source, imports inside functions too; and the law it is held to."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "pyro_lift.models": ROOT / "models",
    "pyro_lift.inference": ROOT / "inference",
    "pyro_lift": ROOT / "pyro_lift",
}

#: Floors from the ground up. A module belongs to the longest name that it starts with.
LAW: dict[str, set[str]] = {
    "support": set(),
    "watching": {"support"},
    "models": {"support"},
    "data": {"models", "support"},
    "inference": {"models", "support", "watching"},
    "inference.baselines": {"inference", "models", "support", "watching"},
    "settings": {"support"},
    "defaults": {"models", "settings", "support"},
    "saving": {"data", "inference", "models", "settings", "support"},
    "diagnostics": {"inference", "models", "settings", "support"},
    "metrics": {"data", "models", "support"},
    "generation": {"data", "metrics", "models", "support"},
    "posterior": {"watching", "generation", "data", "metrics", "saving", "inference", "models", "settings", "support"},
    "tuning": {
        "watching",
        "generation",
        "inference",
        "inference.baselines",
        "metrics",
        "data",
        "models",
        "settings",
        "support",
    },
    "config": {"watching", "data", "models", "settings", "support"},
    "wiring": {"watching", "config", "data", "models", "settings", "support"},
}
LAW["adapter_library"] = LAW["posterior"] | {"defaults", "posterior"}
LAW["new_tasks"] = LAW["posterior"] | LAW["tuning"] | {"defaults", "posterior", "tuning"}
LAW["prior"] = LAW["adapter_library"] | LAW["new_tasks"] | {"adapter_library", "new_tasks"}
LAW["before_chain"] = LAW["prior"] | {"prior"}
LAW["lift"] = LAW["before_chain"] | {"before_chain"}
LAW["methods"] = LAW["lift"] | {"lift", "inference.baselines"}
LAW["commands"] = LAW["lift"] | LAW["wiring"] | LAW["metrics"] | {"lift", "wiring", "metrics"}
LAW["bench"] = set(LAW) - {"commands"}
LAW["comparison"] = LAW["bench"] | {"bench"}
LAW["commands"] |= {"comparison"}
LAW["cli"] = set(LAW)
#: The package itself: names that are imported when they are first used, and the version.
ROOT_MODULE = "pyro_lift"


def floor_of(module: str) -> str:
    """The floor that a module stands on."""
    name = module.removeprefix("pyro_lift.")
    floors = [floor for floor in LAW if name == floor or name.startswith(f"{floor}.")]
    assert floors, f"{module} stands on no floor: give it one in LAW"
    return max(floors, key=len)


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
