"""Records from files, each with its place, so that every complaint names a file and a line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.data.text import TextForm, TextRow, check_answer

__all__ = ["RECORD_FILES", "Record", "read_json", "read_records", "record_files", "text_row"]

#: What :func:`read_records` can read, by the end of a file's name.
RECORD_FILES = (".jsonl", ".jsonl.gz", ".tsv", ".parquet")


class Record(NamedTuple):
    """The fields of one record, and where it stands: ``file:line``, or ``file, row n`` where there are no lines."""

    place: str
    fields: Mapping[str, Any]


def record_files(folder: Path) -> list[Path]:
    """The files of a folder that hold records, in order of name."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(RECORD_FILES))


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON (with the line), not an object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON {type(found).__name__}; expected an object.")
    return found


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL (plain or gzip), Parquet or TSV file, in order; blank lines are passed over.

    A TSV line is CrossFit's: the input, a tab, and one or more outputs with tabs between.

    Raises:
        ValueError: a name with another ending, a line that is not JSON, not an object, not UTF-8, or without a tab; a
            damaged gzip or Parquet file. The message begins with file and line.
    """
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return (_json_record(place, line) for place, line in _lines(path))
    if path.name.endswith(".tsv"):
        return (_tsv_record(place, line) for place, line in _lines(path))
    raise ValueError(f"{path}: cannot read this kind of file; expected one of {', '.join(RECORD_FILES)}.")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line).") from error
                if line.strip():
                    yield f"{path}:{number}", line
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged gzip file ({error}).") from error


def _json_record(place: str, line: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: a JSON {type(fields).__name__}; expected an object with the fields of one example.")
    return Record(place, fields)


def _tsv_record(place: str, line: str) -> Record:
    first, *outputs = line.split("\t")
    if not outputs:
        raise ValueError(f"{place}: no tab; expected the input, a tab, and the output.")
    return Record(place, {"input": first, "output": outputs})


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", fields)
    except ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file ({error}).") from error


def text_row(record: Record, form: TextForm | None = None, labels: Sequence[str] = ()) -> TextRow:
    """A record's ``input`` (or ``text``), ``output`` (or ``label``; one string or several) and ``options``.

    Args:
        record: with its place, for the messages.
        form: of the task; None leaves the answer unchecked.
        labels: of a classification: what the answer must be among.

    Raises:
        ValueError: a missing or misshapen field, an empty input, an answer that may not be given.
    """
    text = _field(record, "input", "text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{record.place}: the input is {text!r}; expected a string that is not empty.")
    outputs = _strings(record, "output", _field(record, "output", "label"))
    options = _strings(record, "options", record.fields.get("options") or ())
    row = TextRow(text, outputs, options)
    if form is not None:
        check_answer(row, form, labels, record.place)
    elif not outputs:
        raise ValueError(f"{record.place}: no output.")
    return row


def _field(record: Record, *names: str) -> Any:
    for name in names:
        if name in record.fields:
            return record.fields[name]
    raise ValueError(f"{record.place}: no field {names[0]!r}; the record has {', '.join(map(repr, record.fields))}.")


def _strings(record: Record, name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return (str(value),)
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, Iterable) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise ValueError(f"{record.place}: {name!r} is {value!r}; expected a string or a list of strings.")
