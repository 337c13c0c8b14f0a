"""Records and tables of text, odd and damaged, and what is right."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from odd_input import Odd, Refused, text

from pyro_lift.data.folder import read_task
from pyro_lift.data.text import TextTask


def with_json(content: str) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        (folder / "train.jsonl").write_text('{"input": "a", "label": "x"}\n{"input": "b", "label": "y"}\n')
        (folder / "task.json").write_text(content)
        return folder

    return lay


def files(**named: str) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        for name, content in named.items():
            (folder / name.replace("_", ".")).write_text(content)
        return folder

    return lay


def train_rows(folder: Path) -> list[tuple[Any, ...]]:
    task = read_task(folder)
    assert isinstance(task, TextTask)
    return [tuple(row) for row in task.train]


def labels(folder: Path) -> tuple[str, ...]:
    return read_task(folder).labels or ()


def answers(folder: Path) -> list[tuple[str, ...]]:
    return [row[1] for row in train_rows(folder)]


def record(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def parquet(column: list[Any]) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        from pyarrow import table
        from pyarrow.parquet import write_table

        write_table(table({"input": ["a"] * len(column), "label": column}), folder / "train.parquet")
        return folder

    return lay


CLASSES = {"form": "classification"}
GOOD = record(input="a", output="b")
TEXTS: dict[str, Odd] = {
    # --- labels and answers
    "a label twice": Odd(with_json('{"labels": ["x", "y", "x"]}'), labels, Refused(r"task\.json.*'x' stands twice")),
    "a label twice but for a blank": Odd(
        with_json('{"labels": ["x", "y", "x "]}'), labels, Refused("'x' stands twice")
    ),
    "a blank label": Odd(with_json('{"labels": ["x", " ", "y"]}'), labels, Refused(r"task\.json: label 1 is blank")),
    "labels as one string": Odd(with_json('{"labels": "xy"}'), labels, Refused(r"task\.json: 'labels' is 'xy'")),
    "labels without a form": Odd(with_json('{"labels": ["y", "x"]}'), labels, ("y", "x")),
    "labels of another form": Odd(
        with_json('{"form": "text_to_text", "labels": ["x"]}'), labels, Refused("'labels' with form 'text_to_text'")
    ),
    "labels as numbers": Odd(
        text(record(input="a", label=0) + record(input="b", label=1), **CLASSES, labels=[0, 1]), labels, ("0", "1")
    ),
    "labels as whole floats": Odd(
        text(record(input="a", label=0.0) + record(input="b", label=1), **CLASSES, labels=[0, 1]), labels, ("0", "1")
    ),
    "labels as booleans": Odd(
        text(record(input="a", label=True) + record(input="b", label=False), **CLASSES, labels=[False, True]),
        labels,
        ("false", "true"),
    ),
    "a label with a blank behind it": Odd(
        text(record(input="a", label="yes") + record(input="b", label="yes "), **CLASSES), labels, ("yes",)
    ),
    "labels that differ in case": Odd(
        text(record(input="a", label="Yes") + record(input="b", label="yes"), **CLASSES),
        labels,
        Refused(r"train\.jsonl: labels 'Yes' and 'yes' differ in letter case"),
    ),
    "labels that differ in Unicode form": Odd(
        text(record(input="a", label="caf\u00e9") + record(input="b", label="cafe\u0301"), **CLASSES),
        labels,
        Refused("differ in letter case or blanks"),
    ),
    "a class of the test part alone": Odd(
        files(
            train_jsonl=record(input="a", label="x"),
            test_jsonl=record(input="a", label="z"),
            task_json='{"form": "classification"}',
        ),
        labels,
        Refused(r"test\.jsonl:1: label 'z' is not one of 'x'"),
    ),
    "a second answer that is no label": Odd(
        text(record(input="a", output=["x", "q"]), **CLASSES, labels=["x", "y"]), labels, Refused(r":1: label 'q'")
    ),
    "an empty answer": Odd(text(record(input="a", output="")), answers, Refused(r"train\.jsonl:1: the output is ''")),
    "an answer that is missing": Odd(text(record(input="a", output=None)), answers, Refused(":1: 'output' is None")),
    "an answer that is a table": Odd(text(record(input="a", output={"b": 1})), answers, Refused(":1: 'output' is {")),
    "a blank among answers": Odd(text(record(input="a", output=["b", " "])), answers, [("b",)]),
    "answers as numbers": Odd(text(record(input="a", output=[1, 2.5])), answers, [("1", "2.5")]),
    "an empty input": Odd(text(record(input=" ", output="b")), answers, Refused(r":1: the input is ' '")),
    "an empty input of a next line": Odd(text(record(input="", output="b"), form="next_token"), answers, [("b",)]),
    "options that stand twice": Odd(
        text(record(input="a", output="x", options=["x", "y", "x"])), train_rows, [("a", ("x",), ("x", "y"))]
    ),
    "options as numbers": Odd(
        text(record(input="a", output=2, options=[1, 2])), train_rows, [("a", ("2",), ("1", "2"))]
    ),
    "options as one string": Odd(
        text(record(input="a", output="x", options="xy")), answers, Refused(":1: 'options' is 'xy'")
    ),
    "options of some rows": Odd(
        text(record(input="a", output="x", options=["x", "y"]) + GOOD),
        answers,
        Refused(r":2: no options, but other rows"),
    ),
    "no options in multiple choice": Odd(
        text(record(input="a", output="x", options=[]), form="multiple_choice"), answers, Refused("without options")
    ),
    "an answer that is no option": Odd(
        text(record(input="a", output="z", options=["x", "y"])),
        answers,
        Refused(":1: answer 'z' is not one of 'x', 'y'"),
    ),
    "options that are not the labels": Odd(
        text(record(input="a", label="x", options=["x", "q"]), **CLASSES, labels=["x", "y"]),
        labels,
        Refused("option 'q'"),
    ),
    # --- JSON
    "a key twice": Odd(
        text('{"input": "a", "output": "b", "output": "c"}'), answers, Refused(":1: key 'output' stands twice")
    ),
    "NaN in JSON": Odd(text('{"input": "a", "output": NaN}'), answers, Refused(":1: NaN is no value of JSON")),
    "infinity in JSON": Odd(text('{"input": "a", "output": -Infinity}'), answers, Refused(":1: -Infinity is no value")),
    "JSON nested without end": Odd(text("[" * 100_000), answers, Refused(r"train\.jsonl:1: not JSON")),
    "a number of 5000 digits": Odd(
        text('{"input": "a", "output": ' + "9" * 5000 + "}"), answers, Refused(":1: not JSON")
    ),
    "half an emoji": Odd(
        text('{"input": "bad \\ud83d half", "output": "b"}'), answers, Refused(":1: the input holds half a ch")
    ),
    "half an emoji in an answer": Odd(
        text('{"input": "a", "output": "\\udc00"}'), answers, Refused("the output holds half")
    ),
    "a NUL": Odd(
        text('{"input": "a\\u0000b", "output": "b"}'), answers, Refused("the input holds a NUL character at place 1")
    ),
    "a list in a JSONL file": Odd(
        text("[" + GOOD.strip() + "]"), answers, Refused(":1: a JSON list; expected an object")
    ),
    "a form that is none": Odd(
        with_json('{"form": "clasification"}'), labels, Refused(r"task\.json: form='clasif.*'classification'")
    ),
    "a metric that is none": Odd(
        with_json('{"metric": "F1"}'), labels, Refused(r"task\.json: metric='F1' is not known")
    ),
    "a key of task.json twice": Odd(
        with_json('{"form": "classification",\n"form": "text_to_text"}'), labels, Refused("stands twice")
    ),
    "a task.json with a byte order mark": Odd(with_json('\ufeff{"labels": ["x", "y"]}'), labels, ("x", "y")),
    # --- bytes and lines
    "a byte order mark": Odd(text(b"\xef\xbb\xbf" + GOOD.encode()), train_rows, [("a", ("b",), ())]),
    "a byte order mark in a table": Odd(text(b"\xef\xbb\xbfa\tb\n", "train.tsv"), train_rows, [("a", ("b",), ())]),
    "lines that end with CR LF": Odd(text("a\tb\r\nc\td\r\n", "train.tsv"), answers, [("b",), ("d",)]),
    "lines that end with CR": Odd(
        text("a\tb\rc\td\r", "train.tsv"), answers, Refused(r"train\.tsv:1: a carriage return")
    ),
    "blank lines at the end": Odd(text(GOOD + "\n  \n\n"), answers, [("b",)]),
    "UTF-16": Odd(
        text(GOOD.encode("utf-16")), answers, Refused(r"train\.jsonl:1: the file is UTF-16; save it as UTF-8")
    ),
    "UTF-16 without a mark": Odd(text("a\tb\n".encode("utf-16-le"), "train.tsv"), answers, Refused("NUL character")),
    "Latin-1": Odd(text('{"input": "caf\xe9", "output": "b"}'.encode("latin-1")), answers, Refused(":1: not UTF-8")),
    "gzip under a plain name": Odd(
        text(gzip.compress(GOOD.encode())), answers, Refused("the file is gzip; end its name")
    ),
    "plain text under a gzip name": Odd(text(GOOD, "train.jsonl.gz"), answers, Refused("damaged gzip file")),
    "a gzip file with a wrong byte": Odd(
        text(gzip.compress(GOOD.encode())[:-8] + b"x" * 8, "train.jsonl.gz"), answers, Refused("damaged gzip file")
    ),
    "a compressed table": Odd(text(gzip.compress(b"a\tb\n"), "train.tsv.gz"), answers, [("b",)]),
    "an empty file": Odd(text(""), answers, Refused(r"train\.jsonl: the train split is empty")),
    # --- tables
    "a blank last answer": Odd(text("who?\tParis\t\n", "train.tsv"), answers, [("Paris",)]),
    "a blank first answer": Odd(text("who?\t\tParis\n", "train.tsv"), answers, [("Paris",)]),
    "nothing but blank answers": Odd(
        text("who?\t\t \n", "train.tsv"), answers, Refused(r"train\.tsv:1: the output is ''")
    ),
    "a label with a blank in a table": Odd(
        text("a\tyes\nb\tyes \nc\tno\n", "train.tsv", **CLASSES), labels, ("no", "yes")
    ),
    "no tab": Odd(text("a\tb\nc d\n", "train.tsv"), answers, Refused(r"train\.tsv:2: no tab")),
    "a header": Odd(text("input\toutput\na\tb\n", "train.tsv"), answers, [("b",)]),
    "a header of other names": Odd(
        text("sentence\tlabel\na\tb\n", "train.tsv"), answers, Refused(r"\.tsv:1: 'sentence', 'label' looks like")
    ),
    "a header in another order": Odd(text("label\ttext\nb\ta\n", "train.tsv"), answers, Refused("looks like a header")),
    "a header with numbers": Odd(
        text("text_a\ttext_b\tgold_label\na\tb\tc\n", "train.tsv"), answers, Refused("a header")
    ),
    "a header of unknown names": Odd(
        text("vraag\tantwoord\n" + "een zin\tja\nnog een\tnee\n" * 2, "train.tsv"),
        answers,
        Refused(r":1: 'vraag', 'antwoord' looks like a header"),
    ),
    "a header of two parts": Odd(
        files(train_tsv="vraag\tja_nee\na\tb\n", test_tsv="vraag\tja_nee\nc\td\n"),
        answers,
        Refused(r"test\.tsv:1: the line is the first of .*train\.tsv as well"),
    ),
    "cells quoted as CSV": Odd(
        text('"He said ""hi"""\tyes\n', "train.tsv"), answers, Refused(r"train\.tsv:1: the cell.*quoted")
    ),
    "a tab inside quotes": Odd(
        text('"a\tb"\tyes\n', "train.tsv"), answers, Refused(r"train\.tsv:1: a tab inside quotes")
    ),
    "a line end inside quotes": Odd(
        text('"a\nb"\tyes\n', "train.tsv"), answers, Refused(":1: no tab.*quoted cell spread")
    ),
    "every cell quoted": Odd(text('"a"\t"b"\n"c"\t"d"\n', "train.tsv"), answers, Refused("every cell is quoted")),
    "quotes that are text": Odd(text('"a" he said\tb\nc\td\n', "train.tsv"), answers, [("b",), ("d",)]),
    "an index before the columns": Odd(
        text("0\ta\tb\n1\tc\td\n", "train.tsv"), answers, Refused("the first column counts the lines")
    ),
    "an index with its header": Odd(
        text("\tinput\toutput\n0\ta\tb\n", "train.tsv"), answers, Refused(r"train\.tsv:1: the input is ''")
    ),
    # --- files and parts
    "a part twice": Odd(
        files(train_jsonl=GOOD, train_tsv="a\tb\n"), answers, Refused("the train part is train.jsonl as well")
    ),
    "a part under two names": Odd(
        files(train_jsonl=GOOD, dev_jsonl=GOOD, val_jsonl=GOOD), answers, Refused("the dev part is dev")
    ),
    "a part that cannot be read": Odd(
        files(train_jsonl=GOOD, test_csv="a,b\n"), answers, Refused(r"test\.csv: cannot read this kind")
    ),
    "letters in upper case": Odd(text(GOOD, "Train.JSONL"), answers, [("b",)]),
    "a hidden file beside": Odd(files(train_jsonl=GOOD, __train_jsonl="\0\0"), answers, [("b",)]),
    "a parquet null": Odd(parquet(["x", None]), answers, Refused(r"train\.parquet, row 2: 'label' is None")),
    "a parquet NaN": Odd(parquet([1.0, float("nan")]), answers, Refused(r"train\.parquet, row 2: 'label' is nan")),
    "parquet numbers with a gap": Odd(lambda f: text("", "x", **CLASSES)(parquet([1.0, 0.0])(f)), labels, ("0", "1")),
}
