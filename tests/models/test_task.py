"""The task: what it accepts, what it refuses, and what it carries along."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from pyro_lift import Task
from pyro_lift.data.text import check_labels
from pyro_lift.models.likelihoods import log_likelihood

X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])
TEXTS = {"input_ids": torch.ones(3, 2, dtype=torch.long), "attention_mask": torch.ones(3, 2, dtype=torch.long)}


def test_the_task_carries_its_metric_labels_dev_part_and_label_texts_to_a_device() -> None:
    task = Task(
        "t", (X, Y), "matching", test=(X, Y), dev=(X[:2], Y[:2]), metric="ACC", labels=list("abc"), label_texts=TEXTS
    )
    moved = task.to("cpu")
    assert (moved.num_classes, moved.metric, moved.labels) == (3, "ACC", ("a", "b", "c"))
    assert moved.dev is not None and len(moved.dev) == 2
    assert moved.label_texts is not None and set(moved.label_texts) == set(TEXTS)


def test_the_number_of_classes_is_that_of_the_labels_even_where_the_last_label_is_unseen() -> None:
    assert Task("t", (X, Y)).num_classes == 3
    assert Task("t", (X, Y), labels=["a", "b", "c", "never"]).num_classes == 4


def test_options_of_every_row_are_inputs_and_set_the_number_of_classes() -> None:
    inputs = {
        "input_ids": torch.ones(4, 5, dtype=torch.long),
        "option_input_ids": torch.ones(4, 6, 2, dtype=torch.long),
        "option_attention_mask": torch.ones(4, 6, 2, dtype=torch.long),
    }
    task = Task("t", (inputs, Y), "matching")
    assert task.num_classes == 6
    assert task.train.take(torch.tensor([1, 3])).inputs["option_input_ids"].shape == (2, 6, 2)


def test_matching_without_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="matching needs texts to match"):
        Task("t", (X, Y), "matching")


def test_disagreement_over_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels has 2, label_texts\['input_ids'\] has 3"):
        Task("t", (X, Y), "matching", labels=["a", "b"], label_texts=TEXTS)


def test_a_dev_label_outside_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="dev data: label 2 is outside"):
        Task("t", (X, Y.clamp_max(1)), dev=(X, Y))


def test_matching_is_a_classification_of_the_similarities() -> None:
    logits = torch.randn(4, 3)
    assert torch.equal(log_likelihood("matching", logits, Y), log_likelihood("classification", logits, Y))


def test_targets_may_be_the_names_that_labels_number() -> None:
    x, names = torch.zeros(4, 2), ["cat", "dog", "cat", "owl"]
    task = Task("t", (x, names), labels=("owl", "cat", "dog"), test=(x[:2], np.array(["dog", "owl"])))
    assert task.train.target.tolist() == [1, 2, 1, 0] and task.num_classes == 3
    assert task.test is not None and task.test.target.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"task 't', dev data: target 'cow' is none of labels=\['cat', 'dog'\]"):
        Task("t", (x, torch.tensor([0, 1, 0, 1])), labels=("cat", "dog"), dev=(x[:2], ["cat", "cow"]))


@pytest.mark.parametrize(
    ("labels", "given", "told"),
    [([1, 2, 3], None, True), ([1, 3, 2, 2], None, True), ([1, 3], None, False), ([0, 1, 2], None, False),
     ([1, 1], None, False), ([1, 2, 3], 4, False)],
)  # fmt: skip
def test_labels_that_begin_at_one_are_pointed_at(
    labels: list[int], given: int | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    task = Task("t", (torch.zeros(len(labels), 2), torch.tensor(labels)), num_classes=given)
    task.to("cpu")
    assert [("If they begin at 1, take 1 off" in words) for words in caplog.messages] == [True] * told


@pytest.mark.parametrize("labels", [{"a", "b"}, frozenset("ab")])
def test_names_of_classes_without_an_order_are_refused(labels: object) -> None:
    with pytest.raises(TypeError, match="has no order of classes: give a list of names"):
        Task("new", (torch.randn(2, 3), torch.tensor([0, 1])), labels=labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [3, np.int32(3), torch.tensor(3)])
def test_a_number_of_classes_may_be_of_any_whole_number_type(classes: Any) -> None:
    task = Task("new", (X, Y), num_classes=classes)
    assert task.num_classes == 3 and type(task.num_classes) is int


@pytest.mark.parametrize("classes", [3.0, "3", True, np.float32(3), torch.tensor(3.0)])
def test_a_number_of_classes_that_is_not_whole_is_refused_with_the_task_and_the_value(classes: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"task 'new': num_classes={classes!r}: expected a whole number")):
        Task("new", (X, Y), num_classes=classes)


@pytest.mark.parametrize("classes", [0, -2])
def test_less_than_one_class_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match=f"task 'new': num_classes={classes}: expected a finite number of at least 1"):
        Task("new", (X, Y), num_classes=classes)


def test_texts_and_tensors_have_one_check_on_the_order_of_classes() -> None:
    with pytest.raises(TypeError, match="has no order of classes: give a list of names"):
        check_labels({"a", "b"}, "task 'new'")


@pytest.mark.parametrize(
    ("data", "way"), [((["a", "b"], [0, 1]), "encode them first"), ((X, ["a"] * len(X)), "number")]
)
def test_strings_are_refused_with_what_to_do_where_they_stand(data: Any, way: str) -> None:
    with pytest.raises(TypeError, match=f"strings; {way}"):
        Task("t", data)
