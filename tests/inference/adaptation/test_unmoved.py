"""Stacking the start of an adaptation with its draws: the weight, the rows it is found from, and what it saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from pyro_lift import DivergedError, LiFT, Task
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.unmoved import (
    IN_ADVANCE,
    STACKED_FROM,
    Unmoved,
    kept_from_the_chain,
    stacked_share,
    unmoved_draws,
)
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models import observation, solved_heads
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.features import all_features
from pyro_lift.models.heads import solve_head
from pyro_lift.models.observation import network_output
from pyro_lift.models.rows import Rows
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.tensor_digest import digest_of


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0"]), seed=0)


def task(rows: int, seed: int = 0, noise: float = 0.0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    score = x @ torch.randn(6, 3, generator=generator) + noise * torch.randn(rows, 3, generator=generator)
    test = torch.randn(10, 6, generator=generator), torch.zeros(10, dtype=torch.long)
    return Task(f"t{seed}", (x, score.argmax(-1)), test=test, num_classes=3)


def solved(tasks: list[Task], net: RandomAdapter) -> SolvedHeads:
    return SolvedHeads(net, tasks, net.initial)


@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.0, 0.1, 1.5])
def test_the_weight_maximises_the_penalised_log_score(shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    start = -torch.rand(40, generator=generator, dtype=torch.float64)
    moved = -torch.rand(40, generator=generator, dtype=torch.float64) + shift

    def loss(w: float) -> float:
        mixed = (w * start.exp() + (1.0 - w) * moved.exp()).log().sum()
        both = torch.tensor([w, 1.0 - w], dtype=torch.float64)
        return -float(mixed + IN_ADVANCE * both.log().sum())

    best = minimize_scalar(loss, bounds=(1e-6, 1.0 - 1e-6), method="bounded", options={"xatol": 1e-9})
    assert stacked_share(start, moved) == pytest.approx(best.x, abs=1e-4)


def test_every_fifth_row_of_each_class_is_kept_from_the_chain() -> None:
    assert kept_from_the_chain(task(STACKED_FROM - 1)) is None
    whole = task(200)
    kept = kept_from_the_chain(whole)
    assert kept is not None
    for label in range(3):
        of_class = whole.train.target == label
        assert int(kept[of_class].sum()) == int(of_class.sum()) // 5
        assert torch.nonzero(kept[of_class]).flatten()[0] == 4


def test_chains_see_the_other_rows_and_heads_of_the_prediction_all() -> None:
    net, whole, small = adapter(), task(120), task(40, seed=1)
    unmoved = Unmoved([whole, small], solved([whole, small], net))
    kept = kept_from_the_chain(whole)
    assert kept is not None and unmoved.solved is not None and unmoved.heads is not None
    assert torch.equal(unmoved.tasks[0].train.target, whole.train.target[~kept])
    assert len(unmoved.tasks[1].train) == 40 and len(unmoved.heads.tasks[0].train) == 120
    # The prior of the head is not chosen again.
    assert unmoved.solved.prior_sd(0) == unmoved.heads.prior_sd(0)


def test_rows_that_are_left_out_are_judged_by_a_head_that_has_not_seen_them() -> None:
    net, whole = adapter(), task(120, noise=1.0)
    heads, kept = solved([whole], net), kept_from_the_chain(whole)
    assert kept is not None
    theta = net.initial + 0.1
    x, y = all_features(net, whole.train, theta, network_output), whole.train.target
    choice = heads.choice(0)
    head = solve_head(x[~kept], y[~kept], choice.model, prior_sd=choice.sd).head
    logits = x[kept] @ head[:, :-1].mT + head[:, -1]
    expected = -nn.functional.cross_entropy(logits, y[kept], reduction="none")
    torch.testing.assert_close(heads.log_prob_without(0, theta, kept).float(), expected, atol=1e-4, rtol=1e-4)


def test_the_share_goes_with_what_the_moves_are_worth() -> None:
    net, whole = adapter(), task(300)
    unmoved = Unmoved([whole], solved([whole], net))
    ruined = net.initial + 30.0 * torch.randn(10, len(net.initial), generator=torch.Generator().manual_seed(0))

    def stays(start: Tensor, thetas: Tensor) -> int:
        return int((unmoved.put_back(0, start, thetas) == start).all(-1).sum())

    assert stays(net.initial, ruined) == 9 and stays(net.initial, ruined[:4]) == 4
    assert unmoved_draws(4, 0.95, all_may=True) == 4 and unmoved_draws(4, 0.95) == 3  # one moves, if rows do not speak
    assert stays(ruined[0], net.initial.expand(10, -1).clone() + 1e-3) <= 1
    half = Unmoved([task(40)], solved([task(40)], net))
    assert int((half.put_back(0, net.initial, ruined) == net.initial).all(-1).sum()) == 5
    given = Unmoved([whole], solved([whole], net), share=0.2)
    assert given.tasks[0] is whole and int((given.put_back(0, ruined[0], ruined[1:]) == ruined[0]).all(-1).sum()) == 2


def test_a_rate_that_ruins_an_adaptation_costs_little_where_rows_can_tell() -> None:
    net, tasks = adapter(), [task(30, seed=k) for k in range(4)]
    lift = LiFT(net, head_scale=1.0, sgd_steps=0, burn_in=5, samples=10, seed=0)
    prior = lift.meta_train(tasks, progress=False)
    new = task(300, seed=9)
    wild = prior.adapt(new, steps=30, learning_rate=3.0, temperature=30.0, seed=0)
    both = prior.adapt_many([new, new], steps=30, learning_rate=3.0, temperature=30.0, seed=0)
    for posterior in (wild, *both):
        at_start = (posterior.thetas == posterior.thetas[0]).all(-1)
        assert int(at_start.sum()) >= 8
    # Where development rows find the draws, none is kept from the chain; looking for them where there are none is vain.
    watched = replace(new, dev=new.test)
    assert Unmoved([watched], solved([watched], net), looks=True).tasks[0].train is watched.train
    assert Unmoved([new], solved([new], net), looks=True).tasks[0].train is not new.train


class Overflowing(nn.Module):
    """Features that are finite at the start, and are not once the weights have grown."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(20.0 * x.abs())


def test_a_chain_that_runs_away_under_solved_heads_says_so() -> None:
    linear = nn.Linear(6, 16)
    nn.init.normal_(linear.weight, std=0.02)
    backbone = nn.Sequential(linear, Overflowing())
    net = adapt_backbone(backbone, peft.LoraConfig(r=2, target_modules=["0"]), seed=0)
    tasks = [task(300, seed=k) for k in range(2)]
    lift = LiFT(net, head_scale=1.0, sgd_steps=0, burn_in=5, samples=10, learning_rate=1e-5, seed=0)
    prior = lift.meta_train(tasks, progress=False)
    prior.rows = None  # as of a prior of before steps had a limit, which may save this one
    with pytest.raises(DivergedError, match="smaller"):
        prior.adapt(task(300, seed=9), steps=20, learning_rate=1e3, seed=0)


def test_the_baselines_stack_as_lift_does() -> None:
    net, new = adapter(), task(300, seed=9)
    ensemble = finetune(
        net, new, net.initial, Budget(steps=20, learning_rate=50.0, draws=10, heads=HeadPolicy(scale=1.0), seed=0)
    )
    assert int((ensemble.thetas == net.initial).all(-1).sum()) >= 8


def test_features_at_the_start_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = LiFT(adapter(), sgd_steps=2, burn_in=2, samples=4, seed=0).meta_train(
        [task(12, seed) for seed in range(3)], progress=False
    )
    read: list[bytes] = []

    def counted(net: RandomAdapter, rows: Rows, theta: Tensor, *rest: Any, **options: Any) -> Tensor:
        read.append(digest_of(theta, *rows.inputs.values()))
        return all_features(net, rows, theta, *rest, **options)

    for module in (observation, solved_heads):
        monkeypatch.setattr(module, "all_features", counted)
    news = [task(12, seed) for seed in range(5, 8)]
    posteriors = prior.adapt_many(news, steps=12, draws=4)
    assert len(read) == len(set(read)) == 3 * (2 + 2)  # phi and the untouched network; and the two draws that move
    assert all((posterior.thetas[0] == posterior.thetas[1]).all() for posterior in posteriors)
