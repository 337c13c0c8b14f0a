"""A command's last write: where its folder cannot take what took hours to compute, another place is found for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pyro_lift.support.archive import reason_of_failure

__all__ = ["write_or_rescue"]


def write_or_rescue(write: Callable[[Path], object], folder: Path, what: str) -> None:
    """Write into a folder; where that fails, into a new one beside it, where we are, or in the temporary folder.

    Args:
        write: given the folder, which it makes where it is not there.
        folder: that was meant.
        what: is written, for the message.

    Raises:
        OSError: the folder could not be written; names the place where everything is instead, or that there is none.
    """
    try:
        write(folder)
        return
    except OSError as error:
        failure = error
    failed = f"{folder}: {what} could not be written ({reason_of_failure(failure)})"
    for parent in _places(folder):
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{folder.absolute().name}-rescued-", dir=parent))
        except OSError:
            continue
        try:
            write(place)
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            continue
        raise OSError(
            failure.errno, f"{failed}. Nothing is lost: it is in {place}. Move it to where it belongs, or use it there"
        ) from failure
    raise OSError(
        failure.errno, f"{failed}, nor beside it, nor in {Path.cwd()}, nor in the temporary folder; it is lost"
    ) from failure


def _places(folder: Path) -> Iterator[Path]:
    yield folder.absolute().parent
    yield Path.cwd()
    try:
        yield Path(tempfile.gettempdir())
    except FileNotFoundError:  # no folder for temporary files can be written
        return
