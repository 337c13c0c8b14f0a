"""Whether the run that is to go on has finished already: one command serves for every start of a job."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pyro_lift.saving.names import CHOICE, CONFIG, PRIOR, RUN
from pyro_lift.support import distributed
from pyro_lift.support.archive import read_json

__all__ = ["is_finished"]


def is_finished(path: Path, folder: Path, *, tuned: bool = False) -> bool:
    """Tell whether a folder holds the finished prior of a TOML file, and say so on the screen.

    Args:
        path: the TOML file. What it says of the log does not count, nor do comments.
        folder: that it names for its prior.
        tuned: whether the run is one of ``tune``, which chooses settings, or of ``train``.
    """
    if not all((folder / name).is_file() for name in (RUN, PRIOR, CONFIG)):
        return False
    if (folder / "checkpoints").is_dir() or (folder / CHOICE).exists():  # a run beside an earlier prior, to go on with
        return False
    if _told(folder / RUN) != _told(path) or (read_json(folder / CONFIG).get("tuning") is not None) != tuned:
        return False
    if distributed.is_first():
        print(f"finished already: {folder} holds the prior of {path}; nothing to do. --overwrite trains anew.")
    return True


def _told(path: Path) -> dict[str, Any] | None:
    """Return what a file says of a run; None where it cannot be read."""
    try:
        told = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError):
        return None
    return {name: value for name, value in told.items() if name != "log"}
