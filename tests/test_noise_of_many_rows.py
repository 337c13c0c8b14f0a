"""A regression has a noise of its own where it has many more rows than the prior's tasks, with a head or without."""

from __future__ import annotations

from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.new_tasks.noise_of_many_rows import set_own_noise
from pyro_lift.tuning.whose_heads import RULES, run_config

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
    lift = LiFT(network(values), peft.LoraConfig(r=1, target_modules=["0"]), noise_scale=0.5, head="shared", **SHORT)
    return lift.meta_train([task(k, ROWS, (0.5,) * values) for k in range(3)], progress=False)


@pytest.mark.parametrize("noise", [(0.1,), (2.0,), (0.1, 1.0)])
def test_it_is_as_wide_as_its_rows_say(noise: tuple[float, ...]) -> None:
    new = task(20, 400, noise)
    assert new.test is not None
    posterior = prior(len(noise)).adapt(new, **QUICK)
    missed = (posterior.predict(new.test.inputs) - new.test.target).square().mean(0).sqrt()
    sd = posterior.predict_sd(new.test.inputs).square().mean(0).sqrt()
    # 8 rows of the common noise against 80; the spread of a standard deviation over 80 and 400 rows is a 11.5th of it.
    expected = ((8 * 0.25 + 80 * missed**2) / 88).sqrt()
    torch.testing.assert_close(sd, expected, rtol=4.0 / 11.5, atol=0.0)


def test_few_rows_and_a_number_of_none_leave_the_common_noise() -> None:
    many, few = task(21, 2 * ROWS + 1, (0.1,)), task(21, 2 * ROWS, (0.1,))
    assert prior(1).adapt_settings.many_rows == 2 * ROWS
    assert prior(1).adapt(many, **QUICK).dispersion is not None
    assert prior(1).adapt(few, **QUICK).dispersion is None
    assert prior(1).adapt(many, many_rows=0, **QUICK).dispersion is None
    together = prior(1).adapt_many([many, few], **QUICK)
    assert [posterior.dispersion is None for posterior in together] == [False, True]


def test_it_is_the_ratio_of_what_is_missed_to_what_is_expected_of_rows_that_a_second_chain_has_not_seen() -> None:
    new = task(22, 60, (0.1,))
    own, common = prior(1).adapt(new, **QUICK), prior(1).adapt(new, many_rows=0, **QUICK)
    assert torch.equal(own.thetas, common.thetas)
    kept = torch.arange(60) % 5 == 2
    cut = Task(new.name, (new.train.positional[0][~kept], new.train.target[~kept]), kind="regression")
    without = prior(1).adapt(cut, many_rows=0, **QUICK)
    rows = new.train.take(torch.nonzero(kept)[:, 0])
    missed = (rows.target - without.predict(rows.inputs)) / without.predict_sd(rows.inputs)
    assert own.dispersion is not None
    torch.testing.assert_close(own.dispersion, (8 + missed.square().sum(0).double()) / 20, rtol=1e-5, atol=0.0)


def test_an_adapter_that_fits_its_rows_by_heart_is_not_surer_than_of_others() -> None:
    """Forty rows without anything to learn, and weights that can follow each: others are missed by far more."""
    lift = LiFT(
        network(1), peft.LoraConfig(r=4, target_modules=["0", "2"]), noise_scale=0.5, head="shared", beta=0.3, **SHORT
    )
    wide = lift.meta_train([task(k, ROWS, (0.5,)) for k in range(3)], progress=False)
    seen, others, sd = [], [], []
    for k in range(4):
        new = task(30 + k, 40, (0.5,))
        assert new.test is not None
        posterior = wide.adapt(new, steps=400, draws=5, learning_rate=1e-2, n_inflate=10)
        seen.append((posterior.predict(new.train.inputs) - new.train.target).square().mean())
        others.append((posterior.predict(new.test.inputs) - new.test.target).square().mean())
        sd.append(posterior.predict_sd(new.test.inputs).square().mean())
    by_heart, missed, expected = (float(torch.stack(some).mean()) for some in (seen, others, sd))
    assert by_heart < 0.5 * missed
    # 32 kept rows of four tasks and as many of the common noise: a mean square has a relative error of a sixth.
    assert abs(expected / missed - 1.0) < 3.0 / 6.0
    assert expected > 1.2 * by_heart


def test_a_second_chain_that_is_lost_leaves_the_common_noise(caplog: pytest.LogCaptureFixture) -> None:
    posterior = prior(1).adapt(task(24, 60, (0.1,)), many_rows=0, **QUICK)
    with caplog.at_level("WARNING", logger="pyro_lift"):
        set_own_noise([posterior], 2 * ROWS, lambda cut: [None] * len(cut))
    assert posterior.dispersion is None
    assert "'t24': the chain that was to say the noise" in caplog.text


def test_tasks_of_a_block_have_the_noise_that_each_has_alone_but_for_chance() -> None:
    tasks = [task(40 + k, 200, (0.1 + 0.4 * k,)) for k in range(2)]
    together = prior(1).adapt_many(tasks, **QUICK)
    for new, posterior in zip(tasks, together, strict=True):
        alone = prior(1).adapt(new, **QUICK).dispersion
        assert posterior.dispersion is not None
        assert alone is not None
        torch.testing.assert_close(posterior.dispersion, alone, rtol=0.1, atol=0.0)


def test_it_is_saved(tmp_path: Path) -> None:
    new = task(23, 60, (0.1,))
    assert new.test is not None
    posterior = prior(1).adapt(new, **QUICK)
    posterior.save_pretrained(tmp_path)
    read = TaskPosterior.from_pretrained(tmp_path, network(1))
    torch.testing.assert_close(read.predict_sd(new.test.inputs), posterior.predict_sd(new.test.inputs))


def features() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh())


def curved(seed: int, rows: int) -> Task:
    """What the features only nearly know, so that a task's few rows miss each other by more than the noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 400, 4, generator=generator)
    turned = 0.5 * torch.randn(4, 12, generator=generator)
    with torch.no_grad():
        hidden = torch.tanh(x @ (next(features().parameters()).T + turned))
    y = hidden @ torch.randn(12, 1, generator=generator) + 0.3 * torch.randn(rows + 400, 1, generator=generator)
    return Task(f"c{seed}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), kind="regression")


def of_heads() -> LiFT:
    return LiFT(features(), peft.LoraConfig(r=2, target_modules=["0"]), **SHORT)


@cache
def prior_of_heads() -> LiFTPrior:
    return of_heads().meta_train([curved(k, ROWS) for k in range(8)], progress=False)


def test_beside_heads_kept_rows_say_it_in_their_place_from_a_quarter_more_rows_on() -> None:
    assert prior_of_heads().adapt_settings.many_rows == 2 * ROWS
    new = curved(50, 60)
    own, by_heads = prior_of_heads().adapt(new, **QUICK), prior_of_heads().adapt(new, many_rows=0, **QUICK)
    kept = torch.arange(60) % 5 == 2
    cut = Task(new.name, (new.train.positional[0][~kept], new.train.target[~kept]), kind="regression")
    without = prior_of_heads().adapt(cut, many_rows=0, **QUICK)
    without.dispersion = None
    rows = new.train.take(torch.nonzero(kept)[:, 0])
    missed = (rows.target - without.predict(rows.inputs)) / without.predict_sd(rows.inputs)
    uneven = prior_of_heads().dispersion
    assert own.dispersion is not None and own.heads is not None and uneven is not None
    against = min(8.0, uneven.rows)  # few where tasks are unevenly noisy
    expected = (against + missed.square().sum(0).double()) / (against + 12)
    torch.testing.assert_close(own.dispersion, expected, rtol=1e-5, atol=0.0)
    few = prior_of_heads().adapt(curved(51, ROWS), **QUICK)
    assert by_heads.dispersion is not None and few.dispersion is not None  # what their heads say
    again = prior_of_heads().adapt(curved(51, ROWS), many_rows=0, **QUICK)
    assert again.dispersion is not None and torch.equal(few.dispersion, again.dispersion)


def test_intervals_of_many_rows_hold_what_they_say_whatever_few_rows_have_said() -> None:
    """Where tasks of few rows missed each by four times the expected square, those of many are taken for quieter."""
    prior = copy(prior_of_heads())
    prior.dispersion = Dispersion(rows=100.0, usual=(4.0,), values=(1.0,))
    held: dict[int | None, list[float]] = {None: [], 0: []}
    for k in range(6):
        new = curved(60 + k, 80)
        assert new.test is not None
        for many_rows, shares in held.items():
            posterior = prior.adapt(new, many_rows=many_rows, **QUICK)
            off = (new.test.target - posterior.predict(new.test.inputs)).abs()
            shares.append(float((off < 1.645 * posterior.predict_sd(new.test.inputs)).float().mean()))
    (mean, error), (by_heads, _) = (
        (float(torch.tensor(shares).mean()), float(torch.tensor(shares).std()) / 6**0.5) for shares in held.values()
    )
    assert abs(mean - 0.9) < 4.0 * error, held
    assert by_heads < 0.75, held


def test_a_run_of_before_asks_its_heads_alone(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "noise of many rows"}
    tasks = [curved(k, ROWS) for k in range(4)]
    for name, rules, since in (("then", then, None), ("today", RULES, 2 * ROWS)):
        run = of_heads()
        config = run_config(run.settings, run.seed, run.adapter, tasks, rules=rules)
        found = run.before_chain(tasks, Session(tmp_path / name, config=config))
        assert found.adapt.many_rows == since
