"""Tasks of tokens say together how many draws of an adaptation stay at its start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.adaptation.unmoved import with_unmoved
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.methods.lift import LiFTMethod, asks_unseen
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.task import Rows
from pyro_lift.settings import AdaptSettings
from pyro_lift.tuning.share_of_tokens import log_probs_of_tokens, share_of_tokens
from pyro_lift.tuning.whose_heads import RULES, run_config

V = 6
OPTIONS: dict[str, Any] = {"sgd_steps": 160, "burn_in": 5, "samples": 10, "seed": 0}


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Embedding(V, 12), torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, V)
    )
    return adapt_backbone(net, peft.LoraConfig(r=3, target_modules=["1", "3"]), seed=0)


def texts(number: int, rows: int, *, noise: float = 0.0) -> list[Task]:
    """Each token's successor is the one that all tasks have in common, or with some probability any token."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randperm(V, generator=generator)
    made = []
    for k in range(number):
        ids = torch.randint(V, (rows, 8), generator=generator)
        other = torch.rand(ids.shape, generator=generator) < noise
        target = torch.where(other, torch.randint(V, ids.shape, generator=generator), common[ids])
        target[:, -1] = -100
        made.append(Task(f"t{k}", (ids, target), kind="tokens"))
    return made


def judged(gains: Sequence[float], rows: int = 20) -> list[tuple[Any, Task]]:
    """Posteriors of ten draws; a token's log probability rises by a task's gain where a draw has left the start."""
    tasks = [Task(t.name, (t.train.inputs, t.train.target), test=t.train, kind="tokens") for t in texts(6, rows)]
    thetas = [torch.cat([torch.zeros(1, 1), torch.full((9, 1), gain)]) for gain in gains]
    return [(SimpleNamespace(thetas=theta), task) for theta, task in zip(thetas, tasks, strict=False)]


def by_the_draw(rows: Rows, theta: Tensor) -> Tensor:
    return theta.expand(5) - 1.0


@pytest.mark.parametrize(
    ("gains", "share"),
    [
        ([-0.1, -0.2, -0.15, -0.1, -0.2, -0.12], 0.9),  # every task would rather stay
        ([0.1, 0.2, 0.15, 0.1, 0.2, 0.12], 0.0),
        ([-1.0, 0.3, -1.0, 0.3, -1.0, 0.3], 0.45),  # on average, and not by more than chance
    ],
)
def test_the_share_is_the_best_one_or_half_way_to_it_where_that_is_not_plain(gains: list[float], share: float) -> None:
    assert share_of_tokens(judged(gains), by_the_draw) == pytest.approx(share)


def test_a_few_tasks_and_tasks_of_many_rows_say_nothing() -> None:
    assert share_of_tokens(judged([-1.0] * 3), by_the_draw) is None
    assert share_of_tokens(judged([-1.0] * 6, rows=100), by_the_draw) is None


def test_a_part_of_the_draws_stays_where_kinds_complement_each_other() -> None:
    """Half of the tokens are likely at the start and the others after it: an average is better than either."""

    def told(rows: Rows, theta: Tensor) -> Tensor:
        p = torch.tensor([0.9, 0.1]) if float(theta) == 0.0 else torch.tensor([0.1, 0.9])
        return p.log()

    assert share_of_tokens(judged([1.0] * 6), told) == pytest.approx(0.5)


def test_tokens_are_as_likely_as_the_posterior_says_at_every_share() -> None:
    task = texts(1, 20, noise=0.3)[0]
    prior = LiFT(adapter(), **{**OPTIONS, "sgd_steps": 20}).meta_train(texts(3, 12), progress=False)
    posterior = prior.adapt(task, unmoved_few=0.1, draws=10, steps=20)
    rows, counts = task.train, task.train.target != -100
    told = torch.stack([log_probs_of_tokens(prior.adapter, rows, theta) for theta in posterior.thetas])
    assert told.shape == (10, int(counts.sum()))
    for share in (0.1, 0.5, 0.9):
        there = posterior.of_draws(slice(None))
        there.thetas = with_unmoved(posterior.thetas[0], posterior.thetas, share)
        p = there.predict(rows.inputs)[counts].gather(-1, rows.target[counts].unsqueeze(-1)).squeeze(-1)
        stay = round(10 * share)
        mixed = torch.cat([told[:1].expand(stay, -1), told[stay:]]).logsumexp(0) - math.log(10)
        torch.testing.assert_close(mixed, p.log().to(mixed), rtol=1e-4, atol=1e-5)


def test_a_run_finds_it_and_keeps_it_with_the_prior(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = texts(8, 12, noise=0.6)  # noise is all that a task has of its own
    with caplog.at_level("INFO", "pyro_lift"):
        prior = LiFT(adapter(), **OPTIONS).meta_train(tasks, progress=False)
    share = prior.adapt_settings.unmoved_few
    assert share is not None and share > 0.0
    assert f"{share:.0%} of the draws stay at the start" in caplog.text
    new = texts(9, 12, noise=0.6)[-1]
    posterior = prior.adapt(new, seed=0)
    stays = [torch.equal(theta, posterior.thetas[0]) for theta in posterior.thetas]
    assert sum(stays) == round(10 * share)
    prior.save_pretrained(tmp_path)
    again = LiFTPrior.from_pretrained(tmp_path, adapter())
    assert again.adapt_settings.unmoved_few == share


def test_a_share_that_is_given_stays_and_a_run_of_before_finds_none(tmp_path: Path) -> None:
    tasks = texts(8, 12, noise=0.6)
    for given in (AdaptSettings(unmoved=0.3), AdaptSettings(unmoved_few=0.0)):
        found = LiFT(adapter(), adapt=given, **OPTIONS).meta_train(tasks, progress=False).adapt_settings
        assert (found.unmoved, found.unmoved_few) == (given.unmoved, given.unmoved_few)
    then = {name: rule for name, rule in RULES.items() if name != "unmoved draws of tokens"}
    run = LiFT(adapter(), **OPTIONS)
    config = run_config(run.settings, run.seed, run.adapter, tasks, rules=then)
    assert run.before_chain(tasks, Session(tmp_path / "then", config=config)).adapt.unmoved_few is None


def test_the_comparison_finds_it_as_well() -> None:
    tasks, budget = texts(8, 12, noise=0.6), Budget(warm_up=200, visits=30, draws=10, steps=20, seed=0)
    state = LiFTMethod(adapter(), budget, on_trial=True).meta_train(tasks)
    share = state.prior.adapt_settings.unmoved_few
    assert share is not None and share > 0.0
    posterior: Any = LiFTMethod(adapter(), budget, on_trial=True).adapt(state, texts(9, 12, noise=0.6)[-1])
    assert sum(torch.equal(theta, posterior.thetas[0]) for theta in posterior.thetas) == round(10 * share)
    assert LiFTMethod(adapter(), budget).meta_train(tasks).prior.adapt_settings.unmoved_few is None


@pytest.mark.parametrize(
    ("tasks", "asked"),
    [
        (texts(2, 99), True),
        (texts(2, 100), False),  # they say it themselves
        ([Task("r", (torch.randn(200, 2), torch.randn(200)), kind="regression")], True),
        ([Task("c", (torch.randn(20, 2), torch.arange(20) % 2))], False),
    ],
)
def test_the_comparison_asks_tasks_of_what_no_other_can_say(tasks: Sequence[Task], asked: bool) -> None:
    assert asks_unseen(tasks) == asked
