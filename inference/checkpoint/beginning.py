"""What is said where a run is to be gone on with and none is saved: it begins, or the folder was misspelt."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from pyro_lift.inference.checkpoint.folder import checkpoints_in

__all__ = ["check_folder", "say_beginning"]

log = logging.getLogger("pyro_lift")


def check_folder(folder: Path) -> None:
    """Refuse what cannot be the folder of a run: a file, what lies below one, or one of a run's checkpoints.

    Raises:
        ValueError: with the folder that is meant.
    """
    for place in (folder, *folder.parents):
        if not place.is_dir() and (place.exists() or place.is_symlink()):
            kind = "a file" if place.exists() else "a link to nowhere"
            below = "" if place == folder else f" {folder} cannot lie below it: give another."
            raise ValueError(f"{place}: is {kind}, and a run is saved in a folder.{below}")
    if folder.name.startswith("step-") and (folder / "state.json").is_file():
        raise ValueError(f"{folder}: is one checkpoint of a run. Give the folder that it stands in: {folder.parent}.")


def say_beginning(folder: Path) -> None:
    """Log that no run is saved in a folder and that one begins; warn where it looks misspelt, and name what is near.

    Args:
        folder: without checkpoints. What else it holds is of a run that had not come to its first one.
    """
    if any(folder.glob("*/work.json")):
        log.info("%s: the run in it had not come to its chain; what it did before is taken where it holds.", folder)
        return
    begins = f"{folder}: no run is saved in it; one begins, and is saved there"
    inner = folder / "checkpoints"  # where a command keeps a run, inside the folder of its prior
    begun = folder.is_dir() and any(folder.iterdir())
    near = [inner] if checkpoints_in(inner) else [] if begun else _near(folder)
    if not near:
        log.info("%s.", begins)
        return
    closest = difflib.get_close_matches(str(folder), [str(path) for path in near], n=1, cutoff=0.0)
    others = f" ({len(near)} runs are saved near it)" if len(near) > 1 else ""
    log.warning("%s. Did you mean %s, which holds a run%s?", begins, closest[0], others)


def _near(folder: Path) -> list[Path]:
    """Folders with a run that differ from this one in their last name, or in the one before it."""
    place = folder.absolute()
    around = [*_folders(place.parent), *(other / place.name for other in _folders(place.parent.parent))]
    shown = [path if folder.is_absolute() else _as_given(path) for path in around if path != place]
    return [path for path in shown if checkpoints_in(path)]


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:  # there is none, or it is not ours to read
        return []


def _as_given(path: Path) -> Path:
    """The path relative to where we are, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
