"""Draw the floors of the package from its import graph: ``make map`` writes docs/figures/architecture.svg.

An arrow says "imports". Arrows that others imply are left out: where bench imports lift and lift imports prior, that
bench imports prior too is not drawn. What may import what is the law in tests/import_graph.py.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from import_graph import LAW, ROOT_MODULE, floor_of, import_graph  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "architecture.svg"
#: Words under each floor's name.
CONTENTS = {
    "cli": "the command line",
    "bench": "demo, comparisons, speed",
    "comparison": "does meta-learning pay?",
    "commands": "train, adapt, predict",
    "methods": "registry of all methods",
    "lift": "meta-training",
    "before_chain": "what is found before it",
    "tuning": "settings by held-out tasks",
    "prior": "mixture over phi",
    "new_tasks": "adaptation under the prior",
    "posterior": "draws of one task",
    "adapter_library": "a prior from LoRAs",
    "defaults": "what is left open, filled in",
    "saving": "folders, PEFT, model cards",
    "diagnostics": "ArviZ",
    "metrics": "scores",
    "generation": "text: decoding, scores",
    "wiring": "from a TOML file to objects",
    "config": "TOML files",
    "settings": "LiFTSettings, AdaptSettings",
    "data": "strings, images, benchmarks",
    "inference": "SGLD-Gibbs, mixture, adaptation",
    "inference.baselines": "MAML, ProtoNet, ...",
    "models": "tasks, adapters, Pyro programs",
    "watching": "callbacks, trackers",
    "support": "options, archives, processes",
}
COLOURS = {"inference": "#CFE3F1", "models": "#D9EAD3", "data": "#FCE8D0", "support": "#EEEEEE"}


def floor_graph() -> dict[str, set[str]]:
    """Return the floors that each floor imports."""
    floors: dict[str, set[str]] = {floor: set() for floor in LAW}
    for module, targets in import_graph().items():
        if module != ROOT_MODULE:
            floors[floor_of(module)] |= {floor_of(target) for target in targets - {ROOT_MODULE}}
    return {floor: targets - {floor} for floor, targets in floors.items()}


def reduced(floors: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out every arrow that a longer way implies."""

    def below(floor: str) -> set[str]:
        return floors[floor].union(*(below(target) for target in floors[floor]))

    implied = {floor: set().union(*(below(target) for target in targets)) for floor, targets in floors.items()}
    return {floor: targets - implied[floor] for floor, targets in floors.items()}


def levels(floors: dict[str, set[str]]) -> dict[str, int]:
    """Return how high each floor stands: one above the highest that it imports."""

    def level(floor: str) -> int:
        return 1 + max((level(target) for target in floors[floor]), default=-1)

    return {floor: level(floor) for floor in floors}


def routed(floors: dict[str, set[str]]) -> dict[tuple[str, ...], list[str]]:
    """Return each arrow, from floor to floor, as the way between: a place on every level that it passes."""
    height = levels(floors)
    return {
        (floor, target): [
            floor,
            *(f"{floor}>{target}@{k}" for k in range(height[floor] - 1, height[target], -1)),
            target,
        ]
        for floor in floors
        for target in sorted(floors[floor])
    }


def places(floors: dict[str, set[str]], sweeps: int = 40) -> dict[str, tuple[float, float]]:
    """Return the centre of each box and of each place that an arrow passes.

    Layers by height; within one the order is by the mean place of the neighbours, in turn from above and from below
    (Sugiyama et al., 1981), and each stands as near to that mean as its neighbours' widths let it.
    """
    height = levels(floors)
    rows: list[list[str]] = [
        sorted(floor for floor in floors if height[floor] == k) for k in range(max(height.values()) + 1)
    ]
    neighbours: dict[str, list[str]] = {floor: [] for floor in floors}
    for way in routed(floors).values():
        for number, passed in enumerate(way[1:-1], 1):
            rows[height[way[0]] - number].append(passed)
            neighbours[passed] = []
        for upper, lower in itertools.pairwise(way):
            neighbours[upper].append(lower)
            neighbours[lower].append(upper)
    x = {name: float(k) - (len(row) - 1) / 2 for row in rows for k, name in enumerate(row)}
    for sweep in range(sweeps):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = {name: sum(x[n] for n in neighbours[name]) / max(len(neighbours[name]), 1) for name in row}
            ordered = sorted(row, key=lambda name: (wanted[name], name))
            x |= _spread(ordered, wanted)
    return {name: (x[name], float(k)) for k, row in enumerate(rows) for name in row}


def _spread(ordered: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """Place names in this order as near as can be to where they are wanted, by pooling those that would overlap."""
    starts = {ordered[0]: 0.0}
    for left, right in itertools.pairwise(ordered):
        starts[right] = starts[left] + (_room(left) + _room(right)) / 2
    pools: list[list[str]] = []
    shift: list[float] = []
    for name in ordered:
        pools.append([name])
        shift.append(wanted[name] - starts[name])
        while len(pools) > 1 and shift[-2] > shift[-1]:
            pools[-2:] = [pools[-2] + pools[-1]]
            shift[-2:] = [sum(wanted[n] - starts[n] for n in pools[-1]) / len(pools[-1])]
    return {name: starts[name] + by for pool, by in zip(pools, shift, strict=True) for name in pool}


def _room(name: str) -> float:
    return 0.3 if "@" in name else 1.06


def draw_map(path: Path) -> None:
    """Write the figure; its description holds the arrows as JSON, so that a test can tell whether it is current."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Line

    mpl.rcParams["svg.hashsalt"], mpl.rcParams["svg.fonttype"] = "pyro_lift", "none"
    arrows = reduced(floor_graph())
    centre = places(arrows)
    width, height = 0.98, 0.56
    figure = Figure(figsize=(10.0, 9.0))
    axes: Any = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for way in routed(arrows).values():
        points = [centre[name] for name in way]
        lean = [max(-0.3, min(0.3, 0.4 * (points[k + 1][0] - points[k][0]))) for k in (0, -2)]
        points[0] = (points[0][0] + lean[0], points[0][1] - height / 2)
        points[-1] = (points[-1][0] - lean[1], points[-1][1] + height / 2)
        corners, codes = [points[0]], [Line.MOVETO]
        for (x, y), (u, v) in itertools.pairwise(points):
            corners += [(x, y - 0.4 * (y - v)), (u, v + 0.4 * (y - v)), (u, v)]
            codes += [Line.CURVE4] * 3
        line = Line(corners, codes)
        axes.add_patch(FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=9, color="0.45", fill=False))
    box = "round,pad=0,rounding_size=0.06"
    for floor in arrows:
        x, y = centre[floor]
        colour, corner = COLOURS.get(floor.split(".")[0], "white"), (x - width / 2, y - height / 2)
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=box, facecolor=colour, edgecolor="0.3", zorder=3))
        axes.text(x, y + 0.1, floor, ha="center", va="center", fontsize=10, weight="bold", zorder=4)
        axes.text(x, y - 0.13, CONTENTS.get(floor, ""), ha="center", va="center", fontsize=7, zorder=4)
    xs, ys = zip(*centre.values(), strict=True)
    axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.45, max(ys) + 0.45))
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    description = json.dumps({floor: sorted(targets) for floor, targets in sorted(arrows.items())})
    metadata = {"Date": None, "Description": description} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, facecolor="white", dpi=110)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE
    draw_map(target)
    print(f"written: {target}")
