"""A run as JSON lines: one a step, readable while it runs, by everything that reads text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from pyro_lift.support.options import check_number
from pyro_lift.watching.steps import Callback, Run, Step

__all__ = ["JsonLines"]


class JsonLines(Callback):
    """A file with a line for each step, a line where a run begins and one where it ends; always appended to.

    A step's line has the fields of :class:`~pyro_lift.watching.steps.Step`, ``null`` for what is not known. Lines of
    other events have ``"event"``: ``"begin"`` with the run's settings, the steps that were ``done`` before, and
    ``"end"`` with the error, if one ended it. A run that goes on from a checkpoint makes some steps again: where a step
    stands twice, the later line is the run's.

    Args:
        path: of the file; folders are made.
        every: steps between two lines.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, every: int = 1) -> None:
        check_number("every", every, least=1, open_below=False, whole=True)
        self.path, self.every = Path(path), every
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; expected a file of JSON lines.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8"):
            pass
        self._file: IO[str] | None = None

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"

    def begin(self, run: Run) -> None:
        """Write that the run begins, with its settings."""
        self._write({"event": "begin", **_named(run), "done": run.done, "total": run.total, "settings": run.settings})

    def step(self, step: Step) -> None:
        """Write the step."""
        values = {f.name: getattr(step, f.name) for f in fields(step) if f.name != "run"}
        self._write({**_named(step.run), **values})

    def end(self, run: Run, error: BaseException | None) -> None:
        """Write that the run has ended, and by what error."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        self._write({"event": "end", **_named(run), "error": said})
        self.close()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps(_json(line), ensure_ascii=False) + "\n")


def _named(run: Run) -> dict[str, str]:
    return {"run": run.kind, "name": run.name}


def _json(value: Any) -> Any:
    """Convert what JSON has no word for: numbers that are not finite become null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
