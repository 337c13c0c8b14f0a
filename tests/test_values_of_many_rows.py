"""New regressions of many more rows have heads of their own in place of the layer that says a network's value."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.new_tasks.adaptation import Adaptation
from pyro_lift.support.archive import sealed
from pyro_lift.tuning.whose_heads import RULES, run_config

FEATURES, ROWS, NOISE = 16, 12, 0.3
SHORT: dict[str, Any] = {"sgd_steps": 10, "burn_in": 5, "samples": 10, "sgd_learning_rate": 1e-3, "seed": 0}
QUICK: dict[str, Any] = {"steps": 20, "draws": 10}


def network(values: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, FEATURES), nn.Tanh(), nn.Linear(FEATURES, values))


def task(seed: int, rows: int, values: int = 1, noise: float = NOISE) -> Task:
    """Rows of values that are a linear map of the network's features, another one in each task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 500, 6, generator=generator)
    with torch.no_grad():
        y = network()[:2](x) @ torch.randn(FEATURES, values, generator=generator)
    y = y + noise * torch.randn(y.shape, generator=generator)
    return Task(f"t{seed}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), kind="regression")


def lift(values: int = 1, **settings: Any) -> LiFT:
    config = peft.LoraConfig(r=1, target_modules=["0", "2"])
    return LiFT(network(values), config, **{**SHORT, "noise_scale": NOISE, **settings})  # given: the layer stays


@cache
def prior(values: int = 1) -> LiFTPrior:
    return lift(values).meta_train([task(k, ROWS, values) for k in range(6)], progress=False)


def misses(posterior: TaskPosterior, of: Task) -> Tensor:
    assert of.test is not None
    return (posterior.predict(of.test) - of.test.target) / posterior.predict_sd(of.test)


@pytest.mark.parametrize("values", [1, 2])
def test_from_twice_the_rows_on_a_task_has_a_ridge_head_around_the_layer(
    values: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert prior(values).adapt_settings.many_rows == 2 * ROWS
    with caplog.at_level(logging.INFO, "pyro_lift"):
        some = [prior(values).adapt(task(10, rows, values), **QUICK) for rows in (2 * ROWS, 2 * ROWS + 1)]
    assert some[0].heads is None and some[1].heads is not None and "a head of its own in place" in caplog.text
    assert some[1].heads.shape == (10, values, FEATURES + 1) and some[1].head_spread is not None
    again = prior(values).adapt(task(10, 2 * ROWS, values), many_rows=0, **QUICK)
    assert torch.equal(again.thetas, some[0].thetas)


def test_new_tasks_are_predicted_better_and_about_as_wide_as_they_are_wrong() -> None:
    new = [task(k, 6 * ROWS) for k in range(20, 40)]

    def scores(**options: Any) -> tuple[Tensor, Tensor]:
        posteriors = prior().adapt_many(new, seed=0, **QUICK, **options)
        z = torch.stack([misses(p, t)[:, 0] for p, t in zip(posteriors, new, strict=True)])
        tests = [t.test for t in new if t.test is not None]
        sd = torch.stack([p.predict_sd(rows)[:, 0] for p, rows in zip(posteriors, tests, strict=True)])
        return (0.5 * z.square() + sd.log()).mean(1), z

    (heads, z), (layer, _) = scores(), scores(many_rows=0)
    gain = layer - heads
    assert float(gain.mean()) > 3.0 * float(gain.std()) / len(gain) ** 0.5
    held = (z.abs() < 1.645).double().mean(1)
    assert abs(float(held.mean()) - 0.9) < 0.03 + 3.0 * float(held.std()) / len(held) ** 0.5


def test_noise_of_its_own_is_found_by_the_chain_with_heads() -> None:
    quiet, noisy = (prior().adapt(task(50, 6 * ROWS, noise=noise), **QUICK) for noise in (NOISE, 10 * NOISE))
    assert quiet.dispersion is not None and noisy.dispersion is not None
    assert float(noisy.dispersion) > 20.0 * float(quiet.dispersion)


def test_their_widths_do_not_begin_at_the_noise_of_a_layer_that_misses_rows_by_more() -> None:
    of_layer = lift(noise_scale=10 * NOISE).meta_train([task(k, ROWS) for k in range(6)], progress=False)
    new = [task(k, 4 * ROWS) for k in range(100, 110)]
    posteriors = of_layer.adapt_many(new, seed=0, **QUICK)
    held = torch.stack([(misses(p, t).abs() < 1.645).double().mean() for p, t in zip(posteriors, new, strict=True)])
    assert abs(float(held.mean()) - 0.9) < 0.05 + 3.0 * float(held.std()) / len(held) ** 0.5  # else all of them


def test_tasks_of_a_block_have_them_too() -> None:
    new = [task(60, 6 * ROWS), task(61, ROWS), task(62, 4 * ROWS)]
    together = prior().adapt_many(new, block_size=3, seed=0, **QUICK)
    assert [posterior.heads is None for posterior in together] == [False, True, False]
    for posterior, one in zip(together, new, strict=True):
        alone = misses(prior().adapt(one, seed=0, **QUICK), one).square().mean()
        assert float(misses(posterior, one).square().mean()) == pytest.approx(float(alone), rel=0.2)


@pytest.mark.parametrize("settings", [{"head": "shared"}, {"many_rows": 0}], ids=str)
def test_they_can_be_left_out(settings: dict[str, Any]) -> None:
    of_run = {name: value for name, value in settings.items() if name == "head"}
    made = lift(**of_run).meta_train([task(k, ROWS) for k in range(4)], progress=False) if of_run else prior()
    options = {} if of_run else settings
    assert made.adapt(task(70, 6 * ROWS), **QUICK, **options).heads is None


def test_a_task_whose_heads_are_lost_keeps_the_layer_and_its_own_noise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Adaptation._run

    def lost(self: Adaptation, *args: Any) -> Any:
        if self.adapter.before_head is not None:
            raise DivergedError("far away", 3, ("t80",))
        return run(self, *args)

    monkeypatch.setattr(Adaptation, "_run", lost)
    posterior = prior().adapt(task(80, 6 * ROWS), **QUICK)
    assert posterior.heads is None and posterior.dispersion is not None
    assert "many_rows=0" in caplog.text and "far away" in caplog.text


def test_it_is_saved_and_a_prior_of_before_predicts_as_it_did(tmp_path: Path) -> None:
    new = task(90, 6 * ROWS)
    assert new.test is not None
    posterior = prior().adapt(new, **QUICK)
    prior().save_pretrained(tmp_path / "prior")
    posterior.save_pretrained(tmp_path / "posterior")
    read = LiFTPrior.from_pretrained(tmp_path / "prior", network())
    for again in (read.adapt(new, **QUICK), TaskPosterior.from_pretrained(tmp_path / "posterior", network())):
        assert torch.equal(again.predict(new.test), posterior.predict(new.test))
        assert torch.equal(again.predict_sd(new.test), posterior.predict_sd(new.test))
    written = tmp_path / "prior" / "config.json"
    config = json.loads(written.read_text())
    written.write_text(json.dumps(sealed({k: v for k, v in config.items() if k not in ("value_heads", "sha256")})))
    before = LiFTPrior.from_pretrained(tmp_path / "prior", network())
    assert not before.value_heads and before.adapt(new, **QUICK).heads is None


def test_a_run_of_before_goes_on_without(tmp_path: Path) -> None:
    then, tasks = {name: rule for name, rule in RULES.items() if name != "value layer"}, [task(0, ROWS)]
    for name, rules, has in (("then", then, False), ("today", RULES, True)):
        run = lift()
        config = run_config(run.settings, run.seed, run.adapter, tasks, rules=rules)
        session = Session(tmp_path / name, config=config)
        (made,) = run.meta_train_many(tasks, [1], session=session, progress=False)
        assert made.value_heads is has and (made.adapt(task(9, 6 * ROWS), **QUICK).heads is not None) is has
