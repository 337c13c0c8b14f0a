"""Where a folder may be written: over an older one of its kind, and over nothing else that is worth something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pyro_lift.saving.names import CONFIG, POSTERIOR, PRIOR

__all__ = ["check_destination"]

WEIGHTS = {"prior": PRIOR, "posterior": POSTERIOR}


def check_destination(folder: Path, kind: Literal["prior", "posterior"]) -> None:
    """Refuse a folder that holds something else, which would be overwritten.

    Args:
        folder: to be written; nothing need be there.
        kind: of what will be written. An older one of the same kind is replaced.

    Raises:
        FileExistsError: a file of that name, a folder of the other kind, or another model's.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the name of a folder.")
    if not (folder / CONFIG).exists():
        return
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        found = None
    made = str(found.get("format", "")) if isinstance(found, dict) else ""
    if made == f"pyro_lift.{kind}" or (found is None and (folder / WEIGHTS[kind]).exists()):
        return
    holds = f"a {made.removeprefix('pyro_lift.')}" if made.startswith("pyro_lift.") else "another model"
    raise FileExistsError(f"{folder} holds {holds}, which the {kind} would overwrite. Give another folder.")
