"""A visit is pure: the same from the same state and streams, the given state as it was, nothing kept of a failure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model, constrained, sequential, vectorised
from torch import Tensor

from pyro_lift import DivergedError, SGLDGibbs
from pyro_lift.inference.gibbs import long_vectors, visit, warmup
from pyro_lift.inference.gibbs.state import Chain, SGLDGibbsState, Streams
from pyro_lift.inference.stores.memory import DeviceStore

GIBBS: dict[str, Any] = {"phi_update": "gibbs"}
LANGEVIN: dict[str, Any] = {"phi_update": "langevin", "phi_step_size": 1e-4}
CASES: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "gibbs, sequential": (sequential, GIBBS),
    "gibbs, vectorised": (vectorised, GIBBS),
    "gibbs, a block of three": (lambda: vectorised(3), GIBBS),
    "gibbs, rms": (sequential, {**GIBBS, "preconditioner": "rms"}),
    "langevin, exact": (sequential, {**LANGEVIN, "accumulator": "exact"}),
    "langevin, table": (sequential, {**LANGEVIN, "accumulator": "table"}),
    "langevin, table, constrained sites": (constrained, {**LANGEVIN, "accumulator": "table"}),
    "langevin, single": (sequential, {**LANGEVIN, "accumulator": "single"}),
    "two steps a visit": (sequential, {**GIBBS, "theta_steps_per_visit": 2}),
}


def set_up(model: Model, **options: Any) -> tuple[SGLDGibbsState, Chain]:
    """A chain some visits on its way, whose states keep their memory to themselves."""
    kernel = SGLDGibbs(model, step_size=0.01, seed=1, store="device", **options)
    kernel.setup(4)
    params = kernel.initial_params
    for _ in range(9):
        params = kernel.sample(params)
    kernel.chain.cache.recycle = False
    kernel.chain.cache.workspaces.clear()
    return kernel.state, kernel.chain


def streams(seed: int = 2) -> Streams:
    generator = torch.Generator().manual_seed(seed)
    return Streams(generator, generator, seed)


def fresh(chain: Chain) -> Chain:
    """The same chain with a store and a cache of its own."""
    assert isinstance(chain.store, DeviceStore)
    return chain._replace(store=copy.deepcopy(chain.store), cache=copy.deepcopy(chain.cache))


def flat(tree: Any) -> list[Any]:
    """All leaves of a state: tensors as lists, so that they can be compared."""
    if isinstance(tree, Tensor):
        return [tree.tolist()]
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in [name, *flat(tree[name])]]
    return [tree]


def numbers(state: SGLDGibbsState) -> list[Any]:
    return [leaf for part in state for leaf in flat(part)]


def stored(chain: Chain) -> list[Any]:
    rows = [chain.store.read([task])[0].tolist() for task in chain.store.tasks()]
    table = chain.cache.table
    return [*rows, *([] if table is None else [None if row is None else row.tolist() for row in table.rows])]


@pytest.mark.parametrize("name", CASES)
def test_a_visit_is_the_same_from_the_same_state_and_streams(name: str) -> None:
    make, options = CASES[name]
    state, chain = set_up(make(), **options)
    index = torch.arange(chain.structure.block_size)
    before = numbers(state)
    first, second = fresh(chain), fresh(chain)
    moved, info = visit.step(state, first, index, streams())
    again, same_info = visit.step(state, second, index, streams())
    assert numbers(moved) == numbers(again) and stored(first) == stored(second)
    assert float(info.log_likelihood) == float(same_info.log_likelihood) and info.tasks == tuple(index.tolist())
    other, _ = visit.step(state, fresh(chain), index, streams(3))
    assert numbers(moved) != numbers(other)
    assert numbers(state) == before


@pytest.mark.parametrize("name", CASES)
def test_later_visits_leave_earlier_states_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_vectors, "FLAT_FROM", 2)
    make, options = CASES[name]
    state, chain = set_up(make(), **options)
    source, held = streams(), [state]
    seen = [numbers(state)]
    for k in range(4):
        index = (torch.arange(chain.structure.block_size) + k) % chain.structure.num_tasks
        held.append(visit.step(held[-1], chain, index, source)[0])
        seen.append(numbers(held[-1]))
    assert [numbers(held_state) for held_state in held] == seen


def test_a_recycled_state_may_be_held_for_one_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does with long vectors, for speed: the S of the state before last is written over."""
    monkeypatch.setattr(long_vectors, "FLAT_FROM", 2)
    kernel = SGLDGibbs(sequential(), step_size=0.01, seed=1)
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(3):
        params = kernel.sample(params)
    assert kernel.chain.cache.recycle
    state = kernel.state
    before = state.sums["phi"].tolist()
    kernel.sample(params)
    assert state.sums["phi"].tolist() == before
    kernel.sample(dict(kernel.state.phi))
    assert state.sums["phi"].tolist() != before


def explosive() -> Model:
    """Task 2 has a likelihood that is not finite once its theta has moved."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for i in pyro.plate("tasks", 3, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
            scale = torch.exp(1e3 * theta.square().sum()) if i == 2 else torch.ones(())
            pyro.sample(f"y_{i}", dist.Normal(theta.sum(), 1.0), obs=torch.ones(()))
            pyro.factor(f"f_{i}", -scale)

    return model


@pytest.mark.parametrize("step", [visit.step, warmup.sgd_step])
def test_nothing_is_kept_of_a_visit_that_fails(step: Any) -> None:
    kernel = SGLDGibbs(explosive(), step_size=0.01, seed=1, store="device")
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(2):
        params = kernel.sample(params)
    chain = kernel.chain
    state = kernel.state._replace(phi={"phi": torch.full((2,), 3.0)})
    chain.store.write([2], [torch.full((2,), 3.0)])
    chain.cache.layouts[2] = chain.cache.layouts[0]
    before = numbers(state), stored(chain)
    with pytest.raises(DivergedError, match="task 2"):
        step(state, chain, torch.tensor([2]), streams())
    assert (numbers(state), stored(chain)) == before


def test_without_its_draw_of_phi_a_visit_changes_only_theta_and_its_sum() -> None:
    state, chain = set_up(sequential(), **GIBBS)
    moved, _ = visit.step(state, fresh(chain), torch.tensor([0]), streams(), move_phi=False)
    assert flat(moved.phi) == flat(state.phi) and flat(moved.sums) != flat(state.sums)
    drawn, _ = visit.step(state, fresh(chain), torch.tensor([0]), streams())
    assert flat(drawn.sums) == flat(moved.sums) and flat(drawn.phi) != flat(state.phi)


@pytest.mark.parametrize("name", CASES)
def test_the_sum_stays_the_sum_of_all_theta(name: str) -> None:
    make, options = CASES[name]
    state, chain = set_up(make(), **options)
    source = streams()
    for k in range(12):
        index = (torch.arange(chain.structure.block_size) * 1 + k) % chain.structure.num_tasks
        state, _ = visit.step(state, chain, index, source)
    for site, S in state.sums.items():
        total = sum(row[: S.numel()].double() for row in chain.store.read(list(range(chain.structure.num_tasks))))
        assert isinstance(total, Tensor)
        torch.testing.assert_close(S.reshape(-1), total, rtol=0, atol=1e-10), site
