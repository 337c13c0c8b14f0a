"""Rows that are only predicted: without labels if need be, and from a folder or file without training rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.data.images import Images
from pyro_lift.data.layout import RECORD_FILES, TENSOR_FILES, npz_inside, part_files, part_folders, walk_files
from pyro_lift.data.pictures import npz_pictures
from pyro_lift.data.pixels import PICTURE_FILES
from pyro_lift.data.records import read_records, text_row
from pyro_lift.data.tensors import read_tensors
from pyro_lift.data.text import CHOICES, TextForm, TextRow, TextTask
from pyro_lift.models.rows import Rows, as_rows
from pyro_lift.models.task import Task

__all__ = ["choice_rows", "new_pictures", "new_tensor_rows", "new_text_rows", "rows_file"]


def rows_file(path: Path, endings: Sequence[str] = (*RECORD_FILES, *TENSOR_FILES)) -> Path | None:
    """Find the file of rows to predict: the path itself, or of a folder ``test``, else ``dev``, else ``train``.

    Returns:
        The file, or None where a folder has none of these endings.

    Raises:
        ValueError: two files of one part, or a file of another kind.
    """
    if path.is_file():
        return path if path.name.casefold().endswith(tuple(endings)) else None
    files = part_files(path, endings) if path.is_dir() else {}
    return next((files[part] for part in ("test", "dev", "train") if part in files), None)


def new_pictures(path: Path) -> Images:
    """Find pictures to predict, of any class or none: a picture, an NPZ file, or all pictures of a folder.

    Of a folder with parts these are ``test``'s, else ``dev``'s, else ``train``'s; of an NPZ file likewise.

    Raises:
        ValueError: none; names the place.
    """
    path = npz_inside(path) or path
    if path.is_file() and path.suffix.casefold() == ".npz":
        pictures = npz_pictures(path)
        return Images(pictures, torch.zeros(len(pictures), dtype=torch.long))
    if path.is_file() and path.suffix.casefold() in PICTURE_FILES:
        files = [path]
    elif path.is_dir():
        homes = part_folders(path)
        home = next((homes[part] for part in ("test", "dev", "train") if part in homes), path)
        files = [file for file in walk_files(home) if file.suffix.casefold() in PICTURE_FILES]
    else:
        files = []
    if not files:
        raise ValueError(f"{path}: no pictures to predict; expected *.png (or {', '.join(PICTURE_FILES[2:6])}).")
    return Images(tuple(files), torch.zeros(len(files), dtype=torch.long))


def new_text_rows(file: Path, form: TextForm, labels: Sequence[str] = ()) -> list[TextRow]:
    """Read the records of a file; those without an answer have no outputs.

    Raises:
        ValueError: no row, or a bad record; names file and line.
    """
    rows = [text_row(record, form, labels or None, answered=False) for record in read_records(file, answered=False)]
    if not rows:
        raise ValueError(f"{file}: no rows to predict.")
    return rows


def choice_rows(encoding: TextEncoding, rows: Sequence[TextRow], labels: Sequence[str]) -> Rows:
    """Encode rows whose answer is chosen; where there is none, any stands in its place, which predictions never see."""
    any_answer = tuple(labels)[:1]
    filled = tuple(
        row if row.outputs else TextRow(row.input, row.options[:1] or any_answer, row.options) for row in rows
    )
    assert encoding.form in CHOICES
    task = TextTask(encoding.task, filled, form=encoding.form, labels=tuple(labels), system=encoding.system)  # type: ignore[arg-type]
    with encoding.telling_of_cut("inputs", len(rows)):
        return encoding.encoder(task).train  # type: ignore[operator, no-any-return]


def new_tensor_rows(file: Path, task: Task) -> tuple[Rows, bool]:
    """Read rows from a safetensors file, and whether they have ``labels``; zeros stand for those of rows without.

    Args:
        file: with inputs by the backbone's keyword.
        task: whose network reads them.

    Raises:
        ValueError: not a safetensors file, no inputs, tensors of unequal length; names the file.
    """
    tensors, _ = read_tensors(file)
    named = {name: x for name, x in tensors.items() if not name.startswith("label_")}
    target = named.pop("labels", None)
    if not named:
        raise ValueError(f"{file}: no inputs among {', '.join(sorted(tensors)) or 'no tensors'}.")
    if target is None:
        first = next(iter(named.values()))
        target = torch.zeros(len(first) if first.dim() else 0, dtype=torch.long)
    rows = as_rows((named, target), str(file))
    return Rows(rows.inputs, rows.target, task.train.shared), "labels" in tensors
