"""The power in adaptation that unseen tasks of tokens choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.tuning.strength import STRONGER, stronger_where_better


def judged(gains: Sequence[float]) -> Any:
    """Posteriors of two draws, whose mean log probability rises by each task's gain where the power does."""
    x = torch.zeros(4, 2)

    def adapt(power: float) -> list[tuple[Any, Task]]:
        higher = 0.0 if power == 1.0 else 1.0
        return [
            (
                SimpleNamespace(thetas=torch.tensor([[higher * gain + 0.5], [higher * gain - 0.5]])),
                Task(f"t{k}", (x, torch.tensor([0, 1, 0, 1])), test=(x[:2], torch.ones(2, dtype=torch.long))),
            )
            for k, gain in enumerate(gains)
        ]

    return adapt


def score(theta: Tensor, tasks: Sequence[Task]) -> Tensor:
    assert len(tasks) == 1 and tasks[0].train.target.tolist() == [1, 1]  # rows that were left out
    return theta.double()


@pytest.mark.parametrize(
    ("gains", "power"),
    [
        ([0.1, 0.2, 0.15, 0.1, 0.2, 0.12], STRONGER),
        ([-0.1, -0.2, -0.15, -0.1, -0.2, -0.1], 1.0),
        ([1.0, -0.9, 1.0, -0.9, 1.0, -0.9], STRONGER),  # better on average, not by more than chance
        ([0.9, -1.0, 0.9, -1.0, 0.9, -1.0], 1.0),
        ([0.1, 0.2, 0.15], 1.0),  # too few tasks to tell
        ([0.005] * 6, 1.0),  # nothing to speak of
    ],
)
def test_the_larger_power_is_taken_where_it_predicts_better_on_average(gains: list[float], power: float) -> None:
    assert stronger_where_better(judged(gains), score) == power


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Embedding(6, 12), torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)
    )
    return adapt_backbone(net, peft.LoraConfig(r=3, target_modules=["1", "3"]), seed=0)


def texts(number: int = 8, rows: int = 12, length: int = 8) -> list[Task]:
    """Each token's successor is the one all tasks have in common, but for one token of the task's own."""
    generator = torch.Generator().manual_seed(1)
    common, made = torch.randperm(6, generator=generator), []
    for k in range(number):
        own = common.clone()
        own[k % 6] = int(torch.randint(0, 6, (1,), generator=generator))
        ids = torch.randint(0, 6, (rows, length), generator=generator)
        made.append(Task(f"t{k}", (ids, own[ids]), kind="tokens"))
    return made


OPTIONS: dict[str, Any] = {"sgd_steps": 160, "burn_in": 5, "samples": 10, "seed": 0}


def test_a_prior_keeps_the_power_that_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pyro_lift"):
        prior = LiFT(adapter(), **OPTIONS).meta_train(texts(), progress=False)
    said = next(message for message in caplog.messages if "times the power" in message)
    found = STRONGER if "is taken" in said else 1.0
    assert (prior.adapt_settings.n_inflate or 1.0) == found
    assert prior.results.get("power in adaptation, over meta-training's", 1.0) == found
    prior.save_pretrained(tmp_path / "prior")
    again = LiFTPrior.from_pretrained(tmp_path / "prior", adapter())
    assert again.adapt_settings.n_inflate == prior.adapt_settings.n_inflate
    new = texts(9)[-1]
    torch.testing.assert_close(again.adapt(new, seed=1).thetas, prior.adapt(new, seed=1).thetas)


@pytest.mark.parametrize("found", [1.0, STRONGER])
def test_what_is_found_is_what_tasks_are_adapted_with(found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.tuning.cross_fit.stronger_where_better", lambda adapt, score: found)
    prior, new = LiFT(adapter(), **OPTIONS).meta_train(texts(), progress=False), texts(9)[-1]
    assert prior.settings.n_inflate == 1.0
    told = prior.adapt(new, seed=1, n_inflate=found).thetas
    torch.testing.assert_close(prior.adapt(new, seed=1).thetas, told, rtol=0, atol=0)
    assert torch.equal(prior.adapt(new, seed=1, n_inflate=1.0).thetas, told) == (found == 1.0)


def test_rows_without_a_token_that_counts_are_no_reason_to_stop() -> None:
    made = []
    for task in texts():
        target = task.train.target.clone()
        target[1:] = -100
        made.append(Task(task.name, (task.train.positional[0], target), kind="tokens"))
    assert LiFT(adapter(), **OPTIONS).meta_train(made, progress=False).adapt_settings.n_inflate is None


def test_a_power_that_is_given_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.tuning.cross_fit.stronger_where_better", None)
    LiFT(adapter(), n_inflate=1.0, temperature=0.1, **OPTIONS).meta_train(texts(), progress=False)
