"""Settings of an adaptation that do nothing, or nothing of use, are warned of with the task and the way out."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
import torch

from pyro_lift import LiFT, LiFTPrior, Task


def task(name: str, seed: int, **parts: Any) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    return Task(name, (x, (x[:, :3] + 0.3 * torch.randn(12, 3, generator=generator)).argmax(1)), num_classes=3, **parts)


def lift(**options: Any) -> LiFT:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    options = {"sgd_steps": 20, "burn_in": 5, "samples": 10, "head": "shared", **options}
    return LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), **options)


TASKS = [task(f"t{k}", k) for k in range(4)]
FEW: dict[str, Any] = {"steps": 4, "draws": 2}


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return lift(seed=0).meta_train(TASKS, progress=False)


def test_a_rate_out_of_all_proportion_is_warned_of(prior: LiFTPrior, caplog: pytest.LogCaptureFixture) -> None:
    for rate, said in (
        (1e3, r"task 't0': learning_rate=1000 moves a weight 5.41e\+03 times as far as it is large \(0.18\)"),
        (1e-30, "task 't0': learning_rate=1e-30 moves no weight by a thousandth of its size"),
    ):
        caplog.clear()
        prior.adapt(TASKS[0], learning_rate=rate, **FEW)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert re.search(said, record.message), record.message
        assert "Leave learning_rate open, or give about 0.018" in record.message
    caplog.clear()
    prior.adapt_many(TASKS, learning_rate=1e3, **FEW)
    (record,) = caplog.records
    assert record.message.startswith("tasks 't0', 't1', 't2', 't3': learning_rate=1000")


def test_a_temperature_and_a_power_out_of_all_proportion_are_warned_of(
    prior: LiFTPrior, caplog: pytest.LogCaptureFixture
) -> None:
    absurd: tuple[tuple[dict[str, Any], str], ...] = (
        ({"temperature": 1e9}, "task 't0': temperature=1e+09 lets a weight vary by"),
        ({"n_inflate": 1e6}, "task 't0': n_inflate=1e+06 counts each row so many times"),
    )
    for options, said in absurd:
        caplog.clear()
        prior.adapt(TASKS[0], **options, **FEW)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and record.message.startswith(said)
    caplog.clear()
    sensible: tuple[dict[str, Any], ...] = ({"temperature": 1.0}, {"temperature": 0.0}, {"n_inflate": 1e4})
    for options in sensible:
        prior.adapt(TASKS[0], **options, **FEW)
    assert not caplog.records


def test_rates_of_meta_training_are_looked_at_too(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("learning_rate", "sgd_learning_rate"):
        caplog.clear()
        lift(seed=0, **{name: 3.0}).meta_train(TASKS, progress=False)
        assert f"{name}=3 moves a weight 16.2 times as far as it is large (0.18)" in caplog.text
        assert f"Leave {name} open, or give about 0.0092" in caplog.text


def test_rates_that_are_tried_in_earnest_are_not(prior: LiFTPrior, caplog: pytest.LogCaptureFixture) -> None:
    assert prior.adapt_settings.learning_rate is not None
    for factor in (0.1, 0.25, 1.0, 4.0):
        prior.adapt(TASKS[0], learning_rate=factor * prior.adapt_settings.learning_rate, steps=20)
    assert not caplog.records


def test_looks_at_rows_that_are_not_there_and_patience_without_looks(
    prior: LiFTPrior, caplog: pytest.LogCaptureFixture
) -> None:
    prior.adapt(TASKS[0], dev_every=2, **FEW)
    assert "task 't0': dev_every=2, and no development rows" in caplog.text and "Give the task dev=" in caplog.text
    caplog.clear()
    prior.adapt(TASKS[0], patience=2, **FEW)
    assert "task 't0': patience=2 does nothing without dev_every" in caplog.text
    caplog.clear()
    watched = task("watched", 5, dev=TASKS[1].train)
    prior.adapt(watched, dev_every=2, patience=2, **FEW)
    assert not caplog.records
    prior.adapt_many([watched, TASKS[0]], dev_every=2, **FEW)
    (record,) = caplog.records
    assert record.message.startswith("task 't0': dev_every=2")


def test_stop_patience_without_stop_every_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lift(stop_every=2, stop_patience=1)
    lift()
    assert not caplog.records
    lift(stop_patience=1)
    assert "stop_patience=1 does nothing without stop_every" in caplog.text


@pytest.mark.parametrize("name", ["adapt", "settings"])
def test_settings_that_are_none_are_refused_at_the_door(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} is a dict; expected (Adapt|LiFT)Settings\("):
        lift(**{name: {"steps": 20}})
