"""The figure of a comparison: differences to LiFT by task, accuracy, and what a task costs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from pyro_lift.comparison.advice import difference
from pyro_lift.comparison.settings import REFERENCE, entrant
from pyro_lift.comparison.summary import Summary
from pyro_lift.support.figures import COLOURS, log_axis, new_figure, save_figure

__all__ = ["plot"]


def plot(summary: Summary, path: Path) -> None:
    """Plot one row a method: its loss over LiFT's with a dot a task, its accuracy or loss, seconds a task."""
    names = list(summary.results)
    against = REFERENCE if REFERENCE in names else names[-1]
    losses, classes = summary.losses, summary.measure == "nll"
    figure, axes = new_figure(1, 3, width=10.5, height=1.6 + 0.42 * len(names), sharey=True)
    for row, name in enumerate(names):
        colour = COLOURS[0] if name == against else COLOURS[1] if not entrant(name).steps else COLOURS[7]
        gaps = [a - b for a, b in zip(losses[name], losses[against], strict=True)]
        if name != against and all(map(math.isfinite, gaps)):
            test = difference(losses[name], losses[against])
            axes[0].plot(gaps, [row + 0.18] * len(gaps), "o", color=colour, alpha=0.35, markersize=4)
            error = 0.0 if math.isnan(test.standard_error) else test.standard_error
            axes[0].errorbar(test.difference, row - 0.1, xerr=error, fmt="D", color=colour, markersize=5, capsize=3)
        key = "accuracy" if classes else "loss"
        values = [result.values[key] for result in summary.results[name]]
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        axes[1].errorbar(statistics.fmean(values), row, xerr=spread, fmt="o", color=colour, capsize=3)
        seconds = statistics.fmean(result.values["adapt_seconds"] for result in summary.results[name])
        axes[2].plot(max(seconds, 1e-3), row, "o", color=colour)
    axes[0].axvline(0.0, color=COLOURS[0], linewidth=1.2)
    loss, unit = ("NLL", " in nats") if classes else ("unexplained variance", "")
    axes[0].set_xlabel(
        f"{loss} over {entrant(against).title}'s{unit}: right is worse\ndots: tasks; mean ± standard error"
    )
    axes[1].set_xlabel("accuracy, ± standard error over tasks" if classes else loss)
    if not classes and summary.chance is not None:
        axes[1].axvline(statistics.fmean(summary.chance), color="0.6", linestyle="--", linewidth=1)
    log_axis(axes[2])
    axes[2].set_xlabel("seconds of adaptation a task")
    axes[0].set_yticks(range(len(names)), [entrant(name).title for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for axis in axes:
        axis.grid(axis="x", linewidth=0.3)
    save_figure(figure, path)
