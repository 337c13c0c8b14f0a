"""CrossFit: 160 few-shot tasks over text, their metrics and the published splits, from local files or the hub.

References:
    CrossFit: a few-shot learning challenge for cross-task generalization in NLP, Ye et al., 2021, arXiv:2104.08835.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.layout import part_files, part_of
from pyro_lift.data.records import Record, read_records, record_files, text_row
from pyro_lift.data.text import TextForm, TextRow, TextTask, infer_labels
from pyro_lift.support.options import check_choice, check_number

__all__ = ["CROSSFIT_SPLITS", "SAMPLES", "crossfit_facts", "few_shot", "load_crossfit"]

#: Seeds of the five published few-shot samples of each task.
SAMPLES = (100, 13, 21, 42, 87)
#: The seven splits of the paper; ``"Random"``, CrossFit's own, can be had too.
CROSSFIT_SPLITS = ("CLS-45", "CLS-23", "CLS-0", "MCQA", "MRC", "NLI", "Paraphrase")
#: Of the rows kept of a long test set.
CAP_SEED = 0
#: In the training *and* the evaluation list of NLI as published.
LEAKED = {"NLI": ("sick",)}

_FORMS: dict[str, TextForm] = {
    "classification": "classification",
    "multiple_choice": "multiple_choice",
    "text2text": "text_to_text",
    "text_to_text": "text_to_text",
}


class LocalTask(NamedTuple):
    """The records of one task by part, and the form they declare, if any."""

    records: Mapping[str, Sequence[Record]]
    form: TextForm | None = None


@cache
def crossfit_facts() -> dict[str, Any]:
    """Read metric, builder, shots and labels of the 160 tasks, and the splits; facts of the upstream repository."""
    facts: dict[str, Any] = json.loads((resources.files("pyro_lift.data") / "crossfit.json").read_text("utf-8"))
    return facts


def load_crossfit(
    split: str | Mapping[str, Sequence[str]] = "CLS-45",
    root: str | Path | None = None,
    *,
    sample: int | None = None,
    dedupe: bool = False,
    hub: bool = False,
    test_rows: int | None = 1000,
) -> TaskCollection[TextTask]:
    """Load the tasks of a split; those that cannot be had are listed in ``missing``.

    Local data is one of: a file or a folder of files of records with the fields ``task``, ``split``, ``input``,
    ``output`` and, where there are any, ``options``; or a folder with a folder for each task that holds CrossFit's own
    ``TASK_16_SEED_train.tsv`` (also ``.jsonl``), ``_dev`` and ``_test``, or ``train.jsonl``, ``dev.jsonl`` and
    ``test.jsonl`` (also Parquet).

    Args:
        split: a name of :data:`CROSSFIT_SPLITS` or ``"Random"``; or ``{"train": names, "dev": names, "test": names}``.
        root: the local data; None for none.
        sample: which few-shot sample, a seed of :data:`SAMPLES`. None takes the rows as they are stored (of CrossFit's
            own files those of the first seed). Where no file names the seed, train and dev rows are pooled and drawn
            again with it: other draws than the published ones, but five of them.
        dedupe: leave out of ``train`` what the published split also evaluates on (``sick`` in NLI).
        hub: fetch tasks that are not in ``root`` from the Hugging Face hub, where ``crossfit.json`` knows how.
        test_rows: longest test set kept, a random choice with a fixed seed; None keeps all rows.

    Raises:
        ValueError: an unknown split, sample or task name; no task at all; a bad record, with file and line.
        FileNotFoundError: no such root.
    """
    name, wanted = _split(split)
    if sample is not None and sample not in SAMPLES:
        raise ValueError(f"sample={sample!r}: expected one of {SAMPLES} or None.")
    if test_rows is not None:
        check_number("test_rows", test_rows, least=1, open_below=False, whole=True)
    notes = []
    both = [task for task in wanted["train"] if task in wanted["test"]]
    if both and dedupe:
        wanted = {**wanted, "train": [task for task in wanted["train"] if task not in both]}
        notes.append(f"left out of train, because also evaluated on: {', '.join(both)}.")
    elif both:
        notes.append(f"in train and in test, as published: {', '.join(both)} (dedupe=True leaves it out of train).")
    names = {task for part in wanted.values() for task in part}
    local = {} if root is None else _find_local(Path(root), names, sample)
    tasks: dict[str, TextTask] = {}
    capped = []
    for task in sorted(names):
        made = _text_task(task, local[task], sample) if task in local else _from_hub(task, sample) if hub else None
        if made is None:
            continue
        if test_rows is not None and len(made.test) > test_rows:
            capped.append(task)
            made = replace(made, test=_choose(made.test, test_rows))
        tasks[task] = made
    if not tasks:
        where = f"in {root}" if root is not None else "given (root=None)"
        raise ValueError(f"none of the {len(names)} tasks of {name} is {where}; pass root=FOLDER or hub=True.")
    if capped:
        notes.append(f"test sets cut to {test_rows} rows, seed {CAP_SEED}: {', '.join(capped)}.")
    if sample is not None and any(task in tasks and not _seeded(local[task]) for task in local):
        notes.append(f"sample {sample} drawn again from the stored train and dev rows; not CrossFit's published draw.")
    parts = {part: tuple(tasks[task] for task in of if task in tasks) for part, of in wanted.items()}
    missing = {part: tuple(task for task in of if task not in tasks) for part, of in wanted.items()}
    return TaskCollection(f"CrossFit {name}", **parts, missing=missing, notes=tuple(notes))


def _split(split: str | Mapping[str, Sequence[str]]) -> tuple[str, dict[str, list[str]]]:
    facts = crossfit_facts()
    if isinstance(split, str):
        check_choice("split", split, facts["splits"])
        return split, facts["splits"][split]
    for part, names in split.items():
        check_choice("part of split", part, ["train", "dev", "test"])
        for task in names:
            check_choice("task", task, facts["tasks"])
    return "own split", {part: list(split.get(part, ())) for part in ("train", "dev", "test")}


def _find_local(root: Path, names: set[str], sample: int | None) -> dict[str, LocalTask]:
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder; root should hold CrossFit's data.")
    local: dict[str, LocalTask] = {}
    files = [root] if root.is_file() else record_files(root)
    # A folder for several benchmarks keeps ours apart by name.
    for path in [path for path in files if path.name.startswith("crossfit")] or files:
        for task, task_records in _by_task(path, names).items():
            if task in local:
                raise ValueError(f"{path}: task {task!r} is in another file of {root} as well; keep one of them.")
            local[task] = task_records
    for task in sorted(names) if root.is_dir() else ():
        folder = root / task
        if task not in local and folder.is_dir():
            records = _folder_records(folder, task, sample)
            if records:
                local[task] = LocalTask(records)
    return local


def _by_task(path: Path, names: set[str]) -> dict[str, LocalTask]:
    """Sort the wanted tasks of one file of records that name their task and split."""
    rows: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    forms: dict[str, TextForm] = {}
    for record in read_records(path):
        for key in ("task", "split"):
            if not isinstance(record.fields.get(key), str):
                raise ValueError(
                    f"{record.place}: no field {key!r}; every record of a file for several tasks needs it."
                )
        task, part = record.fields["task"], record.fields["split"]
        if task not in names:
            continue
        known = part_of(part)
        if known is None:
            raise ValueError(f"{record.place}: split {part!r} is not one of 'train', 'dev', 'test'.")
        if "type" in record.fields:
            kind = record.fields["type"]
            if not isinstance(kind, str) or kind not in _FORMS:
                raise ValueError(f"{record.place}: type {kind!r} is not one of {', '.join(_FORMS)}.")
            if forms.setdefault(task, _FORMS[kind]) != _FORMS[kind]:
                raise ValueError(f"{record.place}: type {kind!r}, but {forms[task]!r} in an earlier row of {task!r}.")
        rows[task][known].append(record)
    return {task: LocalTask(parts, forms.get(task)) for task, parts in rows.items()}


def _folder_records(folder: Path, task: str, sample: int | None) -> dict[str, list[Record]]:
    """Read CrossFit's layout, one file for each seed and part; else one file for each part."""
    files = record_files(folder)
    seed = SAMPLES[0] if sample is None else sample
    pattern = re.compile(rf"{re.escape(task)}_(?:16|32)_{seed}_(train|dev|test)\.")
    named: dict[str, Path] = {}
    for path in files:
        if match := pattern.match(path.name):
            if match[1] in named:
                raise ValueError(f"{path}: the {match[1]} part is {named[match[1]].name} as well; keep one of them.")
            named[match[1]] = path
    named = named or part_files(folder)
    return {part: list(read_records(path)) for part, path in named.items()}


def _seeded(local: LocalTask) -> bool:
    """Tell whether the files themselves name the few-shot seed."""
    first = local.records["train"][0].place if local.records.get("train") else ""
    return any(f"_{seed}_train." in first for seed in SAMPLES)


def _text_task(name: str, local: LocalTask, sample: int | None) -> TextTask:
    facts = crossfit_facts()["tasks"][name]
    for part in ("train", "test"):
        if not local.records.get(part):
            places = [rows[0].place for rows in local.records.values() if rows]
            raise ValueError(f"task {name!r}: the {part} split is empty" + (f" (see {places[0]})." if places else "."))
    first = text_row(local.records["train"][0])
    form = local.form or _form(facts, first)
    labels = _labels(facts, local.records) if form == "classification" else ()
    rows = {
        part: [text_row(record, form, labels) for record in local.records.get(part, ())]
        for part in ("train", "dev", "test")
    }
    if sample is not None and not _seeded(local):
        pool = [*rows["train"], *rows["dev"]]
        rows["train"], rows["dev"] = few_shot(pool, facts["shots"], sample, by_class=form == "classification")
    train, dev, test = (tuple(rows[part]) for part in ("train", "dev", "test"))
    return TextTask(name, train, dev, test, form, facts["metric"], labels)


def _form(facts: Mapping[str, Any], first: TextRow) -> TextForm:
    if facts["builder"] == "classification" and facts["metric"] != "Pearson-Correlation":
        return "classification"
    return "multiple_choice" if first.options else "text_to_text"


def _labels(facts: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> tuple[str, ...]:
    """Choose CrossFit's labels in their order; the records' options where they are others; else train's answers."""
    known = tuple(facts.get("labels", ()))
    first = text_row(records["train"][0], "classification")
    if known and (not first.options or set(known) == set(first.options)):
        return known
    answers = [text_row(record, "classification").outputs[0] for record in records["train"]]
    return first.options or infer_labels(answers, records["train"][0].place)


def few_shot(rows: Sequence[TextRow], shots: int, seed: int, *, by_class: bool) -> tuple[list[TextRow], list[TextRow]]:
    """Draw train and dev as CrossFit: shuffle, then the first ``shots`` rows and the next (of each class).

    A class with fewer than twice as many rows gives half of them to each. The shuffle is numpy's legacy one, so the
    same rows in the same order give the published sample.
    """
    order = np.random.RandomState(seed).permutation(len(rows))
    groups: dict[str, list[TextRow]] = defaultdict(list)
    for index in order:
        groups[rows[index].outputs[0] if by_class else ""].append(rows[index])
    train, dev = [], []
    for group in groups.values():
        n = min(shots, -(-len(group) // 2))
        train += group[:n]
        dev += group[n : n + shots]
    return train, dev


def _choose(rows: Sequence[TextRow], n: int) -> tuple[TextRow, ...]:
    kept = np.random.default_rng(CAP_SEED).choice(len(rows), n, replace=False)
    return tuple(rows[index] for index in sorted(kept))


def _from_hub(name: str, sample: int | None) -> TextTask | None:
    """Fetch a task by its recipe in ``crossfit.json``; None where there is no recipe."""
    from datasets import load_dataset

    facts = crossfit_facts()["tasks"][name]
    recipe = facts.get("hub")
    if recipe is None:
        return None
    seed = SAMPLES[0] if sample is None else sample

    def rows(splits: str) -> list[TextRow]:
        return [
            row
            for split in splits.split("+")
            for row in _recipe_rows(
                load_dataset(recipe["path"], recipe.get("config"), split=split),
                recipe,
                facts,
                f"{recipe['path']}, {split}",
            )
        ]

    pool = rows(recipe["train"])
    if recipe["test"]:
        test = rows(recipe["test"])
    else:  # upstream: a seeded 80/20 split where the data set has no validation part
        order = np.random.RandomState(42).permutation(len(pool))
        cut = len(pool) * 4 // 5
        pool, test = [pool[i] for i in order[:cut]], [pool[i] for i in order[cut:]]
    form: TextForm = (
        "classification" if "label" in recipe else "multiple_choice" if "options" in recipe else "text_to_text"
    )
    train, dev = few_shot(pool, facts["shots"], seed, by_class=form == "classification")
    labels = tuple(facts["labels"]) if form == "classification" else ()
    return TextTask(name, tuple(train), tuple(dev), tuple(test), form, facts["metric"], labels)


def _recipe_rows(
    data: Iterable[Mapping[str, Any]], recipe: Mapping[str, Any], facts: Mapping[str, Any], where: str
) -> list[TextRow]:
    rows = []
    for number, fields in enumerate(data):
        try:
            text = recipe["input"].format(**fields)
            if "label" in recipe:
                label = fields[recipe["label"]]
                if isinstance(label, int) and not 0 <= label < len(facts["labels"]):
                    continue  # the hub marks unlabelled rows with -1
                rows.append(TextRow(text, (facts["labels"][label] if isinstance(label, int) else label,)))
            elif "options" in recipe:
                options = _options(fields, recipe["options"])
                rows.append(TextRow(text, (options[_answer(fields, recipe)],), options))
            else:
                output = _path(fields, recipe["output"])
                rows.append(TextRow(text, (output,) if isinstance(output, str) else tuple(output)))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{where}, row {number}: not as crossfit.json expects it ({error!r}).") from error
    return rows


def _path(fields: Mapping[str, Any], path: str) -> Any:
    value: Any = fields
    for key in path.split("."):
        value = value[key]
    return value


def _options(fields: Mapping[str, Any], where: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(_path(fields, where)) if isinstance(where, str) else tuple(fields[key] for key in where)


def _answer(fields: Mapping[str, Any], recipe: Mapping[str, Any]) -> int:
    """Find the right option: by its key among the keys, by letter, or by number counted from ``first``."""
    answer = fields[recipe["answer"]]
    if "keys" in recipe:
        return list(_path(fields, recipe["keys"])).index(answer)
    if isinstance(answer, str) and answer.isalpha():
        return ord(answer.upper()) - ord("A")
    return int(answer) - int(recipe.get("first", 0))
