"""Unknown scales: which programs have one, what its law is, and that its draws have the exact conditional law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.streaming import CountMeanVarianceStats, StatsOfDict
from scipy import stats
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, StreamingMCMC, from_mcmc, summarise
from pyro_lift.inference.gibbs.scale_draws import Seen, draw_scale, moved_square
from pyro_lift.inference.gibbs.scales import ScaleLaw, scale_site
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.program import Program

Model = Callable[[], None]
N, D = 6, 3
Y = torch.linspace(-2.0, 3.0, N * 4 * D, dtype=torch.float64).view(N, 4, D).sin()
GROUP = torch.tensor([1, 0, 1])
KNOWN = torch.tensor([0.5, 1.0, 2.0]).double()


def double(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def vectors(
    fn: Any, scale: Callable[[Tensor], Tensor], block: int | None = 1, dtype: torch.dtype = torch.float64
) -> Model:
    """Tasks of three coordinates, whose scale is a function of the site ``tau``."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D, dtype=dtype), 2.0).to_event(1))
        tau = pyro.sample("tau", fn)
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, scale(tau)).to_event(1))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).to_event(2), obs=Y[index].to(dtype))

    return model


def looped(fn: Any, scale: Callable[[Tensor], Tensor], block: int = 1) -> Model:
    def model() -> None:
        tau = pyro.sample("tau", fn)
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D).double(), 2.0).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=block):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, scale(tau)).to_event(1))
            pyro.sample(f"y_{i}", dist.Normal(theta.expand(4, D), 1.0).to_event(2), obs=Y[i])

    return model


def scalar(block: int | None = 1) -> Model:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.0), 2.0))
        tau = pyro.sample("tau", dist.HalfCauchy(double(1.0)))
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, tau))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(1), obs=Y[index, :, 0])

    return model


three = double(1.0, 2.0, 0.7)
WAYS: dict[str, Model] = {
    "one scale": vectors(dist.HalfCauchy(double(1.0)), lambda t: t),
    "one scale, times known ones": vectors(dist.HalfNormal(double(1.0)), lambda t: t * KNOWN),
    "a variance": vectors(dist.InverseGamma(double(2.0), double(1.0)), lambda t: t.sqrt()),
    "a precision": vectors(dist.Gamma(double(2.0), double(1.0)), lambda t: t.rsqrt(), block=3),
    "a logarithm": vectors(dist.Normal(double(0.0), 1.0), lambda t: t.exp()),
    "an interval": vectors(dist.Uniform(double(0.0), double(5.0)), lambda t: t),
    "half a student": vectors(dist.FoldedDistribution(dist.StudentT(3.0, double(0.0), 2.0)), lambda t: t),
    "a power": vectors(dist.Exponential(double(1.0)), lambda t: 0.3 * t**0.7),
    "by coordinate": vectors(dist.HalfCauchy(three).to_event(1), lambda t: t),
    "by coordinate, expanded": vectors(dist.HalfCauchy(double(1.0)).expand([D]).to_event(1), lambda t: t),
    "precisions by coordinate": vectors(dist.Gamma(three, three).to_event(1), lambda t: t.rsqrt(), block=2),
    "by group": vectors(dist.HalfNormal(three[:2]).to_event(1), lambda t: t[GROUP]),
    "by group, times known ones": vectors(dist.HalfNormal(three[:2]).to_event(1), lambda t: KNOWN * t[GROUP]),
    "variances by group": vectors(dist.InverseGamma(three[:2], three[:2]).to_event(1), lambda t: t[GROUP].sqrt()),
    "one number in a vector": vectors(dist.HalfNormal(double(1.0)).expand([1]).to_event(1), lambda t: t),
    "in a loop": looped(dist.LogNormal(double(0.0), 1.0), lambda t: t),
    "in a loop, by coordinate": looped(dist.HalfCauchy(three).to_event(1), lambda t: t, block=2),
    "scalars": scalar(),
}


def set_up(model: Model, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, **{"step_size": 0.1, "seed": 3, **options})
    kernel.setup(4)
    return kernel


@pytest.mark.parametrize("name", WAYS)
def test_the_law_read_off_a_program_gives_its_variance_at_any_value_of_the_scale(name: str) -> None:
    kernel = set_up(WAYS[name])
    structure = kernel.chain.structure
    assert list(structure.scales) == ["tau"] and list(structure.pairs) == ["phi"] and not structure.reasons
    program, pair = kernel.chain.program, structure.pairs["phi"]
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        phi = {k: torch.randn(v.shape, generator=generator).to(v) for k, v in kernel.state.phi.items()}
        run = program.run(phi, {}, torch.arange(structure.block_size), None, want_grad=False)
        fn: Any = next(iter(run.locals.values())).fn
        scale = fn.base_dist.scale if hasattr(fn, "base_dist") else fn.scale
        wanted = torch.broadcast_to(scale, run.locals[next(iter(run.locals))].leaf.shape).square()
        variance = torch.broadcast_to(pair.at(structure.scales, phi).local_variance, phi["phi"].shape)
        torch.testing.assert_close(torch.broadcast_to(variance, wanted.shape), wanted, rtol=1e-9, atol=0.0)


PRIORS: dict[str, tuple[Any, float]] = {
    "half Cauchy": (dist.HalfCauchy(double(1.0)), 2.0),
    "half normal": (dist.HalfNormal(double(2.0)), 2.0),
    "half Student": (dist.FoldedDistribution(dist.StudentT(3.0, double(0.0), 1.0)), 2.0),
    "log-normal": (dist.LogNormal(double(0.3), 0.5), 2.0),
    "exponential": (dist.Exponential(double(2.0)), 2.0),
    "uniform": (dist.Uniform(double(0.0), double(1.5)), 2.0),
    "inverse gamma on the variance": (dist.InverseGamma(double(2.0), double(1.5)), 1.0),
    "gamma on the precision": (dist.Gamma(double(2.0), double(1.5)), -1.0),
    "gamma on the scale": (dist.Gamma(double(2.0), double(1.5)), 2.0),
    "inverse gamma on the scale": (dist.InverseGamma(double(2.0), double(1.5)), 2.0),
}
COPIES, TASKS, COORDINATES = 2_000, 5, 2


def drawn(fn: Any, power: float, square: float, temperature: float, moves: int) -> Tensor:
    """Draws of the scale site from many copies of one conditional, in constrained space."""
    model = lambda: pyro.sample("tau", fn.expand([COPIES]).to_event(1))  # noqa: E731
    site = Program(model, None, (), {}, lambda msg: torch.ones(COPIES).double()).run({}, {}, None, None).latents["tau"]
    scale = scale_site(site)
    groups = torch.arange(COPIES).repeat_interleave(COORDINATES)
    law = ScaleLaw("tau", torch.tensor(0.4).double(), power, True, groups, groups.shape)
    seen, generator = [Seen(law, torch.full(groups.shape, square).double())], torch.Generator().manual_seed(5)
    leaf = site.leaf.detach()
    for _ in range(moves):
        leaf = draw_scale(scale, seen, TASKS, temperature, leaf, generator)
    return scale.value(leaf)


def exact_cdf(fn: Any, power: float, square: float, temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    """The conditional's distribution function by a grid over log tau, from the normal's own density."""
    grid = torch.linspace(-12.0, 12.0, 200_001, dtype=torch.float64)
    grid = grid[grid < np.log(1.5)] if isinstance(fn, dist.Uniform) else grid
    tau = grid.exp()
    sd = (0.4 + power * grid).mul(0.5).exp()
    theta = double((square / TASKS) ** 0.5)
    density = fn.log_prob(tau) + grid + TASKS * COORDINATES * dist.Normal(0.0, sd).log_prob(theta)
    if isinstance(fn, dist.Uniform):  # its unconstrained space is another: log(t / (h - t))
        density = density / temperature + (1.0 - 1.0 / temperature) * (-(1.0 - tau / 1.5).log())
    weight = (density / (temperature if not isinstance(fn, dist.Uniform) else 1.0)).double()
    cumulative = (weight - weight.max()).exp().cumsum(0)
    return lambda x: np.interp(np.log(x), grid.numpy(), (cumulative / cumulative[-1]).numpy())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", PRIORS)
def test_a_draw_of_a_scale_has_the_exact_conditional_law(name: str, temperature: float) -> None:
    (fn, power), square = PRIORS[name], 3.7
    moves = 1 if (name, power) in {("inverse gamma on the variance", 1.0), ("gamma on the precision", -1.0)} else 8
    draws = drawn(fn, power, square, temperature, moves).numpy()
    assert stats.kstest(draws, exact_cdf(fn, power, square, temperature)).pvalue > 1e-3
    # The test can tell: a spread of theta 15 % larger is another law.
    assert stats.kstest(draws, exact_cdf(fn, power, 1.3 * square, temperature)).pvalue < 1e-3


def test_the_conjugate_of_a_variance_is_the_inverse_gamma_law_in_closed_form() -> None:
    fn, square = dist.InverseGamma(double(2.0), double(1.5)), 3.7
    draws = drawn(fn, 1.0, square, 1.0, 1).numpy()
    law = stats.invgamma(2.0 + TASKS * COORDINATES / 2, scale=1.5 + COORDINATES * square * np.exp(-0.4) / 2)
    assert stats.kstest(draws, law.cdf).pvalue > 1e-3


def test_a_square_moves_with_phi_as_if_it_were_summed_anew_however_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = 1e6 + 0.1 * torch.randn(50, D, generator=generator, dtype=torch.float64)
    before, after = theta[0], theta[1]
    Q = (theta - before).square().sum(0)
    moved = moved_square(Q, theta.sum(0), 50, before, after)
    torch.testing.assert_close(moved, (theta - after).square().sum(0), rtol=1e-6, atol=0.0)


def two_pairs(shared: bool, block: int = 2) -> Model:
    """Two families, around one mean each, of one scale together or of one each."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(double(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(D).double(), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(double(1.0)))
        t = s if shared else pyro.sample("t", dist.Gamma(three, three).to_event(1)).rsqrt()
        with pyro.plate("tasks", N, subsample_size=block) as index:
            slope = pyro.sample("slope", dist.Normal(a, s))
            level = pyro.sample("level", dist.Normal(b, 2.0 * t).to_event(1))
            mean = (slope.unsqueeze(-1) + level).unsqueeze(-2)
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(2), obs=Y[index])

    return model


RUNS: dict[str, tuple[Model, int]] = {
    "scalars": (scalar(), 1),
    "a whole block": (scalar(None), N),
    "blocks of three": (vectors(dist.Gamma(double(2.0), double(1.0)), lambda t: t.rsqrt(), 3), 3),
    "in a loop": (looped(dist.HalfCauchy(three).to_event(1), lambda t: t, 2), 2),
    "one scale of two families": (two_pairs(True), 2),
    "one scale each": (two_pairs(False), 2),
    "float32": (vectors(dist.HalfCauchy(torch.ones(D)).to_event(1), lambda t: t, 2, torch.float32), 2),
}


@pytest.mark.parametrize("translation", ["none", "saga"])
@pytest.mark.parametrize("name", RUNS)
def test_the_running_sums_are_those_of_the_stored_theta_and_the_scales_move_after_the_first_rounds(
    name: str, translation: Any
) -> None:
    model, block = RUNS[name]
    kernel = SGLDGibbs(model, step_size=0.05, seed=1, translation=translation)
    kernel.setup(0)
    start = dict(kernel.state.phi)
    for step in range(4 * N // block):
        kernel.sample(kernel.initial_params)
        moved = any(not torch.equal(kernel.state.phi[k], start[k]) for k in kernel.chain.structure.scales)
        assert moved == (step + 1 > N // block)
    for key, pair in kernel.chain.structure.pairs.items():
        theta = torch.stack([kernel.theta(i)[pair.family].double() for i in range(N)])
        phi = kernel.state.phi[key].double()
        near = 1e-5 if name == "float32" else 1e-9  # theta is rounded where its offset is taken off
        torch.testing.assert_close(kernel.state.sums[key], theta.sum(0), rtol=near, atol=near)
        torch.testing.assert_close(kernel.state.squares[key], (theta - phi).square().sum(0), rtol=near, atol=near)
    assert all(bool(torch.isfinite(v).all()) for v in kernel.state.phi.values())


def without_data(fn: Any, block: int) -> Model:
    """A hierarchy that observes nothing: its posterior is its prior, and theta's step is exact for any step size."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.5, -1.0), 1.0).to_event(1))
        tau = pyro.sample("tau", fn)
        with pyro.plate("tasks", 2, subsample_size=block):
            pyro.sample("theta", dist.Normal(phi, tau).to_event(1))

    return model


SLOW = pytest.mark.slow
LENGTHS = [
    (2, 1.0, 500),
    *(pytest.param(*case, marks=SLOW) for case in [(2, 1.0, 3_000), (1, 1.0, 6_000), (2, 0.5, 3_000)]),
]


@pytest.mark.parametrize(("block", "temperature", "visits"), LENGTHS)
def test_a_chain_without_data_has_the_prior_for_its_law(block: int, temperature: float, visits: int) -> None:
    kernel = SGLDGibbs(
        without_data(dist.LogNormal(double(-0.5), 0.5), block), step_size=50.0, seed=2, temperature=temperature
    )
    mcmc = MCMC(kernel, visits, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    log_tau = mcmc.get_samples()["tau"].log()
    if temperature != 1.0:
        return _tempered(log_tau, temperature)
    z = (log_tau + 0.5) / 0.5
    batches = z.view(25, -1)  # a lag of a batch is past the memory of the chain
    error = float(batches.mean(1).std()) / 5.0
    assert abs(float(z.mean())) < 4.0 * error < 0.6
    squared = batches.square().mean(1)
    assert abs(float(squared.mean()) - 1.0) < 4.0 * float(squared.std()) / 5.0 < 0.8


def _tempered(log_tau: Tensor, temperature: float) -> None:
    r"""With every density to the power 1/T, in unconstrained space, the normals integrate to tau^(4 (1 - 1/T))."""
    grid = torch.linspace(-6.0, 4.0, 4_001, dtype=torch.float64)
    var = (2.0 * grid).exp()
    # There are four, two tasks of two coordinates; the integral over phi does not hang on tau.
    density = (
        dist.Normal(double(-0.5), 0.5).log_prob(grid) / temperature + 4 * 0.5 * (1.0 - 1.0 / temperature) * var.log()
    )
    weight = torch.softmax(density, 0)
    mean = float((weight * grid).sum())
    batches = log_tau.view(25, -1).mean(1)
    assert abs(float(batches.mean()) - mean) < 4.0 * float(batches.std()) / 5.0 < 0.4


def refused(likelihood: bool = False, **parts: Any) -> Model:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.0), 1.0))
        above = pyro.sample("above", dist.Gamma(double(2.0), 2.0)) if "above" in parts else double(1.0)
        tau = pyro.sample("tau", parts.get("fn", dist.HalfNormal(above)))
        other = pyro.sample("other", dist.HalfNormal(double(1.0))) if "other" in parts else 1.0
        with pyro.plate("tasks", N, subsample_size=2) as index:
            local = parts.get("local", lambda phi, tau, other: dist.Normal(phi, tau * other))
            theta = pyro.sample("theta", local(phi, tau, other))
            if "second" in parts:
                pyro.sample("second", dist.Normal(double(0.0), tau))
            sd = tau if likelihood else double(1.0)
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), sd).expand([2, 4]).to_event(1), obs=Y[index, :, 0])

    return model


REFUSED: dict[str, tuple[Model, str]] = {
    "in the likelihood": (refused(likelihood=True), "'tau'.*an observed site depends on it directly"),
    "in the mean": (refused(local=lambda p, t, o: dist.Normal(p + t, t)), "'tau'"),
    "of no known form": (
        refused(local=lambda p, t, o: dist.Normal(p, (t**2 + 1.0).sqrt())),
        "no constant times a power",
    ),
    "of a Student-t": (refused(local=lambda p, t, o: dist.StudentT(4.0, p, t)), "StudentT"),
    "two of them": (refused(other=True), "several sites"),
    "with a scale of its own": (refused(above=True), "depends on another site"),
    "of an unpaired family": (refused(second=True), "'second' hangs on it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_scale_that_cannot_be_drawn_exactly_is_refused_with_the_reason_and_the_way_out(name: str) -> None:
    model, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f'(?s){reason}.*phi_update="langevin", accumulator="table"'):
        set_up(model)


def test_a_non_centred_program_is_told_to_be_written_centred() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.0), 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(double(1.0)))
        with pyro.plate("tasks", N, subsample_size=2) as index:
            raw = pyro.sample("raw", dist.Normal(double(0.0), 1.0))
            mean = (phi + tau * raw).unsqueeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.0).expand([2, 4]).to_event(1), obs=Y[index, :, 0])

    with pytest.raises(ValueError, match="centred"):
        set_up(model)
    kernel = set_up(model, phi_update="langevin", accumulator="table")
    for _ in range(10):
        kernel.sample(kernel.initial_params)
    assert all(bool(torch.isfinite(v).all()) for v in kernel.state.phi.values())


@pytest.mark.parametrize("odd", ["value", "derivative", "likelihood"])
def test_a_later_task_that_uses_the_scale_otherwise_is_refused_at_its_first_visit(odd: str) -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(double(0.0), 1.0))
        tau = pyro.sample("tau", dist.LogNormal(double(0.0), 1e-4))  # starts at one, where all powers are alike
        for i in pyro.plate("tasks", N, subsample_size=1):
            scale = tau
            if i == 3:
                scale = {"value": 2.0 * tau, "derivative": tau**2, "likelihood": tau}[odd]
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, scale))
            sd = tau if odd == "likelihood" and i == 3 else double(1.0)
            pyro.sample(f"y_{i}", dist.Normal(theta, sd).expand([4]).to_event(1), obs=Y[i, :, 0])

    kernel = set_up(model)
    for _ in range(3):
        kernel.sample(kernel.initial_params)
    with pytest.raises(ValueError, match="task 3: "):
        kernel.sample(kernel.initial_params)


@pytest.mark.parametrize(("option", "value"), [("integrator", "euler"), ("temperature", 0.0)])
def test_options_that_an_unknown_scale_does_not_allow_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}=.*'tau'"):
        set_up(scalar(), **{option: value})


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_run_with_unknown_scales_goes_on_from_a_checkpoint_to_the_bit(store: str, tmp_path: Path) -> None:
    def run(num_samples: int, **saved: Any) -> MCMC:
        kernel = SGLDGibbs(two_pairs(False), step_size=0.05, seed=6, store=store)
        mcmc = MCMC(kernel, num_samples, warmup_steps=6, disable_progbar=True)
        mcmc.run(**saved)
        return mcmc

    plain = run(20)
    run(9, checkpoint=tmp_path / "run")
    # A run that was saved after nine draws is extended: its length is no part of what must be the same.
    resumed = run(20, resume=tmp_path / "run")
    for name, draws in plain.get_samples().items():
        assert torch.equal(resumed.get_samples()[name], draws), name
    first, second = plain.kernel.state.squares, resumed.kernel.state.squares
    assert all(torch.equal(first[name], second[name]) for name in first) and first


@pytest.mark.parametrize("prior", [dist.HalfCauchy(double(25.0)), dist.InverseGamma(double(1e-3), double(1e-3))])
def test_a_chain_starts_where_everything_is_finite_under_the_widest_priors(prior: Any) -> None:
    scale = (lambda t: t) if isinstance(prior, dist.HalfCauchy) else (lambda t: t.sqrt())
    kernel = SGLDGibbs(vectors(prior, scale, None), step_size=None, seed=0)
    mcmc = MCMC(kernel, 40, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    assert bool((mcmc.get_samples()["tau"] > 0.0).all()) and bool(torch.isfinite(mcmc.get_samples()["tau"]).all())


def test_summaries_streams_and_mixtures_take_a_program_with_unknown_scales() -> None:
    statistics = StatsOfDict(
        {(0, "b"): lambda: OnlineGaussianMixture(2, buffer_size=12)}, default=CountMeanVarianceStats
    )
    streaming = StreamingMCMC(
        SGLDGibbs(two_pairs(False), step_size=0.05, seed=1), 40, 20, statistics=statistics, disable_progbar=True
    )
    streaming.run()
    assert float(streaming.get_statistics()[(0, "t")]["mean"].min()) > 0.0  # on its own scale
    mcmc = MCMC(SGLDGibbs(two_pairs(False), step_size=0.05, seed=1), 40, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    data = from_mcmc(mcmc)
    assert {"a", "b", "s", "t"} <= set(data.posterior.data_vars)
    torch.testing.assert_close(
        torch.tensor(data.posterior["t"].values[0]).mean(0), streaming.get_statistics()[(0, "t")]["mean"]
    )
    assert "reach" in str(summarise(mcmc))
