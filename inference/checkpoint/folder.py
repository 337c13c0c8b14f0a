"""Folders of one checkpoint: names, checksums, rows in shards, and what must agree before it is resumed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pyro_lift.inference.checkpoint.differences import difference
from pyro_lift.models.architecture import changed_settings
from pyro_lift.support.archive import DamagedError, check_format, check_sealed, read_json, write_tensors
from pyro_lift.support.wording import some_tasks

__all__ = [
    "ARCHITECTURE",
    "DIGESTS",
    "FORMAT",
    "MANY",
    "NETWORK",
    "SHARD",
    "TASK_DATA",
    "SavableRows",
    "check_config",
    "checkpoints_in",
    "jsonable",
    "link_or_copy",
    "read_verified",
    "saved_config",
    "write_rows",
]


FORMAT = 1


#: Bytes of a file of rows; what a checkpoint needs in memory beside the run itself.
SHARD = 128 * 2**20


#: In a run's configuration: a digest of each task's training rows, by its name.
TASK_DATA = "task_data"
#: Likewise: a digest of the frozen network.
NETWORK = "network"
#: Likewise: what the network computes beside its weights (:mod:`pyro_lift.models.architecture`).
ARCHITECTURE = "architecture"
#: What earlier versions did not keep: a run that has none goes on without.
DIGESTS = (TASK_DATA, NETWORK, ARCHITECTURE)


#: Past this many files of draws they are written as one.
MANY = 32


_KEYS: dict[str, type] = {"transitions": int, "draws": int, "tree": dict, "files": dict, "config": dict}


class SavableRows(Protocol):
    """Many vectors by number; stores and tables of gradients are."""

    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """The rows of these numbers."""
        ...

    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace them."""
        ...

    def tasks(self) -> Iterator[int]:
        """The numbers there are."""
        ...


def checkpoints_in(folder: Path) -> list[Path]:
    """Those that are there, the newest last."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_verified(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint all of whose files have their checksums."""
    state = read_json(path / "state.json")
    check_format(path / "state.json", state, "pyro_lift.checkpoint", FORMAT, _KEYS)
    check_sealed(path / "state.json", state)
    for file, record in state["files"].items():
        if not (path / file).is_file():
            raise DamagedError(f"{path}: no {file} here.")
        size = (path / file).stat().st_size
        if size < record["bytes"]:
            raise DamagedError(f"{path / file}: truncated: {size} of {record['bytes']} bytes.")
        with (path / file).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != record["sha256"]:
                raise DamagedError(f"{path / file}: altered since it was written.")
    return state


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder's newest checkpoint that can be read; nothing where there is none."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return dict(read_json(path / "state.json")["config"])
        except (DamagedError, OSError, KeyError, TypeError, ValueError):
            continue
    return {}


def check_config(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> None:
    """Refuse to go on with another run, naming the first difference.

    Args:
        path: of the file that holds what was saved.
        saved: plain data of the saved run.
        now: the same of the run that goes on.
        at: name of what both are a part of, with a dot at its end; empty for the whole.

    Raises:
        ValueError: a difference.
    """
    for name in [*saved, *(name for name in now if name not in saved)]:
        was: Any = saved.get(name)
        today: Any = now.get(name)
        where = f"{at}{name}"
        if name == TASK_DATA and was and today:
            _check_task_data(path, was, today)
        elif name == NETWORK and was != today:
            raise ValueError(
                f"{path}: the weights of the backbone are others than those that the run was saved with. Go on with "
                "the same network, or begin anew in another folder."
            )
        elif name == ARCHITECTURE:
            _check_architecture(path, was or {}, today or {})
        elif isinstance(was, dict) and isinstance(today, dict):
            check_config(path, was, today, f"{where}.")
        elif name == "start_log_likelihood":
            if not np.isclose(was, today, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"{path}: the log likelihood at the chain's start is {today:.6g} and was {was:.6g}: the data or "
                    "the backbone have changed."
                )
        elif was != today:
            raise ValueError(
                f"{path}: the run was saved with {difference(where, was, today)}. "
                "Go on with the same settings and tasks, or begin anew in another folder."
            )


def _check_task_data(path: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse other training rows than those of the saved run, naming the tasks; other tasks are told of elsewhere."""
    others = [name for name, digest in saved.items() if name in now and now[name] != digest]
    if others:
        raise ValueError(
            f"{path}: the training rows of {some_tasks(others)} (inputs, labels "
            "or label texts) are others than those that the run was saved with. Go on with the same data, or begin "
            "anew in another folder."
        )


def _check_architecture(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a network of the same weights that computes something else."""
    for name, (was, today) in changed_settings(saved, now).items():
        raise ValueError(
            f"{path}: the weights of the backbone are the same, but {name} was {was!r} when the run was saved and is "
            f"{today!r}. Go on with the same network, or begin anew in another folder."
        )


def jsonable(value: Any) -> Any:
    """Convert tuples to lists and keys to strings, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value


def link_or_copy(old: Path, new: Path) -> None:
    """Link a file that is never written again; copy it where the file system has no links."""
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, new)


def write_rows(new: Path, name: str, rows: SavableRows) -> dict[str, Any]:
    """Rows in files of a bounded size, so that a store on the disk is saved in little memory."""
    files: dict[str, Any] = {}
    part: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"{name}-{len(files):06d}.safetensors"
        files[file] = write_tensors(new / file, part)

    for task in rows.tasks():
        row = rows.read([task])[0]
        part[str(task)] = row
        size += row.numel() * row.element_size()
        if size >= SHARD:
            flush()
            part, size = {}, 0
    if part:
        flush()
    return files
