"""A task as safetensors files of encoded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_lift.models.task import Task

__all__ = ["PARTS", "read_tensor_task"]


PARTS = ("train", "dev", "test")


def read_tensor_task(folder: Path) -> Task:
    """A task from ``train.safetensors`` (``dev``, ``test``): inputs by keyword of the backbone, and ``labels``.

    The kind of the likelihood is the files' metadata ``kind``; without it, whole-number labels ``[n]`` are classes,
    ``[n, L]`` tokens, and other numbers are regressed on. Label texts of a matching task are ``label_input_ids`` and
    ``label_attention_mask`` of the training file.

    Raises:
        ValueError: a file that is not safetensors, or without labels; names the file.
    """
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Tensor]] = {}
    kind: Any = None
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as file:
                parts[part] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                kind = (file.metadata() or {}).get("kind", kind)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}).") from error
        if "labels" not in parts[part]:
            raise ValueError(f"{path}: no tensor 'labels' among {', '.join(sorted(parts[part]))}.")
    texts: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        found = {name.removeprefix("label_"): tensors.pop(name) for name in list(tensors) if name.startswith("label_")}
        texts = found if part == "train" else texts
    target = parts["train"]["labels"]
    kind = kind or ("regression" if target.is_floating_point() else "classification" if target.dim() == 1 else "tokens")
    try:
        return Task(
            folder.name, parts["train"], kind, test=parts.get("test"), dev=parts.get("dev"), label_texts=texts or None
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
