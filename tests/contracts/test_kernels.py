"""One table of contract checks over every kernel and every update, and the laws that hold across them."""

from __future__ import annotations

import functools
import json
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model, constrained, data, sequential, vectorised
from pyro.infer import MCMC
from pyro.ops.streaming import CountMeanVarianceStats, StatsOfDict
from torch import Tensor

import pyro_lift
from pyro_lift import SGLD, SGLDGibbs
from pyro_lift.inference.gibbs.conjugate import NormalPair, draw
from pyro_lift.inference.mcmc import StreamingMCMC
from pyro_lift.inference.program import Program
from pyro_lift.inference.schedules import cyclical, polynomial
from pyro_lift.inference.stores.store import row_sum


class Case(NamedTuple):
    kernel: Callable[..., Any]
    model: Callable[[], Model]
    options: dict[str, Any]

    def build(self, **more: Any) -> Any:
        return self.kernel(self.model(), **{**self.options, **more})


langevin: dict[str, Any] = {"phi_update": "langevin", "step_size": 0.02, "phi_step_size": 1e-3}
CASES = {
    "sgld": Case(SGLD, partial(vectorised, None), {"step_size": 0.02}),
    "sgld, default step": Case(SGLD, partial(vectorised, None), {}),
    "sgld, exponential, cold": Case(
        SGLD, partial(vectorised, None), {"step_size": 0.02, "integrator": "exponential", "temperature": 0.1}
    ),
    "sgld, rms": Case(SGLD, partial(vectorised, None), {"step_size": 0.01, "preconditioner": "rms"}),
    "sgld, constrained, polynomial": Case(SGLD, partial(constrained, None), {"step_size": polynomial(0.01)}),
    "gibbs": Case(SGLDGibbs, vectorised, {"step_size": 0.02}),
    "gibbs, default step": Case(SGLDGibbs, vectorised, {}),
    "gibbs, euler, inflated": Case(SGLDGibbs, vectorised, {"step_size": 0.02, "integrator": "euler", "n_inflate": 2}),
    "gibbs, block": Case(SGLDGibbs, partial(vectorised, 3), {"step_size": 0.02}),
    "gibbs, one block": Case(SGLDGibbs, partial(vectorised, None), {"step_size": 0.02}),
    "gibbs, random scan": Case(SGLDGibbs, partial(vectorised, 2), {"step_size": 0.02, "scan": "random"}),
    "gibbs, sequential": Case(SGLDGibbs, sequential, {"step_size": 0.02, "theta_steps_per_visit": 2}),
    "gibbs, sequential block": Case(SGLDGibbs, partial(sequential, block=None), {"step_size": 0.02, "block_size": 3}),
    "gibbs, rms, cyclical": Case(
        SGLDGibbs,
        sequential,
        {"step_size": cyclical(0.02, period=7, floor=0.2), "preconditioner": "rms", "site_step_scale": {"head": 5.0}},
    ),
    "gibbs, sgd start": Case(SGLDGibbs, sequential, {"step_size": 0.02, "sgd_steps": 6, "sgd_step_size": 0.01}),
    "gibbs, clipped": Case(SGLDGibbs, vectorised, {"step_size": 0.02, "max_grad_norm": 1.0}),
    "gibbs, exact": Case(SGLDGibbs, partial(vectorised, None), {"theta_update": "exact"}),
    "gibbs, underdamped block": Case(
        SGLDGibbs, partial(vectorised, 3), {"step_size": 0.02, "theta_update": "underdamped", "momentum": 0.7}
    ),
    "gibbs, underdamped, control variates": Case(
        SGLDGibbs, sequential, {"step_size": 0.02, "theta_update": "underdamped", "control_variates": 2}
    ),
    "gibbs, control variates": Case(
        SGLDGibbs, sequential, {"step_size": 0.02, "control_variates": 2, "theta_steps_per_visit": 2, "scan": "random"}
    ),
    "gibbs, mala": Case(SGLDGibbs, vectorised, {"theta_update": "mala", "theta_steps_per_visit": 2}),
    "gibbs, hmc, sequential block": Case(
        SGLDGibbs,
        partial(sequential, batch=None, block=None),
        {"theta_update": "hmc", "leapfrog_steps": 2, "block_size": 3, "site_step_scale": {"head": 2.0}},
    ),
    "langevin table, mala, constrained": Case(
        SGLDGibbs, partial(constrained, 3), {**langevin, "accumulator": "table", "theta_update": "mala"}
    ),
    "langevin exact": Case(SGLDGibbs, vectorised, {**langevin, "accumulator": "exact"}),
    "langevin table": Case(SGLDGibbs, vectorised, {**langevin, "accumulator": "table"}),
    "langevin table, random block": Case(
        SGLDGibbs, partial(vectorised, 2), {**langevin, "accumulator": "table", "scan": "random"}
    ),
    "langevin table, constrained": Case(SGLDGibbs, constrained, {**langevin, "accumulator": "table"}),
    "langevin single, N": Case(SGLDGibbs, vectorised, {**langevin, "accumulator": "single", "single_scale": "N"}),
    "langevin single, 1": Case(SGLDGibbs, vectorised, {**langevin, "accumulator": "single", "single_scale": "1"}),
}
GIBBS = [name for name, case in CASES.items() if case.kernel is SGLDGibbs]
every = pytest.mark.parametrize("name", CASES)
WARMUP = 6


def run(kernel: Any, num_samples: int = 10, seed: int = 7, warmup: int = WARMUP, **options: Any) -> MCMC:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


@functools.cache
def draws_of(name: str) -> dict[str, Tensor]:
    """Ten draws of a case, as every check below compares with."""
    return dict(run(CASES[name].build()).get_samples())


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def global_shapes(model: Model, kernel: Any) -> dict[str, torch.Size]:
    trace = pyro.poutine.trace(model).get_trace()
    sites = {k: s for k, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    keep = {
        k: s
        for k, s in sites.items()
        if type(s["fn"]).__name__ != "_Subsample"
        and (isinstance(kernel, SGLD) or all(f.name != "tasks" for f in s["cond_indep_stack"]))
    }
    return {k: s["value"].shape for k, s in keep.items()}


# --------------------------------------------------------------------------------------------- the table


@every
def test_it_runs_in_pyro(name: str) -> None:
    kernel = CASES[name].build()
    mcmc = run(kernel)
    samples = mcmc.get_samples()
    expected = global_shapes(CASES[name].model(), kernel)
    assert {k: v.shape for k, v in samples.items()} == {k: (10, *shape) for k, shape in expected.items()}
    assert all(bool(torch.isfinite(v).all()) for v in samples.values())
    assert all(bool((v[1:] != v[:-1]).any()) for v in samples.values())
    assert kernel.state.step == WARMUP + 10
    found = mcmc.diagnostics()
    stats = kernel.diagnostics()["sample_stats"]
    assert "divergences" in found and all(len(values) == 10 for values in stats.values())
    json.dumps(kernel.logging())
    json.dumps(kernel.report())
    # A worker can be sent the kernel: generators cannot be pickled into another process.
    assert kernel.__getstate__()["_generator"] is None is kernel.__getstate__()["_noise_generator"]
    pickle.dumps(kernel.state)


@every
def test_the_seed_fixes_the_draws_and_a_run_starts_afresh(name: str) -> None:
    kernel = CASES[name].build()
    first = draws_of(name)
    run(kernel, num_samples=3, seed=5)
    assert_same(first, run(kernel).get_samples())
    other = run(kernel, seed=8).get_samples()
    assert all(bool((first[k] != other[k]).any()) for k in first)


@every
def test_streaming_sees_the_same_draws(name: str) -> None:
    draws = draws_of(name)
    pyro.set_rng_seed(7)
    statistics = StatsOfDict(default=CountMeanVarianceStats)
    stream = StreamingMCMC(
        CASES[name].build(), num_samples=10, warmup_steps=WARMUP, statistics=statistics, disable_progbar=True
    )
    stream.run()
    for site, found in stream.get_statistics(group_by_chain=False).items():
        assert found["count"] == 10
        torch.testing.assert_close(found["mean"], draws[site].mean(0))
        torch.testing.assert_close(found["variance"], draws[site].var(0))


@every
def test_thinning_keeps_every_third_draw(name: str) -> None:
    thin = run(CASES[name].build(thinning=3), num_samples=3).get_samples()
    assert_same(thin, {site: values[2::3] for site, values in draws_of(name).items()})


@every
def test_two_chains_differ_and_neither_leaks_into_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)  # one after another, in this process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "num_chains=2 is more than available_cpu")
        mcmc = run(CASES[name].build(), num_samples=5, num_chains=2)
    for values in mcmc.get_samples(group_by_chain=True).values():
        assert values.shape[:2] == (2, 5)
        assert bool((values[0] != values[1]).any())
    first = {k: v[0] for k, v in mcmc.get_samples(group_by_chain=True).items()}
    assert_same(first, {k: v[:5] for k, v in draws_of(name).items()})


@every
def test_initial_params_are_where_the_chain_starts(name: str) -> None:
    kernel = CASES[name].build()
    kernel.setup(WARMUP)
    start = {k: v + 0.25 for k, v in kernel.initial_params.items()}
    kernel.initial_params = start
    kernel.setup(WARMUP)
    assert_same(kernel.initial_params, start)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgld", "gibbs", "gibbs, block", "langevin exact", "langevin table"])
def test_it_runs_on_cuda(name: str) -> None:
    case = CASES[name]
    keywords = {"block": {"sgld": None, "gibbs, block": 3}.get(name, 1)}
    kernel = case.kernel(vectorised(**keywords, device="cuda"), **case.options)  # type: ignore[arg-type]
    samples = run(kernel).get_samples()
    assert all(v.device.type == "cuda" and bool(torch.isfinite(v).all()) for v in samples.values())
    host = run(case.build(temperature=0.0)).get_samples()
    there = run(case.kernel(vectorised(**keywords, device="cuda"), **case.options, temperature=0.0)).get_samples()  # type: ignore[arg-type]
    for site, values in host.items():
        torch.testing.assert_close(there[site].cpu(), values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GIBBS)
def test_sums_and_tables_equal_their_recomputation(name: str) -> None:
    kernel = CASES[name].build()
    run(kernel, num_samples=31)
    assert kernel.structure is not None and kernel.store is not None
    for site, pair in kernel.structure.pairs.items():
        # The rows are flat; a paired family stands first in each of our programs.
        total = row_sum(kernel.store, slice(0, kernel.state.phi[site].numel()))
        missing = kernel.structure.num_tasks - len(list(kernel.store.tasks()))
        total = total + missing * kernel.chain.cache.start[pair.family].reshape(-1)
        torch.testing.assert_close(kernel.state.sums[site].reshape(-1), total, rtol=1e-10, atol=1e-10)
    if kernel.chain.cache.table is not None:
        J = torch.cat([kernel.state.J[site].reshape(-1) for site in kernel.state.phi])
        torch.testing.assert_close(J, kernel.chain.cache.table.total(), rtol=1e-10, atol=1e-10)


def test_the_line_of_the_readme_runs_as_written() -> None:
    mcmc = pyro_lift.MCMC(SGLDGibbs(vectorised()), num_samples=20)
    mcmc.run()
    assert mcmc.get_samples()["phi"].shape == (20, 2)
    assert pyro_lift.MCMC(SGLDGibbs(vectorised())).num_samples == 2000


# --------------------------------------------------------------------------------------------- scales


def test_the_task_plate_does_not_scale_a_task_and_minibatches_are_scaled_up() -> None:
    """theta's gradient is that of its own n data points, whatever N; one row of four counts four times."""
    y = data()
    program = Program(sequential(batch=1), "tasks", (), {}, lambda msg: torch.zeros_like(msg["fn"].sample()))
    generator = torch.Generator().manual_seed(0)
    theta, head = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    values = {2: {"theta": theta, "head": head}}
    phi = {"phi": torch.tensor([0.7, 0.1]).double()}
    seen = set()
    for _ in range(60):
        run_ = program.run(phi, values, torch.tensor([2]), generator)  # type: ignore[arg-type]
        drift = run_.drift(run_.locals)
        gradients = 4.0 * (y[2] - theta - head.sum())
        row = int((gradients - drift.gradient["theta_2"]).abs().sum(-1).argmin())
        torch.testing.assert_close(drift.gradient["theta_2"], gradients[row])
        torch.testing.assert_close(drift.gradient["head_2"], gradients[row].sum().expand(3))
        torch.testing.assert_close(drift.gaussian["theta_2"].mean, phi["phi"])  # type: ignore[union-attr]
        seen.add(row)
    assert seen == {0, 1, 2, 3}


def test_n_inflate_multiplies_the_likelihood_and_not_the_priors() -> None:
    program = Program(constrained(), "tasks", (), {}, lambda msg: msg["fn"].sample())
    generator = torch.Generator().manual_seed(0)
    pyro.set_rng_seed(0)
    first = program.run({}, {}, torch.tensor([1]), generator)
    globals_ = {k: s.leaf.detach() for k, s in first.globals.items()}
    locals_ = {None: {k: s.leaf.detach() for k, s in first.locals.items()}}

    def gradient(power: float) -> Tensor:
        run_ = program.run(globals_, locals_, torch.tensor([1]), generator)  # type: ignore[arg-type]
        return torch.cat(list(run_.drift(run_.locals, n_inflate=power).gradient.values()))

    run_ = program.run(globals_, locals_, torch.tensor([1]), generator)  # type: ignore[arg-type]
    leaves = [s.leaf for s in run_.locals.values()]
    likelihood = torch.cat(torch.autograd.grad(run_.log_likelihood, leaves, retain_graph=True))
    prior = torch.cat(torch.autograd.grad(run_.log_prior(run_.locals), leaves))
    for power in (1.0, 3.0):
        torch.testing.assert_close(gradient(power), power * likelihood + prior)


# --------------------------------------------------------------------------------------------- exact draws


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_exact_draw_has_the_conditionals_moments(temperature: float) -> None:
    m0, sigma2, beta2, N = torch.tensor([2.0, -1.0]).double(), 0.25, 0.09, 7
    pair = NormalPair(
        "phi", "theta", m0, torch.full((2,), 1 / sigma2).double(), torch.full((2,), beta2, dtype=torch.float64)
    )
    theta = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    centre = draw(pair, theta.sum(0), N, temperature, zero)
    # Precision-weighted mean, by completing the square on a grid-free oracle: the minimiser of the quadratic.
    phi = zero.clone().requires_grad_()
    energy = ((phi - m0) ** 2 / (2 * sigma2)).sum() + ((theta - phi) ** 2 / (2 * beta2)).sum()
    (gradient,) = torch.autograd.grad(energy, phi)
    torch.testing.assert_close(centre, -gradient / (1 / sigma2 + N / beta2))
    spread = draw(pair, theta.sum(0), N, temperature, one) - centre
    torch.testing.assert_close(spread.square(), (temperature / (1 / sigma2 + N / beta2)) * one)


def test_several_pairs_are_drawn_at_once() -> None:
    y = data(5, d=1).squeeze(-1)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.tensor(1.0).double(), 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(3).double(), 0.7).to_event(1))
        for i in pyro.plate("tasks", 5):
            u = pyro.sample(f"u_{i}", dist.Normal(a, 0.5))
            w = pyro.sample(f"w_{i}", dist.Normal(b, torch.tensor([0.1, 0.2, 0.3]).double()).to_event(1))
            pyro.sample(f"y_{i}", dist.Normal(u + w.sum(), 1.0).expand([4]).to_event(1), obs=y[i])

    kernel = SGLDGibbs(model, step_size=0.01)
    run(kernel)
    assert kernel.structure is not None
    pairs = kernel.structure.pairs
    assert {k: (p.family, p.prior_mean.tolist()) for k, p in pairs.items()} == {
        "a": ("u", 1.0),
        "b": ("w", [0.0, 0.0, 0.0]),
    }
    torch.testing.assert_close(pairs["b"].local_variance, torch.tensor([0.01, 0.04, 0.09]).double())
    torch.testing.assert_close(pairs["a"].prior_precision, torch.tensor(0.25).double())


def test_the_table_reaches_the_sum_of_gradients_when_nothing_moves() -> None:
    """Steps so small that nothing moves: after one sweep J is the gradient of all conditionals at once."""
    options: dict[str, Any] = {"step_size": 1e-14, "phi_step_size": 1e-14, "phi_update": "langevin"}
    table = SGLDGibbs(constrained(), accumulator="table", **options)
    run(table, warmup=0, num_samples=6)
    program = Program(constrained(None), "tasks", (), {}, table.init_strategy)
    everyone = torch.arange(6)
    values = {None: {k: torch.cat([table.theta(i)[k].reshape(1) for i in range(6)]) for k in ("theta", "noise")}}
    run_ = program.run(table.state.phi, values, everyone, None)  # type: ignore[arg-type]
    leaves = [run_.globals[k].leaf for k in table.state.phi]
    expected = torch.autograd.grad(run_.log_prior(run_.locals), leaves)
    for key, gradient in zip(table.state.phi, expected, strict=True):
        torch.testing.assert_close(table.state.J[key], gradient, rtol=1e-5, atol=1e-5)


def test_the_gibbs_chain_starts_where_the_shared_training_ends() -> None:
    kernel = SGLDGibbs(sequential(), step_size=0.02, sgd_steps=12, sgd_step_size=0.05)
    kernel.setup(12)
    params = kernel.initial_params
    for _ in range(12):
        params = kernel.sample(params)
    trained = params["phi"].clone()
    kernel.sample(params)
    assert kernel.structure is not None
    torch.testing.assert_close(kernel.theta(5)["theta"], trained)
    # Task 0 has been visited since; the others stand at the trained vector, so S = N phi + what task 0 moved.
    moved = kernel.theta(0)["theta"] - trained
    torch.testing.assert_close(kernel.state.sums["phi"], 6 * trained + moved)
