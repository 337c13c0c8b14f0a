"""Pieces of work that a run does before its chain, kept in its folder so that a run that goes on has them already."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lift.inference.checkpoint.folder import ARCHITECTURE, DIGESTS, jsonable
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.architecture import changed_settings
from pyro_lift.support.archive import (
    DamagedError,
    check_sealed,
    new_folder,
    read_json,
    read_tensors,
    reason_of_failure,
    sealed,
    write_json,
    write_tensors,
)

__all__ = ["Work", "WorkBefore"]

log = logging.getLogger("pyro_lift")

#: A piece of work: its vector, and plain data that goes with it.
Work = tuple[Tensor, dict[str, Any]]


class WorkBefore:
    """Results by name, each computed once.

    Args:
        folder: of the run; None keeps nothing.
        config: plain data of the run; what was kept by a run of another is computed anew. Its ``"digest"`` of data and
            network, and its ``"architecture"``, are left out of account where an earlier version kept none.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.config = folder, jsonable(dict(config or {}))

    @classmethod
    def of(
        cls, session: Session | None, name: str, digest: Callable[[], str] | None = None, under: str = ""
    ) -> tuple[WorkBefore, bool]:
        """Return what a run did before its chain, and whether its chain began without the work of that name.

        Args:
            session: of the run; without one nothing is kept.
            name: of the work.
            digest: of data and network, asked for where something is kept.
            under: name of a folder inside the run's, for work on what the run may turn out not to be of.
        """
        if session is None:
            return cls(None), False
        config = {name: value for name, value in (session.config or {}).items() if name not in DIGESTS}
        config |= {} if digest is None else {"digest": digest()}  # which says as much of tasks and weights
        config |= {name: value for name, value in (session.config or {}).items() if name == ARCHITECTURE}
        kept = cls(session.folder / under, config)
        return kept, session.transitions > 0 and not kept.has(name)

    def has(self, name: str) -> bool:
        """Whether a result of this run is at hand."""
        return self._read(name) is not None

    def result(self, name: str, compute: Callable[[], Work]) -> Work:
        """Return a result that was kept, or compute it and keep it."""
        kept = self._read(name)
        if kept is not None:
            return kept
        vector, data = compute()
        if self.folder is not None:
            data = jsonable(data)
            self._keep(self.folder, name, vector, data)
        return vector, data

    def _keep(self, folder: Path, name: str, vector: Tensor, data: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / name, ignore_errors=True)
            with new_folder(folder / name) as new:
                record = write_tensors(new / "vector.safetensors", {"vector": vector})
                told = {"config": self.config, "file": record, "data": data}
                write_json(new / "work.json", sealed(told))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder}: what the run found before its chain could not be kept ({reason_of_failure(error)}). Make "
                "room, or give another folder",
            ) from error

    def data(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return plain data without a vector that was kept, or compute it and keep it."""
        return self.result(name, lambda: (torch.zeros(0), compute()))[1]

    def _read(self, name: str) -> Work | None:
        if self.folder is None or not (self.folder / name).is_dir():
            return None
        path = self.folder / name / "work.json"
        try:
            work = read_json(path)
            check_sealed(path, work)
            vector = read_tensors(path.with_name("vector.safetensors"), work["file"])["vector"]
        except DamagedError as error:
            log.warning("%s; it is computed anew", error)
            return None
        if self._is_of(work["config"]):
            return vector, work["data"]
        log.warning("%s is of other settings, tasks or data than this run has; it is done anew", path.parent)
        return None

    def _is_of(self, kept: Mapping[str, Any]) -> bool:
        """Whether what was kept is of this run: by all that both say."""
        if changed_settings(kept.get(ARCHITECTURE) or {}, self.config.get(ARCHITECTURE) or {}):
            return False
        now = {name: value for name, value in self.config.items() if name != "digest" or name in kept}
        then, now = ({name: x for name, x in told.items() if name != ARCHITECTURE} for told in (kept, now))
        return then == now
