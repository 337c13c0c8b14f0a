"""Lists of pictures with their classes, as ``datasets`` has them in an ImageFolder: ``metadata.csv`` or ``.jsonl``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyro_lift.data.records import Record, as_text, read_records

__all__ = ["LIST_FILES", "list_file", "listed_pictures"]

LIST_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: Columns that may hold the class.
LABELS = ("label", "labels", "class", "category")


def list_file(home: Path) -> Path | None:
    """Find the list of a folder's pictures; None where there is none.

    Raises:
        ValueError: two lists.
    """
    there = [home / name for name in LIST_FILES if (home / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"{there[1]}: the pictures are listed in {there[0].name} as well; keep one of them.")
    return there[0] if there else None


def listed_pictures(path: Path) -> dict[str, list[Path]] | None:
    """Read the pictures of each class from a list; None where it has no column of classes.

    Args:
        path: with ``file_name``, relative to the list's folder, and ``label`` (or ``labels``, ``class``, ``category``).

    Raises:
        ValueError: no ``file_name``, a picture that is not there or stands twice, a blank or missing class, a damaged
            file; names file and line.
    """
    classes: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    column: str | None = None
    for number, record in enumerate(_records(path)):
        if number == 0:
            column = next((name for name in LABELS if name in record.fields), None)
            if "file_name" not in record.fields:
                raise ValueError(f"{record.place}: no column 'file_name'; there are {', '.join(record.fields)}.")
            if column is None:
                return None
        assert column is not None
        file = path.parent / _text(record, "file_name")
        if not file.is_file():
            raise ValueError(f"{record.place}: {file}: no such picture.")
        if file in seen:
            raise ValueError(f"{record.place}: the picture {file.name} is listed twice.")
        seen.add(file)
        classes.setdefault(_text(record, column), []).append(file)
    if not classes:
        raise ValueError(f"{path}: no picture is listed.")
    return classes


def _text(record: Record, name: str) -> str:
    try:
        text = as_text(record.fields.get(name)).strip()
    except TypeError:
        text = ""
    if not text:
        raise ValueError(f"{record.place}: {name!r} is {record.fields.get(name)!r}; expected a name.")
    return text


def _records(path: Path) -> Iterator[Record]:
    if path.suffix != ".csv":
        yield from read_records(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader: Any = csv.DictReader(file, strict=True)
            for fields in reader:
                yield Record(f"{path}:{reader.line_num}", {k: v for k, v in fields.items() if k is not None})
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({error}).") from error
