"""A regression on the network's outputs has a noise of its own where it has many more rows than the prior's tasks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior

ROWS = 10
SHORT: dict[str, Any] = {"sgd_steps": 10, "burn_in": 5, "samples": 10, "sgd_learning_rate": 1e-3, "seed": 0}
QUICK: dict[str, Any] = {"steps": 20, "draws": 5}


def network(values: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, values))


def task(seed: int, rows: int, noise: tuple[float, ...]) -> Task:
    """Targets that the network knows, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 400, 4, generator=generator)
    with torch.no_grad():
        y = network(len(noise))(x) + torch.randn(rows + 400, len(noise), generator=generator) * torch.tensor(noise)
    return Task(f"t{seed}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), kind="regression")


@cache
def prior(values: int) -> LiFTPrior:
    lift = LiFT(network(values), peft.LoraConfig(r=1, target_modules=["0"]), noise_scale=0.5, **SHORT)
    return lift.meta_train([task(k, ROWS, (0.5,) * values) for k in range(3)], progress=False)


@pytest.mark.parametrize("noise", [(0.1,), (2.0,), (0.1, 1.0)])
def test_it_is_as_wide_as_its_rows_say(noise: tuple[float, ...]) -> None:
    new = task(20, 400, noise)
    assert new.test is not None
    posterior = prior(len(noise)).adapt(new, **QUICK)
    missed = (posterior.predict(new.test.inputs) - new.test.target).square().mean(0).sqrt()
    sd = posterior.predict_sd(new.test.inputs).square().mean(0).sqrt()
    # 8 rows of the common noise against 400; the spread of a standard deviation over 400 rows is a 28th of it.
    expected = ((8 * 0.25 + 400 * missed**2) / 408).sqrt()
    torch.testing.assert_close(sd, expected, rtol=4.0 / 28.0, atol=0.0)


def test_few_rows_and_a_number_of_none_leave_the_common_noise() -> None:
    many, few = task(21, 2 * ROWS + 1, (0.1,)), task(21, 2 * ROWS, (0.1,))
    assert prior(1).adapt_settings.many_rows == 2 * ROWS
    assert prior(1).adapt(many, **QUICK).dispersion is not None
    assert prior(1).adapt(few, **QUICK).dispersion is None
    assert prior(1).adapt(many, many_rows=0, **QUICK).dispersion is None
    together = prior(1).adapt_many([many, few], **QUICK)
    assert [posterior.dispersion is None for posterior in together] == [False, True]


def test_it_is_the_ratio_of_what_is_missed_to_what_is_expected() -> None:
    new = task(22, 60, (0.1,))
    own, common = prior(1).adapt(new, **QUICK), prior(1).adapt(new, many_rows=0, **QUICK)
    missed = (new.train.target - common.predict(new.train.inputs)) / common.predict_sd(new.train.inputs)
    assert own.dispersion is not None
    torch.testing.assert_close(own.dispersion, (8 + missed.square().sum(0).double()) / 68, rtol=1e-5, atol=0.0)


def test_it_is_saved(tmp_path: Path) -> None:
    new = task(23, 60, (0.1,))
    assert new.test is not None
    posterior = prior(1).adapt(new, **QUICK)
    posterior.save_pretrained(tmp_path)
    read = TaskPosterior.from_pretrained(tmp_path, network(1))
    torch.testing.assert_close(read.predict_sd(new.test.inputs), posterior.predict_sd(new.test.inputs))
