"""Rows that are all of one class, or each of a class of its own, are told."""

from __future__ import annotations

import pytest
import torch

from pyro_lift import Task
from pyro_lift.data.text import infer_labels
from pyro_lift.models.one_class import warn_of_one_class


def task(name: str, labels: list[int]) -> Task:
    return Task(name, (torch.randn(len(labels), 2), torch.tensor(labels)), num_classes=3)


def test_tasks_of_one_class_are_named(caplog: pytest.LogCaptureFixture) -> None:
    regression = Task("r", (torch.randn(5, 2), torch.ones(5)), kind="regression")
    warn_of_one_class([task("both", [0, 0, 0, 1]), task("few", [2, 2, 2]), regression])
    assert not caplog.records
    warn_of_one_class([task("one", [2, 2, 2, 2]), task("both", [0, 0, 0, 1])])
    assert "all rows of 'one' are of one class" in caplog.text


def test_a_label_for_each_row_is_told(caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"a text, number {k}" for k in range(6)]
    infer_labels([*texts, texts[0]], "some.tsv")
    infer_labels(texts[:5], "some.tsv")
    assert not caplog.records
    infer_labels(texts, "some.tsv")
    assert "some.tsv: each of the 6 rows has a label of its own, such as 'a text, number 0'" in caplog.text
