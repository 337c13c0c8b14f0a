"""Memory that is reckoned before a run: near what it takes, and refused with numbers where it is not there."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pretended_cuda import pretended_cuda
from programs import vectorised
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import LiFT, SGLDGibbs
from pyro_lift.bench.memory import peak_bytes
from pyro_lift.inference import footprint
from pyro_lift.inference.footprint import check_fits, mixture_need
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.support import memory

CPU = torch.device("cpu")


def chain(D: int, N: int, **options: Any) -> SGLDGibbs:
    mean = torch.zeros(D)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(mean, 0.3, validate_args=False).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.03, validate_args=False).to_event(1))
            pyro.factor(f"obs_{i}", theta[:10].sum())

    return SGLDGibbs(model, step_size=1e-4, seed=0, check_stability=False, **options)


@pytest.mark.parametrize("options", [{}, {"preconditioner": "rms"}, {"store": "host"}, {"store": "disk"}])
def test_the_memory_of_a_chain_is_what_was_reckoned(options: dict[str, Any]) -> None:
    kernel = chain(100_000, 12, **{"store": "device", **options})
    reckoned: list[int] = []

    def run() -> None:
        kernel.setup(0)
        for _ in range(15):
            kernel.sample(kernel.initial_params)

    original = footprint.chain_needs

    def noting(*given: Any) -> Any:
        needs = original(*given)
        reckoned.append(sum(need.nbytes for need in needs))
        return needs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_lift.inference.gibbs.kernel.chain_needs", noting)
        taken = peak_bytes(run, CPU)
    assert 0.6 < reckoned[0] / taken < 1.6


@pytest.mark.parametrize(("components", "covariance"), [(1, "diag"), (5, "diag"), (3, "spherical")])
def test_the_memory_of_a_mixture_is_what_was_reckoned(components: int, covariance: Any) -> None:
    D, draws = 60_000, 40
    mixture = OnlineGaussianMixture(components, covariance, buffer_size=8)
    reckoned = mixture_need(mixture, torch.zeros(D), draws).nbytes
    stream = torch.randn(components, D)

    def run() -> None:
        for k in range(draws):
            mixture.update(stream[k % components] + 0.01 * k)

    assert 0.5 < reckoned / peak_bytes(run, CPU) < 2.0


def test_a_chain_that_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 6 * 10**6)
    with pytest.raises(
        MemoryError, match=r"theta of 30 tasks 0.01.*0.01 GiB are free.*store=\"host\" or store=\"disk\""
    ):
        chain(100_000, 30, store="device").setup(0)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 10**7)
    chain(100_000, 30, store="disk").setup(0)


def test_the_host_s_part_is_held_against_the_host_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 10**9, "cpu": 50}
    monkeypatch.setattr(footprint, "free_bytes", lambda device: free[device.type])
    with pretended_cuda():
        with pytest.raises(MemoryError, match="on cpu"):
            SGLDGibbs(vectorised(2, device="cuda"), step_size=0.01, seed=0, store="host").setup(0)
        free |= {"cuda": 50, "cpu": 10**9}
        with pytest.raises(MemoryError, match="on cuda:0"):
            SGLDGibbs(vectorised(2, device="cuda"), step_size=0.01, seed=0, store="host").setup(0)


def test_lift_counts_its_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 20_000)
    lift = LiFT(tiny_adapter(), components=5, sgd_steps=2, burn_in=2, samples=200, seed=0)
    with pytest.raises(MemoryError, match=r"the mixture of 5 components.*fewer components"):
        lift.meta_train(tiny_tasks(3), progress=False)


def test_nothing_is_refused_where_there_is_room() -> None:
    check_fits([footprint.Need("theta", 10**6)], CPU)
    check_fits([], CPU)


def test_what_pytorch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes(torch.device("cuda")) == 140
