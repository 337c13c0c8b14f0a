"""The hub: folders that are fetched from it, and uploaded to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.saving.parts import Savable
from pyro_lift.support.archive import DamagedError
from pyro_lift.support.hub_names import not_found, reason_of

__all__ = ["local_folder", "push"]


def push(thing: Savable, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Save into a temporary folder and upload it; returns the commit's address.

    Args:
        thing: a prior or a posterior.
        repo_id: ``"user/name"``; made if it is not there.
        private: of a new repository.
        options: ``token``, and those of ``HfApi.upload_folder``.
    """
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as scratch:
        folder = thing.save_pretrained(Path(scratch) / "upload")
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.upload_folder(
            repo_id=repo, folder_path=folder, **{"commit_message": "Upload by pyro_lift", **options}
        )
    return str(info.commit_url)


def local_folder(source: str | Path, download: Mapping[str, Any]) -> Path:
    """Return a folder as it is, and a repository of the hub once it has been fetched.

    Args:
        source: a folder, or ``"user/name"``.
        download: options of ``huggingface_hub.snapshot_download``.

    Raises:
        DamagedError: no folder, and no name that the hub could have.
        FileNotFoundError: no folder, and the hub gave nothing of that name.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise DamagedError(f"{source}: no such folder, and not a name of the hub ('user/name').")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), **download))
    except HFValidationError as error:
        raise DamagedError(f"{source}: no such folder, and not a name of the hub ({reason_of(error)}).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(not_found(source, error)) from error
