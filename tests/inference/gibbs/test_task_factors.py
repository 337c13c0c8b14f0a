"""Steps of the tasks' own: alike for tasks whose data are the same rows many times over."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFTSettings, SGLDGibbs
from pyro_lift.settings import complete_settings

FACTORS = (1.0, 0.25, 1.0, 0.5)


def iterated(data: Tensor, powers: tuple[float, ...]) -> None:
    """Each task sees its row ``powers[i]`` times."""
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("tasks", len(data), subsample_size=2):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
        with pyro.poutine.scale(scale=powers[int(i)]):
            pyro.sample(f"y_{i}", dist.StudentT(3.0, theta, 1.0).to_event(1), obs=data[int(i)])


def vectorised(data: Tensor, powers: tuple[float, ...]) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("tasks", len(data), subsample_size=2, dim=-1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
        with pyro.poutine.scale(scale=torch.tensor(powers)[index]):
            pyro.sample("y", dist.StudentT(3.0, theta, 1.0).to_event(1), obs=data[index])


def rows() -> Tensor:
    return 3.0 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def visited(model: Any, powers: tuple[float, ...], visits: int = 12, **options: Any) -> tuple[SGLDGibbs, Tensor]:
    """Run some visits of burn-in, and return the kernel and all theta."""
    options = {"step_size": 0.02, "phi_update": "gibbs", "theta_update": "sgld", "seed": 0, **options}
    kernel = SGLDGibbs(model, **options)
    kernel.setup(visits, rows(), powers)
    params = dict(kernel.initial_params)
    for _ in range(visits):
        params = kernel.sample(params)
    return kernel, torch.stack([row.reshape(-1) for row in kernel.chain.store.read(range(4))])


@pytest.mark.parametrize("preconditioner", [None, "rms"])
@pytest.mark.parametrize("model", [iterated, vectorised])
def test_one_factor_for_all_is_another_step_size(model: Any, preconditioner: str | None) -> None:
    """Under the preconditioner it is the same step: it divides by the root of what it multiplies."""
    shared: dict[str, Any] = {"preconditioner": preconditioner, "damping": 1e-6}
    scaled = visited(model, (1.0,) * 4, task_step_scale=[0.25] * 4, **shared)[1]
    plain = visited(model, (1.0,) * 4, step_size=0.02 if preconditioner else 0.005, **shared)[1]
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("translation", ["none", "falling"])
@pytest.mark.parametrize("preconditioner", [None, "rms"])
def test_a_task_whose_rows_are_repeated_moves_as_one_whose_are_not(
    translation: str, preconditioner: str | None
) -> None:
    """A likelihood to the power n with a step over n is the first one's step, but for noise and prior."""
    shared: dict[str, Any] = {"temperature": 0.0, "integrator": "euler", "preconditioner": preconditioner}
    shared |= {"translation": translation, "check_stability": False, "visits": 4, "damping": 1e-6}
    if translation == "falling":
        shared["translation_step_size"] = 0.01
    powers = tuple(1.0 / factor for factor in FACTORS)
    alike = visited(iterated, powers, task_step_scale=FACTORS, **shared)
    once = visited(iterated, (1.0,) * 4, **shared)
    led = visited(iterated, powers, **shared)
    # The prior's pull on theta is by its own step, so that the two differ by what it does in two visits.
    apart, led_apart = (float((each[1] - once[1]).abs().max()) for each in (alike, led))
    assert apart < 0.1 * led_apart
    if preconditioner:
        squares = [float(next(iter(run[0].state.second_moment.values())).mean()) for run in (alike, once, led)]
        assert squares[0] == pytest.approx(squares[1], rel=0.05)
        assert squares[2] > 1.3 * squares[1]


def test_a_block_of_a_plate_steps_as_tasks_one_by_one() -> None:
    shared: dict[str, Any] = {"temperature": 0.0, "visits": 6, "task_step_scale": FACTORS}
    powers = tuple(1.0 / factor for factor in FACTORS)
    one_by_one, together = (visited(model, powers, **shared)[1] for model in (iterated, vectorised))
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_what_takes_no_such_steps_refuses_them() -> None:
    with pytest.raises(ValueError, match="task_step_scale has 3 factors for 4 tasks"):
        visited(vectorised, FACTORS, task_step_scale=[1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"task_step_scale\[1\]=-1.0"):
        SGLDGibbs(vectorised, task_step_scale=[1.0, -1.0])
    with pytest.raises(ValueError, match='does not go with theta_update="underdamped"'):
        visited(vectorised, FACTORS, task_step_scale=FACTORS, theta_update="underdamped")
    with pytest.raises(ValueError, match="task_step_scale does not go with it"):
        visited(vectorised, FACTORS, task_step_scale=FACTORS, theta_update="auto", phi_update="nuts", step_size=None)


def test_a_run_that_was_saved_before_keeps_one_step_size() -> None:
    assert complete_settings({})["task_steps"] == "rows"
    assert LiFTSettings(**complete_settings({"task_steps": "tasks"})).task_steps == "tasks"
    with pytest.raises(ValueError, match="task_steps"):
        LiFTSettings(task_steps="task")  # type: ignore[arg-type]
