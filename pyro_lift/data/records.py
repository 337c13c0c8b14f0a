"""Records from files, each with its place, so that every complaint names a file and a line."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.data.chats import Conversation, as_messages
from pyro_lift.data.layout import RECORD_FILES, visible
from pyro_lift.data.text import CHOICES, TextForm, TextRow, check_answer, tidy
from pyro_lift.data.tsv import tsv_rows

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "RECORD_FILES",
    "Record",
    "as_text",
    "parse_json",
    "read_json",
    "read_records",
    "record_files",
    "text_row",
]

#: What the column of the input and that of the answer may be called.
INPUTS, OUTPUTS = ("input", "text", "prompt"), ("output", "label", "completion")
#: Columns of other layouts, and what to do with them.
_OTHER_COLUMNS = {
    "chosen": "pairs of preferences are not learnt from; write the preferred answer as 'completion'",
    "question": "call the question 'prompt' (or 'input') and its answer 'completion' (or 'output')",
    "messages": "messages are of the form 'chat', and the task has another",
    "text": "of text without an answer, the form 'next_token' learns lines as 'output'",
}
#: How files begin that are named for what they are not.
_BEGINNINGS = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "gzip; end its name in .gz",
    b"PAR1": "Parquet; end its name in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
}


class Record(NamedTuple):
    """The fields of one record, and where it stands: ``file:line``, or ``file, row n`` where there are no lines."""

    place: str
    fields: Mapping[str, Any]


def record_files(folder: Path) -> list[Path]:
    """List the files of a folder that hold records, in order of name."""
    return [path for path in visible(folder) if path.name.casefold().endswith(RECORD_FILES) and path.is_file()]


def parse_json(text: str, place: str) -> dict[str, Any]:
    """Parse the object of a JSON text, which has each key once and no NaN.

    Raises:
        ValueError: anything else; the message begins with the place, and a line where there are several.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(items)
        if len(seen) < len(items):
            keys = [key for key, _ in items]
            raise _DoubleKeyError(next(key for key in keys if keys.count(key) > 1))
        return seen

    def constant(name: str) -> Any:
        raise _ConstantError(name)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        line = "" if "\n" not in text else f":{error.lineno}"
        if text.strip() in ("{", "["):
            raise ValueError(f"{place}: a JSON text over several lines; JSONL has one object a line.") from error
        raise ValueError(f"{place}{line}: not JSON: {error.msg} at column {error.colno}.") from error
    except _DoubleKeyError as error:
        raise ValueError(f"{place}: key {error.args[0]!r} stands twice.") from None
    except _ConstantError as error:
        raise ValueError(f"{place}: {error.args[0]} is no value of JSON; use null, or leave it out.") from None
    except (RecursionError, ValueError) as error:  # nested without end, or a number of thousands of digits
        raise ValueError(f"{place}: not JSON that can be read ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON {type(value).__name__}; expected an object.")
    return value


class _DoubleKeyError(Exception):
    """A key that stands twice in one object."""


class _ConstantError(Exception):
    """NaN or an infinity."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON (with the line), not an object, a key that stands twice.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}).") from error
    return parse_json(text, str(path))


def read_records(path: Path, *, answered: bool = True) -> Iterator[Record]:
    """Read the records of a JSONL, TSV (both plain or gzip) or Parquet file; blank lines are passed over.

    A TSV line is CrossFit's (:mod:`pyro_lift.data.tsv`): the input, a tab, and one or more outputs with tabs between.
    Where no answers are needed (``answered=False``) it may be the input alone.

    Raises:
        ValueError: a name with another ending, a line that is not JSON, not an object, not UTF-8, or without a tab; a
            damaged gzip or Parquet file. The message begins with file and line.
    """
    name = path.name.casefold()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return (_json_record(place, line) for place, line in _lines(path))
    if name.endswith((".tsv", ".tsv.gz")):
        rows = tsv_rows(list(_lines(path)), answered=answered)
        return (Record(p, {"input": cells[0]} | ({"output": cells[1:]} if cells[1:] else {})) for p, cells in rows)
    raise ValueError(f"{path}: cannot read this kind of file; expected one of {', '.join(RECORD_FILES)}.")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Read the lines that are not blank, each with its place; a byte order mark is no part of a line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.casefold().endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1 and (kind := next((k for b, k in _BEGINNINGS.items() if raw.startswith(b)), None)):
                    raise ValueError(f"{path}:1: the file is {kind}.")
                try:
                    line = raw.decode("utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line).") from error
                if "\0" in line:
                    raise ValueError(f"{path}:{number}: the line holds a NUL character; is it UTF-16, or binary?")
                if line.strip():
                    yield f"{path}:{number}", line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: damaged gzip file ({error}).") from error


def _json_record(place: str, line: str) -> Record:
    try:
        return Record(place, parse_json(line, place))
    except ValueError as error:
        hint = " with the fields of one example." if str(error).endswith("expected an object.") else ""
        raise ValueError(str(error).removesuffix("." if hint else "") + hint) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise ValueError(f"{path}: column {double!r} stands twice.")
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", fields)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error}).") from error


def text_row(
    record: Record, form: TextForm | None = None, labels: Sequence[str] | None = None, *, answered: bool = True
) -> TextRow:
    """Take a record's ``input`` (``text``, ``prompt``), ``output`` (``label``, ``completion``) and ``options``.

    The output is one or several accepted answers. A chat has ``messages``, of which the last is the assistant's answer,
    and perhaps ``answers``, further accepted ones; or ``prompt`` and ``completion`` as messages.

    Numbers and true or false are taken as their JSON text; of a choice, 1.0 is 1. Only a next-token task may have an
    empty input: what follows nothing is the first line.

    Args:
        record: with its place, for the messages.
        form: of the task; None leaves the answer unchecked.
        labels: of a classification: what the answer must be among; None for anything.
        answered: whether there must be an answer; rows that are only predicted need none.

    Raises:
        ValueError: a missing or misshapen field, an empty input, an answer that may not be given.
    """
    _check_fields(record)
    if form == "chat":
        row = _chat_row(record, answered)
        if row.outputs:
            check_answer(row, form, None, record.place)
        return row
    text = _field(record, *INPUTS)
    if not isinstance(text, str) or not (text.strip() or form == "next_token"):
        raise ValueError(f"{record.place}: the input is {text!r}; expected a string that is not empty.")
    if not answered and all(record.fields.get(name) is None for name in OUTPUTS):
        outputs: tuple[str, ...] = ()
    else:
        name = _present(record, *OUTPUTS, form=form)
        outputs = _strings(record, name, record.fields[name], form)
        outputs += _strings(record, "answers", record.fields.get("answers") or (), form)
    options = record.fields.get("options")
    if options is not None and not isinstance(options, (list, tuple)):
        raise ValueError(f"{record.place}: 'options' is {options!r}; expected a list of strings.")
    row = TextRow(text, outputs, _strings(record, "options", options or (), form))
    if not outputs and not answered:
        return row
    if form is not None:
        row = tidy(row, form)
        check_answer(row, form, labels, record.place)
    elif not outputs:
        raise ValueError(f"{record.place}: no output.")
    return row


def _check_fields(record: Record) -> None:
    """Refuse columns that stand for the same, and those of layouts whose other columns would be passed over."""
    for names in (INPUTS, OUTPUTS):
        given = [name for name in reversed(names) if record.fields.get(name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{record.place}: both {given[0]!r} and {given[1]!r}; they mean the same. Keep one of them."
            )
    if "messages" in record.fields and any(name in record.fields for name in (*INPUTS, *OUTPUTS)):
        other = next(name for name in (*INPUTS, *OUTPUTS) if name in record.fields)
        raise ValueError(f"{record.place}: both 'messages' and {other!r}; a row is a conversation or a text.")
    if record.fields.get("tools"):
        raise ValueError(f"{record.place}: the column 'tools': calls of tools are not read. Leave it out.")
    for name in ("system", "system_prompt"):
        if record.fields.get(name):
            raise ValueError(
                f"{record.place}: the column {name!r} would not be read. A system prompt is the first of a row's "
                "'messages', or 'system' in task.json for all rows of a task."
            )
    for name, layout in (("instruction", "Alpaca's"), ("conversations", "ShareGPT's")):
        if name in record.fields:
            raise ValueError(
                f"{record.place}: the column {name!r} is {layout}; write 'prompt' and 'completion', or 'messages' with "
                "'role' and 'content', in its place."
            )


def _chat_row(record: Record, answered: bool) -> TextRow:
    """Take the messages of a record: those before the answer, and the accepted answers."""
    if "messages" in record.fields:
        messages = as_messages(record.fields["messages"], f"{record.place}: 'messages'")
    else:
        given, said = _field(record, "messages", "prompt"), record.fields.get("completion")
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said or []
        for name, value in (("prompt", given), ("completion", said)):
            if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
                raise ValueError(
                    f"{record.place}: {name!r} is {str(value)[:40]!r}; in a chat it is a list of messages."
                )
        messages = as_messages([*given, *said], f"{record.place}: 'prompt' and 'completion'")
    further = _strings(record, "answers", record.fields.get("answers") or (), None)
    if messages[-1].role != "assistant":
        if answered:
            raise ValueError(f"{record.place}: the last message is the user's; expected an assistant's, to be learnt.")
        return TextRow(Conversation(messages), further)
    if len(messages) == 1:
        raise ValueError(f"{record.place}: an answer alone; expected a user's message before it.")
    return TextRow(Conversation(messages[:-1]), (messages[-1].content, *further))


def _field(record: Record, *names: str) -> Any:
    return record.fields[_present(record, *names)]


def _present(record: Record, *names: str, form: TextForm | None = None) -> str:
    """Return the name, of some, that the record has a value by, else one that it has.

    Raises:
        ValueError: it has none; says what it may be meant by.
    """
    if known := [name for name in names if name in record.fields]:
        return next((name for name in known if record.fields[name] is not None), known[0])
    wanted = "completion" if names == OUTPUTS and "prompt" in record.fields else names[0]
    near = {name.strip().casefold(): name for name in record.fields}
    hint = next((f" {near[name]!r} is {name!r} in small letters." for name in names if name in near), "")
    others = record.fields.keys() - ({"text"} if form in CHOICES else set())
    other = next((f" {why[0].upper()}{why[1:]}." for key, why in _OTHER_COLUMNS.items() if key in others), "")
    there = ", ".join(map(repr, record.fields))
    called = f" It is called {', '.join(map(repr, names[:-1]))} or {names[-1]!r}."
    raise ValueError(f"{record.place}: no field {wanted!r}; the record has {there}.{hint or other or called}")


def _strings(record: Record, name: str, value: Any, form: TextForm | None) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(as_text(x, whole=form in CHOICES) for x in values)
    except TypeError:
        raise ValueError(f"{record.place}: {name!r} is {value!r}; expected a string or a list of strings.") from None


def as_text(value: Any, *, whole: bool = True) -> str:
    """Write a name that a file gives as a string, a number, or true or false.

    Args:
        value: of JSON or Parquet.
        whole: whether 1.0 is written 1, as a table with gaps turns whole numbers into others.

    Raises:
        TypeError: anything else, NaN and infinity too.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if whole and value == int(value) else str(value)
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"{value!r}: expected a string.")
