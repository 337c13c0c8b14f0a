"""Tasks of one's own from a folder: JSONL, Parquet or TSV text, NPZ arrays, tensors, or pictures by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.images import ImageTask
from pyro_lift.data.layout import (
    PARTS,
    RECORD_FILES,
    TENSOR_FILES,
    part_files,
    part_folders,
    task_name,
    task_places,
)
from pyro_lift.data.pictures import is_picture_task, json_labels, read_pictures
from pyro_lift.data.records import Record, read_json, read_records, text_row
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.data.text import CHOICES, TEXT_METRICS, TextForm, TextTask, infer_labels
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice, check_distinct

__all__ = ["holds_task", "load_folder", "read_task"]


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
        ValueError: no task; a bad one, with file and line; a name that stands twice.
        FileNotFoundError: no such folder.
    """
    if root is None:
        raise ValueError("root=None: pass the folder that holds the tasks.")
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    _check_holds_tasks(folder)
    everything = task_places(folder)
    places = {name: path for name, path in everything.items() if holds_task(path)}
    if not places:
        raise ValueError(
            f"{folder}: no task; a task is an NPZ file, or a folder with train.jsonl or train/CLASS/*.png."
        )
    for name in names or ():
        check_choice(f"{folder}: task", name, places)
    if names is not None:
        check_distinct("names", names, "Name each task once.")
        places = {name: places[name] for name in names}
    if split is None:
        path = folder / "split.json"
        split = _split(read_json(path), str(path)) if path.is_file() else {"train": list(places)}
    else:
        split = _split(split, "split")
    if names is not None:
        split = {part: [name for name in listed if name in names] for part, listed in split.items()}
    parts = {part: tuple(read_task(places[n]) for n in split.get(part, ()) if n in places) for part in PARTS}
    missing = {part: tuple(n for n in split.get(part, ()) if n not in places) for part in PARTS}
    unused = sorted(set(places).difference(*split.values()))
    empty = sorted(name for name in everything if name not in places and names is None)
    notes = []
    if unused:
        notes.append(f"in the folder but in no part of the split: {', '.join(unused)}.")
    if empty:
        notes.append(f"in the folder and no tasks: {', '.join(empty)}.")
    return TaskCollection(
        f"tasks of {folder}", parts["train"], parts["dev"], parts["test"], missing=missing, notes=tuple(notes)
    )


def _check_holds_tasks(folder: Path) -> None:
    """Refuse a folder that is one task itself, whose parts would be taken for tasks."""
    if "train" in part_files(folder, (*RECORD_FILES, *TENSOR_FILES)) or "train" in part_folders(folder):
        raise ValueError(
            f"{folder}: it has a train part, so it is one task. root is the folder around the tasks: {folder.parent}, "
            f"with names={[folder.name]!r} for this one alone."
        )


def holds_task(path: Path) -> bool:
    """Tell whether a place has anything of a task: an NPZ file, or a folder with parts or folders of pictures."""
    if not path.is_dir():
        return is_picture_task(path)
    return bool(part_files(path, (*RECORD_FILES, *TENSOR_FILES)) or part_folders(path)) or is_picture_task(path)


def _split(split: Mapping[str, Any], where: str) -> dict[str, Sequence[str]]:
    """Check the names by part, each in one part."""
    for part, names in split.items():
        check_choice(f"{where}: part of split", part, PARTS)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: {part!r} is {names!r}; expected a list of names of tasks.")
    listed = [name for names in split.values() for name in names]
    check_distinct(where, listed, "A task is for training, for tuning or for judging; name it once.")
    return dict(split)


def read_task(path: Path) -> TextTask | ImageTask | Task:
    """Read one task: an NPZ file, or a folder of records, of pictures, or of tensors.

    Pictures are ``train/CLASS/*.png``, or ``CLASS/*.png`` (:func:`~pyro_lift.data.pictures.read_pictures`).

    Records are ``train``, ``dev`` and ``test`` with one of the endings ``.jsonl``, ``.jsonl.gz``, ``.parquet``,
    ``.tsv``, ``.tsv.gz``. ``task.json`` may say ``form``, ``labels``, ``metric`` and ``system``, a prompt before every
    input; without a form, rows with options are multiple choice, with ``messages`` a chat, with ``prompt`` and
    ``completion`` a completion, others text to text. Labels without a form are a classification's. Tensors are
    ``train.safetensors`` (:func:`~pyro_lift.data.tensors.read_tensor_task`).

    Raises:
        ValueError: nothing to train on, or a bad record; names file and line.
    """
    if is_picture_task(path):
        return read_pictures(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no folder of records, and no NPZ file of pictures.")
    either = part_files(path, (*RECORD_FILES, *TENSOR_FILES))
    if any(file.name.casefold().endswith(TENSOR_FILES) for file in either.values()):
        return read_tensor_task(path)
    files = part_files(path)
    records = {part: list(read_records(files[part])) if part in files else [] for part in PARTS}
    if not records["train"]:
        raise ValueError(
            f"{files.get('train', path)}: the train split is empty; expected train.jsonl (or .parquet, .tsv) with "
            "rows, or pictures train/CLASS/*.png."
        )
    _check_headers(records)
    about = _about(path / "task.json")
    form: TextForm = about.get("form") or ("classification" if "labels" in about else _form(records["train"]))
    if "labels" in about and form != "classification":
        raise ValueError(f"{path / 'task.json'}: 'labels' with form {form!r}; they belong to a classification.")
    labels = about.get("labels", ())
    if form == "classification" and not labels:
        first, *others = [text_row(record, form) for record in records["train"]]
        answers = [row.outputs[0] for row in (first, *others)]
        labels = first.options or infer_labels(answers, str(files["train"]))
    rows = {part: tuple(text_row(record, form, labels) for record in of) for part, of in records.items()}
    default = "ACC" if form in CHOICES else "Perplexity" if form == "next_token" else "EM"
    metric = about.get("metric", default)
    try:
        train, dev, test = (rows[part] for part in ("train", "dev", "test"))
        return TextTask(task_name(path), train, dev, test, form, metric, labels, about.get("system", ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _about(path: Path) -> dict[str, Any]:
    """Read what ``task.json`` says of a text task, and look at each value."""
    if not path.is_file():
        return {}
    about = read_json(path)
    for key in about:
        check_choice(f"{path}: key", key, ["form", "labels", "metric", "system"])
    for key, choices in (("form", get_args(TextForm)), ("metric", TEXT_METRICS)):
        if key in about:
            check_choice(f"{path}: {key}", about[key], choices)
    if not isinstance(about.get("system", ""), str):
        raise ValueError(f"{path}: 'system' is {about['system']!r}; expected a string.")
    if "labels" in about:
        about["labels"] = json_labels(about["labels"], path)
    return about


def _check_headers(records: Mapping[str, Sequence[Record]]) -> None:
    """Refuse tables whose first lines are one line of single words in several parts: the names of the columns."""
    firsts = [of[0] for of in records.values() if of and ".tsv" in of[0].place]
    for record in firsts[1:]:
        cells = [record.fields["input"], *record.fields["output"]]
        if record.fields == firsts[0].fields and all(len(cell.split()) == 1 for cell in cells):
            raise ValueError(
                f"{record.place}: the line is the first of {firsts[0].place.rpartition(':')[0]} as well. Take it out "
                "if it names the columns; if it is an example, keep it in one part."
            )


def _is_chat(record: Record) -> bool:
    return "messages" in record.fields or isinstance(record.fields.get("prompt"), list)


def _form(records: Sequence[Record]) -> TextForm:
    """Infer the form: a chat of messages, a completion of prompts; multiple choice where all rows have options."""
    chats = [_is_chat(record) for record in records]
    if any(chats):
        if not all(chats):
            raise ValueError(f"{records[chats.index(False)].place}: no messages, but other rows have some.")
        return "chat"
    completions = ["prompt" in record.fields and "completion" in record.fields for record in records]
    if all(completions):
        return "completion"
    if any(completions):
        raise ValueError(
            f"{records[completions.index(False)].place}: no 'prompt' and 'completion', but other rows have them; "
            "before other answers a blank is put, so rows of both kinds are no task."
        )
    with_options = [bool(record.fields.get("options")) for record in records]
    if any(with_options) and not all(with_options):
        place = records[with_options.index(False)].place
        raise ValueError(f"{place}: no options, but other rows have some; give every row options, or none.")
    return "multiple_choice" if all(with_options) else "text_to_text"
