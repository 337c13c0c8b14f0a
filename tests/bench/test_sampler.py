"""The benchmark's chains are the kernels', to the last digit, and its command writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pyro
import pytest
import torch
from typer.testing import CliRunner

from pyro_lift.bench import sampler
from pyro_lift.bench.toy_chains import Toys, Update, chain, checkpoints, curve, generator_noise, second_half_kl
from pyro_lift.cli import app
from pyro_lift.models.linear_gaussian import LinearGaussian


@pytest.mark.parametrize("update", sampler.UPDATES)
def test_a_chain_is_the_kernels_with_the_same_noise(update: Update) -> None:
    N, visits, theta, phi = 4, 20, 0.004, 0.005 if update == "saga" else 0.02
    toy = LinearGaussian(N, seed=3, block_size=None if update == "sgld" else 1)
    kernel = sampler._kernel(update, toy, theta, phi)
    pyro.set_rng_seed(0)
    kernel.setup(0)
    generator = torch.Generator()
    assert kernel._noise_generator is not None
    generator.set_state(kernel._noise_generator.get_state())

    def as_the_kernel_draws(count: int, vectors: int) -> torch.Tensor:
        if update == "sgld":  # phi's noise, then that of all theta at once
            parts = [
                [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (1, N)] for _ in range(count)
            ]
            return torch.stack([torch.cat(part) for part in parts]).view(count, vectors, 1, 1, 2)
        flat = [torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(count * vectors)]
        return torch.stack(flat).view(count, vectors, 1, 1, 2)

    assert kernel._generator is not None
    seed = kernel._generator.initial_seed()
    theta_step, phi_step = (torch.full((1, 1, 1), step, dtype=torch.float64) for step in (theta, phi))
    ours = chain(Toys.of([toy]), update, theta_step, phi_step, as_the_kernel_draws, seed)
    params = kernel.initial_params
    for visit in range(visits):
        params = kernel.sample(params)
        torch.testing.assert_close(
            next(ours).view(2),
            params["phi"],
            rtol=1e-10,
            atol=1e-10,
            msg=lambda m, visit=visit: f"visit {visit}: {m}",  # type: ignore[misc]
        )


def test_a_curve_is_the_kl_of_the_second_half() -> None:
    toys = Toys.of([LinearGaussian(3, seed=s) for s in range(3)])
    step = torch.tensor([0.002, 0.006], dtype=torch.float64).view(-1, 1, 1)
    draws = torch.stack(
        [
            phi
            for phi, _ in zip(chain(toys, "gibbs", step, step, generator_noise((2, 3, 2), 0)), range(152), strict=False)
        ]
    )
    found = curve(chain(toys, "gibbs", step, step, generator_noise((2, 3, 2), 0)), toys, 152)
    assert found.visits == checkpoints(152) == [32, 38, 45, 54, 64, 76, 90, 108, 128, 152]
    for k, n in ((4, 64), (9, 152)):
        for p in range(2):
            each = [second_half_kl(draws[:n, p, r], toys.posterior[r]) for r in range(3)]
            assert float(found.kl[p, k]) == pytest.approx(sorted(each)[1], rel=1e-6)
    assert found.best[1].tolist() == found.kl.argmin(0).tolist()


def test_the_command_writes_records_a_table_and_a_figure(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "sampler", "--smoke", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "sampler.json").read_text())
    assert {r["update"] for r in records} == set(sampler.NAMES)
    for record in records:
        assert {"update", "tasks", "iterations", "seconds", "kl"} <= set(record)
        assert record["seconds"] > 0.0 and record["kl"] > 0.0
    assert "iterations to 0.01" in result.output and "langevin, table J" in result.output
    assert (tmp_path / "sampler.png").stat().st_size > 10_000


def test_reached_is_the_first_record_at_or_below_the_target() -> None:
    records = [
        {"update": "gibbs", "tasks": 10, "iterations": n, "seconds": n / 100, "kl": kl}
        for n, kl in ((32, 0.5), (64, 0.009), (128, 0.02), (256, 0.004))
    ]
    hit = sampler.reached(records, "gibbs", 10, 0.01)
    assert hit is not None and hit["iterations"] == 64
    assert sampler.reached(records, "gibbs", 10, 0.001) is None
    assert "64" in sampler.table(records)
