"""Tensors, data sets, predictions and collections, odd and damaged, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from odd_arrays import WORDS, npz
from odd_input import Odd, Refused, nothing, text
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from pyro_lift import Task
from pyro_lift.data import load_tasks
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.metrics import probabilities as measures
from pyro_lift.metrics.text import score
from pyro_lift.models.likelihoods import log_likelihood


def tensors(**given: torch.Tensor) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        save_file({"x": torch.zeros(4, 3), **given}, folder / "train.safetensors")
        return folder

    return lay


def kind_of(folder: Path) -> tuple[str, torch.dtype, Any]:
    task = read_tensor_task(folder)
    return task.kind, task.train.target.dtype, task.num_classes


def task(data: Any, *args: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda _: Task("t", data() if callable(data) else data, *args, **options)


def targets(made: Task) -> list[int]:
    return made.train.target.tolist()


def read(make: Callable[[Path], Any], use: Callable[[Any], Any] = targets) -> Callable[[Path], Any]:
    return lambda folder: use(make(folder))


def split(content: str) -> Callable[[Path], Path]:
    """A folder with one task and a split.json."""

    def lay(folder: Path) -> Path:
        (folder / "split.json").write_text(content)
        (folder / "a").mkdir()
        text('{"input": "a", "output": "b"}')(folder / "a")
        return folder

    return lay


def dataset(**columns: Any) -> Callable[[], Any]:
    def make() -> Any:
        from datasets import Dataset

        return Dataset.from_dict(columns)

    return make


INPUT, LABEL = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
P = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
TRUTH = torch.tensor([0, 1, 1])
TENSORS: dict[str, Odd] = {
    "uint8 labels": Odd(tensors(labels=LABEL.to(torch.uint8)), kind_of, ("classification", torch.int64, 2)),
    "int32 labels": Odd(tensors(labels=LABEL.int()), kind_of, ("classification", torch.int64, 2)),
    "boolean labels": Odd(tensors(labels=LABEL.bool()), kind_of, ("classification", torch.int64, 2)),
    "float labels are regressed on": Odd(tensors(labels=LABEL.float()), kind_of, ("regression", torch.float32, None)),
    "labels of three dimensions": Odd(
        tensors(labels=torch.zeros(4, 2, 2).long()), kind_of, Refused(r"labels have shape \[4, 2, 2\]")
    ),
    "no labels": Odd(tensors(), kind_of, Refused(r"train\.safetensors: no tensor 'labels' among x")),
    "an empty tensor file": Odd(text(b"", "train.safetensors"), kind_of, Refused("not a safetensors file")),
    "targets in a column": Odd(
        nothing, read(task((INPUT, LABEL[:, None]))), Refused(r"task 't', train data: .*\[4, 1\].*squeeze")
    ),
    "targets in one-hot rows": Odd(
        nothing, read(task((INPUT, torch.eye(2)[LABEL]))), Refused(r"shape \[4, 2\].*argmax")
    ),
    "one target for all": Odd(nothing, read(task((INPUT, torch.tensor(1)))), Refused(r"the targets have shape \[\]")),
    "float targets of classes": Odd(
        nothing, read(task((INPUT, LABEL.float()))), Refused("expected whole-number targets")
    ),
    "a huge label": Odd(
        nothing, read(task((INPUT, torch.tensor([0, 1, 2, 2**40])))), Refused("label 1099511627776 would make")
    ),
    "words for targets": Odd(
        nothing, read(task((INPUT, WORDS))), Refused("targets cannot be made a tensor of numbers .*strings")
    ),
    "a missing target": Odd(nothing, read(task((INPUT, [0, None, 1, 1]))), Refused("a value is missing: None")),
    "rows of unequal length": Odd(
        nothing, read(task(([[1.0], [1.0, 2.0]], [0, 1]))), Refused("inputs cannot be made a tensor of numbers")
    ),
    "arrays of unsigned numbers": Odd(
        nothing, read(task((np.zeros((2, 3), np.float32), np.array([0, 1], np.uint16)))), [0, 1]
    ),
    "arrays of another byte order": Odd(
        nothing, read(task((np.zeros((2, 3), ">f4"), np.array([0, 1], ">i8")))), [0, 1]
    ),
    "arrays read backwards": Odd(
        nothing, read(task((np.zeros((2, 3), np.float32)[::-1], np.array([0, 1])[::-1]))), [1, 0]
    ),
    "NaN in an input": Odd(
        nothing, read(task((torch.tensor([[0.0], [np.nan]]), [0, 1]))), Refused(r"not finite \(row 1\)")
    ),
    "infinity in a regression": Odd(
        nothing, read(task((INPUT, torch.full((4,), torch.inf)), "regression")), Refused("not finite")
    ),
    "complex inputs": Odd(nothing, read(task((INPUT.to(torch.complex64), LABEL))), Refused("inputs is complex")),
    "whole numbers to regress on": Odd(nothing, read(task((INPUT, LABEL), "regression")), [0.0, 1.0, 0.0, 1.0]),
    "no token that counts": Odd(
        nothing, read(task((INPUT, torch.full((4, 2), -100)), "tokens")), Refused("no token counts")
    ),
    "tokens without a length": Odd(
        nothing, read(task((INPUT, LABEL), "tokens")), Refused(r"tokens have shape \[4\]; expected .*\[n, L\]")
    ),
    "a test part with other inputs": Odd(
        nothing,
        read(task({"x": INPUT, "labels": LABEL}, test={"z": INPUT, "labels": LABEL})),
        Refused(r"test data: inputs \['z'\]"),
    ),
    "a label name twice": Odd(
        nothing, read(task((INPUT, LABEL), labels=["a", "a"])), Refused("task 't', labels: 'a' stands twice")
    ),
    "both label and labels": Odd(
        nothing, read(task({"x": INPUT, "labels": LABEL, "label": LABEL})), Refused("both 'labels' and 'label'")
    ),
    "a data set with a missing label": Odd(
        nothing, read(task(dataset(x=[[1.0], [2.0]], label=[0, None]))), Refused("label.* row 1: .*missing")
    ),
    "a data set of strings": Odd(
        nothing, read(task(dataset(x=[[1.0], [2.0]], label=["a", "b"]))), Refused("holds strings; number the")
    ),
    "a torch data set": Odd(nothing, read(task(TensorDataset(INPUT, LABEL))), [0, 1, 0, 1]),
    "a loader": Odd(nothing, read(task(DataLoader(TensorDataset(INPUT, LABEL), batch_size=3))), [0, 1, 0, 1]),
    "a loader that drops rows": Odd(
        nothing,
        read(task(DataLoader(TensorDataset(INPUT, LABEL), batch_size=3, drop_last=True))),
        Refused("drops 1 of 4 rows"),
    ),
    "a list of pairs": Odd(nothing, read(task([(INPUT, LABEL)])), Refused("list given; expected")),
    "accuracy of a column": Odd(
        nothing, lambda _: measures.accuracy(P, TRUTH[:, None]), Refused(r"\[3, 2\] and targets \[3, 1\]")
    ),
    "nll of a column": Odd(nothing, lambda _: measures.nll(P, TRUTH[:, None]), Refused(r"nll: .*\[3, 1\]")),
    "ece of a column": Odd(
        nothing, lambda _: measures.expected_calibration_error(P, TRUTH[:, None]), Refused(r"\[3, 1\]")
    ),
    "accuracy of one class": Odd(nothing, lambda _: measures.accuracy(P[:, 0], TRUTH), Refused(r"shape \[3\]")),
    "accuracy of nothing": Odd(nothing, lambda _: measures.accuracy(P[:0], TRUTH[:0]), Refused("no rows")),
    "accuracy of a class too many": Odd(
        nothing, lambda _: measures.accuracy(P, TRUTH + 1), Refused("target 2 is outside the 2 classes")
    ),
    "nll of logits": Odd(nothing, lambda _: measures.nll(10 * P - 5, TRUTH), Refused("are no probabilities")),
    "nll of what is no number": Odd(
        nothing, lambda _: measures.nll(P * torch.nan, TRUTH), Refused("are no probabilities")
    ),
    "uint8 targets of a score": Odd(nothing, lambda _: round(measures.accuracy(P, TRUTH.to(torch.uint8)), 3), 0.667),
    "a likelihood of a column": Odd(
        nothing,
        lambda _: log_likelihood("classification", P.log(), TRUTH[:, None]),
        Refused(r"\[3, 2\] and the target \[3, 1\]"),
    ),
    "a regression against a column": Odd(
        nothing,
        lambda _: log_likelihood("regression", P[:, 0], P[:, :1]),
        Refused(r"output has shape \[3\] and the target \[3, 1\]"),
    ),
    "a regression of one output on two": Odd(
        nothing, lambda _: log_likelihood("regression", P[:, :1], P), Refused(r"\[3, 1\] and the target \[3, 2\]")
    ),
    "tokens the other way round": Odd(
        nothing,
        lambda _: log_likelihood("tokens", torch.zeros(2, 3, 5), torch.zeros(3, 2).long()),
        Refused(r"\[2, 3, 5\] and the target"),
    ),
    "predictions that are one string": Odd(
        nothing, lambda _: score("ACC", "ab", [["a"], ["b"]]), Refused("predictions is the string 'ab'")
    ),
    "predictions that are numbers": Odd(
        nothing, lambda _: score("EM", cast("list[str]", [1]), [["1"]]), Refused("row 0: 1 is a int; expected strings")
    ),
    "two tasks of one name": Odd(nothing, lambda _: _collection("t", "t"), Refused("'t' stands twice")),
    "pictures with targets in a column": Odd(
        nothing,
        lambda _: ImageTask("t", _images(torch.zeros(2, 1).long()), ("a",)),
        Refused(r"train data: targets have shape \[2, 1\]"),
    ),
    "a text task with half an emoji": Odd(
        nothing,
        lambda _: TextTask("t", (TextRow("a \ud83d", ("b",)),)),
        Refused("train row 0: the input holds half a character"),
    ),
    "an answer that is one string": Odd(
        nothing,
        lambda _: TextTask("t", (TextRow("a", "xyz"),)),  # type: ignore[arg-type]
        Refused("train row 0: outputs and options are tuples of strings"),
    ),
    "a place with a task twice": Odd(
        lambda f: (npz()(f).rename(f / "a.npz"), (f / "a").mkdir(), f)[2],
        lambda f: load_tasks("folder", root=f),
        Refused("'a' stands twice"),
    ),
    "a split that names a task twice": Odd(
        split('{"train": ["a"], "test": ["a"]}'),
        lambda f: load_tasks("folder", root=f),
        Refused(r"split\.json: 'a' stands twice"),
    ),
    "a split of a part that is none": Odd(
        split('{"trian": ["a"]}'),
        lambda f: load_tasks("folder", root=f),
        Refused(r"split\.json: part of split='trian'"),
    ),
    "a folder that is no task": Odd(
        lambda f: ((f / "raw").mkdir(), split('{"train": ["a", "b"]}')(f))[1],
        lambda f: (lambda c: (c.notes, dict(c.missing)["train"]))(load_tasks("folder", root=f)),
        (("in the folder and no tasks: raw.",), ("b",)),
    ),
    "a split that is a string": Odd(
        split('{"train": "a"}'),
        lambda f: load_tasks("folder", root=f),
        Refused(r"split\.json: 'train' is 'a'; expected a list"),
    ),
}


def _images(target: torch.Tensor) -> Any:
    return Images(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), target)


def _collection(*names: str) -> Any:
    return TaskCollection("c", tuple(Task(name, (INPUT, LABEL)) for name in names))
