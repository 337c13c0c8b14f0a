"""How wide a regression's predictions are by what its own rows miss: leaving rows out, and the law of the factors."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy import integrate, stats
from short_runs import SHORT
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.dispersion import COUNTED, ODD, ODD_ROWS, UNKNOWN, Dispersion, left_out_squares
from pyro_lift.models.heads import scaling_of
from pyro_lift.models.value_head import choose_value_head
from pyro_lift.models.value_spread import spread_of
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.whose_heads import RULES, run_config

CONFIG = peft.LoraConfig(r=2, target_modules=["0"])


def rows(n: int, values: int = 1, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = 3.0 * torch.randn(n, features, generator=generator).double() + 2.0
    slope = torch.randn(features, values, generator=generator).double()
    return x, (40.0 + x @ slope + torch.randn(n, values, generator=generator).double()).squeeze(-1)


@pytest.mark.parametrize(("n", "values"), [(2, 1), (3, 2), (12, 2)])  # fewer rows than features, and more
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_rows_are_left_out_as_if_each_were_predicted_from_the_others(n: int, values: int, noise: float) -> None:
    x, y = rows(n, values)
    choice = choose_value_head(x, y)
    assert isinstance(choice.model.bias_sd, float) and isinstance(choice.model.noise_scale, float)
    unit = noise / choice.model.noise_scale
    m, d = choice.model.limited(scaling_of(x))
    u = torch.cat([choice.sd * unit * (x - m) / d, torch.full((n, 1), choice.model.bias_sd * unit).double()], -1)
    target = (y - y.mean(0)).reshape(n, values)
    squares = []
    for k in range(n):  # a Bayesian linear regression on the other rows
        others = [j for j in range(n) if j != k]
        precision = torch.eye(u.shape[-1]).double() + u[others].T @ u[others] / noise**2
        mean = torch.linalg.solve(precision, u[others].T @ target[others]) / noise**2
        variance = noise**2 + u[k] @ torch.linalg.solve(precision, u[k])
        squares.append((target[k] - u[k] @ mean).square() / variance)
    torch.testing.assert_close(left_out_squares(x, y, choice, noise), torch.stack(squares).mean(0), rtol=1e-8, atol=0.0)


def test_they_are_in_the_unit_in_which_predictions_are_wide() -> None:
    x, y = rows(12)
    choice = choose_value_head(x, y)
    one, other = (left_out_squares(x, y, choice, noise) * noise**2 for noise in (1.0, 5.0))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0.0)
    found, new = spread_of(x, choice, 2.0), torch.randn(3, 4).double()
    torch.testing.assert_close(found.variance(new), 4.0 * spread_of(x, choice, 1.0).variance(new), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("known", [4.0, 30.0])
def test_the_factor_is_the_harmonic_mean_under_its_posterior(known: float) -> None:
    """1 / s is gamma a priori, and a mean of N squares given s is s times chi-squared over N."""
    number, missed = 6, 1.7
    dispersion = Dispersion(known, (1.0,), (1.0,))

    def density(precision: float) -> float:
        prior = stats.gamma.pdf(precision, 0.5 * known, scale=2.0 / known)
        return float(prior * stats.chi2.pdf(number * missed * precision, number) * number * precision)

    mass = integrate.quad(density, 0.0, 50.0)[0]
    mean = integrate.quad(lambda precision: precision * density(precision), 0.0, 50.0)[0] / mass
    assert mass == pytest.approx(stats.f.pdf(missed, number, known), rel=1e-6)
    found = dispersion.of(torch.tensor([missed]), number)
    odd = (
        ODD * stats.f.pdf(missed, number, ODD_ROWS) / ((1.0 - ODD) * mass + ODD * stats.f.pdf(missed, number, ODD_ROWS))
    )
    own = (ODD_ROWS + number * missed) / (ODD_ROWS + number)
    assert float(found.factors) == pytest.approx((1.0 - odd) / mean + odd * own, rel=1e-6) and not found.odd


def test_a_task_that_is_none_of_the_others_goes_by_its_own_rows() -> None:
    alike = Dispersion(100.0, (2.0, 0.5), (1.5, 0.5))
    found = alike.of(torch.tensor([2.0, 0.5]), 20)
    torch.testing.assert_close(found.factors, torch.tensor([1.5, 0.5]).double())
    wide = alike.of(torch.tensor([200.0, 0.5]), 20)
    assert wide.odd and wide.missed == pytest.approx(100.0)
    torch.testing.assert_close(wide.factors, torch.tensor([1.5 * 2001.0 / 21.0, 0.5]).double(), rtol=1e-3, atol=0.0)
    narrow = alike.of(torch.tensor([2.0, 0.005]), 20)
    assert narrow.odd and float(narrow.factors[1]) == pytest.approx(0.5 * 1.2 / 21.0, rel=1e-2)


def test_few_rows_say_little_and_many_no_more_than_some() -> None:
    dispersion, missed = Dispersion(10.0, (1.0,), (1.0,)), torch.tensor([1.5])
    assert [float(dispersion.of(missed, n).factors) for n in (1, 2)] == pytest.approx([1.0, 1.0], rel=1e-2)
    assert dispersion.of(missed, COUNTED).factors == dispersion.of(missed, 1000 * COUNTED).factors
    nothing = dispersion.of(torch.tensor([math.nan]), 8)
    assert float(nothing.factors) == 1.0 and not nothing.odd


def test_tasks_of_other_values_or_that_nobody_could_ask() -> None:
    told = Dispersion(10.0, (1.0, 2.0), (1.0, 4.0)).of(torch.ones(3), 20)
    torch.testing.assert_close(told.factors, torch.ones(3).double())
    unknown = UNKNOWN.of(torch.tensor([0.2, 1.0]), 56)
    torch.testing.assert_close(unknown.factors, torch.tensor([(8.0 + 11.2) / 64.0, 1.0]).double(), rtol=0.1, atol=0.0)


def test_where_no_task_has_rows_to_leave_out_a_new_one_s_own_say_how_noisy_it_is() -> None:
    given = [regression(k, 0.3, 2) for k in range(10)]
    prior = LiFT(network(), CONFIG, **SHORT).meta_train(given, progress=False)
    assert prior.dispersion == UNKNOWN
    given_noise = LiFT(network(), CONFIG, noise_scale=0.5, **SHORT).meta_train(given, progress=False)
    assert given_noise.dispersion is None


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh())


def regression(k: int, noise: float, n: int = 24, unit: float = 1.0) -> Task:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(n, 5, generator=generator)
    y = x @ torch.randn(5, generator=generator) + noise * torch.randn(n, generator=generator)
    return Task(f"t{k}", (x, unit * y), "regression")


UNLIKE = [regression(k, 0.05 if k % 2 else 2.0) for k in range(10)]


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(network(), CONFIG, **SHORT).meta_train(UNLIKE, progress=False)


def test_predictions_are_as_wide_as_the_task_s_own_rows_say(prior: LiFTPrior, tmp_path: Path) -> None:
    assert prior.dispersion is not None and prior.dispersion.rows < 100.0
    new = torch.randn(40, 5)
    by_heads: dict[str, Any] = {"seed": 0, "many_rows": 0}  # of so many rows, those that are kept say it else
    quiet, noisy = prior.adapt_many([regression(31, 0.05, 48), regression(32, 2.0, 48)], **by_heads)
    assert float(noisy.predict_sd(new).mean()) > 4.0 * float(quiet.predict_sd(new).mean())
    alike = LiFTPrior(prior.adapter, prior.mixture, prior.settings, prior.adapt_settings, prior.second_moment)
    (one,) = alike.adapt_many([regression(31, 0.05, 48)], **by_heads)
    assert one.dispersion is None and float(one.predict_sd(new).mean()) > 2.0 * float(quiet.predict_sd(new).mean())
    folder = quiet.save_pretrained(tmp_path / "posterior")
    again = TaskPosterior.from_pretrained(folder, network())
    assert torch.equal(again.predict_sd(new), quiet.predict_sd(new))
    saved = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), network())
    assert saved.dispersion == prior.dispersion
    _, same = saved.adapt_many([regression(31, 0.05, 48), regression(32, 2.0, 48)], **by_heads)
    assert torch.equal(same.predict_sd(new), noisy.predict_sd(new))


def test_a_task_of_another_width_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    alike = LiFT(network(), CONFIG, **SHORT).meta_train([regression(k, 0.3) for k in range(10)], progress=False)
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        alike.adapt(regression(40, 0.3, unit=20.0), seed=0)
        assert "'t40'" in caplog.text and "further from what its other rows predict" in caplog.text
        caplog.clear()
        alike.adapt(regression(41, 0.3), seed=0)
        assert "other rows predict" not in caplog.text
        x, y = regression(42, 0.3).train.inputs[""], torch.full((24,), 2.0)
        level = alike.adapt(Task("level", (x, y), "regression"), seed=0)
        assert "nearer to what its other rows predict" in caplog.text
        assert bool(torch.isfinite(level.predict_sd(x)).all()) and float(level.predict_sd(x).min()) > 0.0


@pytest.mark.parametrize("values", [[0.0, [1.0], [1.0]], [8.0, [1.0], [1.0, 2.0]], [8.0, [1.0]], [8.0, 1.0, 1.0], "8"])
def test_a_dispersion_that_was_never_written_is_refused(prior: LiFTPrior, tmp_path: Path, values: object) -> None:
    path = prior.save_pretrained(tmp_path / "prior") / "config.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "dispersion": values})))
    with pytest.raises(DamagedError, match="key 'dispersion'"):
        LiFTPrior.from_pretrained(path.parent, network())


def test_a_run_of_before_goes_on_with_tasks_that_are_alike(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "noise"}
    found = []
    for rules in (then, RULES):
        lift = LiFT(network(), CONFIG, **SHORT)
        config = run_config(lift.settings, lift.seed, lift.adapter, UNLIKE, rules=rules)
        session = Session(tmp_path / str(len(rules)), config=config)
        (prior,) = lift.meta_train_many(UNLIKE, [1], progress=False, session=session, crossed=True)
        found.append(prior.dispersion is None)
    assert found == [True, False]
