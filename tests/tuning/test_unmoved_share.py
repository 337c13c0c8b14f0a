"""The share of an adaptation's draws that stay at its start, found on tasks of few rows together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from common_map import adapter, tasks
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.inference.adaptation.unmoved import STACKED_FROM
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.settings import AdaptSettings
from pyro_lift.tuning.unmoved_share import Apart, apart, chosen_share
from pyro_lift.tuning.whose_heads import RULES, run_config

SHORT: dict[str, Any] = {"sgd_steps": 400, "burn_in": 20, "samples": 20, "seed": 0}


def predicted(start: float, moved: float, number: int = 20, rows: int = 60) -> list[Apart]:
    """Ten predictions of each task, which know as much of its classes as the numbers say, errors of their own."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        target = torch.randint(3, (rows,), generator=generator)
        knows = torch.tensor([start, *[moved] * 9], dtype=torch.float64).view(-1, 1, 1)
        noise = torch.randn(10, rows, 3, generator=generator, dtype=torch.float64)
        p = torch.softmax(knows * torch.nn.functional.one_hot(target, 3) + noise, -1)
        found.append(Apart(Predicted(p[0], target), p[1:]))
    return found


def loss(predictions: Sequence[Apart], stay: int) -> float:
    """The same loss by brute force over temperatures, of so many draws at the start, by code of its own."""
    pairs = []
    for each in predictions:
        p = stay * each.start.probabilities + each.moved[max(stay - 1, 0) :].sum(0)
        pairs.append((p / p.sum(-1, keepdim=True), each.start.target))
    losses = []
    for T in torch.logspace(-0.7, 0.7, 300, dtype=torch.float64):
        losses.append(sum(nll(p ** (1 / T) / (p ** (1 / T)).sum(-1, keepdim=True), y) for p, y in pairs) / len(pairs))
    return min(losses)


@pytest.mark.parametrize(("start", "moved"), [(2.0, 1.0), (1.0, 1.0), (1.0, 2.0), (2.5, 0.0)])
@pytest.mark.parametrize("usual", [0.0, 0.5])
def test_the_share_is_half_way_to_that_of_the_lowest_loss(start: float, moved: float, usual: float) -> None:
    predictions = predicted(start, moved, number=8, rows=30)
    losses = {stay: loss(predictions, stay) for stay in range(10)}
    best = min(losses, key=losses.__getitem__)
    assert chosen_share(predictions, usual) == pytest.approx(0.5 * (usual + best / 10))


def test_the_start_stays_where_it_knows_more_and_goes_where_it_knows_less() -> None:
    shares = [chosen_share(predicted(start, 1.0), 0.5) for start in (0.0, 1.0, 2.0, 8.0)]
    assert shares == sorted(shares) and shares[0] == 0.25 and shares[-1] > 0.5


@cache
def learned() -> LiFTPrior:
    return LiFT(adapter(), sgd_steps=0, burn_in=2, samples=4, seed=0).meta_train(tasks(4), progress=False)


def few_adapted(rows: int, **options: Any) -> tuple[Task, Any]:
    task = tasks(1, rows + 10)[0]
    task = Task("t", task.train.take(slice(0, rows)), num_classes=3, test=task.train.take(slice(rows, rows + 10)))
    return task, learned().adapt(task, seed=0, progress=False, **options)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_parts_are_put_together_as_a_posterior_of_that_share_is(share: float) -> None:
    task, posterior = few_adapted(12, unmoved_few=0.1)
    assert not torch.equal(posterior.thetas[0], posterior.thetas[1]) and len(posterior.thetas) == 10
    parts = apart(posterior, task)
    assert parts is not None and task.test is not None
    _, of_share = few_adapted(12, unmoved_few=share)
    together, mixed = of_share.predicted(task.test), parts.mixed(share)
    torch.testing.assert_close(mixed.probabilities, together.probabilities)
    assert torch.equal(mixed.target, together.target)
    assert len(posterior.thetas) == 10  # the posterior that parts were taken of is as it was


def test_a_task_of_many_rows_is_not_asked_and_not_told() -> None:
    task, posterior = few_adapted(STACKED_FROM, unmoved_few=0.5, many_rows=0)
    assert len({tuple(theta.tolist()) for theta in posterior.thetas}) == 10  # its head is the network's: all move
    assert apart(posterior, task) is None


@pytest.mark.parametrize(("share", "stay"), [(0.0, 0), (0.3, 3), (0.9, 9)])
def test_a_task_of_few_rows_has_the_share_that_is_given_for_those(share: float, stay: int) -> None:
    _, posterior = few_adapted(12, unmoved_few=share)
    same = (posterior.thetas == posterior.thetas[0]).all(-1)
    assert int(same.sum()) == max(stay, 1)  # the first is itself
    _, given = few_adapted(12, unmoved_few=share, unmoved=0.5)
    assert int((given.thetas == given.thetas[0]).all(-1).sum()) == 5


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "half"])
def test_a_share_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="unmoved_few"):
        few_adapted(12, unmoved_few=value)


def test_a_head_that_moves_with_the_weights_says_nothing_at_the_start() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())
    config = peft.LoraConfig(r=2, target_modules=["0"])
    lift = LiFT(net, config, head="langevin", head_scale=1.0, **{**SHORT, "sgd_steps": 0})
    prior = lift.meta_train(tasks(4), progress=False)
    with pytest.raises(ValueError, match=r"unmoved_few=0\.5: a head that moves"):
        prior.adapt(tasks(1)[0], unmoved_few=0.5)


def noisy(number: int = 12) -> list[Task]:
    """Tasks of one map, whose own rows mislead: the start that all have in common is better than what they move to."""
    made = tasks(number, 108, noise=0.3)
    return [replace(t, train=t.train.take(slice(0, 8)), test=t.train.take(slice(8, 108))) for t in made]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def from_scratch() -> RandomAdapter:
    return adapt_backbone(network(), peft.LoraConfig(r=3, target_modules=["0", "2"]), seed=0)


def test_tasks_say_together_that_draws_stay_and_new_ones_are_predicted_better(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lift = LiFT(from_scratch(), **SHORT)
    with caplog.at_level(logging.INFO, "pyro_lift"):
        prior = lift.meta_train(noisy(24), progress=False)
    share = prior.adapt_settings.unmoved_few
    assert share is not None and share > 0.0
    assert f"{share:.0%} of the draws stay at the start" in caplog.text
    new = noisy(40)[24:]

    def losses(**options: Any) -> Tensor:
        posteriors = prior.adapt_many(new, seed=0, **options)
        rows = [task.test for task in new if task.test is not None]
        return torch.tensor([nll(p.predict(r), r.target) for p, r in zip(posteriors, rows, strict=True)])

    gains = losses(unmoved_few=0.0) - losses()
    assert float(gains.mean()) > 2.0 * float(gains.std()) / len(gains) ** 0.5
    read = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path), network())
    assert read.adapt_settings.unmoved_few == share


def test_what_was_given_is_not_looked_for_and_a_run_of_before_goes_on_without(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "unmoved draws"}
    asked: list[bool] = []
    for name, rules, given in (
        ("then", then, {}),
        ("given", RULES, {"unmoved": 0.2}),
        ("few", RULES, {"unmoved_few": 0.2}),
        ("looks", RULES, {"dev_every": 5}),
        ("today", RULES, {}),
    ):
        lift = LiFT(from_scratch(), adapt=AdaptSettings(**given), **SHORT)
        config = run_config(lift.settings, lift.seed, lift.adapter, noisy(24), rules=rules)
        found = lift.before_chain(noisy(24), Session(tmp_path / name, config=config))
        assert found.halves is not None
        asked.append(found.halves.unmoved is not None)
        assert found.adapt.unmoved_few == (found.halves.unmoved if name == "today" else given.get("unmoved_few"))
    assert asked == [False, False, False, False, True]


def test_chains_of_one_model_have_the_mean_of_their_shares() -> None:
    first, second = learned(), copy(learned())
    second.adapt_settings = replace(second.adapt_settings, unmoved_few=0.2)
    assert first.merge(second).adapt_settings.unmoved_few is None
    third = copy(second)
    third.adapt_settings = replace(third.adapt_settings, unmoved_few=0.5)
    assert second.merge(third).adapt_settings.unmoved_few == pytest.approx(0.35)
    assert second.adapt_settings.unmoved_few == 0.2
