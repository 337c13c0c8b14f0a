"""One task out of all proportion to the others narrows no prior, and is named with the way out."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.out_of_proportion import far_above, large_columns, tasks_of_large_inputs
from pyro_lift.models.prior_loss import prior_loss


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs))


def task(name: str, seed: int, scale: float = 1.0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator)
    y = (x[:, :3] + 0.3 * torch.randn(16, 3, generator=generator)).argmax(1)
    return Task(name, (scale * x, y), num_classes=3)


TASKS = [task(f"t{k}", k) for k in range(5)]
FAR = task("far", 9, scale=1e3)
CONFIG = peft.LoraConfig(r=2, target_modules=["0", "2"])
SHORT: dict[str, Any] = {"sgd_steps": 4, "sgd_learning_rate": 1e-3, "burn_in": 2, "samples": 4, "seed": 0}


def test_the_means_are_to_the_bit_those_of_the_other_tasks() -> None:
    adapter = RandomAdapter(peft.get_peft_model(network(), CONFIG))
    alone = prior_loss(adapter, TASKS, adapter.initial, 0.1)
    beside = prior_loss(adapter, [*TASKS[:2], FAR, *TASKS[2:]], adapter.initial, 0.1)
    assert alone.outliers == {} and beside[:3] == alone[:3]
    assert list(beside.outliers) == ["far"] and beside.outliers["far"] > 20.0


def test_widths_are_those_without_the_task_and_the_warning_names_it(caplog: pytest.LogCaptureFixture) -> None:
    alone = LiFT(network(), CONFIG, **SHORT).meta_train(TASKS, progress=False)
    assert "out of all proportion" not in caplog.text
    beside = LiFT(network(), CONFIG, **SHORT).meta_train([*TASKS, FAR], progress=False)
    assert beside.settings.beta == alone.settings.beta and beside.settings.sigma == alone.settings.sigma
    said = [r.message for r in caplog.records if "out of all proportion" in r.message]
    assert len(said) == 1 and said[0].startswith("task 'far': inputs 1")
    assert "Scale its inputs as theirs, or leave it out" in said[0] and "Leave beta" not in caplog.text


def test_a_loss_out_of_proportion_is_named_where_inputs_are_not(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(16, 4, generator=generator) for _ in range(6)]
    tasks = [Task(f"r{k}", ((90.0 if k == 2 else 1.0) * x, x[:, :1]), "regression") for k, x in enumerate(rows)]
    LiFT(network(1), CONFIG, noise_scale=1.0, **SHORT).meta_train(tasks, progress=False)
    assert "task 'r2': before training the loss is" in caplog.text
    assert "scale its inputs or targets as theirs, or leave it out" in caplog.text


def test_large_is_a_hundred_times_the_median_and_never_most_of_the_tasks() -> None:
    def of(*scales: float) -> list[str]:
        return list(tasks_of_large_inputs([task(f"s{k}", k, scale) for k, scale in enumerate(scales)]))

    assert of(1, 1, 1, 1e4) == ["s3"] and of(1, 1, 50, 50) == [] and of(1, 1e4) == [] and of(1, 1e4, 1e4) == []
    assert of(0, 0, 1) == [] and of(1, 1e3, 1, 1e6, 1) == ["s1", "s3"]
    tokens = Task("w", (torch.full((4, 3), 10**6), torch.arange(4) % 2), num_classes=2)
    assert tasks_of_large_inputs([tokens, *TASKS]) == {}
    assert far_above([1.0, 2.0, 1.0, 300.0], [1.1] * 4) == [3] and far_above([1.0, 300.0], [1.1] * 2) == []
    assert far_above([0.01, 0.01, 0.01, 15.0], [1.1] * 4) == []  # 15 nats a row: sure of the wrong class
    assert far_above([-3.0, -2.0, 1e9, math.inf, -2.5], [-2.0] * 5) == [2, 3]


def test_a_column_out_of_proportion_is_named_and_no_advice_is_of_what_is_open(caplog: pytest.LogCaptureFixture) -> None:
    scales = torch.tensor([1.0, 1.0, 1e4, 1.0])
    tasks = [Task(t.name, (scales * t.train.positional[0], t.train.target), num_classes=3) for t in TASKS]
    assert large_columns(TASKS) == {}
    ((place, times),) = large_columns(tasks).values()
    assert place == 2 and 5e3 < times < 2e4
    LiFT(network(), CONFIG, **SHORT).meta_train(tasks, progress=False)
    assert "column 2 of the inputs is" in caplog.text and "Leave beta" not in caplog.text
    pictures = [Task("p", (torch.rand(3, 1, 2, 2), torch.arange(3)), num_classes=3)]
    tokens = [Task("w", (torch.full((4, 3), 10**6), torch.arange(4) % 2), num_classes=2)]
    assert large_columns(pictures) == large_columns(tokens) == {}
