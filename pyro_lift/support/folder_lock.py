"""One run a folder: a lock of the operating system, which goes with the process that holds it, however that ends.

The lock is on a file :data:`LOCK` inside the folder, taken through ``filelock``. A process that is killed leaves the
file and not the lock, and the next run takes it over. Where a file system has no locks the run goes on with a warning.
"""

from __future__ import annotations

import inspect
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_lift.support import distributed

__all__ = ["LOCK", "FolderInUseError", "only_run_in"]

log = logging.getLogger("pyro_lift")

#: Name of the file that is locked; there while a run works in the folder, and after a kill.
LOCK = ".run.lock"


class FolderInUseError(ValueError):
    """Another run works in the folder."""


@contextmanager
def only_run_in(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the context lasts.

    Args:
        folder: made where it is not there, and taken away again if nothing was written into it.
        shared: whether the processes of ``torchrun`` share the run: the first of them holds the lock for all, and all
            must enter.

    Raises:
        FolderInUseError: another run holds the folder; in every process of a shared run.
        OSError: the folder cannot be made.
    """
    if shared:
        distributed.join()
    if shared and not distributed.is_first():
        refused = distributed.from_first(None)
        if refused:
            raise FolderInUseError(refused)
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    held, error = None, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _Held(folder / LOCK)
    except (FolderInUseError, OSError) as failure:
        error = failure
    if shared:
        distributed.from_first(None if error is None else str(error))
    if error is not None:
        raise error
    try:
        yield
    finally:
        if held is not None:
            held.release()
        for path in made:
            with suppress(OSError):  # something was written into it
                path.rmdir()


class _Held:
    """The lock on a file, taken at once or refused.

    Raises:
        FolderInUseError: another process, or another run of this one, has it.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self._file: os.stat_result | None = None
        # Without locks of the system newer versions would leave a file as the lock, which outlives a kill.
        known = inspect.signature(FileLock).parameters
        hard: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in known else {}
        self._lock = FileLock(path, timeout=0, **hard)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise FolderInUseError(
                f"{path.parent}: another run works in this folder{_holder(path)}. Wait until it has ended, stop it, or "
                "give another folder."
            ) from error
        except (NotImplementedError, OSError) as error:
            log.warning(
                "%s: cannot be locked (%s). Take care that no second run works in it: each would overwrite the other's "
                "files.", path.parent, error,
            )  # fmt: skip
            return
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            self._file = path.stat()

    def release(self) -> None:
        """Let the folder go; the file too, unless another run has put its own in its place."""
        with suppress(OSError):  # gone with the folder; or a system on which open files stay
            if self._file is not None and os.path.samestat(self._file, self.path.stat()):
                self.path.unlink()
        self._lock.release()


def _holder(path: Path) -> str:
    """Say which process has a lock, where its file tells."""
    try:
        told = path.read_text().strip()
    except (OSError, ValueError):
        told = ""
    return f" ({told})" if told else ""
