"""Names that are a folder here or a repository of the hub: which of the two they can be, and what to say of neither."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["check_findable", "not_found", "reason_of"]

#: A repository: ``name`` or ``user/name``, which begin with a letter, a digit or an underscore.
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_findable(name: str | Path) -> None:
    """Refuse a name that is no folder here and that the hub cannot have either, without asking it.

    Args:
        name: of a folder or a repository; timm's may have a source before a colon (``hf-hub:user/name``).

    Raises:
        FileNotFoundError: names the folder that was looked in.
    """
    path = Path(name)
    if path.is_file():
        raise FileNotFoundError(f"{name}: is a file; give the folder of a model, or its name on the hub.")
    if not path.is_dir() and ":" not in str(name) and not REPOSITORY.fullmatch(str(name)):
        raise FileNotFoundError(f"{name}: no such folder{_looked_in(path)}, and not a name of the hub ('user/name').")


def not_found(name: str | Path, error: BaseException) -> str:
    """Say that there is no folder of a name here, and that the hub was asked for it without success.

    Args:
        name: of a folder or a repository.
        error: what asking the hub ended with.
    """
    return (
        f"{name}: no such folder{_looked_in(Path(name))}, and the hub gave nothing of that name ({reason_of(error)}). "
        "Is the folder's path right, or the name on the hub, and can the hub be reached?"
    )


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, not too long, without the stop at its end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .")


def _looked_in(path: Path) -> str:
    return "" if path.is_absolute() else f" in {Path.cwd()}"
