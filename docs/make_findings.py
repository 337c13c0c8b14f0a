"""Draw the figures of docs/findings.md from the numbers in docs/findings.json.

    python docs/make_findings.py

What measured the numbers stands beside each finding. ``pyro-lift demo --labels`` writes labels.json; given to this
script (``--labels demo-output/labels.json``) it replaces the last figure's. A folder of ``pyro-lift bench paper``
(``--records docs/results/paper``) replaces those of the probe and of K, in docs/findings.json too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pyro_lift.bench.page.evidence import Evidence, read_evidence
from pyro_lift.bench.page.findings import cases
from pyro_lift.bench.paper.families import FAMILIES
from pyro_lift.bench.paper.tables import Column
from pyro_lift.metrics.significance import paired_test
from pyro_lift.support.figures import COLOURS, log_axis, new_figure, save_figure

HERE = Path(__file__).resolve().parent
#: Differences in nats that the figure of K reaches to.
SHOWN = 0.1
#: Half of what an axis of losses spans at least, in nats: less is no difference.
LEAST_SPAN = 0.05


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
        for row, value in enumerate(values):
            colour = {0: COLOURS[1], len(values) - 1: COLOURS[0]}.get(row, COLOURS[7])
            if value is not None:  # not run yet
                axis.plot(value, row, "o", color=colour)
        axis.set(title=family, xlabel="NLL, nats")
        middle = 0.5 * sum(axis.get_xlim())
        half = max(0.5 * (axis.get_xlim()[1] - axis.get_xlim()[0]), LEAST_SPAN)
        axis.set_xlim(middle - half, middle + half)
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
    figure, axis = new_figure(width=6.4, height=0.9 + 0.3 * len(n["families"]))
    names = list(n["families"])
    for offset, colour, place in ((-0.13, 0, "smaller"), (0.13, 1, "larger")):
        label = f"the {place} K of the table"
        for row, name in enumerate(names):
            of = n["families"][name][place]
            if abs(of["difference"]) + 2.0 * of["standard error"] < SHOWN:
                at = (of["difference"], row + offset)
                axis.errorbar(*at, xerr=2.0 * of["standard error"], fmt="o", color=COLOURS[colour], label=label)
            else:  # its bar would leave the axis: a task that ran away would make points of all the others
                words = f"{of['difference']:+.2f} ± {of['standard error']:.2f}"
                axis.text((0.5 * colour - 0.95) * SHOWN, row, words, color=COLOURS[colour], fontsize=8, va="center")
            label = ""
    axis.axvline(0.0, color="0.6", linewidth=1)
    axis.set_xlim(-SHOWN, SHOWN)
    axis.set_xticks([-SHOWN, -0.5 * SHOWN, 0.0, 0.5 * SHOWN, SHOWN])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="NLL minus that of K = 1, nats (bars: two s.e.)")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
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


# ------------------------------------------------------------------------------------------------ numbers from records

#: Splits of the first figure, and its rows.
PROBED = {
    "CrossFit CLS-45": ("crossfit", "CLS-45"),
    "pictures, structured": ("vtab", "structured"),
    "digits, 10 labels": ("digits", "10 labels"),
    "digits, 25 labels": ("digits", "25 labels"),
}
ROWS = {
    "probe on frozen features": "linear-probe",
    "No Meta Train": "no-meta-train",
    "Union Train": "union-train",
    "LiFT": "lift",
}


def probe_numbers(evidence: Evidence) -> dict[str, Any]:
    """Return the first figure's numbers: mean NLL, of the splits on which the probe and LiFT were run."""
    found = {
        name: [evidence.summary(Column(split, family, split), row, "nll") for row in ROWS.values()]
        for name, (family, split) in PROBED.items()
    }
    kept = {name: of for name, of in found.items() if of[0] and of[-1]}
    means = [[None if s is None else round(s.mean, 3) for s in of] for of in kept.values()]
    return {"families": list(kept), "methods": {row: [of[k] for of in means] for k, row in enumerate(ROWS)}}


def components_numbers(evidence: Evidence) -> dict[str, Any]:
    """Return what two numbers of components differ from one by, in NLL, paired over the tasks of every split."""
    families: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        for split in family.splits:
            column = Column(split, name, split)
            losses = [cases(evidence, column, row, "nll") for row in family.orders]
            if len(losses) < 3 or len(losses[0]) < 4 or not all(losses):  # run with one number of components alone
                continue
            tests = [paired_test(list(of.values()), [losses[0][case] for case in of]) for of in losses[1:]]
            places = dict(zip(("smaller", "larger"), tests, strict=True))
            families[f"{name} {split}"] = {
                place: {"difference": round(t.difference, 4), "standard error": round(t.standard_error, 4)}
                for place, t in places.items()
            }
    return {"families": families}


def _written(numbers: dict[str, Any]) -> str:
    """Format the numbers, an entry of a finding on each line."""
    parts = []
    for name, finding in numbers.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in finding.items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "figures")
    parser.add_argument("--labels", type=Path, help="labels.json of `pyro-lift demo --labels`")
    parser.add_argument("--records", type=Path, help="folder of `pyro-lift bench paper`")
    given = parser.parse_args()
    numbers = json.loads((HERE / "findings.json").read_text("utf-8"))
    if given.records is not None:
        evidence = read_evidence(given.records)
        numbers |= {"probe": probe_numbers(evidence), "components": components_numbers(evidence)}
        (HERE / "findings.json").write_text(_written(numbers), encoding="utf-8")
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
