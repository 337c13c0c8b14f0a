"""What regressions say of heads of few rows at phi: the density by which they are asked, and what is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from short_runs import SHORT
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.few_values import MOVES_FROM, FewValues
from pyro_lift.models.heads import UsualPrior, scaling_of
from pyro_lift.models.value_head import few_value_head
from pyro_lift.models.value_spread import spread_of
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.few_values import BIASES, VALUES, _asked, _drawn, _Read, _ridges, _Unseen
from pyro_lift.tuning.whose_heads import RULES, run_config

FEATURES, NOISE, SPREAD = 6, 0.5, 2.0
UNIT = torch.ones(FEATURES, dtype=torch.float64)


def made(seed: int, n: int, value: float, bias: float, around: Tensor | None = None) -> _Read:
    """A task of the model itself: features of standard deviation one, slopes and a level around a head."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    slope = value / math.sqrt(FEATURES) * torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    level = bias * torch.randn((), generator=generator, dtype=torch.float64)
    y = x @ slope + level + NOISE * torch.randn(n, generator=generator, dtype=torch.float64)
    if around is not None:
        y = y + x @ around[0, :-1] + around[0, -1]
    return _Read(x, y.unsqueeze(-1))


@pytest.mark.parametrize("number", [1, 3])
def test_rows_are_told_by_the_normal_density_given_those_that_are_known(number: int) -> None:
    x, y = made(0, 9, 1.0, 1.0)
    found = _drawn(x, y, number, UNIT, (SPREAD, NOISE), torch.Generator().manual_seed(1)).view(len(VALUES), -1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    own, other = order[:number], order[number:]
    scaling = scaling_of(x[own])
    sd = torch.where(x[own].std(0, correction=0) > 0.0, scaling.sd, UNIT).maximum(UNIT) if number > 1 else UNIT
    z = (x - x[own].mean(0)) / sd
    for i, j in ((0, 0), (4, 5), (len(VALUES) - 1, 2)):
        value, bias = SPREAD * VALUES[i], SPREAD * BIASES[j]
        prior = value**2 / FEATURES * z @ z.T + bias**2 + NOISE**2 * torch.eye(9, dtype=torch.float64)
        told = []
        for m in other.tolist():
            a, b, c = prior[own][:, own], prior[m, own], prior[m, m]
            mean = b @ torch.linalg.solve(a, y[own, 0])
            variance = c - b @ torch.linalg.solve(a, b)
            normal = torch.distributions.Normal(mean, variance.sqrt())
            told.append(normal.log_prob(y[m, 0]) + 0.5 * math.log(2.0 * math.pi))
        torch.testing.assert_close(found[i, j], torch.stack(told).mean(), rtol=1e-6, atol=1e-6)


def test_tasks_find_the_prior_that_made_them_and_the_head_that_they_are_around() -> None:
    around = torch.tensor([[1.0, -2.0, 0.5, 0.0, 0.0, 1.0, 30.0]], dtype=torch.float64)
    halves = [[made(100 * k + i, 24, 2.0, 1.0, around) for i in range(16)] for k in range(2)]
    strength, priors = _asked([_Unseen(one, two, UNIT) for one, two in (halves, halves[::-1])], NOISE)
    head = _ridges([read for half in halves for read in half], UNIT)[strength]
    torch.testing.assert_close(head, around, rtol=0.0, atol=4.0 * math.hypot(2.0 / math.sqrt(FEATURES), 1.0) / 32**0.5)
    assert [rows for rows, _ in priors] == [1, 2, 4, 8, 12]
    for _, (value, bias) in priors:
        assert 1.2 < value < 3.3 and 0.2 < bias < 1.7  # a step or two of the grids to either side
    nothing = [[_Read(read.x, torch.zeros_like(read.y)) for read in half] for half in halves]
    assert _asked([_Unseen(one, two, UNIT) for one, two in (nothing, nothing[::-1])], NOISE) == (0, ())
    assert _asked([_Unseen(halves[0][:2], halves[1][:1], UNIT)], NOISE) == (0, ())


def test_where_tasks_have_nothing_in_common_their_head_is_their_mean_value() -> None:
    halves = [[made(100 * k + i, 24, 4.0, 0.5) for i in range(8)] for k in range(2)]
    halves = [[_Read(x, y + 7.0) for x, y in half] for half in halves]
    strength, _ = _asked([_Unseen(one, two, UNIT) for one, two in (halves, halves[::-1])], NOISE)
    head = _ridges([read for half in halves for read in half], UNIT)[strength]
    assert float(head[0, :-1].norm()) < 1.0 and abs(float(head[0, -1]) - 7.0) < 0.7


def test_a_head_of_one_row_is_as_far_off_as_the_prior_leaves_open() -> None:
    few = FewValues(torch.zeros(1, FEATURES + 1), UNIT.float(), ((1, UsualPrior(3.0, 2.0)), (4, UsualPrior(3.0, 2.0))))
    (x, y), new = made(0, 1, 3.0, 2.0), made(1, 50, 3.0, 2.0).x
    choice = few_value_head(x, y, few, NOISE)
    assert choice is not None and few_value_head(new[:5], new[:5, :1], few, NOISE) is None
    found = spread_of(x, choice, NOISE).variance(new)
    left = 4.0 * NOISE**2 / (4.0 + NOISE**2)
    torch.testing.assert_close(found, left + 9.0 / FEATURES * (new - x).square().sum(-1), rtol=1e-5, atol=0.0)


def test_a_task_that_is_none_of_these_goes_by_its_own_rows() -> None:
    few = FewValues(torch.zeros(1, FEATURES + 1), UNIT.float(), ((1, UsualPrior(1.0, 0.5)), (4, UsualPrior(1.0, 0.5))))
    told = [few_value_head(*made(seed, 1 + seed % 4, 1.0, 0.5), few, NOISE) is not None for seed in range(200)]
    assert all(told)  # one in fifty would see one that is called odd
    for n in (1, 3):
        x, y = made(0, n, 1.0, 0.5)
        assert few_value_head(x, y + 20.0, few, NOISE) is None


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12), torch.nn.Tanh())


CONFIG = peft.LoraConfig(r=2, target_modules=["0", "2"])


def task(seed: int, n: int) -> Task:
    """Maps near to one another, of twenty rows and a few."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 60, 3, generator=generator)
    slope = torch.tensor([2.0, -1.0, 0.5]) + 0.2 * torch.randn(3, generator=generator)
    y = 50.0 + 10.0 * (x @ slope + 0.1 * torch.randn(n + 60, generator=generator))
    return Task(f"t{seed}", (x[:n], y[:n]), "regression", test=(x[n:], y[n:]))


def density(prior: LiFTPrior, tasks: list[Task]) -> Tensor:
    told = []
    for posterior, each in zip(prior.adapt_many(tasks, seed=0), tasks, strict=True):
        assert each.test is not None
        normal = torch.distributions.Normal(posterior.predict(each.test), posterior.predict_sd(each.test))
        told.append(normal.log_prob(each.test.target).mean())
    return torch.stack(told)


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(network(), CONFIG, **SHORT).meta_train([task(k, 20) for k in range(12)], progress=False)


def test_new_tasks_of_few_rows_know_what_the_others_have_in_common(prior: LiFTPrior) -> None:
    mean = prior.head_mean
    assert mean is not None and mean.few_values is not None
    new = [task(100 + k, 2) for k in range(8)]
    found = density(prior, new)
    prior.head_mean = mean._replace(few_values=None)
    before = density(prior, new)
    prior.head_mean = mean
    gain = found - before
    assert float(gain.mean()) > 0.2 and float(gain.mean()) > 3.0 * float(gain.std()) / len(new) ** 0.5
    (posterior,) = prior.adapt_many(new[:1], seed=0)
    phi = prior.mixture.get().mean
    assert all(torch.equal(theta, phi.to(theta)) for theta in posterior.thetas)
    assert not torch.equal(prior.adapt(task(100, MOVES_FROM), seed=0).thetas[-1], phi)


def test_it_is_saved_with_the_prior(prior: LiFTPrior, tmp_path: Path) -> None:
    new = task(100, 3)
    loaded = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path), network())
    assert new.test is not None
    for posteriors in zip(*(each.adapt_many([new], seed=0) for each in (loaded, prior)), strict=True):
        one, other = (posterior.predict_sd(new.test) for posterior in posteriors)
        torch.testing.assert_close(one, other)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, match in (([], "do not belong together"), ([[1, 2.0]], "two standard deviations")):
        broken = {name: value for name, value in config.items() if name != "sha256"} | {"head_few_values": wrong}
        (tmp_path / "config.json").write_text(json.dumps(sealed(broken)))
        with pytest.raises(DamagedError, match=match):
            LiFTPrior.from_pretrained(tmp_path, network())


def test_a_run_of_before_goes_on_without(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "values by rows"}
    found = []
    for rules in (then, RULES):
        lift, tasks = LiFT(network(), CONFIG, **SHORT), [task(k, 20) for k in range(8)]
        config = run_config(lift.settings, lift.seed, lift.adapter, tasks, rules=rules)
        session = Session(tmp_path / str(len(rules)), config=config)
        (prior,) = lift.meta_train_many(tasks, [1], progress=False, session=session)
        assert prior.head_mean is not None
        found.append(prior.head_mean.few_values is not None)
    assert found == [False, True]
