"""The speed benchmark's tables, the line through each curve, and its figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyro_lift.bench.figures import COLOURS, new_figure, save_figure
from pyro_lift.bench.records import Record, format_table

__all__ = [
    "adapt_table",
    "blocks_table",
    "curves_table",
    "em_table",
    "large_table",
    "plot",
    "prefix_table",
    "steps_table",
    "term",
]

#: Parts with a panel of their own in the figure.
PANELS = ("step", "breakdown", "em", "large", "prefix", "adapt")
#: Labels of the axis that a curve is plotted against.
LABELS = {
    "D": "D, adapter weights (N = 10)",
    "N": "N, tasks (D = 100,000)",
    "K": "K, components (D = 1 M)",
    "B": "B, tasks of a pass (16 rows each)",
}


def term(records: Sequence[Record]) -> tuple[float, float]:
    r"""Fit a line :math:`a + b\,x` to a curve in seconds, a and b not negative, by least squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    x = np.array([float(r["at"]) for r in records])
    y = np.array([r["cpu_seconds_per_step"] for r in records])
    a, b = nnls(np.stack([np.ones_like(x), x], 1) / y[:, None], np.ones_like(y))[0]
    return float(a), float(b)


def steps_table(records: Sequence[Record], title: str) -> str:
    """Format the methods on one backbone: seconds, and ratios to the plain step."""
    rows = []
    for record in records:
        if record["part"] == "step":
            rows.append(
                [
                    record["method"],
                    f"{record['seconds_per_step']:.3f}",
                    f"{record['ratio_to_plain']:.3f}",
                    f"{record['cpu_ratio_to_plain']:.3f}",
                    "{:.3f}-{:.3f}".format(*record["cpu_ratio_quartiles"]),
                ]
            )
    return title + "\n" + format_table(["method", "seconds", "ratio", "cpu ratio", "quartiles"], rows)


def _curves_of(records: Sequence[Record], curves: str) -> dict[tuple[str, str], list[Record]]:
    points: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["part"] == "curve" and record["curve"] in curves:
            points.setdefault((record["curve"], record["method"]), []).append(record)
    return points


def curves_table(records: Sequence[Record]) -> str:
    """Format every curve but B's: what was measured, and its line."""
    rows = []
    for (curve, method), points in _curves_of(records, "DNK").items():
        a, b = term(points)
        measured = ", ".join(f"{r['at']:,}: {1e3 * r['cpu_seconds_per_step']:.3g}" for r in points)
        rows.append([curve, method, measured, _term_text(a, b, curve)])
    return "processor time of a step, ms\n" + format_table(["against", "what", "measured", "line"], rows)


def em_table(records: Sequence[Record]) -> str:
    """Format the mixture's update against a copy."""
    rows = []
    for r in (r for r in records if r["part"] == "em"):
        spread = "{:.2f}-{:.2f}".format(*r["share_quartiles"])
        numbers = [f"{1e3 * r['seconds_per_step']:.1f}", f"{r['copy_bytes_per_second'] / 1e9:.1f}"]
        rows.append([r["method"], *numbers, f"{r['share_of_copy_bandwidth']:.2f}", spread])
    about = next(r for r in records if r["part"] == "em")
    head = ["update", "ms", "copy, GB/s", "share of its bandwidth", "quartiles"]
    return f"the mixture, D = {about['dim']:,}, K = {about['components']}\n" + format_table(head, rows)


def blocks_table(records: Sequence[Record]) -> str:
    """Format visits a second against B."""
    rows = []
    for points in _curves_of(records, "B").values():
        for r in points:
            spread = "{:.2f}-{:.2f}".format(*r["cpu_visits_quartiles"])
            numbers = [f"{r['visits_per_second']:.1f}", f"{r['cpu_visits_to_one_by_one']:.2f}", spread]
            rows.append([r["backbone"], str(r["at"]), f"{r['cpu_seconds_per_step']:.3f}", *numbers])
    head = ["backbone", "B", "cpu seconds", "visits a second", "to one by one (cpu)", "quartiles"]
    return "blocks of B tasks in one pass\n" + format_table(head, rows)


def large_table(records: Sequence[Record], name: str) -> str:
    """Format the methods on the largest backbone: seconds and peak memory."""
    rows = []
    for r in records:
        peak = "?" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / 2**30:.2f}"
        seconds = f"{r['seconds_per_step']:.2f}" if "seconds_per_step" in r else "does not fit"
        rows.append([r["method"], seconds, f"{r.get('cpu_seconds_per_step', 0.0):.2f}", peak])
    title = f"{name}, {records[0]['weights'] / 1e6:,.0f} M weights in {records[0]['dtype']}, D = {records[0]['dim']:,}"
    return title + "\n" + format_table(["method", "seconds", "cpu seconds", "peak GiB"], rows)


def prefix_table(records: Sequence[Record]) -> str:
    """Format visits with the layers below the adapter computed once a row, against visits without that."""
    rows = []
    for r in records:
        spread = "{:.2f}-{:.2f}".format(*r["cpu_ratio_quartiles"])
        numbers = [f"{1e3 * r[name]:.1f}" for name in ("cpu_seconds_without", "cpu_seconds_per_visit")]
        of = f"last {r['adapted']} of {r['layers']}"
        rows.append([r["backbone"], of, *numbers, f"{r['cpu_ratio_to_without']:.3f}", spread])
    head = ["backbone", "layers", "visit without, cpu ms", "with", "ratio (cpu)", "quartiles"]
    return "layers below the adapter computed once a row\n" + format_table(head, rows)


def adapt_table(records: Sequence[Record]) -> str:
    """Format the adaptation to new tasks, against plain PEFT + AdamW."""
    rows = []
    for r in records:
        spread = "{:.2f}-{:.2f}".format(*r["cpu_times_quartiles"])
        of = f"{r['adapted']} of {r['layers']}"
        rows.append([r["method"], of, f"{r['cpu_seconds_per_task']:.2f}", f"{r['cpu_times_as_fast']:.2f}", spread])
    first = records[0]
    title = (
        f"{first['tasks']} new tasks of 50 rows, {first['steps']} steps, {first['draws']} draws: {first['backbone']}"
    )
    return title + "\n" + format_table(["method", "layers", "cpu s a task", "times as fast", "quartiles"], rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot ratios by method, where a step's time goes, the curves and the largest backbone, as far as measured."""
    of = {part: [r for r in records if r["part"] == part] for part in PANELS}
    panels: list[Callable[[Any], None]] = []
    if of["step"]:
        panels += [partial(_plot_ratios, of["step"]), partial(_plot_breakdown, of["breakdown"])]
    if of["em"]:
        panels.append(partial(_plot_em, of["em"]))
    for curve in LABELS:
        curves = _curves_of(records, curve)
        if curves:
            panels.append(partial(_plot_curve, list(curves.values()), curve))
    if any(r["part"] == "curve" and r["curve"] == "B" for r in records):
        panels.append(partial(_plot_blocks, list(_curves_of(records, "B").values())))
    if of["large"]:
        panels.append(partial(_plot_large, of["large"]))
    if of["prefix"]:
        panels.append(partial(_plot_prefix, of["prefix"]))
    if of["adapt"]:
        panels.append(partial(_plot_adapt, of["adapt"]))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // max(columns, 1))
    figure, axes = new_figure(rows, columns, width=5.0 * columns, height=3.6 * rows)
    places = list(axes.flat) if len(panels) > 1 else [axes]
    for panel, axis in zip(panels, places, strict=False):
        panel(axis)
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def _plot_ratios(records: Sequence[Record], axis: Any) -> None:
    cells = list(dict.fromkeys((r["backbone"], r["rank"]) for r in records))
    methods = [m for m in dict.fromkeys(r["method"] for r in records) if m not in ("SGD", "MAML")]
    for k, method in enumerate(methods):
        for place, cell in enumerate(cells):
            for r in (r for r in records if (r["backbone"], r["rank"]) == cell and r["method"] == method):
                low, high = r["cpu_ratio_quartiles"]
                x = place + 0.15 * (k - (len(methods) - 1) / 2)
                axis.plot([x, x], [low, high], color=COLOURS[k])
                axis.plot([x], [r["cpu_ratio_to_plain"]], "o", color=COLOURS[k], label=method if place == 0 else None)
    axis.axhline(1.0, color="0.7", zorder=0, linewidth=1)
    axis.set_xticks(range(len(cells)), [f"{name}\nrank {rank}" for name, rank in cells], fontsize=8)
    axis.set_ylabel("step over plain SGD step")
    axis.set_title("Cost of a step (processor time, quartiles)", fontsize=10)
    if cells:
        axis.legend(frameon=False, fontsize=8)


def _plot_breakdown(records: Sequence[Record], axis: Any) -> None:
    labels = [f"{r['backbone']}\nrank {r['rank']}" for r in records]
    left = [0.0] * len(records)
    names = ["mixture", "phi", "theta", "store", "handlers", "rest"]
    for k, name in enumerate(names):
        share = []
        for r in records:
            spent = r["cpu_seconds"]
            share.append(100.0 * spent.get(name, 0.0) / (spent["forward"] + spent["backward"]))
        axis.barh(labels, share, left=left, color=COLOURS[k], label=name)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.set_xlabel("% of the backbone's forward and backward pass")
    axis.set_title("What is beside the backbone (LiFT, K = 5)", fontsize=10)
    axis.tick_params(axis="y", labelsize=8)
    if records:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plot_em(records: Sequence[Record], axis: Any) -> None:
    for k, r in enumerate(records):
        low, high = r["share_quartiles"]
        axis.plot([low, high], [k, k], color=COLOURS[k])
        axis.plot([r["share_of_copy_bandwidth"]], [k], "o", color=COLOURS[k])
    axis.axvline(0.6, color="0.7", linewidth=1)
    axis.set_yticks(range(len(records)), [r["method"] for r in records], fontsize=8)
    axis.set_ylim(-0.5, len(records) - 0.5)
    axis.set_xlim(0.0, None)
    axis.set_xlabel("share of the copy's bandwidth (grey: 0.6)")
    about = f"D = {records[0]['dim']:,}, K = {records[0]['components']}"
    axis.set_title(f"The mixture's update, quartiles\n{about}", fontsize=10)


def _plot_curve(curves: Sequence[Sequence[Record]], curve: str, axis: Any) -> None:
    for k, points in enumerate(curves):
        a, b = term(points)
        x, y = [r["at"] for r in points], [1e3 * r["cpu_seconds_per_step"] for r in points]
        axis.plot(x, y, "o", color=COLOURS[k], label=points[0]["method"])
        low, high = zip(*(r["cpu_seconds_quartiles"] for r in points), strict=True)
        axis.vlines(x, [1e3 * t for t in low], [1e3 * t for t in high], color=COLOURS[k])
        grid = [x[0] * (x[-1] / x[0]) ** (i / 50.0) for i in range(51)]
        axis.plot(
            grid, [1e3 * (a + b * at) for at in grid], color=COLOURS[k], linewidth=1, label=_term_text(a, b, curve)
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    if x[-1] < 100 * x[0]:  # not even two decades, whose own ticks say nothing
        axis.set_xticks(x, [f"{v:,}" for v in x])
        axis.set_xticks([], minor=True)
    axis.set_xlabel(LABELS[curve])
    axis.set_ylabel("ms a step, processor time")
    if curve == "N":  # a flat line between the nearest decades
        middle = 1e3 * curves[0][0]["cpu_seconds_per_step"]
        axis.set_ylim(middle / 10.0, middle * 10.0)
    axis.legend(frameon=False, fontsize=7)


def _term_text(a: float, b: float, curve: str) -> str:
    unit, scale = ("ns", 1e9) if b < 1e-6 else ("ms", 1e3)
    return f"{1e3 * a:.3g} ms + {scale * b:.3g} {unit} × {curve}"


def _plot_blocks(curves: Sequence[Sequence[Record]], axis: Any) -> None:
    for k, points in enumerate(curves):
        x, y = [r["at"] for r in points], [r["cpu_visits_to_one_by_one"] for r in points]
        axis.plot(x, y, "o-", color=COLOURS[k], label=points[0]["backbone"])
        low, high = zip(*(r["cpu_visits_quartiles"] for r in points), strict=True)
        axis.vlines(x, low, high, color=COLOURS[k])
    axis.axhline(1.0, color="0.7", zorder=0, linewidth=1)
    axis.set_xscale("log")
    axis.set_ylim(0.0, None)
    axis.set_xlabel(LABELS["B"])
    axis.set_ylabel("visits a second, to one by one")
    axis.legend(frameon=False, fontsize=8)


def _plot_large(records: Sequence[Record], axis: Any) -> None:
    for k, r in enumerate(records):
        if "seconds_per_step" in r:
            colour = COLOURS[["LiFT", "SGD", "MAML"].index(r["method"])]
            axis.barh([k], [r["seconds_per_step"]], color=colour)
        peak = "" if r.get("peak_bytes") is None else f"  {r['peak_bytes'] / 2**30:.1f} GiB"
        text = peak if "seconds_per_step" in r else "  does not fit"
        axis.text(r.get("seconds_per_step", 0.0), k, text, va="center", fontsize=8)
    axis.set_yticks(range(len(records)), [r["method"] for r in records])
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("seconds a step; peak memory beside it")
    first = records[0]
    axis.set_title(f"{first['backbone']}, {first['weights'] / 1e6:,.0f} M weights, {first['dtype']}", fontsize=10)


def _plot_prefix(records: Sequence[Record], axis: Any) -> None:
    for k, r in enumerate(records):
        low, high = r["cpu_ratio_quartiles"]
        axis.plot([low, high], [k, k], color=COLOURS[k])
        axis.plot([r["cpu_ratio_to_without"]], [k], "o", color=COLOURS[k])
    labels = [f"{r['backbone']}\nlast {r['adapted']} of {r['layers']}" for r in records]
    axis.set_yticks(range(len(records)), labels, fontsize=8)
    axis.set_ylim(-0.5, len(records) - 0.5)
    axis.set_xlim(0.0, 1.1)
    axis.axvline(1.0, color="0.7", zorder=0, linewidth=1)
    axis.set_xlabel("visit over one that computes all layers")
    axis.set_title("Layers below the adapter, once a row", fontsize=10)


def _plot_adapt(records: Sequence[Record], axis: Any) -> None:
    for k, r in enumerate(records):
        axis.barh([k], [r["cpu_times_as_fast"]], color=COLOURS[k % len(COLOURS)])
    labels = [f"{r['method']}\n{r['adapted']} of {r['layers']} layers" for r in records]
    axis.set_yticks(range(len(records)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="0.7", linewidth=1)
    axis.set_xlabel("times as fast as PEFT + AdamW")
    axis.set_title(f"{records[0]['tasks']} new tasks of 50 rows", fontsize=10)
