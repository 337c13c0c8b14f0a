"""New tasks of many more rows have heads of their own beside the classes that a network has itself."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.adaptation.failures import LostTasksError
from pyro_lift.inference.adaptation.tempered_rows import TemperedRows
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.head_choice import choose_head
from pyro_lift.models.head_problem import HeadModel
from pyro_lift.models.heads import scaling_of
from pyro_lift.models.observation import network_output
from pyro_lift.new_tasks.adaptation import Adaptation
from pyro_lift.new_tasks.heads_beside_layer import draws_of_heads, many_rows
from pyro_lift.settings import AdaptSettings
from pyro_lift.tuning.whose_heads import RULES, run_config

FEATURES, CLASSES, ROWS = 16, 4, 12
SHORT: dict[str, Any] = {"sgd_steps": 10, "burn_in": 5, "samples": 10, "sgd_learning_rate": 1e-3, "seed": 0}
QUICK: dict[str, Any] = {"steps": 20, "draws": 10}


def network(classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, FEATURES), nn.Tanh(), nn.Linear(FEATURES, classes))


def task(seed: int, rows: int, classes: int = CLASSES) -> Task:
    """Rows of classes that are a linear map of the network's features, another one in each task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 500, 6, generator=generator)
    weight = 2.0 * torch.randn(FEATURES, classes, generator=generator)
    with torch.no_grad():
        y = (network()[:2](x) @ weight).argmax(-1)
    return Task(f"t{seed}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), num_classes=classes)


def lift(**settings: Any) -> LiFT:
    return LiFT(network(), peft.LoraConfig(r=1, target_modules=["0", "2"]), **SHORT, **settings)


@cache
def prior() -> LiFTPrior:
    return lift().meta_train([task(k, ROWS) for k in range(3)], progress=False)  # few enough to keep the layer


def predicted(posterior: TaskPosterior, of: Task) -> Tensor:
    assert of.test is not None
    return posterior.predict(of.test.inputs, calibrated=False)


def test_the_share_of_heads_rises_from_twice_the_rows_on() -> None:
    tasks = [task(k, rows) for k, rows in enumerate([10, 12, 40])]
    assert many_rows(tasks) == 24
    shares = [draws_of_heads(rows, 24, 10) for rows in (0, 1, 24, 25, 32, 48, 96, 240, 10**6)]
    assert shares == [0, 0, 0, 0, 2, 5, 8, 9, 9]  # 1 - 24 / n; one stays
    assert draws_of_heads(10**6, 0, 10) == 0 and draws_of_heads(10**6, 24, 1) == 0


def test_a_run_finds_it_and_what_is_given_stays() -> None:
    assert prior().adapt_settings.many_rows == 2 * ROWS
    given = lift(adapt=AdaptSettings(many_rows=7)).meta_train([task(k, ROWS) for k in range(3)], progress=False)
    assert given.adapt_settings.many_rows == 7
    heads = lift(head_scale=1.0).meta_train([task(k, ROWS) for k in range(3)], progress=False)
    assert heads.adapt_settings.many_rows is None  # they have heads for any number of rows


def test_a_run_of_before_goes_on_without(tmp_path: Path) -> None:
    then, tasks = {name: rule for name, rule in RULES.items() if name != "heads of many rows"}, [task(0, ROWS)]
    for name, rules, since in (("then", then, None), ("today", RULES, 2 * ROWS)):
        run = lift()
        config = run_config(run.settings, run.seed, run.adapter, tasks, rules=rules)
        found = run.before_chain(tasks, Session(tmp_path / name, config=config))
        assert found.adapt.many_rows == since


def test_draws_of_the_layer_say_what_the_network_says_and_those_of_heads_what_a_head_around_it_says() -> None:
    new = task(10, 6 * ROWS)  # two thirds of the draws
    mixed, layer = prior().adapt(new, **QUICK), prior().adapt(new, many_rows=0, **QUICK)
    assert layer.heads is None and mixed.heads is not None and mixed.heads.shape == (10, CLASSES, FEATURES + 1)
    assert torch.equal(mixed.thetas[:3], layer.thetas[[2, 5, 9]])
    for mine, whole in zip(range(3), (2, 5, 9), strict=True):
        pair = [p.of_draws(slice(k, k + 1)) for p, k in ((mixed, mine), (layer, whole))]
        torch.testing.assert_close(*[predicted(p, new) for p in pair], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.heads[mine], merged(layer.thetas[whole]), rtol=1e-4, atol=1e-5)


def merged(theta: Tensor) -> Tensor:
    """The class layer's weights and biases, its LoRA multiplied out and added by hand."""
    down, up = (x for name, x in prior().adapter.bind(theta).items() if ".2." in name)
    plain = network()[2]
    assert isinstance(plain, nn.Linear)
    alpha = peft.LoraConfig().lora_alpha
    return torch.cat([plain.weight.detach() + alpha * up @ down, plain.bias.detach().unsqueeze(-1)], -1)


def test_heads_are_modes_around_the_layer_at_phi() -> None:
    new = task(11, 6 * ROWS)
    posterior = prior().adapt(new, **QUICK)
    assert posterior.heads is not None
    around, rows = merged(prior().mixture.get().mean.reshape(-1)), new.train
    theta, head = posterior.thetas[-1], posterior.heads[-1].double()
    found = network_output(posterior.adapter, rows, theta)
    start = network_output(posterior.adapter, rows, prior().mixture.get().mean.reshape(-1))
    sds = [choose_head(start, rows.target, CLASSES, around=at).sd for at in (around, None)]

    def slope(sd: float, at: Tensor | None) -> float:
        """Size of the gradient of the log posterior at the head, over that at the centre of its prior."""
        model = HeadModel(CLASSES, around=at)
        sizes = []
        for h in (head, around.double() if at is not None else torch.zeros_like(head)):
            scaling = scaling_of(found)
            z = scaling.apply(found.double())
            w = torch.cat([h[:, :-1] * scaling.sd, (h[:, -1] + h[:, :-1] @ scaling.mean).unsqueeze(-1)], -1)
            w = w.detach().requires_grad_()
            centre = torch.zeros_like(w)
            if at is not None:
                a = around.double()
                centre = torch.cat([a[:, :-1] * scaling.sd, (a[:, -1] + a[:, :-1] @ scaling.mean).unsqueeze(-1)], -1)
            logits = z @ w[:, :-1].mT + w[:, -1]
            prior_sd = torch.full_like(w, sd)
            prior_sd[:, -1] = model.bias_sd
            loss = torch.nn.functional.cross_entropy(logits, rows.target, reduction="sum")
            loss = loss + 0.5 * ((w - centre) / prior_sd).square().sum()
            (gradient,) = torch.autograd.grad(loss, w)
            sizes.append(float((gradient * prior_sd).norm()))
        return sizes[0] / sizes[1]

    assert min(slope(sds[0], around), slope(sds[1], None)) < 1e-3  # float32 of the head


def test_many_more_rows_are_predicted_better_where_the_adapter_is_too_small() -> None:
    gains = []
    for seed in range(20, 26):
        new = task(seed, 300)
        assert new.test is not None
        both = predicted(prior().adapt(new, **QUICK), new)
        layer = predicted(prior().adapt(new, many_rows=0, **QUICK), new)
        gains.append(nll(layer, new.test.target) - nll(both, new.test.target))
    found = torch.tensor(gains)
    assert float(found.mean()) > 4.0 * float(found.std()) / len(found) ** 0.5 + 0.2


def test_tasks_together_have_what_they_have_alone_and_others_are_as_they_were() -> None:
    tasks = [task(30, 6 * ROWS), task(31, ROWS), task(32, 5 * ROWS)]
    apart = prior().adapt_many(tasks, block_size=1, **QUICK)
    for posterior, new in zip(apart, tasks, strict=True):
        alone = prior().adapt(new, **QUICK)
        assert torch.equal(alone.thetas, posterior.thetas)
        assert (alone.heads is None) == (posterior.heads is None)
        assert alone.heads is None or torch.equal(alone.heads, torch.as_tensor(posterior.heads))
    together = prior().adapt_many(tasks, block_size=3, **QUICK)
    assert [p.heads is None for p in together] == [False, True, False]
    plain = prior().adapt_many(tasks, block_size=3, many_rows=0, **QUICK)
    assert torch.equal(together[1].thetas, plain[1].thetas)
    for posterior, new in zip(together, tasks, strict=True):
        assert torch.isfinite(predicted(posterior, new)).all()


def test_the_network_is_read_apart_once_for_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    views, reading = list[RandomAdapter](), RandomAdapter.reading

    def read(self: RandomAdapter, before_head: Any) -> RandomAdapter:
        views.append(reading(self, before_head))
        return views[-1]

    monkeypatch.setattr(RandomAdapter, "reading", read)
    posteriors = prior().adapt_many([task(k, 6 * ROWS) for k in range(33, 37)], block_size=2, **QUICK)
    assert len(views) == 1 and all(posterior.heads is not None for posterior in posteriors)


def texts(seed: int, rows: int) -> Task:
    """Texts of eight tokens whose class is their second one's."""
    ids = torch.randint(3, 30, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return Task(f"text{seed}", ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1] % CLASSES))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_transformers_model_has_them_before_its_own_layer_too(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, vocab_size=30, num_labels=CLASSES, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    lift = LiFT(network, peft.LoraConfig(r=1, target_modules=["query", "value"]), **SHORT)
    found = lift.meta_train([texts(k, ROWS) for k in range(3)], progress=False)
    assert found.adapt_settings.many_rows == 2 * ROWS  # the network's classes stay
    new = texts(9, 6 * ROWS)
    mixed, layer = found.adapt(new, **QUICK), found.adapt(new, many_rows=0, **QUICK)
    assert layer.heads is None and mixed.heads is not None and mixed.heads.shape == (10, CLASSES, 17)
    pair = [
        p.of_draws(slice(k, k + 1)).predict(new.train.inputs, calibrated=False) for p, k in ((mixed, 0), (layer, 2))
    ]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    mixed.save_pretrained(tmp_path)
    again = TaskPosterior.from_pretrained(tmp_path, network)
    torch.testing.assert_close(again.predict(new.train.inputs), mixed.predict(new.train.inputs))


@pytest.mark.parametrize("options", [{"dev_every": 5}, {"many_rows": 0}, {"draws": 1}])
def test_a_posterior_is_of_the_layer_alone_where_that_is_asked_for(options: dict[str, Any]) -> None:
    new = task(40, 6 * ROWS)
    new = replace(new, dev=new.test)
    assert prior().adapt(new, **{**QUICK, **options}).heads is None


def test_none_leaves_it_as_it_was_found() -> None:
    new, none = task(43, 6 * ROWS), {**QUICK, "many_rows": None}
    told, left = prior().adapt(new, seed=0, **none), prior().adapt(new, seed=0, **QUICK)
    assert told.heads is not None and left.heads is not None and torch.equal(told.heads, left.heads)


def test_other_classes_than_the_network_has_and_shared_heads_have_none() -> None:
    fewer = task(41, 6 * ROWS, CLASSES - 1)
    assert prior().adapt(fewer, **QUICK).heads is None
    shared = lift(head="shared").meta_train([task(k, ROWS) for k in range(3)], progress=False)
    assert shared.adapt(task(42, 6 * ROWS), **QUICK).heads is None
    with pytest.raises(ValueError, match="many_rows"):
        AdaptSettings(many_rows=-1)


def test_it_is_saved_with_the_prior_and_a_posterior_predicts_the_same_when_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = task(50, 6 * ROWS)
    with caplog.at_level(logging.INFO, logger="pyro_lift"):
        posterior = prior().adapt(new, **QUICK)
    assert "many_rows=0" in caplog.text
    posterior.save_pretrained(tmp_path / "posterior")
    read = TaskPosterior.from_pretrained(tmp_path / "posterior", network())
    torch.testing.assert_close(predicted(read, new), predicted(posterior, new))
    prior().save_pretrained(tmp_path / "prior")
    again = LiFTPrior.from_pretrained(tmp_path / "prior", network())
    torch.testing.assert_close(predicted(again.adapt(new, seed=0, **QUICK), new), predicted(posterior, new))
    with pytest.raises(ValueError, match="many_rows=0"):
        posterior.merge_and_save(tmp_path / "merged")


def lose(name: str, monkeypatch: pytest.MonkeyPatch, *, heads: bool) -> None:
    """Let a task's chain be lost: that of its heads, or that under the network's classes."""
    run = Adaptation._run

    def runs(self: Adaptation, program: Any, start: Tensor, source: Any, shown: Any, windows: Any) -> Any:
        if (self.head_mean is not None) == heads and any(task.name == name for task in shown.tasks):
            raise DivergedError("far away", 3, (name,))
        return run(self, program, start, source, shown, windows)

    monkeypatch.setattr(Adaptation, "_run", runs)


def test_less_of_the_layers_temperature_is_left_where_more_draws_have_heads() -> None:
    one = copy(prior())
    one.prediction_temperature, one.tempered_rows = 2.0, TemperedRows(ROWS, 0.0, 4.0)
    found = [one.adapt(task(70, rows), **QUICK).prediction_temperature for rows in (24, 27, 34, 48, 72)]
    assert found == pytest.approx([2.0, 2.0**0.8, 2.0**0.4, 1.0, 1.0])  # heads have 0, 1, 3, 5 and 7 of ten draws
    one.tempered_rows = TemperedRows(6.0 * ROWS, 0.0, 4.0)  # as calibrate(...) finds it, on tasks of so many rows
    assert one.adapt(task(70, 6 * ROWS), **QUICK).prediction_temperature == 2.0


@pytest.mark.parametrize("together", [False, True])
def test_a_task_whose_heads_are_lost_keeps_the_layer(
    together: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    new, lost = task(60, 6 * ROWS), task(61, 6 * ROWS)
    lose(lost.name, monkeypatch, heads=True)
    if together:
        posteriors = prior().adapt_many([new, lost], block_size=2, **QUICK)
    else:
        posteriors = [prior().adapt(one, **QUICK) for one in (new, lost)]
    assert [posterior.heads is None for posterior in posteriors] == [False, True]
    assert "'t61'" in caplog.text and "many_rows=0" in caplog.text and "far away" in caplog.text


def test_tasks_that_are_lost_by_the_layer_leave_the_others_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    new, lost = task(60, 6 * ROWS), task(61, 6 * ROWS)
    lose(lost.name, monkeypatch, heads=False)
    with pytest.raises(LostTasksError) as error:
        prior().adapt_many([new, lost], block_size=2, **QUICK)
    kept, gone = error.value.posteriors
    assert gone is None and kept.heads is not None
