"""A visit piece by piece against the plain visit: the same numbers from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import SGLDGibbs
from pyro_lift.inference import tiles
from pyro_lift.inference.gibbs import long_vectors
from pyro_lift.inference.stores.memory import DeviceStore
from pyro_lift.inference.stores.store import row_sum

D, N = 117, 3
TILE = 32
SIGMA, BETA = 0.7, 0.2


def program(with_head: bool = False, dtype: torch.dtype = torch.float64, by_coordinate: str = "") -> Callable[[], None]:
    """Two levels of normals; ``by_coordinate`` names the widths that differ by coordinate."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(N, D, generator=generator, dtype=dtype)
    m0 = torch.randn(D, generator=generator, dtype=dtype)

    widths = torch.linspace(0.5, 2.0, D, dtype=dtype)
    sigma = SIGMA * widths if "sigma" in by_coordinate else SIGMA
    beta = BETA * widths.flip(0) if "beta" in by_coordinate else BETA

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(m0, sigma).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, beta).to_event(1))
            shift: Tensor | float = 0.0
            if with_head:
                shift = pyro.sample(f"head_{i}", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample(f"obs_{i}", dist.Normal(theta + shift, 0.5).to_event(1), obs=y[i])

    return model


def run(flat: bool, visits: int, model: Callable[[], None], **options: Any) -> tuple[SGLDGibbs, list[Tensor]]:
    pyro.set_rng_seed(3)
    # Past the limit of some of the likelihoods, for the few visits that are compared.
    kernel = SGLDGibbs(model, step_size=0.02, check_stability=False, **options)
    kernel.setup(options.get("sgd_steps", 0) + 4)
    params, draws = kernel.initial_params, []
    for _ in range(visits):
        params = kernel.sample(params)
        draws.append(params["phi"])
    assert bool(kernel.chain.cache.workspaces) is flat
    return kernel, draws


@pytest.fixture
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(long_vectors, "FLAT_FROM", 10)
    monkeypatch.setattr(tiles, "TILE", TILE)
    return monkeypatch


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"preconditioner": "rms"},
    "cold": {"temperature": 0.0},
    "warm, inflated": {"temperature": 0.3, "n_inflate": 2.0},
    "clipped": {"max_grad_norm": 0.5},
    "after sgd": {"sgd_steps": 3, "preconditioner": "rms"},
    "cold rms": {"temperature": 0.0, "preconditioner": "rms"},
    "site scale": {"site_step_scale": {"theta": 3.0}},
    "translation": {"translation": "saga", "translation_step_size": 0.002},
    "translation, rms": {"translation": "saga", "preconditioner": "rms"},
    "translation, falling": {"translation": "falling", "translation_step_size": 0.002, "temperature": 0.3},
    "site temperature": {"site_temperature": {"theta": 0.3}},
}


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_same_chain_as_the_plain_visit(short_is_long: pytest.MonkeyPatch, name: str, with_head: bool) -> None:
    """The last piece has 21 numbers, which is no multiple of the noise generator's groups of 16."""
    model = program(with_head)
    kernel, draws = run(True, 17, model, **CASES[name])
    short_is_long.setattr(long_vectors, "FLAT_FROM", 10**9)
    plain, expected = run(False, 17, model, **CASES[name])
    torch.testing.assert_close(torch.stack(draws), torch.stack(expected), rtol=1e-9, atol=1e-11)
    for i in range(N):
        for family, value in plain.theta(i).items():
            torch.testing.assert_close(kernel.theta(i)[family], value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(kernel.state.sums["phi"], plain.state.sums["phi"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("by_coordinate", ["beta", "sigma", "beta, sigma"])
@pytest.mark.parametrize("name", ["plain", "rms", "cold rms", "warm, inflated", "translation, rms"])
def test_widths_that_differ_by_coordinate_too(short_is_long: pytest.MonkeyPatch, name: str, by_coordinate: str) -> None:
    model = program(by_coordinate=by_coordinate)
    kernel, draws = run(True, 17, model, **CASES[name])
    short_is_long.setattr(long_vectors, "FLAT_FROM", 10**9)
    plain, expected = run(False, 17, model, **CASES[name])
    torch.testing.assert_close(torch.stack(draws), torch.stack(expected), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(kernel.state.sums["phi"], plain.state.sums["phi"], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("short_is_long")
def test_s_is_the_sum_of_all_theta_after_any_visits() -> None:
    kernel, _ = run(True, 40, program(dtype=torch.float32))
    assert isinstance(kernel.store, DeviceStore)
    torch.testing.assert_close(kernel.state.sums["phi"], row_sum(kernel.store, slice(None)), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("short_is_long")
def test_draws_and_rows_are_memory_of_their_own() -> None:
    kernel, draws = run(True, 12, program())
    copies = [draw.clone() for draw in draws]
    theta = kernel.theta(0)["theta"]
    before = theta.clone()
    for _ in range(6):
        kernel.sample(kernel.state.phi)
    assert all(torch.equal(a, b) for a, b in zip(draws, copies, strict=True))
    assert torch.equal(theta, before)


@pytest.mark.usefixtures("short_is_long")
def test_a_visit_that_fails_leaves_state_and_rows() -> None:
    from pyro_lift.inference.sgld import DivergedError

    bad: list[bool] = []

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D), SIGMA).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, BETA).to_event(1))
            # Zero, with a gradient that is not finite.
            cusp = (theta - theta.detach()).sum().sqrt() if bad else 0.0
            pyro.factor(f"obs_{i}", -(theta - 1.0).square().sum() + cusp)

    kernel, _ = run(True, 7, model)
    S, phi, theta = kernel.state.sums["phi"].clone(), kernel.state.phi["phi"].clone(), kernel.theta(1)["theta"].clone()
    bad.append(True)
    with pytest.raises(DivergedError, match="step 7, task 1"):
        kernel.sample(kernel.state.phi)
    assert torch.equal(kernel.state.sums["phi"], S) and torch.equal(kernel.state.phi["phi"], phi)
    assert torch.equal(kernel.theta(1)["theta"], theta)


def test_noise_in_pieces_is_the_noise_at_once() -> None:
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    pieces = torch.empty(1000)
    for piece in pieces.split(64):
        piece.normal_(generator=generator)
    assert torch.equal(pieces, whole)
