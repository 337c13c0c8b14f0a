"""Inputs of a prediction: every mapping, array and list of numbers reads as its tensors, or is refused by name."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from pyro_lift import Task, TaskPosterior
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone

X, MASK = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(5, 4)
INPUTS = {"x": X, "mask": MASK}
LABELS = torch.arange(5) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.a(x if mask is None else x * mask)
        return out


@pytest.fixture(scope="module")
def adapter() -> RandomAdapter:
    return adapt_backbone(Net(), peft.LoraConfig(r=1, target_modules=["a"], init_lora_weights=False))


def predictors(adapter: RandomAdapter, train: Any = INPUTS) -> list[Any]:
    task = Task("t", (train, LABELS))
    thetas = adapter.initial.expand(2, -1)
    return [TaskPosterior(adapter, task, thetas), Ensemble(adapter, task, thetas)]


class Custom(dict[str, Tensor]):
    pass


class DictOfBatches(UserDict[str, Tensor]):
    def __len__(self) -> int:  # as a batch of a data library counts its rows
        return 5


MAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "dict": dict,
    "BatchEncoding": BatchEncoding,
    "UserDict": UserDict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda inputs: defaultdict(list, inputs),
    "ChainMap": lambda inputs: ChainMap({"x": inputs["x"]}, {"mask": inputs["mask"]}),
    "MappingProxyType": MappingProxyType,
    "a subclass": Custom,
    "a length of its own": DictOfBatches,
    "arrays": lambda inputs: {name: x.numpy() for name, x in inputs.items()},
    "float64 arrays": lambda inputs: {name: x.double().numpy() for name, x in inputs.items()},
    "half": lambda inputs: {"x": inputs["x"], "mask": inputs["mask"].half()},
    "whole numbers": lambda inputs: {"x": inputs["x"], "mask": inputs["mask"].long()},
    "lists": lambda inputs: {name: x.tolist() for name, x in inputs.items()},
    "another order": lambda inputs: {"mask": inputs["mask"], "x": inputs["x"]},
    "a gradient": lambda inputs: {"x": inputs["x"].clone().requires_grad_(), "mask": inputs["mask"]},
    "not contiguous": lambda inputs: {"x": inputs["x"].T.contiguous().T, "mask": inputs["mask"]},
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_is_read_alike(name: str, adapter: RandomAdapter) -> None:
    for predictor in predictors(adapter):
        got = predictor.predict(MAPPINGS[name](INPUTS))
        torch.testing.assert_close(got, predictor.predict(INPUTS), atol=1e-6, rtol=0.0)
        assert not got.requires_grad


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_task_reads_every_mapping_alike(name: str) -> None:
    made = MAPPINGS[name](INPUTS)
    task = Task("t", (made, LABELS))
    assert set(task.train.inputs) == set(INPUTS) and len(task.train) == 5
    if name in ("UserDict", "BatchEncoding", "OrderedDict", "a subclass"):
        assert len(Task("t", type(made)({**made, "labels": LABELS})).train) == 5


BARE: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x,
    "an array": lambda x: x.numpy(),
    "a float64 array": lambda x: x.double().numpy(),
    "lists": lambda x: x.tolist(),
    "a tuple of rows": lambda x: tuple(x.tolist()),
    "an array in another order": lambda x: np.asfortranarray(x.numpy()),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_inputs_are_read_alike(name: str, adapter: RandomAdapter) -> None:
    for predictor in predictors(adapter, X):
        torch.testing.assert_close(predictor.predict(BARE[name](X)), predictor.predict(X), atol=1e-6, rtol=0.0)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "an empty mapping"),
    "an empty BatchEncoding": (BatchEncoding({}), "an empty mapping"),
    "one that is missing": ({"x": X}, "'mask' is missing"),
    "a bare tensor": (X, "a Tensor given, .* 2 inputs: 'mask', 'x'. Give a mapping"),
    "other lengths": ({"x": X, "mask": MASK[:3]}, "'mask' has 3 rows, 'x' 5"),
    "no rows": ({"x": X[:0], "mask": MASK[:0]}, "'x' has no rows"),
    "strings": ({"x": ["a", "b"], "mask": MASK[:2]}, r"inputs\['x'\]: strings; encode them first"),
    "texts": (["a", "b"], "strings; encode them first"),
    "one text": ("a text", "strings; encode them first|the string 'a text'; give a list of strings"),
    "a pair": ((X, LABELS), "without the targets"),
    "None": ({"x": X, "mask": None}, r"inputs\['mask'\]: a NoneType"),
    "a number": (3.0, "a float"),
    "a single row's scalar": (torch.tensor(1.0), r"shape \[\]"),
    "not finite": ({"x": X / 0.0, "mask": MASK}, "not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_rows_of_numbers_is_refused_by_name(name: str, adapter: RandomAdapter) -> None:
    inputs, message = WRONG[name]
    for predictor in predictors(adapter):
        with pytest.raises((TypeError, ValueError), match=message):
            predictor.predict(inputs)


def test_numbers_of_another_kind_than_the_tasks_are_refused(adapter: RandomAdapter) -> None:
    for predictor in predictors(adapter, {"x": X, "mask": MASK.long()}):
        with pytest.raises(TypeError, match=r"'mask' of torch.float32, but the task's own rows are torch.int64"):
            predictor.predict(INPUTS)


def test_numbers_that_the_tasks_type_does_not_hold_are_refused_and_others_read_alike(adapter: RandomAdapter) -> None:
    pixels = torch.tensor([[0, 100, 200, 255]] * 5, dtype=torch.uint8)
    for predictor in predictors(adapter, {"x": X, "mask": pixels}):
        same = predictor.predict({"x": X, "mask": pixels})
        torch.testing.assert_close(predictor.predict({"x": X, "mask": pixels.long()}), same)
        for wrong, named in ((pixels.long() + 1, 256), (pixels.long() - 1, -1)):
            with pytest.raises(
                ValueError, match=rf"'mask': {named} does not fit into torch.uint8, the type of the task"
            ):
                predictor.predict({"x": X, "mask": wrong})
    for predictor in predictors(adapter):
        with pytest.raises(ValueError, match=r"'x': 1e\+300 does not fit into torch.float32"):
            predictor.predict({"x": X.double() * 0.0 + 1e300, "mask": MASK})


def test_the_callers_inputs_are_left_as_they_were(adapter: RandomAdapter) -> None:
    inputs = BatchEncoding({name: x.clone() for name, x in INPUTS.items()})
    for predictor in predictors(adapter):
        predictor.predict(inputs)
    assert list(inputs) == ["x", "mask"] and all(torch.equal(inputs[name], x) for name, x in INPUTS.items())
