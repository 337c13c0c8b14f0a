"""How sure predictions under label matching may be is what tasks say that joint training has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matching_tasks import adapter, tasks

from pyro_lift import LiFT
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.tuning.halves import is_above_zero
from pyro_lift.tuning.whose_heads import RULES, run_config

SHORT: dict[str, Any] = {"sgd_steps": 80, "burn_in": 10, "samples": 20, "seed": 0}


def test_texts_that_say_nothing_of_their_labels_make_predictions_less_sure(tmp_path: Path) -> None:
    given = [replace(task, test=None) for task in tasks(8, 24, seed=1)]
    lift = LiFT(adapter(), **SHORT)
    prior = lift.meta_train(given, progress=False)
    new = tasks(12, 24, seed=2)
    gains = []
    for task, posterior in zip(new, prior.adapt_many(new, seed=0, steps=20), strict=True):
        assert task.test is not None
        found = nll(posterior.predict(task.test), task.test.target)
        posterior.prediction_temperature = 1.0
        gains.append(float(nll(posterior.predict(task.test), task.test.target) - found))
    assert is_above_zero(torch.tensor(gains))
    rules = {name: rule for name, rule in RULES.items() if name != "sureness of matching"}
    config = run_config(lift.settings, lift.seed, lift.adapter, given, rules=rules)
    then = LiFT(adapter(), **SHORT).before_chain(given, Session(tmp_path / "then", config=config))
    assert then.adapt.unmoved_few is None
    assert then.halves is None or then.halves.temperature == 1.0
