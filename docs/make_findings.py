"""Draw the figures of docs/findings.md from the numbers in docs/findings.json.

    python docs/make_findings.py

What measured the numbers stands beside each finding. ``pyro-lift demo --labels`` writes labels.json; given to this
script (``--labels demo-output/labels.json``) it replaces the last figure's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pyro_lift.support.figures import COLOURS, log_axis, new_figure, save_figure

HERE = Path(__file__).resolve().parent


def draw(numbers: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every finding's figure; returns the files."""
    figures = {
        "probe": _probe,
        "translation": _translation,
        "one knob": _one_knob,
        "components": _components,
        "harm": _harm,
        "cold": _cold,
        "labels": _labels,
    }
    paths = []
    for name, make in figures.items():
        path = folder / f"finding-{name.replace(' ', '-')}.png"
        save_figure(make(numbers[name]), path)
        paths.append(path)
    return paths


def _probe(n: dict[str, Any]) -> Any:
    figure, axes = new_figure(1, len(n["families"]), width=9.0, height=2.6)
    for k, (axis, family) in enumerate(zip(axes, n["families"], strict=True)):
        values = [of[k] for of in n["methods"].values()]
        axis.plot(values, range(len(values)), "o", color=COLOURS[7])
        axis.plot(values[0], 0, "o", color=COLOURS[1])
        axis.plot(values[-1], len(values) - 1, "o", color=COLOURS[0])
        axis.set(title=family, xlabel="NLL, nats")
        axis.set_ylim(len(values) - 0.5, -0.5)
        axis.set_yticks(range(len(values)), list(n["methods"]) if k == 0 else [""] * len(values))
        axis.grid(axis="y", linewidth=0.3)
    return figure


def _translation(n: dict[str, Any]) -> Any:
    figure, axes = new_figure(1, 2, width=8.0, height=3.0)
    for axis, (case, visits) in zip(axes, n["visits"].items(), strict=True):
        for colour, name in zip((7, 1, 0), ("exact draw alone", "falling step", "control variates"), strict=True):
            axis.loglog(visits, n[name][case], "o-", color=COLOURS[colour], label=name)
        axis.set(title=case, xlabel="visits")
        log_axis(axis)
    axes[0].set_ylabel("KL from the exact posterior, nats")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _one_knob(n: dict[str, Any]) -> Any:
    figure, axis = new_figure(width=5.4, height=3.2)
    width = np.array(n["beta"]) * np.sqrt(np.array(n["power"]))
    for beta, colour in ((0.03, 0), (0.01, 1)):
        chosen = np.isclose(n["beta"], beta)
        axis.semilogx(width[chosen], np.array(n["nll"])[chosen], "o", color=COLOURS[colour], label=f"beta {beta}")
    axis.axhline(n["phi itself"], color="0.6", linewidth=1, label="phi itself, not adapted")
    axis.axhline(n["point estimate"], color="0.6", linewidth=1, linestyle="--", label="a point estimate")
    axis.set(xlabel="beta x root of the power", ylabel="NLL of two unseen tasks, nats")
    log_axis(axis)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _components(n: dict[str, Any]) -> Any:
    figure, axis = new_figure(width=4.6, height=3.0)
    axis.errorbar(n["K"], n["nll"], yerr=n["standard error"], fmt="o", capsize=3, color=COLOURS[0], label="LiFT")
    axis.axhline(n["Union Train"], color=COLOURS[7], label="Union Train")
    axis.set_xticks(n["K"])
    axis.set(xlabel="K, components of the mixture over phi", ylabel="NLL, nats")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.1, 0.75))
    return figure


def _harm(n: dict[str, Any]) -> Any:
    figure, axis = new_figure(width=5.4, height=3.2)
    for colour, part in zip((1, 4), ("development", "test"), strict=True):
        values = n[f"joint training, {part} tasks"]
        axis.plot(n["gradients"], values, "o-", color=COLOURS[colour], label=f"joint training, {part} tasks")
    for colour, value, part in zip((0, 5), n["hierarchical at 1000"], ("development", "test"), strict=True):
        axis.plot(n["gradients"][-1], value, "s", color=COLOURS[colour], label=f"hierarchical, {part} tasks")
    axis.set(xlabel="gradients of meta-training", ylabel="NLL of unseen tasks before\nany adaptation, nats")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _cold(n: dict[str, Any]) -> Any:
    figure, axis = new_figure(width=4.6, height=3.0)
    for colour, labels in ((0, 10), (1, 25)):
        pairs = [(t, v) for t, v in zip(n["temperature"], n[f"nll, {labels} labels"], strict=True) if v is not None]
        axis.semilogx(*zip(*pairs, strict=True), "o-", color=COLOURS[colour], label=f"{labels} labels a task")
    axis.set(xlabel="temperature", ylabel="NLL on digits, nats")
    log_axis(axis)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _labels(n: dict[str, Any]) -> Any:
    figure, axis = new_figure(width=4.6, height=3.0)
    error = 2.0 * np.array(n["standard error"])
    axis.errorbar(n["labels"], n["lead"], yerr=error, fmt="o-", capsize=3, color=COLOURS[0])
    axis.axhline(0.0, color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(n["labels"], [str(count) for count in n["labels"]])
    axis.minorticks_off()
    axis.set(xlabel="labelled images of each task to learn from", ylabel="NLL: Union Train minus LiFT")
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "figures")
    parser.add_argument("--labels", type=Path, help="labels.json of `pyro-lift demo --labels`")
    given = parser.parse_args()
    numbers = json.loads((HERE / "findings.json").read_text("utf-8"))
    if given.labels is not None:
        from pyro_lift.bench.demo_labels import leads

        found = leads(json.loads(given.labels.read_text("utf-8")), "nll")
        numbers["labels"] = {
            "labels": [lead.labels for lead in found],
            "lead": [lead.test.difference for lead in found],
            "standard error": [lead.test.standard_error for lead in found],
        }
    for path in draw(numbers, given.out):
        print(path.name)


if __name__ == "__main__":
    main()
