"""Where the prior holds all weights, adaptation counts rows more often; what the user chose stays."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_backbones import bert, ids

from pyro_lift import AdaptSettings, LiFT, LiFTPrior, LiFTSettings, Task, before_chain
from pyro_lift.defaults import LOOSE_POWER, LOOSE_RATE, LOOSE_ROWS, loosened
from pyro_lift.inference.effective_weights import MOVED

FILLED = LiFTSettings(learning_rate=0.01, n_inflate=2.0)


def changed(
    settings: LiFTSettings | None = None, adapt: AdaptSettings | None = None, moved: float = 0.3, rows: float = 80.0
) -> bool:
    adapt = adapt or AdaptSettings()
    after = loosened(adapt, settings or LiFTSettings(), FILLED, moved, rows)
    if after is adapt:
        return False
    assert after == replace(adapt, learning_rate=LOOSE_RATE * 0.01, n_inflate=LOOSE_POWER * 2.0)
    return True


def test_it_takes_rows_and_a_prior_that_holds_them() -> None:
    assert changed() and changed(rows=LOOSE_ROWS) and changed(moved=1.0 / LOOSE_POWER)
    assert not changed(rows=LOOSE_ROWS - 1) and not changed(moved=1.0)
    assert not changed(moved=0.9 / LOOSE_POWER), "the network says nothing of these tasks, at any power"


@pytest.mark.parametrize("name", ["learning_rate", "n_inflate", "beta", "sigma", "temperature"])
def test_what_meta_training_was_given_stays(name: str) -> None:
    assert not changed(LiFTSettings(**{name: 0.5}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["learning_rate", "n_inflate", "temperature"])
def test_what_adaptation_was_given_stays(name: str) -> None:
    assert not changed(adapt=AdaptSettings(**{name: 0.5}))  # type: ignore[arg-type]
    assert not changed(LiFTSettings(preconditioner="none"))


def tasks(rows: int) -> list[Task]:
    repeated = {"input_ids": ids().repeat(-(-rows // len(ids())), 1)[:rows]}
    return [Task(f"t{k}", (repeated, torch.arange(rows) % 2), num_classes=2) for k in range(3)]


@pytest.mark.parametrize(("rows", "loose"), [(LOOSE_ROWS, True), (12, False)])
def test_a_default_run_finds_it_and_its_prior_keeps_it(
    rows: int, loose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(before_chain, "weights_moved", lambda *_, **__: {MOVED: 0.3})
    settings: dict[str, Any] = {"sgd_steps": 0, "burn_in": 2, "samples": 8}
    lift = LiFT(bert(2), peft.LoraConfig(r=2, target_modules=["query"]), seed=0, **settings)
    with caplog.at_level(logging.INFO, logger="pyro_lift"):
        prior = lift.meta_train(tasks(rows), progress=False)
    a = prior.adapt_settings
    assert (a.learning_rate is not None, a.n_inflate) == (loose, LOOSE_POWER if loose else None)
    assert ("In adaptation each row counts 100 times" in caplog.text) == loose
    assert ("move less than one of the adapter's" in caplog.text) == (not loose)
    assert ("what is its own is its head" in caplog.text) == (not loose)
    again = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), prior.adapter)
    assert again.adapt_settings == a
