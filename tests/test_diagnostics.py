"""The way to ArviZ: groups, plots, netCDF, and sites too large to show."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import sequential, vectorised
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.streaming import CountMeanVarianceStats, StackStats, StatsOfDict
from torch import nn

import pyro_lift
from pyro_lift import SGLD, RandomAdapter, SGLDGibbs, from_mcmc, summarise
from pyro_lift.diagnostics import SAMPLE_STATS
from pyro_lift.inference.projections import ProjectedTrace, project, projection

az = pytest.importorskip("arviz")


def finished(kernel: Any, chains: int = 1, draws: int = 24, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=6, num_chains=chains, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


@pytest.fixture
def two_chains(monkeypatch: pytest.MonkeyPatch) -> MCMC:
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)  # one after another, in this process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "num_chains=2 is more than available_cpu")
        return finished(SGLDGibbs(vectorised(), step_size=0.02), chains=2)


def test_groups_shapes_and_attributes(two_chains: MCMC) -> None:
    data = from_mcmc(two_chains)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["phi"].shape == (2, 24, 2)
    samples = two_chains.get_samples(group_by_chain=True)["phi"]
    np.testing.assert_array_equal(posterior["phi"].values, samples.numpy())
    assert set(SAMPLE_STATS) <= set(stats.data_vars)
    assert all(stats[name].shape == (2, 24) for name in SAMPLE_STATS)
    assert stats["clipped"].dtype == bool
    # Six visits of warm-up, then round robin over six tasks.
    np.testing.assert_array_equal(stats["task"].values[0], np.arange(24) % 6)
    assert posterior.attrs["inference_library"] == "pyro_lift"
    assert posterior.attrs["inference_library_version"] == pyro_lift.__version__


def test_summary_plots_and_netcdf(two_chains: MCMC, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    data = from_mcmc(two_chains)
    table = az.summary(data)
    assert len(table) == 2
    assert {"ess_bulk", "ess_tail", "r_hat"} <= set(table.columns)
    az.plot_trace(data)
    az.plot_rank(data)
    matplotlib.pyplot.close("all")  # type: ignore[attr-defined]
    data.to_netcdf(str(tmp_path / "run.nc"))
    back = az.from_netcdf(str(tmp_path / "run.nc"))
    for group in ("posterior", "sample_stats"):
        assert set(back[group].data_vars) == set(data[group].data_vars)
        for name in data[group].data_vars:
            np.testing.assert_array_equal(back[group][name].values, data[group][name].values)


def test_a_large_site_becomes_projections_and_norms() -> None:
    D = 100

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D).double(), 1.0).to_event(1))
        pyro.sample("mu", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(phi, 1.0).to_event(1), obs=torch.ones(D).double())

    mcmc = finished(SGLD(model, step_size=0.1))
    posterior = from_mcmc(mcmc, coordinates=5, seed=2)["posterior"]
    assert set(posterior.data_vars) == {"mu", "phi_projection", "phi_norm"}
    phi = mcmc.get_samples()["phi"]
    np.testing.assert_allclose(
        posterior["phi_projection"].values[0], (phi @ projection(D, 5, seed=2).double()).numpy(), rtol=1e-12
    )
    np.testing.assert_allclose(posterior["phi_norm"].values[0, :, 0], phi.norm(dim=-1).numpy())
    assert "phi" in from_mcmc(mcmc, max_size=D)["posterior"].data_vars


def test_a_projection_keeps_variances_on_average() -> None:
    x = torch.randn(4_000, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance = project(x, 200).var(0)
    # Each is |column|^2 of 60 entries N(0, 1/60): sd sqrt(2/60) over columns, plus the sampling error of the draws.
    assert abs(float(variance.mean()) - 1.0) < 4.0 * np.sqrt(2 / 60 / 200 + 2 / 4_000)
    torch.testing.assert_close(project(x, 7), project(x, 7), rtol=0, atol=0)


def test_norms_are_named_by_module() -> None:
    import peft

    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    adapter = RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=["0", "2"])))

    class Program:
        def __init__(self) -> None:
            self.adapter = adapter

        def __call__(self) -> None:
            pyro.sample("theta", dist.Normal(adapter.initial, 0.1).to_event(1))

    mcmc = finished(SGLD(Program(), step_size=1e-4))
    posterior = from_mcmc(mcmc)["posterior"]
    assert list(posterior["theta_norm"].coords["theta_module"].values) == ["0", "2"]
    theta = mcmc.get_samples()["theta"]
    total = np.square(posterior["theta_norm"].values[0]).sum(-1)
    np.testing.assert_allclose(total, theta.square().sum(-1).numpy(), rtol=1e-5)


def test_a_streaming_run_shows_its_trace_and_equals_the_stored_one() -> None:
    model = vectorised()
    pyro.set_rng_seed(3)
    stored = from_mcmc(finished(SGLDGibbs(model, step_size=0.02)), max_size=1)["posterior"]
    pyro.set_rng_seed(3)
    stream = StreamingMCMC(
        SGLDGibbs(model, step_size=0.02),
        num_samples=24,
        warmup_steps=6,
        statistics=StatsOfDict(default=ProjectedTrace),
        disable_progbar=True,
    )
    stream.run()
    data = from_mcmc(stream)
    for name in ("phi_projection", "phi_norm"):
        np.testing.assert_allclose(data["posterior"][name].values, stored[name].values, rtol=1e-12)
    assert data["sample_stats"]["step_size"].shape == (1, 24)


@pytest.mark.parametrize("statistics", [CountMeanVarianceStats, StackStats])
def test_a_streaming_run_without_a_trace_is_told_how_to_keep_one(statistics: Any) -> None:
    stream = StreamingMCMC(
        SGLDGibbs(vectorised(), step_size=0.02),
        num_samples=3,
        warmup_steps=0,
        statistics=StatsOfDict(default=statistics),
        disable_progbar=True,
    )
    stream.run()
    with pytest.raises(ValueError, match="statistics=StatsOfDict\\(default=ProjectedTrace\\)"):
        from_mcmc(stream)


def test_a_run_that_has_not_happened_is_refused() -> None:
    with pytest.raises(ValueError, match="it has not been run"):
        from_mcmc(MCMC(SGLDGibbs(vectorised()), num_samples=3))


def test_pyros_own_kernels_pass_too() -> None:
    mcmc = finished(NUTS(vectorised(None)), draws=5)
    data = from_mcmc(mcmc)
    assert data["posterior"]["theta"].shape == (1, 5, 6, 2)
    assert data["sample_stats"]["diverging"].shape == (1, 5)


def test_traces_merge_in_order() -> None:
    first, second = ProjectedTrace(4), ProjectedTrace(4)
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    whole = ProjectedTrace(4)
    for row in x:
        whole.update(row)
    for row in x[:2]:
        first.update(row)
    for row in x[2:]:
        second.update(row)
    merged = first.merge(second).get()
    torch.testing.assert_close(merged["projection"], whole.get()["projection"])
    torch.testing.assert_close(merged["norm"], whole.get()["norm"])
    assert len(first.projections) == 2


def test_the_report_gives_steps_without_dimensions() -> None:
    kernel = SGLDGibbs(vectorised(), step_size=0.02, phi_update="langevin", phi_step_size=0.03)
    finished(kernel, draws=2)
    report = kernel.report()
    json.dumps(report)
    assert report["a_theta (phi)"] == pytest.approx(0.02 / (2 * 0.25))
    assert report["a_phi (phi)"] == pytest.approx(0.5 * 0.03 * (6 / 0.25 + 1 / 4))
    assert report["curvature"] == pytest.approx(4 + 1 / 0.25, rel=1e-6)
    assert SGLDGibbs(sequential(), step_size=0.02).report() == {}


def test_the_summary_is_arviz_by_coordinate_with_times_and_reach(two_chains: MCMC) -> None:
    summary = summarise(two_chains)
    data = from_mcmc(two_chains)["posterior"]
    assert [c.name for c in summary.coordinates] == ["phi[0]", "phi[1]"]
    for k, c in enumerate(summary.coordinates):
        x = data["phi"].values[..., k]
        assert c.mean == pytest.approx(x.mean()) and c.sd == pytest.approx(x.std(ddof=1))
        assert c.mcse == pytest.approx(float(az.mcse(x))) and c.r_hat == pytest.approx(float(az.rhat(x)))
        assert c.ess_bulk == pytest.approx(float(az.ess(x, method="bulk")))
        assert c.ess_tail == pytest.approx(float(az.ess(x, method="tail", prob=(0.05, 0.95))))
        assert summary.seconds is not None and summary.seconds > 0.0
        assert c.ess_bulk_per_second == pytest.approx(c.ess_bulk / summary.seconds)
    assert summary.worst_r_hat == max(c.r_hat for c in summary.coordinates)
    assert (summary.divergences, summary.clipped, summary.draws) == (0, 0, 48)
    # 24 visits to 6 tasks; a_theta = 0.02 / (2 beta^2) = 0.04; phi is drawn exactly.
    assert summary.reach == {"visits_per_task": 4.0, "theta (phi)": pytest.approx(4 * 0.04), "phi (phi)": None}
    assert "r_hat" in str(summary) and "phi (phi) exact" in str(summary)
    assert summarise(two_chains, seconds=2.0).coordinates[0].ess_bulk_per_second == summary.coordinates[0].ess_bulk / 2


def test_the_summary_counts_clipped_draws_and_phis_own_reach() -> None:
    mcmc = finished(SGLDGibbs(vectorised(), step_size=0.02, max_grad_norm=0.1, thinning=2), draws=10)
    assert (summarise(mcmc).clipped, summarise(mcmc).divergences) == (10, 0)
    langevin = SGLDGibbs(vectorised(), step_size=0.02, phi_update="langevin", phi_step_size=0.03, thinning=2)
    reach = summarise(finished(langevin, draws=10)).reach
    assert reach["visits_per_task"] == pytest.approx(20 / 6)
    assert reach["phi (phi)"] == pytest.approx(20 * 0.5 * 0.03 * (6 / 0.25 + 1 / 4))


def test_the_summary_of_pyros_own_kernels_has_no_times_unless_they_are_given() -> None:
    mcmc = finished(NUTS(vectorised(None)), draws=8)
    summary = summarise(mcmc)
    assert summary.seconds is None and summary.reach == {} and summary.coordinates[0].ess_bulk_per_second is None
    assert len(summary.coordinates) == 2 + 12 and "-" in str(summary)
    assert summarise(mcmc, seconds=1.0).coordinates[0].ess_bulk_per_second is not None


RESERVED: dict[str, tuple[str, ...]] = {
    "a dimension of all": ("chain",),
    "the other": ("draw",),
    "a dimension of another site": ("x", "x_dim_0"),
    "in another order": ("x_dim_0", "x"),
    "the name it would be given": ("chain", "chain_"),
    "a slash": ("group/phi",),
    "a slash, and the name it would be given": ("group/phi", "group.phi"),
    "a summary of another site": ("x", "x_norm", "x_projection", "coordinate", "x_module"),
}


@pytest.mark.parametrize("case", RESERVED)
def test_a_site_may_have_any_name(case: str, tmp_path: Path) -> None:
    names, size = RESERVED[case], 80 if case.startswith("a summary") else 3

    def model() -> None:
        for k, name in enumerate(names):
            pyro.sample(name, dist.Normal(torch.zeros(size if k == 0 else 2), 1.0).to_event(1))

    mcmc = finished(SGLD(model, step_size=0.1))
    data = from_mcmc(mcmc)
    posterior = data["posterior"]
    assert len(posterior.data_vars) == len(names) + (size > 64)
    for name, draws in mcmc.get_samples(group_by_chain=True).items():
        named = [x for key, x in posterior.data_vars.items() if x.attrs.get("site", key) == name]
        assert draws.shape[-1] > 64 or any(np.array_equal(x.values, draws.numpy()) for x in named)
    pyro_lift.summarise(mcmc)
    data.to_netcdf(str(tmp_path / "run.nc"))


def test_the_visited_tasks_log_likelihood_is_not_taken_for_a_pointwise_one(two_chains: MCMC) -> None:
    data = from_mcmc(two_chains)
    assert "log_likelihood" not in data["sample_stats"]
    with pytest.raises(TypeError, match="log likelihood"):
        az.loo(data)
