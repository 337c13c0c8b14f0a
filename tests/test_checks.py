"""Checks of a sampler and of a program: each passes what is right, and fails what is wrong by a known amount."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from diagnostics_programs import data, rows_in_a_plate
from pyro import poutine
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, compare_with_nuts, posterior_check, prior_check, sbc, whole
from pyro_lift.diagnostics import Calibration, NutsComparison
from pyro_lift.diagnostics.calibration import ecdf_band
from pyro_lift.diagnostics.nuts import _rows
from pyro_lift.inference.with_data import with_data

Y = data()


def ranks_of(width: float, shift: float = 0.0, count: int = 800, draws: int = 31) -> Calibration:
    """Ranks of a standard normal truth among draws from a normal of that width, moved by ``shift``."""
    generator = torch.Generator().manual_seed(4)
    drawn = shift + width * torch.randn(draws, count, generator=generator)
    return Calibration({"x": (drawn < torch.randn(count, generator=generator)).sum(0)}, draws)


def test_right_draws_are_uniform_and_wrong_ones_are_not() -> None:
    assert ranks_of(1.0).outside() == [] and ranks_of(1.0).p_value("x") > 0.01
    for wrong in (ranks_of(1.3), ranks_of(0.75), ranks_of(1.0, 0.2)):
        assert wrong.outside() == ["x"] and wrong.p_value("x") < 1e-3
    assert "stays in" in str(ranks_of(1.0)) and "leaves" in str(ranks_of(1.3))


def test_the_band_holds_whole_curves_of_uniform_ranks_as_often_as_it_says() -> None:
    count, draws = 150, 20
    _, low, high = ecdf_band(count, draws, 0.9)
    random = np.random.default_rng(7)
    counts = random.multinomial(count, np.full(draws + 1, 1 / (draws + 1)), size=2_000)
    below = np.cumsum(counts, 1)[:, :-1] / count
    inside = ((below >= low - 1e-9) & (below <= high + 1e-9)).all(1).mean()
    assert inside == pytest.approx(0.9, abs=0.03)


def test_the_figure_is_written(tmp_path: Path) -> None:
    ranks_of(1.0).plot(tmp_path / "one.png")
    several = Calibration({name: ranks_of(1.0).ranks["x"] for name in "abcd"}, 31)
    several.plot(tmp_path / "four.png")
    assert (tmp_path / "one.png").stat().st_size > 1_000 and (tmp_path / "four.png").stat().st_size > 1_000


def one_group(y: Tensor) -> None:
    """Four tasks, so few that a short chain is enough."""
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 1.0))
    with pyro.plate("tasks", 4) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.7))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


def test_calibration_runs_on_a_program_that_simulates_itself() -> None:
    def kernel(program: Any, seed: int) -> SGLDGibbs:
        return SGLDGibbs(program, step_size=0.3, keep_theta=True, seed=seed)

    found = sbc(one_group, replicates=8, kernel=kernel, args=[torch.zeros(4)], draws=7, thinning=3, warmup_steps=10)
    assert set(found.ranks) == {"phi", *(f"theta[{i}]" for i in range(4))}
    assert all(len(r) == 8 and int(r.min()) >= 0 and int(r.max()) <= 7 for r in found.ranks.values())

    def simulate(seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        return {"phi": torch.tensor(100.0)}, [torch.full((4,), 100.0 + seed)]

    far = sbc(one_group, simulate, replicates=2, kernel=kernel, draws=7, thinning=1, warmup_steps=10)
    assert far.ranks["phi"].tolist() == [7, 7]
    with pytest.raises(ValueError, match="sites: 'tau' has no true value"):
        sbc(one_group, simulate, sites=["tau"], replicates=1, kernel=kernel, draws=2, thinning=1, warmup_steps=1)
    with pytest.raises(TypeError, match="unknown option 'thining' of sbc"):
        sbc(one_group, simulate, thining=2)  # type: ignore[call-arg]


@pytest.mark.slow
def test_the_exact_draws_of_phi_and_theta_are_calibrated() -> None:
    def kernel(program: Any, seed: int) -> SGLDGibbs:
        return SGLDGibbs(program, step_size=0.05, keep_theta=True, seed=seed)

    args = [torch.zeros(4).double()]
    found = sbc(one_group, replicates=200, kernel=kernel, args=args, draws=31, thinning=60, warmup_steps=300)
    assert min(found.p_values.values()) * len(found.p_values) > 0.01, str(found)


def test_data_are_put_where_the_program_observes_them() -> None:
    other = torch.arange(20.0).double().view(5, 4)
    trace = poutine.trace(with_data(rows_in_a_plate(2), {"y": other})).get_trace(Y)
    index = trace.nodes["tasks"]["value"]
    torch.testing.assert_close(trace.nodes["y"]["value"], other[index])
    trace = poutine.trace(whole(with_data(rows_in_a_plate(2), {"y": other}))).get_trace(Y)
    torch.testing.assert_close(trace.nodes["y"]["value"], other)


@pytest.mark.slow
def test_nuts_agrees_with_itself_and_not_with_another_program() -> None:
    def right(model: Any) -> SGLDGibbs:
        return SGLDGibbs(model, step_size=0.02, keep_theta=True, seed=1)

    def hot(model: Any) -> SGLDGibbs:
        return SGLDGibbs(model, step_size=0.02, temperature=4.0, keep_theta=True, seed=1)

    options: dict[str, Any] = {"num_samples": 1_500, "warmup_steps": 200, "nuts_samples": 150, "nuts_warmup": 100}
    found = compare_with_nuts(rows_in_a_plate(None), Y, kernel=right, **options)
    assert {row.name for row in found.rows} == {"phi", *(f"theta[{i}, 0]" for i in range(5))}
    assert found.worst < 4.5, str(found)
    wrong = compare_with_nuts(rows_in_a_plate(None), Y, kernel=hot, **options)
    assert max(row.z_sd for row in wrong.rows) > 5.0, str(wrong)
    assert "standard errors" in str(found)


def test_the_table_of_differences_counts_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 400, 2, generator=generator), torch.randn(1, 400, 2, generator=generator)
    y[..., 1] = 0.5 + 2.0 * y[..., 1]
    alike, other = _rows("x", x.numpy(), y.numpy())
    assert alike.name == "x[0]" and max(abs(alike.z_mean), abs(alike.z_sd)) < 4.0
    assert other.z_mean == pytest.approx(-0.5 / math.sqrt((1 + 4) / 400), abs=2.5)
    assert other.z_sd < -10.0
    table = NutsComparison([alike, other])
    assert table.worst == max(abs(other.z_sd), abs(other.z_mean)) and "worst difference" in str(table)


def test_predictive_checks_tell_data_of_the_program_from_others() -> None:
    statistics = {"mean": lambda d: d["y"].mean(), "largest": lambda d: d["y"].max(), "sd": lambda d: d["y"].std()}
    kernel = SGLDGibbs(rows_in_a_plate(None), step_size=0.05, keep_theta=True, seed=2)
    mcmc = MCMC(kernel, num_samples=80, warmup_steps=60, disable_progbar=True)
    mcmc.run(Y)
    assert all(0.02 < check.p_value < 0.98 for check in posterior_check(mcmc, statistics))
    odd = Y.clone()
    odd[2, 1] = 9.0
    mcmc.run(odd)
    largest = posterior_check(mcmc, statistics)[1]
    assert largest.observed == 9.0 and largest.p_value < 0.01 and "largest: observed 9" in str(largest)
    assert prior_check(rows_in_a_plate(), statistics, args=[Y + 30.0])[0].p_value < 0.01
    assert 0.02 < prior_check(rows_in_a_plate(), statistics, args=[Y])[0].p_value < 0.98
