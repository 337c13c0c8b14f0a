"""A task that declares fewer classes than a shared head has outputs gives the others no probability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.block_likelihood import block_log_likelihood, stack_rows
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.likelihoods import among_classes
from pyro_lift.models.task import undeclared
from pyro_lift.saving.names import CONFIG

PEFT = peft.LoraConfig(r=1, target_modules=["0", "2"])
SHORT: dict[str, Any] = {"sgd_steps": 4, "sgd_learning_rate": 1e-3, "burn_in": 2, "samples": 4, "seed": 0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))


def task(name: str, seed: int, classes: int, **options: Any) -> Task:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return Task(name, (x, torch.arange(16) % classes), **options)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    tasks = [task(f"t{k}", k, 5, num_classes=5) for k in range(3)]
    return LiFT(network(), PEFT, **SHORT).meta_train(tasks, progress=False)


def missing(p: Tensor) -> Tensor:
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p), dtype=p.dtype), check_dtype=False)
    return p[:, 2:]


@pytest.mark.parametrize("options", [{"num_classes": 2}, {"labels": ["no", "yes"]}])
def test_declared_classes_have_all_the_probability(prior: LiFTPrior, options: dict[str, Any]) -> None:
    new = task("new", 5, 2, **options)
    posterior = prior.adapt(new, steps=6, draws=3)
    assert posterior.predict(X).shape == (6, 5) and not missing(posterior.predict(X)).any()
    posterior.prediction_temperature = 3.0
    assert not missing(posterior.predict(X)).any()
    for each in prior.adapt_many([new, task("other", 6, 5, num_classes=5)], steps=6, draws=3):
        assert bool(each.predict(X)[:, 2:].any()) == (each.task.name == "other")
    ensemble = Ensemble(prior.adapter, new, posterior.thetas)
    assert not missing(ensemble.predict(X)).any() and not missing(ensemble.predict(new.train)).any()


def test_classes_that_were_only_counted_are_no_declaration(prior: LiFTPrior) -> None:
    few = task("few", 5, 2)
    assert few.num_classes == 2 and few.train.classes is None and few.to("cpu").train.classes is None
    assert replace(few, name="again").train.classes is None
    assert bool(missing(prior.adapt(few, steps=6, draws=3).predict(X)).all())
    declared = task("few", 5, 2, num_classes=2)
    assert declared.to("cpu").train.classes == 2 and declared.train.take(slice(0, 3)).classes == 2
    assert Task("whole", declared.train, num_classes=4).train.classes == 4
    assert Task("whole", declared.train).train.classes is None


def test_likelihoods_are_those_of_a_head_of_so_many_outputs() -> None:
    adapter = adapt_backbone(network(), PEFT, seed=0)
    new, theta = task("new", 5, 2, num_classes=2), adapter.initial + 0.1
    with torch.no_grad():
        scores = adapter(new.train.inputs[""], theta=theta)
        expected = scores[:, :2].log_softmax(-1).gather(1, new.train.target[:, None]).sum()
        whole = scores.log_softmax(-1).gather(1, new.train.target[:, None]).sum()
        law = torch.distributions.Independent(torch.distributions.Normal(theta, 1.0), 1)
        torch.testing.assert_close(FlatAdapter(adapter, new, law).log_likelihood(theta), expected)
        counted = undeclared(new)
        torch.testing.assert_close(FlatAdapter(adapter, counted, law).log_likelihood(theta), whole)
        both = FlatBlock(adapter, [new, counted], law).log_likelihood(theta)
        torch.testing.assert_close(both, torch.stack([expected, whole]))


def test_the_gradient_is_finite_and_that_of_the_declared_classes() -> None:
    adapter = adapt_backbone(network(), PEFT, seed=0)
    new = task("new", 5, 2, num_classes=2)
    block = stack_rows([new.train, task("all", 6, 5, num_classes=5).train], [16, 16], "classification")
    theta = (adapter.initial + 0.1).expand(2, -1).clone().requires_grad_()
    block_log_likelihood(adapter, "classification", block, theta, None, 1.0).sum().backward()
    alone = (adapter.initial + 0.1).clone().requires_grad_()
    scores = adapter(new.train.inputs[""], theta=alone)[:, :2]
    scores.log_softmax(-1).gather(1, new.train.target[:, None]).sum().backward()
    assert theta.grad is not None and alone.grad is not None
    torch.testing.assert_close(theta.grad[0], alone.grad)


def test_scores_of_all_classes_are_the_same_object() -> None:
    scores = torch.randn(3, 4)
    assert among_classes(scores, None) is scores and among_classes(scores, 4) is scores
    assert not among_classes(scores, 2).softmax(-1)[:, 2:].any()


def test_a_prior_and_a_posterior_saved_before_go_on_as_they_did(prior: LiFTPrior, tmp_path: Path) -> None:
    new = task("new", 5, 2, labels=["no", "yes"])
    posterior = prior.adapt(new, steps=6, draws=3)
    for saved in (prior, posterior):
        name = type(saved).__name__
        saved.save_pretrained(tmp_path / name)
        assert ("masks" if saved is prior else "declares_classes") in json.loads((tmp_path / name / CONFIG).read_text())
    loaded = TaskPosterior.from_pretrained(tmp_path / "TaskPosterior", network())
    assert torch.equal(loaded.predict(X), posterior.predict(X))
    again = LiFTPrior.from_pretrained(tmp_path / "LiFTPrior", network())
    assert again.masks and not missing(again.adapt(new, steps=6, draws=3, seed=0).predict(X)).any()
    before = LiFTPrior.from_pretrained(tmp_path / "LiFTPrior", network())
    before.masks = False
    old, counted = before.adapt(new, steps=6, draws=3, seed=0), prior.adapt(undeclared(new), steps=6, draws=3, seed=0)
    assert torch.equal(old.predict(X), counted.predict(X)) and bool(missing(old.predict(X)).all())
    old.save_pretrained(tmp_path / "old")
    for given in (None, new):
        kept = TaskPosterior.from_pretrained(tmp_path / "old", network(), given)
        assert torch.equal(kept.predict(X), old.predict(X))


def test_meta_training_takes_narrower_tasks_beside_wide_ones() -> None:
    tasks = [task(f"t{k}", k, classes, num_classes=classes) for k, classes in enumerate((5, 2, 3, 5))]
    learned = LiFT(network(), PEFT, **SHORT).meta_train(tasks, progress=False)
    assert torch.isfinite(learned.mixture.get().mean).all()
