"""Tasks of one's own from a folder: JSONL, Parquet or TSV text, NPZ arrays, or pictures in folders by class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.records import RECORD_FILES, Record, read_records, text_row
from pyro_lift.data.task import Images, ImageTask, TextForm, TextTask
from pyro_lift.data.vtab import read_npz
from pyro_lift.options import check_choice

__all__ = ["load_folder", "read_task"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_PARTS = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}


def load_folder(
    split: Mapping[str, Sequence[str]] | None = None, root: str | Path | None = None
) -> TaskCollection[TextTask | ImageTask]:
    """Every task of a folder: one folder or NPZ file each (see :func:`read_task`).

    Args:
        split: names by ``"train"``, ``"dev"`` and ``"test"``; None reads ``split.json``, and without that all tasks
            are for training.
        root: the folder.

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
    if split is None:
        path = folder / "split.json"
        split = _json(path) if path.is_file() else {"train": list(found)}
    for part in split:
        check_choice("part of split", part, _PARTS)
    parts = {part: tuple(read_task(found[n]) for n in split.get(part, ()) if n in found) for part in _PARTS}
    missing = {part: tuple(n for n in split.get(part, ()) if n not in found) for part in _PARTS}
    unused = sorted(set(found) - {name for names in split.values() for name in names})
    notes = (f"in the folder but in no part of the split: {', '.join(unused)}.",) if unused else ()
    return TaskCollection(
        f"tasks of {folder}", parts["train"], parts["dev"], parts["test"], missing=missing, notes=notes
    )


def read_task(path: Path) -> TextTask | ImageTask:
    """One task: an NPZ file, a folder of records, or a folder of pictures ``train/CLASS/*.png``.

    Records are ``train``, ``dev`` and ``test`` with one of the endings ``.jsonl``, ``.jsonl.gz``, ``.parquet``,
    ``.tsv``. ``task.json`` may say ``form``, ``labels`` and ``metric``; without it, rows with options are multiple
    choice, others text to text.

    Raises:
        ValueError: nothing to train on, or a bad record; names file and line.
    """
    if path.suffix == ".npz":
        return read_npz(path)
    if (path / "train").is_dir():
        return _pictures(path)
    records = {part: _records(path, names) for part, names in _PARTS.items()}
    if not records["train"]:
        raise ValueError(f"{path}: the train split is empty; expected train.jsonl (or .parquet, .tsv) with rows.")
    about = _json(path / "task.json") if (path / "task.json").is_file() else {}
    for key in about:
        check_choice(f"{path / 'task.json'}: key", key, ["form", "labels", "metric"])
    first = text_row(records["train"][0])
    form: TextForm = about.get("form") or ("multiple_choice" if first.options else "text_to_text")
    check_choice("form", form, get_args(TextForm))
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


def _pictures(folder: Path) -> ImageTask:
    labels = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    parts: dict[str, Images] = {}
    for part, names in _PARTS.items():
        home = next((folder / name for name in names if (folder / name).is_dir()), None)
        if home is None:
            continue
        strange = sorted(p.name for p in home.iterdir() if p.is_dir() and p.name not in labels)
        if strange:
            raise ValueError(f"{home / strange[0]}: class {strange[0]!r} is not one of train's {', '.join(labels)}.")
        files = [(p, k) for k, c in enumerate(labels) for p in sorted((home / c).glob("*")) if p.suffix in PICTURES]
        if not files:
            raise ValueError(f"{home}: no picture; expected CLASS/*.png (or {', '.join(PICTURES[1:])}).")
        parts[part] = Images(tuple(p for p, _ in files), torch.tensor([k for _, k in files]))
    return ImageTask(folder.name, parts["train"], labels, parts.get("dev"), parts.get("test"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON {type(found).__name__}; expected an object.")
    return found
