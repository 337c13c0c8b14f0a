"""A chain that has lost what it knew begins again, slower, where its rate was left open."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from pyro_lift import ChainLostError, LiFT, LiFTPrior, Task
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.lost import LossWatch
from pyro_lift.tuning.lost_chain import MOST, SMALLER, Slower, once_slower, slower_so_far

SHORT: dict[str, Any] = {"sgd_steps": 8, "sgd_learning_rate": 1e-3, "burn_in": 10, "samples": 20, "noise_scale": 1.0}


def tasks() -> list[Task]:
    made = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(6, 4, generator=made), torch.randn(6, generator=made)) for _ in range(3)]
    return [Task(f"t{i}", pair, "regression") for i, pair in enumerate(pairs)]


def lift(**options: Any) -> LiFT:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    return LiFT(net, peft.LoraConfig(r=1, target_modules=["0"]), seed=0, **{**SHORT, **options})


class Watching:
    """Stands in for the watch over losses: the first so many chains are lost, each at a visit of its own."""

    def __init__(self, lost_at: list[int]) -> None:
        self.lost_at, self.begun = lost_at, 0
        self.visits = 0

    def of(self, *args: Any, visits: int) -> Watching:
        self.begun, self.visits = self.begun + 1, visits
        return self

    def see(self, *args: Any) -> None:
        self.visits += 1
        if self.begun <= len(self.lost_at) and self.visits == self.lost_at[self.begun - 1]:
            raise ChainLostError("lost", self.visits)

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["visits"] == self.visits


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watching]:
    def put(*lost_at: int) -> Watching:
        watching = Watching(list(lost_at))
        monkeypatch.setattr(LossWatch, "of", watching.of)
        return watching

    return put


def rate_of(prior: LiFTPrior) -> float:
    assert prior.settings.learning_rate is not None
    return prior.settings.learning_rate


def same(one: LiFTPrior, other: LiFTPrior) -> bool:
    return torch.equal(one.mixture.get().mean, other.mixture.get().mean)


def test_it_begins_again_at_a_third_and_says_so(
    losing: Callable[..., Watching], caplog: pytest.LogCaptureFixture
) -> None:
    losing()
    usual = lift().meta_train(tasks(), progress=False)
    losing(20, 12)
    with caplog.at_level(logging.WARNING):
        slow = lift().meta_train(tasks(), progress=False)
    assert rate_of(slow) == pytest.approx(SMALLER**2 * rate_of(usual))
    assert "after 20 steps" in caplog.text and "after 12 steps" in caplog.text
    # Adaptation has the rate that it has after a chain that was not lost, and what was open stays open in a copy.
    assert slow.adapt_settings.learning_rate == usual.adapt_settings.learning_rate
    given = lift(learning_rate=rate_of(slow)).meta_train(tasks(), progress=False)
    assert same(given, slow)  # it is the chain that this rate gives, from the start


def test_joint_training_that_was_lost_goes_slower_too() -> None:
    setup = lift(sgd_learning_rate=None)
    found = setup.before_chain(tasks(), crossed=False)
    again = setup.slower(found, Slower(2, 1))
    assert found.settings.learning_rate is not None and found.settings.sgd_learning_rate is not None
    assert again.settings.learning_rate == pytest.approx(SMALLER**2 * found.settings.learning_rate)
    assert again.settings.sgd_learning_rate == pytest.approx(SMALLER * found.settings.sgd_learning_rate)
    assert again.run.settings.learning_rate == again.settings.learning_rate
    assert found.run.settings.learning_rate is None  # the first is as it was
    kept = setup.slower(found, Slower(1, 0))
    assert kept.settings.sgd_learning_rate == found.settings.sgd_learning_rate


@pytest.mark.parametrize(
    ("options", "times"), [({"learning_rate": 1e-3}, 1), ({"stop_every": 5, "stop_patience": 2}, 1), ({}, MOST + 1)]
)
def test_a_rate_that_was_given_is_kept_and_so_is_the_error(
    losing: Callable[..., Watching], options: dict[str, Any], times: int
) -> None:
    watching = losing(*[9] * 9)
    made = tasks() + [
        Task(f"more {i}", (task.train.inputs, task.train.target), "regression") for i, task in enumerate(tasks())
    ]
    with pytest.raises(ChainLostError):
        lift(**options).meta_train(made, progress=False)
    assert watching.begun == times


def test_a_run_that_is_saved_goes_on_slower_to_the_bit(losing: Callable[..., Watching], tmp_path: Path) -> None:
    losing(25)
    through = lift().meta_train(tasks(), progress=False, checkpoint=tmp_path / "through", checkpoint_every=4)
    losing(25)
    alone = lift().meta_train(tasks(), progress=False)
    assert same(through, alone)

    class StoppedError(Exception):
        pass

    watching, steps = losing(25), 0

    def stop() -> None:
        nonlocal steps
        steps += watching.begun == 2
        if steps == 21:
            raise StoppedError

    folder = tmp_path / "stopped"
    with pytest.raises(StoppedError):
        lift().meta_train(tasks(), progress=False, checkpoint=folder, checkpoint_every=4, on_step=stop)
    losing()
    resumed = lift().meta_train(tasks(), progress=False, resume=folder, checkpoint_every=4)
    assert same(resumed, through) and rate_of(resumed) == rate_of(through)


def test_a_chain_that_is_lost_after_a_stop_is_told_by_all_its_steps(
    losing: Callable[..., Watching], tmp_path: Path
) -> None:
    """Joint training was eight steps long, and the loss comes five after the run went on."""
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == 16:
            raise KeyboardInterrupt

    losing()
    with pytest.raises(KeyboardInterrupt):
        lift().meta_train(tasks(), progress=False, checkpoint=tmp_path, checkpoint_every=4, on_step=stop)
    losing(20)
    resumed = lift().meta_train(tasks(), progress=False, resume=tmp_path, checkpoint_every=4)
    losing(20)
    through = lift().meta_train(tasks(), progress=False)
    assert same(resumed, through) and resumed.settings.sgd_learning_rate == through.settings.sgd_learning_rate


def test_a_folder_says_how_often(tmp_path: Path) -> None:
    kept = WorkBefore(tmp_path)
    one = once_slower(slower_so_far(tmp_path, lambda: kept), ChainLostError("lost", 3), kept, in_joint=True)
    two = once_slower(one, ChainLostError("lost", 5), kept, in_joint=False)
    assert slower_so_far(tmp_path, lambda: WorkBefore(tmp_path)) == two == Slower(2, 1)
    assert slower_so_far(None, lambda: WorkBefore(None)) == Slower()


def test_ordinary_regressions_of_two_values_are_learnt() -> None:
    """Fourteen tasks of 24 rows, whose chain is lost at the default rate, here at least."""
    made = np.random.default_rng(70)
    shared, mean = 0.6 * made.normal(size=(6, 8)), made.normal(size=(8, 1))

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights, x = mean + 0.5 * made.normal(size=(8, 2)), made.normal(size=(rows, 6))
        y = np.tanh(x @ shared) @ weights + 0.3 * made.normal(size=(rows, 2))
        return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)

    torch.manual_seed(1010)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
    learner = LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=10)
    prior = learner.meta_train([Task(f"t{i}", drawn(24), "regression") for i in range(14)], progress=False)
    x, y = drawn(224)
    new = prior.adapt(Task("new", (x[:24], y[:24]), "regression"))
    assert float((new.predict(x[24:]) - y[24:]).square().mean()) < 0.5 * float(y[24:].var(0).mean())
