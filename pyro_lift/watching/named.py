"""Callbacks by name, for files and the command line: ``run.jsonl``, ``tensorboard:runs``, ``wandb:project``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from pyro_lift.support.options import check_choice
from pyro_lift.watching.json_lines import JsonLines
from pyro_lift.watching.steps import Callback
from pyro_lift.watching.trackers import MLflow, TensorBoard, Trackio, WandB

__all__ = ["check_log", "named_callback", "named_callbacks"]

#: What stands behind the colon of each.
NAMES = {
    "json": "a file",
    "tensorboard": "a folder",
    "wandb": "a project",
    "trackio": "a project",
    "mlflow": "an experiment's number, or nothing",
}
_ENDINGS = (".jsonl", ".json", ".ndjson")


def check_log(name: str) -> tuple[str, str]:
    """Split a name such as ``wandb:project`` in its kind and what it is of.

    Raises:
        ValueError: an unknown kind, with the nearest known one; nothing behind the colon.

    Example:
        >>> check_log("logs/run.jsonl"), check_log("tensorboard:runs")
        (('json', 'logs/run.jsonl'), ('tensorboard', 'runs'))
    """
    kind, colon, of = name.partition(":")
    if name.casefold().endswith(_ENDINGS) and kind not in NAMES:
        return "json", name
    if not colon and kind not in NAMES:
        raise ValueError(
            f"log {name!r}: expected a file ending in .jsonl, or one of "
            + ", ".join(f"{known}:{what.split()[-1].upper()}" for known, what in list(NAMES.items())[1:4])
            + ", mlflow."
        )
    check_choice("log", kind, NAMES)
    if not of and kind != "mlflow":
        raise ValueError(f"log {name!r}: {NAMES[kind]} is missing; write {kind}:{NAMES[kind].split()[-1].upper()}.")
    return kind, of


def named_callback(name: str, every: int | None = None) -> Callback:
    """Make the callback of a name.

    Args:
        name: as of :func:`check_log`.
        every: steps between two that it is told of; None takes the callback's own.

    Raises:
        ValueError: an unknown name.
        ImportError: a library that is not installed.
        OSError: a file that cannot be written.
    """
    kind, of = check_log(name)
    experiment: dict[str, Any] = {"experiment_id": of} if of else {}
    makers: dict[str, Callable[[], Callback]] = {
        "json": lambda: JsonLines(of),
        "tensorboard": lambda: TensorBoard(of),
        "wandb": lambda: WandB(of),
        "trackio": lambda: Trackio(of),
        "mlflow": lambda: MLflow(**experiment),
    }
    callback = makers[kind]()
    if every is not None:
        callback.every = every
    return callback


@contextmanager
def named_callbacks(names: Sequence[str], every: int | None = None) -> Iterator[list[Callback]]:
    """Make the callbacks of some names, and close them at the end of the context."""
    with ExitStack() as stack:
        yield [stack.enter_context(named_callback(name, every)) for name in names]
