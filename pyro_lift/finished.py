"""Whether the run that is to go on has finished already: one command serves for every start of a job."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pyro_lift.commands import CHOICE, CONFIG, PRIOR
from pyro_lift.config import read_config
from pyro_lift.saving.folders import CONFIG as ABOUT
from pyro_lift.support import distributed
from pyro_lift.support.archive import read_json

__all__ = ["is_finished"]


def is_finished(path: Path, *, tuned: bool = False) -> bool:
    """Tell whether the folder of a TOML file holds the finished prior of that very file, and say so on the screen.

    Args:
        path: the TOML file. What it says of the log does not count, nor do comments.
        tuned: whether the run is one of ``tune``, which chooses settings, or of ``train``.

    Raises:
        ValueError: anything wrong with the file.
    """
    folder = Path(read_config(path).output.folder)
    if not all((folder / name).is_file() for name in (CONFIG, PRIOR, ABOUT)):
        return False
    if (folder / "checkpoints").is_dir() or (folder / CHOICE).exists():  # a run beside an earlier prior, to go on with
        return False
    if _told(folder / CONFIG) != _told(path) or (read_json(folder / ABOUT).get("tuning") is not None) != tuned:
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
