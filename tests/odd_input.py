"""What a line of the tables of odd input is: what is laid down, what reads it, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Odd", "Refused", "nothing", "text"]


class Refused(NamedTuple):
    """The message that a kind of input is answered with."""

    message: str


class Odd(NamedTuple):
    """One kind of input: what is laid down, what reads it, and what comes of it."""

    lay: Callable[[Path], Any]
    read: Callable[[Any], Any]
    right: Any


def nothing(folder: Path) -> Path:
    """No file at all: the input is in the call."""
    return folder


def text(content: str | bytes, name: str = "train.jsonl", **about: Any) -> Callable[[Path], Path]:
    """A task's folder with one file, and perhaps a task.json."""

    def lay(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if about:
            (folder / "task.json").write_text(json.dumps(about))
        return folder

    return lay
