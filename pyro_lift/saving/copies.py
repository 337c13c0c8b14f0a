"""The files of a saved folder that other programs read and ours do not: the PEFT adapter, and a head beside it.

What is learned stands in ``prior.safetensors`` or ``posterior.safetensors``; these files are copies of a part of it,
and damage to them changes nothing here. It would change what PEFT or a server makes of the folder, so that it is said.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.saving.names import HEAD
from pyro_lift.saving.peft_folder import PEFT_WEIGHTS

__all__ = ["digests_of_copies", "warn_of_copies"]

log = logging.getLogger("pyro_lift")


def digests_of_copies(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of each copy that a folder has, by name of its file."""
    return {name: digest for name in (PEFT_WEIGHTS, HEAD) if (digest := _digest(folder / name)) is not None}


def warn_of_copies(folder: Path, config: Mapping[str, Any]) -> None:
    """Warn of copies that are missing, truncated or altered; a folder of before has no record of them.

    Args:
        folder: that is loaded.
        config: of it, with ``copies`` as :func:`digests_of_copies` wrote them.
    """
    for name, digest in dict(config.get("copies") or {}).items():
        if (found := _digest(folder / str(name))) != digest:
            log.warning(
                "%s %s. Nothing here reads it, but PEFT and servers do: save the folder again for them.",
                folder / str(name), "is missing" if found is None else "is not as it was written",
            )  # fmt: skip


def _digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
