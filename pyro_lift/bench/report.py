"""The table of a comparison of methods, and the figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lift.bench.figures import COLOURS, new_figure, save_figure
from pyro_lift.bench.records import Record, format_table
from pyro_lift.metrics.probabilities import expected_calibration_error, reliability
from pyro_lift.metrics.significance import paired_test

if TYPE_CHECKING:
    from pyro_lift.data.digits import DigitFamily
    from pyro_lift.metrics.task import Judged

__all__ = [
    "by_task",
    "comparison",
    "plot_by_task",
    "plot_mixture",
    "plot_reliability",
    "plot_scores",
    "plot_tasks",
    "plot_traces",
]

MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


def comparison(
    records: Sequence[Record], methods: Sequence[str], reference: str, measures: Mapping[str, str] = MEASURES
) -> str:
    """Format each method's mean ± standard deviation over seeds, and the paired p-values of its gap to ``reference``.

    The standard deviation is that of the seeds' means over tasks; the test is Student's, paired over seeds and tasks.

    Args:
        records: with ``method``, ``seed``, ``task`` and the measures.
        methods: a row each.
        reference: what the others are tested against.
        measures: keys of the records, and what they are called.
    """
    header = ["method", *(f"{name}" for name in measures.values()), *(f"p ({name})" for name in measures.values())]
    base = {key: _paired(records, reference, key) for key in measures}
    rows = []
    for method in methods:
        cells: list[str] = []
        for key in measures:
            by_seed = _seed_means(records, method, key)
            spread = f" ± {np.std(by_seed, ddof=1):.3f}" if len(by_seed) > 1 else ""
            cells.append(f"{np.mean(by_seed):.3f}{spread}")
        for key in measures:
            values = _paired(records, method, key)
            alone = method == reference or len(values) < 2
            cells.append("" if alone else f"{paired_test(values, base[key]).p_value:.1e}")
        rows.append([method, *cells])
    seeds, tasks = {r["seed"] for r in records}, {r["task"] for r in records}
    spread = "mean ± sd over seeds" if len(seeds) > 1 else "means over tasks"
    times = f"{len(seeds)} seed{'s' * (len(seeds) > 1)} x {len(tasks)} unseen task{'s' * (len(tasks) > 1)}"
    note = f"{times}; {spread}; p: paired t-test against {reference}."
    return f"{format_table(header, rows)}\n{note}"


def _paired(records: Sequence[Record], method: str, key: str) -> list[float]:
    """Return a method's values in one order for all methods."""
    values = {(r["seed"], r["task"]): float(r[key]) for r in records if r["method"] == method}
    return [values[pair] for pair in sorted(values)]


def _seed_means(records: Sequence[Record], method: str, key: str) -> list[float]:
    of_method = [r for r in records if r["method"] == method]
    seeds = sorted({r["seed"] for r in of_method})
    return [float(np.mean([r[key] for r in of_method if r["seed"] == seed])) for seed in seeds]


def by_task(records: Sequence[Record], methods: Sequence[str], key: str, digits: int = 3) -> str:
    """Format one measure, a row a task and a column a method, means over seeds."""
    tasks = list(dict.fromkeys(str(r["task"]) for r in records))
    rows = [[task, *(f"{_task_mean(records, m, task, key):.{digits}f}" for m in methods)] for task in tasks]
    return format_table([key, *methods], rows)


def _task_mean(records: Sequence[Record], method: str, task: str, key: str) -> float:
    return float(np.mean([r[key] for r in records if r["method"] == method and r["task"] == task]))


def plot_by_task(
    records: Sequence[Record], methods: Sequence[str], path: Path, measures: Mapping[str, str] = MEASURES
) -> None:
    """Plot each measure, a row a task and the mean of all below: a dot a method, means over seeds."""
    tasks = list(dict.fromkeys(str(r["task"]) for r in records))
    figure, axes = new_figure(
        1, len(measures), width=2.2 + 2.6 * len(measures), height=1.5 + 0.26 * len(tasks), sharey=True
    )
    axes = np.atleast_1d(axes)
    for ax, (key, name) in zip(axes, measures.items(), strict=True):
        for k, method in enumerate(methods):
            values = [_task_mean(records, method, task, key) for task in tasks]
            shown, places = [*values, float(np.mean(values))], [*range(len(tasks)), len(tasks) + 0.5]
            colour = COLOURS[len(methods) - 1 - k]  # our own method stands last, and has the first colour
            ax.plot(shown, places, "o", color=colour, alpha=0.8, markersize=5.5, label=method)
        ax.axhline(len(tasks) - 0.25, color="0.6", linewidth=0.8)
        ax.set(xlabel=name)
        ax.grid(axis="y", linewidth=0.3)
        ax.set_ylim(len(tasks) + 1.0, -0.6)
    axes[0].set_yticks([*range(len(tasks)), len(tasks) + 0.5], [*tasks, "mean"], fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(methods), loc="outside upper center")
    save_figure(figure, path)


def plot_scores(records: Sequence[Record], methods: Sequence[str], path: Path) -> None:
    """Plot each measure by method: a dot a seed, a bar at the mean."""
    figure, axes = new_figure(1, len(MEASURES), width=9.0, height=2.8, sharey=True)
    for ax, (key, name) in zip(axes, MEASURES.items(), strict=True):
        for row, method in enumerate(methods):
            values = _seed_means(records, method, key)
            colour = COLOURS[row]
            ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            ax.plot([np.mean(values)] * 2, [row - 0.25, row + 0.25], color=colour, linewidth=2.5)
        ax.set(title=f"{name} ({'higher' if key == 'accuracy' else 'lower'} is better)", xlabel=name)
        ax.set_ylim(len(methods) - 0.5, -0.5)
    axes[0].set_yticks(range(len(methods)), methods)
    save_figure(figure, path)


def plot_reliability(predictions: Sequence[Judged], methods: Sequence[str], path: Path) -> None:
    """Plot the share of right answers against confidence; all tasks and seeds of a method together."""
    figure, axes = new_figure(1, len(methods), width=2.7 * len(methods), height=3.6, sharey=True)
    for k, (ax, method) in enumerate(zip(axes, methods, strict=True)):
        of_method = [judged for judged in predictions if judged.method == method]
        p, y = (torch.cat([getattr(judged, name) for judged in of_method]) for name in ("probabilities", "target"))
        cases, confidence, right = reliability(p, y, bins=10)
        filled = cases > 0
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        size = 8.0 + 160.0 * cases[filled] / cases.sum()
        ax.scatter(confidence[filled], right[filled], s=size, color=COLOURS[k], zorder=3)
        ax.plot(confidence[filled], right[filled], color=COLOURS[k], linewidth=1)
        ax.set(title=f"{method}\nECE {expected_calibration_error(p, y):.3f}", xlabel="confidence", aspect="equal")
        ax.set(xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("share right")
    save_figure(figure, path)


def plot_tasks(family: DigitFamily, path: Path, tasks: int = 6, images: int = 10) -> None:
    """Show the first labelled images of some tasks, a row each."""
    shown = [*family.train[: tasks // 2], *family.test[: tasks - tasks // 2]]
    figure, axes = new_figure(len(shown), images, width=8.0, height=0.95 * len(shown))
    for row, task in zip(axes, shown, strict=True):
        pictures, labels = task.train.positional[0], task.train.target
        for k, ax in enumerate(row):
            ax.imshow(pictures[k, 0], cmap="gray", vmin=-0.2, vmax=1.2)
            ax.set_title(str(int(labels[k])), fontsize=8, pad=2)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(task.name, fontsize=8, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def plot_mixture(report: Mapping[str, Any], path: Path) -> None:
    """Plot the components' shares of the draws, and the distances between them."""
    figure, (left, right) = new_figure(1, 2, width=7.2, height=3.2)
    counts, separation = np.array(report["n"]), np.array(report["separation"])
    names = [str(j + 1) for j in range(len(counts))]
    left.bar(names, counts / counts.sum(), color=COLOURS[0], width=0.6)
    left.set(xlabel="component", ylabel="weight", title=f"mixture over φ, {report['seen']} draws")
    image = right.imshow(separation, cmap="viridis", vmin=0.0)
    right.set(xticks=range(len(names)), yticks=range(len(names)), title="distance of means, in typical radii")
    right.set_xticklabels(names)
    right.set_yticklabels(names)
    for i, j in np.ndindex(separation.shape):
        bright = separation[i, j] < 0.6 * separation.max()
        right.text(j, i, f"{separation[i, j]:.2f}", ha="center", va="center", color="white" if bright else "black")
    right.spines[:].set_visible(False)
    figure.colorbar(image, ax=right, shrink=0.8)
    save_figure(figure, path)


def plot_traces(data: Any, path: Path, coordinates: int = 3) -> None:
    """Plot projections of phi, norms of its modules, and the tasks' log likelihood along the chain."""
    posterior, stats = data["posterior"], data["sample_stats"]
    projection, norm = posterior["phi_projection"].values[0], posterior["phi_norm"].values[0]
    names = [str(name) for name in posterior["phi_module"].values]
    figure, axes = new_figure(3, 1, width=7.2, height=6.0, sharex=True)
    for k in range(min(coordinates, projection.shape[-1])):
        axes[0].plot(projection[:, k], linewidth=0.9, label=f"projection {k + 1}")
    axes[0].set(ylabel="projection of φ", title="the chain over φ, after warm-up and burn-in")
    for k in np.argsort(-norm.mean(0))[:coordinates]:
        axes[1].plot(norm[:, k], linewidth=0.9, label=names[k].removeprefix("base_model.model."))
    axes[1].set_ylabel("norm of a module's φ")
    axes[2].plot(stats["visit_log_likelihood"].values[0], linewidth=0.7)
    axes[2].set(ylabel="log likelihood of the\nvisited task", xlabel="draw")
    for ax in axes[:2]:
        ax.legend(frameon=False, fontsize=8, ncols=coordinates, loc="upper center", bbox_to_anchor=(0.5, 1.0))
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.25 * (high - low))
    save_figure(figure, path)
