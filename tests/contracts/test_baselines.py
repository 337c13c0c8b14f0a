"""The contract of all baselines: one table of all rows through the same checks, on a tiny family."""

from __future__ import annotations

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.methods.registry import BASELINES


@pytest.fixture(params=sorted(BASELINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "heads",
    [HeadPolicy(), HeadPolicy(scale=1.0, lr_scale=3.0, update="step"), HeadPolicy(scale=1.0, update="solve")],
    ids=["shared", "own", "solved"],
)
def test_contract(name: str, heads: HeadPolicy) -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(4)
    from dataclasses import replace

    method = BASELINES[name](adapter, replace(SMALL, heads=heads))
    before = {k: v.clone() for k, v in adapter.backbone.state_dict().items()}
    state = method.meta_train(tasks[:3])
    assert state.meta_steps >= 0
    first = method.adapt(state, tasks[3]).predict(tasks[3].test)
    again = method.adapt(method.meta_train(tasks[:3]), tasks[3]).predict(tasks[3].test)
    assert first.shape == (20, 3)
    assert torch.isfinite(first).all() and (first >= 0).all()
    torch.testing.assert_close(first.sum(-1), torch.ones(20, dtype=first.dtype))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for key, value in adapter.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_ablations_of_adaptation_work_on_lifts_own_state() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(4)
    whole, cold = BASELINES["lift"](adapter, SMALL), BASELINES["lift-noise-x"](adapter, SMALL)
    state = whole.meta_train(tasks[:3])
    found = [cold.adapt(state, tasks[3], seed=seed).thetas for seed in (0, 1)]  # type: ignore[attr-defined]
    noisy = [whole.adapt(state, tasks[3], seed=seed).thetas for seed in (0, 1)]  # type: ignore[attr-defined]
    # Without noise two seeds differ by their minibatches alone.
    assert float((found[0] - found[1]).abs().max()) < 0.5 * float((noisy[0] - noisy[1]).abs().max())
