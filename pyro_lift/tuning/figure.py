"""The figure of a tuning: the loss of every candidate on held-out tasks, rung by rung."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.support.figures import COLOURS, new_figure, save_figure

__all__ = ["plot_tuning"]


def plot_tuning(tuning: Mapping[str, Any], path: Path) -> None:
    """Plot one line a candidate over the rungs that it reached, the chosen one in colour.

    Args:
        tuning: as :meth:`~pyro_lift.tuning.search.Tuning.to_dict` tells.
        path: of the PNG.
    """
    figure, axis = new_figure(width=6.4, height=3.6)
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for trial in tuning["trials"]:
        if trial["loss"] < 1e6:
            by_name.setdefault(trial["settings"], []).append(trial)
    chosen = tuning["chosen"]
    for name, trials in sorted(by_name.items(), key=lambda pair: pair[0] == chosen):
        colour, width, alpha = (COLOURS[0], 2.0, 1.0) if name == chosen else (COLOURS[7], 0.8, 0.6)
        rungs, losses = [trial["rung"] for trial in trials], [trial["loss"] for trial in trials]
        axis.plot(rungs, losses, "o-", color=colour, linewidth=width, markersize=4, alpha=alpha)
    shares = {trial["rung"]: trial["share"] for trial in tuning["trials"]}
    axis.set_xticks(sorted(shares), [f"{rung + 1}\n({100 * shares[rung]:.0f} %)" for rung in sorted(shares)])
    axis.set_xlabel("rung (fraction of the whole length); each is judged by other held-out tasks")
    axis.set_ylabel(f"{tuning['measure']} on held-out tasks")
    axis.set_title(f"chosen: {chosen}", fontsize=9)
    save_figure(figure, path)
