"""A limit on what data move a weight in a visit: where it binds, where it does not, and a family that needs it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import SGLD, LiFTSettings, SGLDGibbs
from pyro_lift.settings import complete_settings

#: The third task pulls a thousand times as hard as the others.
PULL = (1.0, 1.0, 1000.0, 1.0)
ETA = 0.02


def iterated(data: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    for i in pyro.plate("tasks", len(data), subsample_size=2):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 100.0).to_event(1))
        with pyro.poutine.scale(scale=PULL[int(i)]):
            pyro.sample(f"y_{i}", dist.Laplace(theta, 1.0).to_event(1), obs=data[int(i)])


def vectorised(data: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    with pyro.plate("tasks", len(data), subsample_size=2, dim=-1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 100.0).to_event(1))
        with pyro.poutine.scale(scale=torch.tensor(PULL)[index]):
            pyro.sample("y", dist.Laplace(theta, 1.0).to_event(1), obs=data[index])


def visited(model: Any, visits: int = 6, **options: Any) -> tuple[list[Tensor], list[bool], SGLDGibbs]:
    """Run some visits of burn-in; the theta that each moved, whether it was clipped, and the kernel."""
    shared: dict[str, Any] = {"step_size": ETA, "phi_update": "gibbs", "theta_update": "sgld", "seed": 0}
    shared |= {"preconditioner": "rms", "temperature": 0.0, "check_stability": False}
    kernel = SGLDGibbs(model, **{**shared, **options})
    kernel.setup(visits, 20.0 + torch.arange(12.0).view(4, 3))
    params, thetas, clipped = dict(kernel.initial_params), list[Tensor](), list[bool]()
    for _ in range(visits):
        params = kernel.sample(params)
        assert kernel.last_visit is not None
        tasks = kernel.last_visit.tasks
        thetas.append(torch.stack([row.reshape(-1).clone() for row in kernel.chain.store.read(tasks)]))
        clipped.append(bool(kernel.last_visit.clipped))
    return thetas, clipped, kernel


@pytest.mark.parametrize("model", [iterated, vectorised])
def test_a_limit_that_is_never_reached_changes_nothing(model: Any) -> None:
    free, _, _ = visited(model, temperature=1.0)
    limited, clipped, _ = visited(model, temperature=1.0, max_move=1e9)
    assert torch.equal(free[-1], limited[-1]) and not any(clipped)


@pytest.mark.parametrize("factors", [None, (1.0, 0.5, 0.001, 1.0)])
@pytest.mark.parametrize("model", [iterated, vectorised])
def test_no_weight_moves_by_more_than_the_limit_and_all_gradients_are_those_of_the_clamp(
    model: Any, factors: tuple[float, ...] | None
) -> None:
    """Laplace's gradient has one size, so that V and P are known in closed form."""
    limit, damping, decay = 0.4, 0.1, 0.99
    thetas, clipped, kernel = visited(model, visits=4, max_move=limit, task_step_scale=factors)
    before, V = {0: torch.zeros(2, 3), 1: torch.zeros(2, 3)}, torch.zeros(())
    own = torch.tensor(factors or (1.0,) * 4)
    for visit, theta in enumerate(thetas):
        tasks = [0, 1] if visit % 2 == 0 else [2, 3]
        pull = torch.tensor(PULL)[tasks]
        P = torch.zeros(2)
        for k, own_square in enumerate((own[tasks] * pull).square()):  # sites one after the other, or a block's mean
            square = own_square if model is iterated else (own[tasks] * pull).square().mean()
            if model is iterated or k == 0:
                V = square if V == 0.0 else decay * V + (1.0 - decay) * square
            P[k] = 1.0 / (V.sqrt() * (1.0 + damping))
        gradient = torch.minimum(pull, limit / (own[tasks] * P))
        step = 0.5 * ETA * own[tasks] * P * gradient
        moved = theta - before[visit % 2]
        torch.testing.assert_close(moved, step.unsqueeze(-1).expand_as(moved), rtol=1e-3, atol=1e-6)
        assert bool((moved <= 0.5 * ETA * limit * (1.0 + 1e-4)).all())
        assert clipped[visit] == bool((pull > gradient * (1.0 + 1e-6)).any())
        before[visit % 2] = theta
    assert kernel.settings.max_move == limit


def test_the_translation_sees_the_gradient_that_moved_theta() -> None:
    moved = {}
    for limit in (None, 0.5):
        options = {"translation": "falling", "translation_step_size": 1e-3, "max_move": limit}
        moved[limit] = float(visited(iterated, visits=8, **options)[2].state.phi["phi"].abs().max())
    assert moved[0.5] < 0.2 * moved[None]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match='max_move=3 counts in steps of a preconditioner: give preconditioner="rms"'):
        SGLDGibbs(iterated, max_move=3.0)
    with pytest.raises(ValueError, match=r"max_move=0"):
        SGLDGibbs(iterated, max_move=0.0, preconditioner="rms")
    with pytest.raises(ValueError, match="max_move=3 counts in steps of a preconditioner"):
        SGLD(iterated, max_move=3.0)
    with pytest.raises(ValueError, match="max_move=3 counts in steps of a preconditioner"):
        LiFTSettings(max_move=3.0, preconditioner="none")
    with pytest.raises(ValueError, match="a gradient that is shortened is no difference"):
        visited(iterated, max_move=3.0, control_variates=5)
    with pytest.raises(ValueError, match=r"max_move=-1"):
        LiFTSettings(max_move=-1.0)


def test_a_run_that_was_saved_before_keeps_no_limit() -> None:
    assert complete_settings({})["max_move"] == 0.0
    assert LiFTSettings().max_move is None
