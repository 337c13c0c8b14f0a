"""Chains in processes of their own can be sent there, begin where they were told, and draw what they would here."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_median, init_to_sample, init_to_value
from pyro.infer.mcmc.api import mp
from pyro.ops.streaming import StatsOfDict
from torch import Tensor

from pyro_lift import MCMC, SGLD, OnlineGaussianMixture, SGLDGibbs, StreamingMCMC
from pyro_lift.inference.parallel_chains import ParallelChains
from pyro_lift.inference.schedules import constant, cyclical, polynomial
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.stores.disk import DiskStore
from pyro_lift.inference.stores.memory import DeviceStore, HostStore
from pyro_lift.models.linear_gaussian import LinearGaussian

TASKS = 4


def hierarchy() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("tasks", TASKS, subsample_size=1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=torch.arange(8.0).view(4, 2)[index])


def positive() -> None:
    spread = pyro.sample("spread", dist.Gamma(4.0, 4.0))
    with pyro.plate("tasks", TASKS, subsample_size=2) as index:
        theta = pyro.sample("theta", dist.StudentT(5.0, 0.0, spread))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(4.0)[index])


def flat() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 100.0).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(4.0, 4.0))
    pyro.sample("y", dist.Normal(phi.sum(), 100.0 + tau), obs=torch.tensor(1.0))


def ends_at_once() -> None:
    """A program whose process dies without a word."""
    if mp.parent_process() is not None:
        os._exit(9)
    flat()


def diverges() -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    pyro.factor("nothing", phi * torch.tensor(float("nan")), has_rsample=False)


langevin = partial(SGLDGibbs, phi_update="langevin")
KERNELS: dict[str, Callable[..., Any]] = {
    "plain": partial(SGLDGibbs, hierarchy),
    "a number": partial(SGLDGibbs, hierarchy, step_size=0.1, sgd_step_size=0.01, sgd_steps=2),
    "constant": partial(SGLDGibbs, hierarchy, step_size=constant(0.1)),
    "polynomial": partial(SGLDGibbs, hierarchy, step_size=polynomial(0.1, offset=3.0)),
    "cyclical": partial(SGLDGibbs, hierarchy, step_size=cyclical(0.1, period=5, floor=0.1)),
    "exact": partial(langevin, hierarchy, phi_step_size=polynomial(0.01)),
    "table": partial(langevin, positive, step_size=0.01, accumulator="table", phi_step_size=0.01),
    "single": partial(langevin, hierarchy, accumulator="single", phi_step_size=0.01),
    "random scan": partial(SGLDGibbs, hierarchy, scan="random", thinning=2, theta_steps_per_visit=2),
    "rms": partial(SGLDGibbs, hierarchy, step_size=0.1, preconditioner="rms", max_grad_norm=5.0),
    "sites": partial(SGLDGibbs, hierarchy, site_step_scale={"theta": 0.5}, site_temperature={"theta": 0.5}),
    "on the host": partial(SGLDGibbs, hierarchy, store="host"),
    "on the disk": partial(SGLDGibbs, hierarchy, store="disk"),
    "a store": lambda **options: SGLDGibbs(hierarchy, store=HostStore(TASKS), **options),
    "mean": partial(SGLDGibbs, hierarchy, init_strategy=init_to_mean),
    "median": partial(SGLDGibbs, hierarchy, init_strategy=init_to_median),
    "sample": partial(SGLDGibbs, hierarchy, init_strategy=init_to_sample),
    "value": partial(SGLDGibbs, hierarchy, init_strategy=init_to_value(values={"phi": torch.ones(2)})),
    "a program of ours": partial(SGLDGibbs, LinearGaussian(num_tasks=TASKS)),
    "sgld": partial(SGLD, flat, 0.01),
    "sgld measured": partial(SGLD, flat),
    "sgld rms": partial(SGLD, flat, polynomial(0.01), preconditioner="rms", second_moment={"phi": torch.ones(2)}),
    "sgld exponential": partial(SGLD, flat, cyclical(0.01, period=3), integrator="exponential", temperature=0.5),
}


def run(kernel: Any, num_samples: int = 6, warmup_steps: int = 3, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples, warmup_steps, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def draws(mcmc: MCMC) -> dict[str, Tensor]:
    samples: dict[str, Tensor] = mcmc.get_samples(group_by_chain=True)
    return samples


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pyro draws chains in turn where there are no more cores than chains."""
    monkeypatch.setattr(mp, "cpu_count", lambda: 8)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_was_pickled_draws_the_same(name: str) -> None:
    sent = pickle.loads(pickle.dumps(KERNELS[name](seed=5)))  # before any run
    here = run(KERNELS[name](seed=5))
    for other in (sent, pickle.loads(pickle.dumps(here.kernel)) if name != "a store" else KERNELS[name](seed=5)):
        there = draws(run(other))
        assert all(torch.equal(value, there[site]) for site, value in draws(here).items())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in KERNELS if name != "a store"])
def test_spawned_chains_of_every_kernel_draw_what_chains_in_turn_draw(name: str, many_cores: None) -> None:
    _same_elsewhere(KERNELS[name], "spawn")


@pytest.mark.parametrize(("name", "how"), [("polynomial", "spawn"), ("sgld rms", "fork"), ("table", "fork")])
def test_chains_elsewhere_draw_what_chains_in_turn_draw(name: str, how: str, many_cores: None) -> None:
    _same_elsewhere(KERNELS[name], how)


def _same_elsewhere(make: Callable[..., Any], how: str) -> None:
    elsewhere = run(make(seed=5), num_chains=2, mp_context=how)
    assert isinstance(elsewhere.sampler, ParallelChains)
    mp.cpu_count = lambda: 1  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="drawn sequentially"):
        in_turn = run(make(seed=5), num_chains=2)
    for site, value in draws(in_turn).items():
        assert torch.equal(value, draws(elsewhere)[site]), site
        assert not torch.equal(value[0], value[1])


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_processes_that_were_asked_for_are_made_however_few_cores_there_are(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mp, "cpu_count", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc = MCMC(SGLDGibbs(hierarchy, seed=5), 2, 1, num_chains=3, mp_context=how, disable_progbar=True)
    assert isinstance(mcmc.sampler, ParallelChains)
    plain = MCMC(SGLDGibbs(hierarchy, seed=5), 2, 1, mp_context=how, disable_progbar=True)
    assert not isinstance(plain.sampler, ParallelChains)  # one chain needs no process


SCRIPT = """
import sys
import pyro, torch
import pyro.distributions as dist
from pyro_lift import MCMC, SGLDGibbs

def model(y):
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("schools", 4, dim=-2):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

if __name__ == "__main__":
    y = torch.arange(12.0).view(4, 3) / 6.0
    found = []
    for how in (sys.argv[1], None):
        torch.manual_seed(3)
        mcmc = MCMC(SGLDGibbs(model, keep_theta=True), 20, 5, num_chains=4, mp_context=how)
        mcmc.run(y)
        found.append(mcmc.get_samples(group_by_chain=True))
    assert found[0]["theta"].shape == (4, 20, 4, 1)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    print("the same", type(mcmc.sampler).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_script_runs_four_chains_in_processes_with_a_bar_each(how: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "script.py", how], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "the same" in ended.stdout
    for chain in range(1, 5):
        assert f"[{chain}]: 100%" in ended.stderr


def test_draws_of_constrained_sites_come_back_constrained(many_cores: None) -> None:
    spread = draws(run(KERNELS["table"](seed=1), num_samples=40, num_chains=2, mp_context="fork"))["spread"]
    assert bool((spread > 0).all())


@pytest.mark.parametrize("how", ["fork", "in turn"])
@pytest.mark.filterwarnings("ignore:num_chains")
def test_each_chain_begins_where_it_was_told(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp, "cpu_count", lambda: 8 if how == "fork" else 1)
    start = torch.tensor([[5000.0, 5000.0], [-5000.0, -5000.0], [0.0, 9000.0]])
    kept = start.clone()
    options: dict[str, Any] = {"num_chains": 3, "initial_params": {"phi": start}}
    first = draws(run(SGLD(flat, 1e-3), 2, 0, **options, **({"mp_context": how} if how == "fork" else {})))["phi"][:, 0]
    torch.testing.assert_close(first, start, atol=5.0, rtol=0.0)
    assert torch.equal(start, kept)


@pytest.mark.filterwarnings("ignore:num_chains")
@pytest.mark.parametrize("num_chains", [1, 2])
def test_streaming_chains_begin_where_they_were_told(num_chains: int) -> None:
    start = torch.tensor([[5000.0, 5000.0], [-5000.0, -5000.0]])[:num_chains]
    mcmc = StreamingMCMC(
        SGLD(flat, 1e-3),
        num_samples=2,
        warmup_steps=0,
        num_chains=num_chains,
        initial_params={"phi": start if num_chains > 1 else start[0]},
        disable_progbar=True,
    )
    mcmc.run()
    means = mcmc.get_statistics()
    for chain in range(num_chains):
        torch.testing.assert_close(means[chain, "phi"]["mean"], start[chain], atol=5.0, rtol=0.0)


def test_a_start_is_of_its_own_run_and_not_of_the_next() -> None:
    kernel = SGLD(flat, 1e-3)
    run(kernel, 2, 0, initial_params={"phi": torch.tensor([5000.0, 5000.0])})
    assert draws(run(kernel, 2, 0))["phi"].abs().max() < 500.0


STARTS: dict[str, tuple[Any, str]] = {
    "another shape": ({"phi": torch.zeros(3)}, r"'phi'\] has shape \[3\] for one chain; the site's.* is \[2\]"),
    "a row too many": ({"phi": torch.zeros(1, 2)}, r"\[1, 2\]"),
    "a scalar": ({"phi": 1.0}, r"has shape \[\]"),
    "another site": ({"psi": torch.zeros(2)}, r"'psi' is no site .* 'phi'"),
    "a site of a task": ({"theta": torch.zeros(2)}, "stands inside the plate"),
    "no number": ({"phi": "here"}, r"'phi'\] is a str"),
    "not finite": ({"phi": torch.tensor([0.0, float("nan")])}, "not finite"),
    "no mapping": ([torch.zeros(2)], "is a list"),
}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("make", [MCMC, StreamingMCMC])
def test_a_start_that_does_not_fit_is_refused_before_the_chain(name: str, make: Any) -> None:
    start, message = STARTS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        make(SGLDGibbs(hierarchy), num_samples=2, initial_params=start, disable_progbar=True).run()


@pytest.mark.parametrize("start", [torch.zeros(2), torch.zeros(3, 2), torch.tensor(0.0)])
@pytest.mark.parametrize("make", [MCMC, StreamingMCMC])
def test_starts_of_several_chains_have_a_leading_dimension(start: Tensor, make: Any) -> None:
    shape = list(start.shape)
    if shape == [2]:
        start = start[:1]
    with pytest.raises(ValueError, match="its leading dimension is the number of chains"):
        make(SGLDGibbs(hierarchy), num_samples=2, num_chains=2, initial_params={"phi": start})


def test_a_whole_number_or_an_array_is_a_start_too() -> None:
    for start in ([1, -1], torch.tensor([1, -1]), torch.tensor([1.0, -1.0]).double().numpy()):
        first = draws(run(SGLD(flat, 1e-4), 1, 0, initial_params={"phi": start}))["phi"][0, 0]
        torch.testing.assert_close(first, torch.tensor([1.0, -1.0]), atol=1.0, rtol=0.0)


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_what_cannot_be_sent_is_said_with_the_way_out(how: str, many_cores: None) -> None:
    def inside() -> None:
        flat()

    with pytest.raises(TypeError, match=r"functions of a module, not lambdas .* mp_context=\"fork\""):
        run(SGLD(inside, 0.01), num_chains=2, mp_context=how)


def test_a_process_that_dies_is_reported_and_not_waited_for(many_cores: None) -> None:
    with pytest.raises(RuntimeError, match=r"the process of chain \d ended with exit code 9"):
        run(SGLD(ends_at_once, 0.01), num_chains=2, mp_context="fork")


def test_an_error_of_ours_arrives_from_another_process(many_cores: None) -> None:
    with pytest.raises(DivergedError):
        run(SGLD(diverges, 0.01), num_chains=2, mp_context="fork")


def test_an_error_keeps_its_step_and_tasks_when_it_is_sent() -> None:
    error = pickle.loads(pickle.dumps(DivergedError("at 3", 3, (1, 2))))
    assert (str(error), error.step, error.tasks) == ("at 3", 3, (1, 2))


@pytest.mark.filterwarnings("ignore:num_chains")
@pytest.mark.parametrize("store", [DeviceStore, HostStore, DiskStore])
def test_a_store_serves_one_chain(store: Any) -> None:
    rows = store(TASKS)
    with pytest.raises(ValueError, match="one store for 2 chains"):
        run(SGLDGibbs(hierarchy, store=rows), num_chains=2)
    run(SGLDGibbs(hierarchy, store=rows))
    with pytest.raises(ValueError, match=r"holds rows already \(task 0\)"):
        run(SGLDGibbs(hierarchy, store=rows))
    with pytest.raises(ValueError, match="has 3 places; the program has 4 tasks"):
        run(SGLDGibbs(hierarchy, store=store(3)))
    with pytest.raises(TypeError, match=r"has no read\(\)"):
        run(SGLDGibbs(hierarchy, store={}))  # type: ignore[arg-type]


def test_a_store_on_the_disk_stays_in_its_process() -> None:
    store = DiskStore(TASKS)
    with pytest.raises(TypeError, match="cannot be sent to another"):
        pickle.dumps(store)
    store._process += 1
    with pytest.raises(RuntimeError, match="belongs to another process"):
        store.write([0], [torch.zeros(2)])
    with pytest.raises(RuntimeError, match="belongs to another process"):
        store.read([0])


def test_a_mixture_that_was_pickled_goes_on_as_it_would_have() -> None:
    here = OnlineGaussianMixture(2)
    points = torch.randn(60, 3)
    for x in points[:40]:
        here.update(x)
    there = pickle.loads(pickle.dumps(here))
    for x in points[40:]:
        here.update(x)
        there.update(x)
    for mine, other in zip(here.moments, there.moments, strict=True):
        assert torch.equal(mine, other)


def counts() -> None:
    """Log rates under a prior so wide that some of its draws have no finite density."""
    phi = pyro.sample("phi", dist.Normal(torch.tensor(1.0, dtype=torch.float64), 500.0))
    with pyro.plate("tasks", TASKS, subsample_size=1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=torch.arange(4.0, dtype=torch.float64)[index])


@pytest.mark.parametrize("how", ["fork", "in turn"])
@pytest.mark.filterwarnings("ignore:num_chains")
def test_later_chains_begin_at_draws_of_the_prior(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """phi is N(0, 100^2) and one step of 1e-4 leaves it where it was."""
    monkeypatch.setattr(mp, "cpu_count", lambda: 99 if how == "fork" else 1)
    options: dict[str, Any] = {"mp_context": how} if how == "fork" else {}
    first = draws(run(SGLD(flat, 1e-4, seed=3), 1, 0, num_chains=6, **options))["phi"][:, 0]
    assert first[0].abs().max() < 1.0
    assert 40.0 < float(first[1:].std()) < 200.0
    assert len(first[1:].unique()) == 10


@pytest.mark.filterwarnings("ignore:num_chains")
def test_a_start_that_cannot_be_sampled_is_drawn_back_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp, "cpu_count", lambda: 1)
    several: list[dict[str, Any]] = [{}, {"step_size": 0.05}]
    for options in several:
        kernel = SGLDGibbs(counts, seed=0, **options)
        starts = []
        kernel.begin_run(4)
        for _ in range(4):
            kernel.setup(0)
            starts.append(float(kernel.initial_params["phi"]))
            assert 0.0 < float(kernel.report()["curvature"]) < 40.0
        assert starts[0] == 1.0 and len(set(starts)) == 4


@pytest.mark.filterwarnings("ignore:num_chains")
def test_a_start_of_the_users_own_is_that_of_every_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp, "cpu_count", lambda: 1)
    kernel = SGLDGibbs(hierarchy, init_strategy=init_to_value(values={"phi": torch.ones(2)}), seed=1)
    kernel.begin_run(2)
    for _ in range(2):
        kernel.setup(0)
        assert torch.equal(kernel.initial_params["phi"], torch.ones(2))


def test_a_single_run_begins_where_it_did_whatever_ran_before() -> None:
    kernel = SGLDGibbs(hierarchy, seed=1)
    alone = draws(run(kernel))["phi"]
    kernel.begin_run(3)
    for _ in range(3):
        kernel.setup(0)
    assert torch.equal(draws(run(kernel))["phi"], alone)


def test_chains_without_a_seed_draw_the_same_side_by_side_and_in_turn(many_cores: None) -> None:
    pyro.set_rng_seed(4)
    elsewhere = draws(run(SGLDGibbs(hierarchy, init_strategy=init_to_sample), num_chains=2, mp_context="fork"))
    mp.cpu_count = lambda: 1  # type: ignore[method-assign]
    pyro.set_rng_seed(4)
    with pytest.warns(UserWarning, match="drawn sequentially"):
        in_turn = draws(run(SGLDGibbs(hierarchy, init_strategy=init_to_sample), num_chains=2))
    assert torch.equal(elsewhere["phi"], in_turn["phi"])


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_streaming_chains_side_by_side_merge_to_what_chains_in_turn_do(how: str) -> None:
    found: list[Any] = []
    several: list[dict[str, Any]] = [{}, {"mp_context": how}]
    for options in several:
        statistics = StatsOfDict(default=partial(OnlineGaussianMixture, 2, buffer_size=10))
        mcmc = StreamingMCMC(
            SGLDGibbs(hierarchy, seed=2),
            num_samples=20,
            warmup_steps=3,
            num_chains=2,
            statistics=statistics,
            disable_progbar=True,
            **options,
        )
        mcmc.run()
        assert isinstance(mcmc.sampler, ParallelChains) is bool(options)
        found.append(mcmc.get_statistics(group_by_chain=False)["phi"])
    here, there = found
    torch.testing.assert_close(here.mixture_distribution.probs, there.mixture_distribution.probs)
    torch.testing.assert_close(here.component_distribution.mean, there.component_distribution.mean)
    assert here.component_distribution.mean.shape == (2, 2)


def test_each_chain_side_by_side_has_a_bar_of_its_own(
    many_cores: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # where bars are hidden
        monkeypatch.delenv(name, raising=False)
    MCMC(SGLD(flat, 1e-3, seed=0), 4, 2, num_chains=3, mp_context="fork").run()
    shown = capsys.readouterr().err
    assert all(f"[{number}]" in shown for number in (1, 2, 3)), shown
