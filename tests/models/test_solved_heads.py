"""Heads solved inside a program: the held-out likelihood by hand, its gradient, blocks, and the front door."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pyro
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.unmoved import with_unmoved
from pyro_lift.inference.baselines.finetune import finetune, finetune_each
from pyro_lift.inference.baselines.union_train import union_train
from pyro_lift.inference.program import Program
from pyro_lift.lift import LiFT
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.heads import HeadModel, choose_prior_sd, solve_head
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.observation import network_output
from pyro_lift.models.solved_heads import SolvedHeads, held_out_log_prob, solved_heads
from pyro_lift.settings import AdaptSettings, LiFTSettings


def rows(n: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def test_each_row_is_judged_by_the_head_of_the_other_folds() -> None:
    x, y = rows(14, 5, 3)
    found = held_out_log_prob(x, y, HeadModel(3), 0.4, folds=3)
    order = torch.argsort(y, stable=True)
    for k in range(3):
        left, kept = order[k::3], torch.cat([order[j::3] for j in range(3) if j != k])
        head = solve_head(x[kept], y[kept], HeadModel(3), prior_sd=0.4).head
        expected = (x[left] @ head[:, :-1].T + head[:, -1]).log_softmax(-1)[torch.arange(len(left)), y[left]]
        torch.testing.assert_close(found[left], expected, rtol=1e-7, atol=1e-7)


def test_the_gradient_holds_the_heads_fixed() -> None:
    x, y = rows(8, 4, 2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(held_out_log_prob(x, y, HeadModel(2), 0.4, folds=2).sum(), x)
    order = torch.argsort(y, stable=True)
    for k in range(2):
        left, kept = order[k::2], order[1 - k :: 2]
        head = solve_head(x.detach()[kept], y[kept], HeadModel(2), prior_sd=0.4).head
        p = (x.detach()[left] @ head[:, :-1].T + head[:, -1]).softmax(-1)
        expected = (torch.nn.functional.one_hot(y[left], 2) - p) @ head[:, :-1]
        torch.testing.assert_close(gradient[left], expected, rtol=1e-6, atol=1e-7)


def test_a_head_that_memorises_earns_nothing() -> None:
    own, held_out = [], []
    for seed in range(10):
        x, y = rows(30, 200, 2, seed)
        head = solve_head(x, y, HeadModel(2), prior_sd=0.5).head
        own.append(float((x @ head[:, :-1].T + head[:, -1]).log_softmax(-1)[torch.arange(30), y].mean()))
        held_out.append(float(held_out_log_prob(x, y, HeadModel(2), 0.5).mean()))
    assert min(own) > -0.05
    assert sum(held_out) / 10 < -0.69


def test_padding_is_left_out_and_a_row_alone_in_its_class_counts_nothing() -> None:
    x, y = rows(9, 4, 3)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 2])
    alone = held_out_log_prob(x, y, HeadModel(3), 0.4)
    assert float(alone[8]) == 0.0 and (alone[:8] < 0).all()
    padded = torch.cat([x, torch.full((3, 4), 9.0, dtype=torch.float64)])
    weight = torch.cat([torch.full((9,), 2.0), torch.zeros(3)])
    found = held_out_log_prob(padded, torch.cat([y, y[:3]]), HeadModel(3), 0.4, weight=weight)
    torch.testing.assert_close(found[:9], alone, rtol=1e-6, atol=1e-7)
    assert (found[9:] == 0).all()
    single = held_out_log_prob(x[:1], y[:1], HeadModel(3), 0.4)
    assert single.shape == (1,) and float(single) == 0.0


def test_the_width_is_chosen_once_at_the_start() -> None:
    adapter, tasks = tiny_adapter(6), tiny_tasks(2)
    heads = solved_heads("solve", adapter, tasks, 1.0, adapter.initial)
    assert heads is not None
    found = network_output(adapter, tasks[1].train, adapter.initial).detach()
    choice = choose_prior_sd(found, tasks[1].train.target, HeadModel(3))
    assert heads.prior_sd(1) == choice.sd and heads.score(1) == -min(choice.scores)
    theta = adapter.initial + 0.3
    moved = network_output(adapter, tasks[1].train, theta).detach()
    expected = solve_head(moved, tasks[1].train.target, HeadModel(3), prior_sd=choice.sd).head
    torch.testing.assert_close(heads.solve(1, theta), expected)
    assert solved_heads("sample", adapter, tasks, 1.0, adapter.initial) is None
    assert solved_heads("solve", adapter, tasks, None, adapter.initial) is None
    with pytest.raises(ValueError, match="head='mode'"):
        solved_heads("mode", adapter, tasks, 1.0, adapter.initial)  # type: ignore[arg-type]


def log_likelihood(program: object, values: dict[str, Tensor]) -> float:
    strategy = init_to_value(values=values)
    with torch.random.fork_rng():
        return float(Program(program, None, (), {}, strategy).run({}, {}, None, None).log_likelihood.detach())  # type: ignore[arg-type]


def test_a_block_of_tasks_is_the_tasks_one_by_one() -> None:
    adapter, tasks = tiny_adapter(6), [*tiny_tasks(2), *tiny_tasks(1, rows=9)]
    prior = Independent(Normal(adapter.initial, 0.1), 1)
    thetas = adapter.initial + 0.2 * torch.randn(3, adapter.dim, dtype=torch.float64)
    heads = SolvedHeads(adapter, tasks, adapter.initial)
    single = [
        log_likelihood(
            FlatAdapter(adapter, task, prior, head_scale=1.0, solved=SolvedHeads(adapter, [task], adapter.initial)),
            {"theta": theta},
        )
        for task, theta in zip(tasks, thetas, strict=True)
    ]
    assert len(set(single)) == 3 and all(value < 0 for value in single)
    together = log_likelihood(FlatBlock(adapter, tasks, prior, head_scale=1.0, solved=heads), {"theta": thetas})
    assert together == pytest.approx(sum(single), rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 3])
def test_the_hierarchy_has_no_site_for_a_head_that_is_solved(block_size: int) -> None:
    adapter, tasks = tiny_adapter(6), tiny_tasks(3)
    program = AdapterHierarchy(adapter, tasks, beta=0.1, sigma=0.1, head_scale=1.0, block_size=block_size, head="solve")
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(program).get_trace()
    assert not any("head" in name for name in trace.nodes)
    observed = [site for name, site in trace.nodes.items() if name.startswith("obs")]
    assert len(observed) == 1
    total = float(observed[0]["fn"].log_prob(observed[0]["value"]).sum())
    assert total < 0 and torch.isfinite(torch.tensor(total))


@pytest.mark.parametrize("head", ["solve", "laplace"])
def test_the_front_door_solves_heads_at_every_draw(head: Literal["solve", "laplace"]) -> None:
    adapter, tasks = tiny_adapter(6), tiny_tasks(4)
    adapt = AdaptSettings(steps=8, draws=2, batch_size=6)
    settings = LiFTSettings(sgd_steps=4, burn_in=3, samples=6, head_scale=1.0, head=head)
    prior = LiFT(adapter, settings=settings, adapt=adapt, seed=0).meta_train(tasks[:3], progress=False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    posterior = prior.adapt(tasks[3])
    assert torch.equal(torch.get_rng_state(), before)
    assert posterior.heads is not None and posterior.heads.shape == (2, 3, 7)
    start = prior.mixture.get().component_distribution.mean[0]
    assert torch.equal(posterior.thetas[0], start) and not torch.equal(posterior.thetas[1], start)
    heads = SolvedHeads(adapter, [tasks[3]], start)
    modes = torch.stack([heads.solve(0, theta) for theta in posterior.thetas])
    if head == "solve":
        torch.testing.assert_close(posterior.heads, modes)
    else:
        assert float((posterior.heads - modes).abs().mean()) > 0.01
    again = prior.adapt(tasks[3])
    torch.testing.assert_close(again.heads, posterior.heads, rtol=0, atol=0)
    many = prior.adapt_many([tasks[3], tasks[2]], block_size=2)
    assert [one.heads.shape for one in many if one.heads is not None] == [(2, 3, 7)] * 2
    p = many[0].predict(tasks[3].test)
    torch.testing.assert_close(p.sum(-1), torch.ones(20, dtype=p.dtype))


def test_the_start_is_the_component_whose_features_predict_left_out_rows_best() -> None:
    adapter, tasks = tiny_adapter(6), tiny_tasks(4)
    settings = LiFTSettings(sgd_steps=4, burn_in=3, samples=8, head_scale=1.0, head="solve", components=2)
    adapt = AdaptSettings(steps=4, draws=2)
    prior = LiFT(adapter, settings=settings, adapt=adapt, seed=0).meta_train(tasks[:3], progress=False)
    means = prior.mixture.get().component_distribution.mean
    scores = [SolvedHeads(adapter, [tasks[3]], mean).score(0) for mean in means]
    assert prior.adapt(tasks[3]).component == int(torch.tensor(scores).argmax())


def test_half_of_the_draws_stay_at_the_start() -> None:
    start, thetas = torch.zeros(3), torch.arange(1.0, 6.0).unsqueeze(-1).expand(5, 3)
    assert with_unmoved(start, thetas)[:, 0].tolist() == [0.0, 0.0, 3.0, 4.0, 5.0]
    assert with_unmoved(start, thetas, 0.0)[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert with_unmoved(start, thetas[:1])[:, 0].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"unmoved=1"):
        AdaptSettings(unmoved=1.0)


def test_fine_tuning_and_joint_training_see_rows_that_their_heads_have_not() -> None:
    adapter, tasks = tiny_adapter(6), tiny_tasks(3)
    budget = replace(SMALL, steps=4, draws=2, batch_size=100, heads=HeadPolicy(scale=1.0, update="solve"))
    start = adapter.initial + 0.1
    found = finetune(adapter, tasks[0], start, budget)
    heads = SolvedHeads(adapter, [tasks[0]], start)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(budget.seed))
    rows = tasks[0].train.take(order)  # all of them, dealt into folds in the minibatch's order
    assert found.losses[0] == pytest.approx(float(-heads.log_prob_at(0, rows, start).mean()))
    assert found.heads is not None and torch.equal(found.thetas[0], start)
    torch.testing.assert_close(found.heads[1], heads.solve(0, found.thetas[1]))
    block = finetune_each(adapter, tasks[:2], start, budget)
    torch.testing.assert_close(block[0].thetas, found.thetas, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(block[0].heads, found.heads, rtol=1e-5, atol=1e-6)
    joint = union_train(adapter, tasks, budget=budget, steps=1, learning_rate=1e-3, start=start)
    leaf = start.clone().requires_grad_()
    loss = -SolvedHeads(adapter, tasks, start).log_prob_at(0, rows, leaf).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(joint, start - 1e-3 * gradient.sign(), rtol=0, atol=1e-5)


def test_adaptation_inherits_power_and_temperature_of_meta_training() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    adapt = AdaptSettings(steps=4, draws=2)
    prior = LiFT(
        adapter, adapt=adapt, seed=0, n_inflate=7.0, temperature=0.5, sgd_steps=3, burn_in=2, samples=4
    ).meta_train(tasks, progress=False)
    kernel = prior.adapt(tasks[0]).mcmc.kernel
    assert kernel.n_inflate == 7.0 and kernel.temperature == 0.5
    told = prior.adapt(tasks[0], n_inflate=2.0, temperature=0.0).mcmc.kernel
    assert told.n_inflate == 2.0 and told.temperature == 0.0


def test_a_share_of_the_draws_stays_with_a_shared_head_where_it_is_asked_for() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    adapt = AdaptSettings(steps=8, draws=4)
    prior = LiFT(adapter, adapt=adapt, seed=0, sgd_steps=3, burn_in=2, samples=4).meta_train(tasks, progress=False)
    start = prior.mixture.get().component_distribution.mean[0]
    for share, stays in ((None, 0), (0.5, 2)):
        thetas = prior.adapt(tasks[0], unmoved=share).thetas
        assert [torch.equal(theta, start) for theta in thetas] == [True] * stays + [False] * (4 - stays)
    stepped = LiFT(adapter, adapt=adapt, seed=0, head_scale=1.0, head="langevin", sgd_steps=3, burn_in=2, samples=4)
    with pytest.raises(ValueError, match=r"unmoved=0\.5"):
        stepped.meta_train(tasks, progress=False).adapt(tasks[0], unmoved=0.5)
