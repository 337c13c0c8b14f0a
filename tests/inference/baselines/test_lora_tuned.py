"""Tuned LoRA: the candidates scored by hand, the probe among them, the last fit on all rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import bert, matching_task
from tiny_methods import SMALL, tiny_adapter, tiny_tasks

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.lora_tuned import LoRATuned
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.observation import outputs
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Task

OWN = replace(SMALL, heads=HeadPolicy(scale=1.0), steps=8)


def test_the_candidate_without_steps_is_the_solved_head_scored_on_a_fifth() -> None:
    adapter, task = tiny_adapter(6), tiny_tasks(1, rows=20)[0]
    method = LoRATuned(adapter, OWN, rates=(1e-3,))
    found = method.adapt(method.meta_train([task]), task)
    order = torch.argsort(task.train.target, stable=True)
    held = torch.zeros(20, dtype=torch.bool)
    held[order[4::5]] = True
    kept, left = task.train.take((~held).nonzero().squeeze(-1)), task.train.take(held.nonzero().squeeze(-1))
    head = SolvedHeads(adapter, [replace(task, train=kept)], adapter.initial).solve(0, adapter.initial)
    log_p = outputs(adapter, left, adapter.initial, head).log_softmax(-1)
    expected = float(log_p[torch.arange(4), left.target].mean().detach())
    assert [(c.rate, c.steps) for c in found.tried] == [(None, 0), (1e-3, 2), (1e-3, 4), (1e-3, 8)]
    assert found.tried[0].score == pytest.approx(expected)
    assert found.chosen == max(found.tried, key=lambda candidate: candidate.score)


def test_no_step_is_chosen_where_steps_do_harm_and_steps_where_they_help() -> None:
    adapter, task = tiny_adapter(6), tiny_tasks(1, rows=20)[0]
    wild = LoRATuned(adapter, OWN, rates=(30.0,))
    found = wild.adapt(wild.meta_train([task]), task)
    assert found.chosen.rate is None
    posterior: Any = found.posterior
    expected = SolvedHeads(adapter, [task], adapter.initial).solve(0, adapter.initial)
    assert torch.equal(posterior.thetas[0], adapter.initial)
    torch.testing.assert_close(posterior.heads[0], expected)
    budget = replace(OWN, steps=80)
    good = LoRATuned(adapter, budget, rates=(3e-3,))
    better = good.adapt(good.meta_train([task]), task)
    assert better.chosen.rate == 3e-3 and better.chosen.score > better.tried[0].score
    assert better.thetas is not None and not torch.equal(better.thetas[0], adapter.initial)
    assert better.heads is not None and better.heads.shape == (1, 3, 7)


def test_nothing_random_of_the_callers_is_touched_and_a_seed_says_it_all() -> None:
    adapter, task = tiny_adapter(6), tiny_tasks(1, rows=20)[0]
    method = LoRATuned(adapter, OWN)
    state = method.meta_train([task])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = method.adapt(state, task, seed=1), method.adapt(state, task, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tried == again.tried
    torch.testing.assert_close(first.predict(task.test), again.predict(task.test), rtol=0, atol=0)


def test_a_shared_head_has_the_probe_for_a_rival_and_few_rows_leave_it() -> None:
    adapter, task = tiny_adapter(3), tiny_tasks(1, rows=20)[0]
    method: Any = BASELINES["lora-tuned"](adapter, SMALL)
    found = method.adapt(method.meta_train([task]), task)
    assert [c.probe for c in found.tried[:2]] == [False, True]
    few = Task("few", task.train.take(slice(0, 4)), num_classes=3)
    probed = method.adapt(method.meta_train([few]), few)
    assert probed.tried == () and probed.chosen.probe
    probe: Any = BASELINES["linear-probe"](adapter, SMALL)
    expected = probe.adapt(probe.meta_train([few]), few).predict(task.test)
    torch.testing.assert_close(probed.predict(task.test), expected)
    assert probed.thetas is None and probed.heads.shape[:2] == (1, 3)


def test_regression_is_tuned_on_its_values() -> None:
    adapter = tiny_adapter(1)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Task("values", (x, x[:, 0]), "regression")
    method = LoRATuned(adapter, SMALL)
    assert method.adapt(method.meta_train([task]), task).predict(x).shape[0] == 10


def test_label_matching_keeps_its_scale_while_the_linear_part_moves() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, task = bert().eval(), matching_task("t")
    adapter = adapt_backbone(network, recipe(network, rank=2), seed=0)
    method = LoRATuned(adapter, replace(SMALL, steps=8), rates=(1e-2,))
    state = method.meta_train([task])
    from pyro_lift.inference.baselines.lora_tuned import _Fit

    fit = _Fit(adapter, task, state.theta, method.budget, 0)
    ((_, moved),) = fit.path(1e-2, [8])
    assert fit.start.head is not None and moved.head is not None
    assert torch.equal(moved.head[:, 16:19], fit.start.head[:, 16:19])
    assert not torch.equal(moved.head[:, :16], fit.start.head[:, :16])
    assert method.adapt(state, task).predict(task.train).shape == (8, 3)


def test_settings_that_say_nothing_are_refused() -> None:
    adapter = tiny_adapter(3)
    with pytest.raises(ValueError, match="rates is empty"):
        LoRATuned(adapter, rates=())
    with pytest.raises(ValueError, match="rates=-1"):
        LoRATuned(adapter, rates=(1e-3, -1.0))
