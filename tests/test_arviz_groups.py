"""The groups that second passes give to ArviZ: pointwise log likelihoods, predictions, prior, data, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from diagnostics_programs import ROWS, N, data, looped, rows_in_a_plate, vector_rows
from pyro import poutine
from pyro.infer import NUTS, Predictive

from pyro_lift import MCMC, SGLDGibbs, from_mcmc, summarise, whole

az = pytest.importorskip("arviz")
Y = data()
CITIES = ["oslo", "rome", "bern", "kyiv", "lima"]


def finished(model: Any, draws: int = 60, warmup: int = 40, **options: Any) -> MCMC:
    kernel = SGLDGibbs(model, step_size=0.05, seed=2, **{"keep_theta": True, **options})
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(Y)
    return mcmc


@pytest.fixture(scope="module")
def run() -> MCMC:
    return finished(rows_in_a_plate())


@pytest.fixture(scope="module")
def everything(run: MCMC) -> Any:
    return from_mcmc(run, log_likelihood=True, posterior_predictive=True, prior=40, coords={"tasks": CITIES})


def groups_of(data: Any) -> set[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return {str(name).strip("/") for name in names} - {""}


def test_all_groups_are_there_with_plates_as_dimensions(everything: Any) -> None:
    assert groups_of(everything) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "observed_data",
    }
    assert everything["posterior"]["theta"].dims[:3] == ("chain", "draw", "tasks")
    assert list(everything["posterior"]["theta"].coords["tasks"].values) == CITIES
    assert set(everything["posterior"].data_vars) == {"phi", "theta", "double"}
    for group, draws in (("log_likelihood", 60), ("posterior_predictive", 60), ("prior_predictive", 40)):
        assert set(everything[group].data_vars) == {"y"}
        assert everything[group]["y"].dims == ("chain", "draw", "tasks", "rows")
        assert everything[group]["y"].shape == (1, draws, N, ROWS)
    assert everything["observed_data"]["y"].dims == ("tasks", "rows")
    np.testing.assert_array_equal(everything["observed_data"]["y"].values, Y.numpy())
    assert set(everything["prior"].data_vars) == {"phi", "theta", "double"}


def test_log_likelihoods_are_the_normal_density_of_each_row(run: MCMC, everything: Any) -> None:
    theta = run.get_samples()["theta"]
    expected = torch.distributions.Normal(theta, 0.8).log_prob(Y)
    np.testing.assert_allclose(everything["log_likelihood"]["y"].values[0], expected.numpy())
    np.testing.assert_allclose(everything["posterior"]["double"].values[0], 2.0 * theta.numpy())


@pytest.mark.parametrize("pointwise", ["program", "rows"])
def test_a_tasks_rows_of_one_event_count_as_one_or_each(pointwise: Any) -> None:
    mcmc = finished(vector_rows(2))
    each = from_mcmc(mcmc, log_likelihood=True, posterior_predictive=True, pointwise=pointwise)
    theta = mcmc.get_samples()["theta"].unsqueeze(-1)
    expected = torch.distributions.Normal(theta, 0.8).log_prob(Y)
    expected = expected if pointwise == "rows" else expected.sum(-1)
    np.testing.assert_allclose(each["log_likelihood"]["y"].values[0], expected.numpy())
    assert each["log_likelihood"]["y"].dims[2] == "tasks"
    assert each["posterior_predictive"]["y"].shape == (1, 60, N, ROWS)  # as wide as the data


def test_a_loop_over_tasks_gives_the_same_groups_as_a_plate() -> None:
    mcmc = finished(looped())
    found = from_mcmc(mcmc, log_likelihood=True, posterior_predictive=True, prior=3, coords={"tasks": CITIES})
    draws = mcmc.get_samples()
    theta = torch.stack([draws[f"theta_{i}"] for i in range(N)], -1)
    np.testing.assert_array_equal(found["posterior"]["theta"].values[0], theta.numpy())
    assert found["posterior"]["theta"].dims == ("chain", "draw", "tasks")
    expected = torch.distributions.Normal(theta.unsqueeze(-1), 0.8).log_prob(Y)
    np.testing.assert_allclose(found["log_likelihood"]["y"].values[0], expected.numpy())
    np.testing.assert_array_equal(found["observed_data"]["y"].values, Y.numpy())


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_tasks_of_unequal_rows_stand_one_behind_the_other() -> None:
    sizes = (4, 2, 3, 1, 4)
    found = from_mcmc(finished(looped(sizes)), log_likelihood=True)
    assert found["log_likelihood"]["y"].dims == ("chain", "draw", "y_row")
    flat = torch.cat([Y[i, :n] for i, n in enumerate(sizes)])
    np.testing.assert_array_equal(found["observed_data"]["y"].values, flat.numpy())
    assert az.loo(found).n_data_points == sum(sizes)


def test_deterministic_sites_have_the_dimensions_of_their_plates() -> None:
    def inside(y: torch.Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 2.0))
        pyro.deterministic("outside", phi.exp().expand(N))
        with pyro.plate("tasks", N, dim=-2):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5).expand([N, 1, N]).to_event(1))
            pyro.deterministic("square", theta.squeeze(1))
            pyro.deterministic("first", theta[..., 0])
            pyro.deterministic("squeezed", theta[:, 0, 0])
            pyro.deterministic("pairs", torch.stack([theta, theta], -1))
            pyro.deterministic("said", theta, event_dim=1)
            with pyro.plate("rows", ROWS, dim=-1):
                pyro.deterministic("fitted", theta[..., 0] + 0.0 * y)
                pyro.sample("y", dist.Normal(theta[..., 0], 0.8), obs=y)

    mcmc = finished(inside, draws=3, warmup=1)
    found = from_mcmc(mcmc, log_likelihood=True, prior=2, coords={"tasks": CITIES})
    for group in ("posterior", "prior"):
        dims = {str(name): value.dims[2:] for name, value in found[group].data_vars.items()}
        assert dims["square"] == ("tasks", "square_dim_1") and dims["first"] == ("tasks", "first_dim_1")
        assert dims["squeezed"] == ("tasks",) and dims["outside"] == ("outside_dim_0",)
        assert dims["pairs"][:1] == dims["said"][:1] == ("tasks",)
        assert dims["fitted"] == ("tasks", "rows")
    theta = found["posterior"]["theta"].sel(tasks="bern").values[..., 0, 0]
    np.testing.assert_array_equal(found["posterior"]["squeezed"].sel(tasks="bern").values, theta)
    assert list(az.summary(found, var_names=["squeezed"]).index) == [f"squeezed[{city}]" for city in CITIES]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_calls_of_arviz_work(everything: Any) -> None:
    """ArviZ 1.x ranks draws of two chains or more, and has another name for the plot of predictions."""
    import matplotlib

    matplotlib.use("Agg")
    loo = az.loo(everything)
    assert loo.n_data_points == N * ROWS
    assert len(az.compare({"one": everything, "two": everything})) == 2
    assert len(az.summary(everything)) == 1 + 2 * N
    assert az.ess(everything)["theta"].sizes["tasks"] == N and az.mcse(everything)["theta"].sizes["tasks"] == N
    kernel = SGLDGibbs(rows_in_a_plate(), step_size=0.05, seed=2)
    two = MCMC(kernel, num_samples=20, warmup_steps=5, num_chains=2, disable_progbar=True)
    two.run(Y)
    az.plot_rank(from_mcmc(two), var_names=["phi"])
    (az.plot_ppc if hasattr(az, "plot_ppc") else az.plot_ppc_dist)(everything)
    matplotlib.pyplot.close("all")  # type: ignore[attr-defined]


def test_predictions_are_drawn_from_the_likelihood_at_the_draws(run: MCMC, everything: Any) -> None:
    noise = everything["posterior_predictive"]["y"].values[0] - run.get_samples()["theta"].numpy()
    assert noise.std() == pytest.approx(0.8, abs=0.06) and abs(noise.mean()) < 0.1
    again = from_mcmc(run, posterior_predictive=True)["posterior_predictive"]["y"]
    np.testing.assert_array_equal(again.values, everything["posterior_predictive"]["y"].values)


def test_what_pyros_predictive_gives_is_taken_as_it_is(run: MCMC) -> None:
    free = poutine.uncondition(whole(rows_in_a_plate()))
    predicted = Predictive(free, run.get_samples())(Y)
    prior = Predictive(free, num_samples=7)(Y)
    keep = {"y": predicted["y"]}
    found = from_mcmc(run, posterior_predictive=keep, prior={name: prior[name] for name in ("phi", "theta", "y")})
    np.testing.assert_array_equal(found["posterior_predictive"]["y"].values[0], predicted["y"].numpy())
    assert found["prior_predictive"]["y"].shape == (1, 7, N, ROWS) and found["prior"]["phi"].shape == (1, 7)


def test_nothing_of_the_callers_stream_is_used(run: MCMC) -> None:
    before = torch.get_rng_state()
    from_mcmc(run, log_likelihood=True, posterior_predictive=True, prior=2)
    assert torch.equal(before, torch.get_rng_state())


def test_without_theta_the_way_to_keep_it_is_told() -> None:
    mcmc = finished(rows_in_a_plate(), keep_theta=False)
    assert set(from_mcmc(mcmc)["posterior"].data_vars) == {"phi"}
    for asked in ({"log_likelihood": True}, {"posterior_predictive": True}):
        with pytest.raises(ValueError, match=r"no draws of the site 'theta'.*SGLDGibbs\(model, keep_theta=True\)"):
            from_mcmc(mcmc, **asked)  # type: ignore[arg-type]
    assert "prior" in groups_of(from_mcmc(mcmc, prior=2))


def test_names_of_the_users_own_for_dimensions(run: MCMC) -> None:
    found = from_mcmc(run, dims={"theta": ["tasks", "one"]}, constant_data={"size": [ROWS] * N}, prior=2)
    assert found["posterior"]["theta"].dims == ("chain", "draw", "tasks", "one")
    assert list(found["constant_data"]["size"].values) == [ROWS] * N
    with pytest.raises(ValueError, match="dims: there is no variable 'thetta'"):
        from_mcmc(run, dims={"thetta": ["tasks"]})
    with pytest.raises(ValueError, match="coords: no variable has a dimension 'task'"):
        from_mcmc(run, coords={"task": CITIES})
    with pytest.raises(TypeError, match="unknown option 'cords'"):
        from_mcmc(run, cords={})  # type: ignore[call-arg]


def test_pyros_own_kernels_have_the_same_groups() -> None:
    mcmc = MCMC(NUTS(whole(rows_in_a_plate())), num_samples=6, warmup_steps=6, disable_progbar=True)
    mcmc.run(Y)
    found = from_mcmc(mcmc, log_likelihood=True, coords={"tasks": CITIES})
    expected = torch.distributions.Normal(mcmc.get_samples()["theta"], 0.8).log_prob(Y)
    np.testing.assert_allclose(found["log_likelihood"]["y"].values[0], expected.numpy())


def test_the_summary_shows_many_theta_by_projections() -> None:
    mcmc = finished(rows_in_a_plate(), draws=8)
    names = {c.name.split("[")[0] for c in summarise(mcmc, max_size=3).coordinates}
    assert names == {"phi", "theta_projection", "theta_norm"}
