"""Tasks of one's own from a folder: JSONL, Parquet or TSV text, NPZ arrays, or pictures in folders by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.images import ImageTask
from pyro_lift.data.pictures import PARTS, is_picture_task, read_pictures
from pyro_lift.data.records import RECORD_FILES, Record, read_json, read_records, text_row
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.data.text import TextForm, TextTask
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice, check_literal

__all__ = ["load_folder", "read_task"]


def load_folder(
    split: Mapping[str, Sequence[str]] | None = None,
    root: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> TaskCollection[TextTask | ImageTask | Task]:
    """Load every task of a folder: one folder or NPZ file each (see :func:`read_task`).

    Args:
        split: names by ``"train"``, ``"dev"`` and ``"test"``; None reads ``split.json``, and without that all tasks
            are for training.
        root: the folder.
        names: only these tasks, in this order; None takes all.

    Raises:
        ValueError: no task; a bad one, with file and line.
        FileNotFoundError: no such folder.
    """
    if root is None:
        raise ValueError("root=None: pass the folder that holds the tasks.")
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    found = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    found |= {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise ValueError(
            f"{folder}: no task; a task is an NPZ file, or a folder with train.jsonl or train/CLASS/*.png."
        )
    for name in names or ():
        check_choice(f"{folder}: task", name, found)
    if names is not None:
        found = {name: found[name] for name in names}
    if split is None:
        path = folder / "split.json"
        split = read_json(path) if path.is_file() else {"train": list(found)}
    if names is not None:
        split = {part: [name for name in listed if name in names] for part, listed in split.items()}
    for part in split:
        check_choice("part of split", part, PARTS)
    parts = {part: tuple(read_task(found[n]) for n in split.get(part, ()) if n in found) for part in PARTS}
    missing = {part: tuple(n for n in split.get(part, ()) if n not in found) for part in PARTS}
    unused = sorted(set(found) - {name for names in split.values() for name in names})
    notes = (f"in the folder but in no part of the split: {', '.join(unused)}.",) if unused else ()
    return TaskCollection(
        f"tasks of {folder}", parts["train"], parts["dev"], parts["test"], missing=missing, notes=notes
    )


def read_task(path: Path) -> TextTask | ImageTask | Task:
    """Read one task: an NPZ file, a folder of records, of pictures ``train/CLASS/*.png``, or of tensors.

    Records are ``train``, ``dev`` and ``test`` with one of the endings ``.jsonl``, ``.jsonl.gz``, ``.parquet``,
    ``.tsv``. ``task.json`` may say ``form``, ``labels`` and ``metric``; without it, rows with options are multiple
    choice, others text to text. Tensors are ``train.safetensors`` (:func:`~pyro_lift.data.tensors.read_tensor_task`).

    Raises:
        ValueError: nothing to train on, or a bad record; names file and line.
    """
    if (path / "train.safetensors").is_file():
        return read_tensor_task(path)
    if is_picture_task(path):
        return read_pictures(path)
    records = {part: _records(path, names) for part, names in PARTS.items()}
    if not records["train"]:
        raise ValueError(f"{path}: the train split is empty; expected train.jsonl (or .parquet, .tsv) with rows.")
    about = read_json(path / "task.json") if (path / "task.json").is_file() else {}
    for key in about:
        check_choice(f"{path / 'task.json'}: key", key, ["form", "labels", "metric"])
    first = text_row(records["train"][0])
    form: TextForm = about.get("form") or ("multiple_choice" if first.options else "text_to_text")
    check_literal("form", form, TextForm)
    labels = tuple(about.get("labels", ()))
    if form == "classification" and not labels:
        labels = first.options or tuple(sorted({text_row(record).outputs[0] for record in records["train"]}))
    rows = {part: tuple(text_row(record, form, labels) for record in of) for part, of in records.items()}
    default = {"text_to_text": "EM", "next_token": "Perplexity"}.get(form, "ACC")
    return TextTask(path.name, rows["train"], rows["dev"], rows["test"], form, about.get("metric", default), labels)


def _records(folder: Path, names: Sequence[str]) -> list[Record]:
    for name in names:
        for end in RECORD_FILES:
            if (folder / f"{name}{end}").is_file():
                return list(read_records(folder / f"{name}{end}"))
    return []
