"""Regressions of few rows go by all tasks: by the ridge that these say, and by how features vary over their rows."""

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
from pyro_lift.models.head_problem import HeadModel, apply_head
from pyro_lift.models.heads import solve_head
from pyro_lift.models.value_head import FEW, RATIO_WIDTHS, choose_value_head
from pyro_lift.models.value_spread import spread_of
from pyro_lift.support.archive import sealed
from pyro_lift.tuning.whose_heads import RULES, run_config

FEATURES = 5
CONFIG = peft.LoraConfig(r=2, target_modules=["0", "2"])


def rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(n, FEATURES, generator=generator).double() + 2.0
    slope = torch.randn(FEATURES, generator=generator).double()
    return x, 40.0 + 10.0 * x @ slope + 0.3 * torch.randn(n, generator=generator).double()


SD = torch.full((FEATURES,), 0.1, dtype=torch.float64)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 12), torch.nn.ReLU())


def tasks(number: int, n: int, seed: int = 0) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k in range(number):
        x, slope = torch.randn(n + 60, 3, generator=generator), torch.randn(3, generator=generator)
        y = 20.0 * torch.tanh(x @ slope) + 100.0 + torch.randn(n + 60, generator=generator)
        made.append(Task(f"s{seed}-{k}", (x[:n], y[:n]), "regression", test=(x[n:], y[n:])))
    return made


@pytest.mark.parametrize("width", [2.0, 8.0, 5.66])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("n", [1, 3, FEW])
def test_few_rows_have_the_ratio_of_all_tasks_and_their_spread(width: float, around: bool, n: int) -> None:
    x, y = rows(n)
    head = torch.zeros(1, FEATURES + 1, dtype=torch.float64) if around else None
    choice = choose_value_head(x, y, around=head, width=width, feature_sd=SD, by_all=True)
    usual = min(RATIO_WIDTHS, key=lambda w: abs(math.log(w / width)))
    assert choice.sd / choice.model.noise_scale == pytest.approx(usual / math.sqrt(FEATURES))
    assert choice.model.least_spread is not None and choice.model.level_spread
    torch.testing.assert_close(choice.model.least_spread, SD)
    assert math.isnan(choice.score) == (n == 1)


def test_more_rows_and_priors_of_before_choose_by_their_own() -> None:
    x, y = rows(FEW + 1)
    for n, by_all in ((FEW + 1, True), (6, False)):
        now = choose_value_head(x[:n], y[:n], width=0.1, feature_sd=SD, by_all=by_all)
        before = choose_value_head(x[:n], y[:n], width=0.1, feature_sd=SD)
        assert now.sd == before.sd and now.score == before.score and not now.model.level_spread


def test_a_score_is_that_of_the_rows_left_out_under_the_ratio_of_all_tasks() -> None:
    x, y = rows(6)
    choice = choose_value_head(x, y, width=4.0, feature_sd=SD, by_all=True)
    squares = []
    for k in range(6):
        kept = torch.arange(6) != k
        weight = kept.double()
        model = HeadModel(1, "regression", bias_sd=choice.model.bias_sd, centred=True, least_spread=SD)
        model = model._replace(noise_scale=choice.model.noise_scale)
        # Features stand at the mean of all rows, as where the choice is made; the targets' at that of those kept.
        head = solve_head(x - x.mean(0), y, model, prior_sd=choice.sd, weight=weight).head
        squares.append(float((apply_head((x - x.mean(0))[k : k + 1], head).squeeze() - y[k]).square()))
    expected = -0.5 * (math.log(2.0 * math.pi * sum(squares) / 6) + 1.0)
    assert choice.score == pytest.approx(expected, abs=0.3)


def test_a_feature_that_is_level_on_the_rows_is_as_wide_as_over_all_tasks() -> None:
    x, y = rows(4)
    x[:, 0] = 2.0
    choice = choose_value_head(x, y, width=4.0, feature_sd=SD, by_all=True)
    other = x[:1].clone()
    other[0, 0] += 0.1  # one standard deviation over all tasks
    spread = spread_of(x, choice, 1.0)
    added = float(spread.variance(other) - spread.variance(x[:1]))
    assert added == pytest.approx(16.0 / FEATURES, rel=1e-4)  # s squared: nothing is known of that slope
    before = spread_of(x, choice._replace(model=choice.model._replace(level_spread=False)), 1.0)
    assert float(before.variance(other) - before.variance(x[:1])) == pytest.approx(0.01 * 16.0 / FEATURES, rel=1e-4)


def test_features_that_never_vary_are_no_error() -> None:
    x, y = rows(3)
    x[:, 0] = 1.0
    for sd in (torch.tensor([0.0, 0.1, 0.1, 0.1, 0.1]).double(), torch.zeros(FEATURES).double()):
        choice = choose_value_head(x, y, width=4.0, feature_sd=sd, by_all=True)
        assert torch.isfinite(solve_head(x, y, choice.model, prior_sd=choice.sd).head).all()
        assert torch.isfinite(spread_of(x, choice, 1.0).variance(x)).all()


def test_tasks_of_one_row_and_more_know_what_they_do_not(tmp_path: Path) -> None:
    prior = LiFT(network(), CONFIG, **SHORT).meta_train(tasks(10, 24), progress=False)
    assert prior.head_mean is not None and prior.head_mean.rows == 24
    for n in (1, 2, 4):
        made = tasks(16, n, seed=5)
        told = []
        for task, posterior in zip(made, prior.adapt_many(made, seed=0), strict=True):
            assert task.test is not None
            missed = posterior.predict(task.test) - task.test.target
            told.append((missed / posterior.predict_sd(task.test)).square().mean())
        assert 0.2 < float(torch.stack(told).median()) < 3.0  # of one row it was 12, of two 3.3
    new = tasks(1, 1, seed=7)[0]
    assert new.test is not None
    loaded = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path), network())
    assert loaded.head_mean is not None and loaded.head_mean.rows == 24
    torch.testing.assert_close(
        loaded.adapt(new, seed=0).predict_sd(new.test), prior.adapt(new, seed=0).predict_sd(new.test)
    )
    prior.head_mean = prior.head_mean._replace(few_values=None)  # which says it by number (test_values_by_rows.py)
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = {name: value for name, value in config.items() if name not in ("head_rows", "sha256")}
    (tmp_path / "config.json").write_text(json.dumps(sealed(before)))
    old = LiFTPrior.from_pretrained(tmp_path, network())  # a folder of before: by its own row alone
    assert old.head_mean is not None and old.head_mean.rows == 0
    wide = prior.adapt(new, seed=0).predict_sd(new.test).mean()
    assert old.adapt(new, seed=0).predict_sd(new.test).mean() < 0.7 * wide


def test_a_run_of_before_goes_on_with_each_task_going_by_its_own_rows(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "few values"}
    found = []
    for rules in (then, RULES):
        lift, made = LiFT(network(), CONFIG, **SHORT), tasks(8, 12)
        config = run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        mean = lift.before_chain(made, Session(tmp_path / str(len(rules)), config=config)).run.head_mean
        assert mean is not None
        found.append((mean.head.rows, {head.rows for _, head in mean.halves}))
    assert found == [(0, {0}), (12, {12})]
