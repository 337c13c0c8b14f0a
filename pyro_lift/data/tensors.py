"""A task as safetensors files of encoded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from pyro_lift.data.layout import TENSOR_FILES, part_files, task_name
from pyro_lift.models.likelihoods import LossKind
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice

__all__ = ["read_tensor_task", "read_tensors"]


def read_tensor_task(folder: Path) -> Task:
    """Read a task from ``train.safetensors`` (``dev``, ``test``): inputs by the backbone's keyword, and ``labels``.

    The kind of the likelihood is the files' metadata ``kind``; without it, whole-number labels ``[n]`` are classes,
    ``[n, L]`` tokens, and other numbers are regressed on. Label texts of a matching task are ``label_input_ids`` and
    ``label_attention_mask`` of the training file.

    Raises:
        ValueError: a file that is not safetensors, or without labels; parts that disagree; names the file.
    """
    files = part_files(folder, TENSOR_FILES)
    if "train" not in files:
        raise ValueError(f"{folder}: no train.safetensors.")
    parts: dict[str, dict[str, Tensor]] = {}
    kinds: dict[Path, str] = {}
    for part, path in files.items():
        parts[part], kind = read_tensors(path)
        if "labels" not in parts[part]:
            raise ValueError(f"{path}: no tensor 'labels' among {', '.join(sorted(parts[part])) or 'none'}.")
        if kind is not None:
            check_choice(f"{path}: metadata kind", kind, get_args(LossKind))
            kinds[path] = kind
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{folder}: the parts are of {' and '.join(f'{p.name} {k!r}' for p, k in kinds.items())}.")
    texts = _label_texts(parts, files)
    target = parts["train"]["labels"]
    guess = "regression" if target.is_floating_point() else "tokens" if target.dim() == 2 else "classification"
    kind = next(iter(kinds.values()), guess)
    try:
        return Task(
            task_name(folder),
            parts["train"],
            kind,  # type: ignore[arg-type]  # one of the choices, by check_choice
            test=parts.get("test"),
            dev=parts.get("dev"),
            label_texts=texts or None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read the tensors of a file, and the kind that its metadata declares.

    Raises:
        ValueError: a file that is not safetensors; names it.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kind = (file.metadata() or {}).get("kind")
    except Exception as error:  # whatever the parser met, the file is the reason
        raise ValueError(f"{path}: not a safetensors file ({error}).") from error
    return tensors, kind


def _label_texts(parts: dict[str, dict[str, Tensor]], files: dict[str, Path]) -> dict[str, Tensor]:
    """Take the label texts out of the parts; those of the training file count, others must be the same."""
    taken: dict[str, dict[str, Tensor]] = {}
    for part, tensors in parts.items():
        names = [name for name in tensors if name.startswith("label_")]
        taken[part] = {name.removeprefix("label_"): tensors.pop(name) for name in names}
    texts = taken["train"]
    for part, other in taken.items():
        same = set(other) == set(texts) and all(x.equal(texts[name]) for name, x in other.items())
        if other and not same:
            raise ValueError(f"{files[part]}: its label texts are not those of {files['train'].name}.")
    return texts
