"""Regressions have heads on the features before the network's value, or its value, as unseen tasks are better with."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.tuning.value_layer import without_value_layer
from pyro_lift.tuning.whose_heads import RULES, heads_settled, run_config

INPUTS, WIDTH = 4, 16
SHORT: dict[str, Any] = {"sgd_steps": 60, "burn_in": 5, "samples": 20, "seed": 0}
MIXED = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(5))


def tasks(number: int = 12, rows: int = 16) -> list[Task]:
    """Tasks that mix the same features, each in its own way."""
    generator, made = torch.Generator().manual_seed(7), []
    for k in range(number):
        x = torch.randn(rows + 100, INPUTS, generator=generator)
        y = 0.3 * torch.tanh(x @ MIXED) @ torch.randn(WIDTH, generator=generator)
        y = (y + 0.1 * torch.randn(len(x), generator=generator)).unsqueeze(-1)
        made.append(Task(f"t{k}", (x[:rows], y[:rows]), kind="regression", test=(x[rows:], y[rows:])))
    return made


class Squeezed(nn.Module):
    """A value without a dimension of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def network() -> nn.Sequential:
    """A network that has these features, and a last layer that is none of the tasks'."""
    torch.manual_seed(0)
    features = nn.Linear(INPUTS, WIDTH)
    with torch.no_grad():
        features.weight.copy_(MIXED.mT)
        features.bias.zero_()
    return nn.Sequential(features, nn.Tanh(), nn.Linear(WIDTH, 1))


def config() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["0"])


def lift(net: nn.Module | None = None, **options: Any) -> LiFT:
    how = AdaptSettings(steps=40, draws=8)
    return LiFT(net or network(), config(), adapt=how, **{**SHORT, **options})


# ---------------------------------------------------------------------------------------------------------- the trial


def test_both_ways_are_tried_where_the_features_can_be_read() -> None:
    adapter, made = adapt_backbone(network(), config(), seed=0), tasks()
    settled = heads_settled(LiFTSettings(), adapter, made, trial=True)
    assert settled.adapter.before_head is not None and settled.settings.head_scale == 1.0
    assert settled.layer == LiFTSettings()
    for options in ({"trial": False}, {"trial": True, "values": False}):
        assert heads_settled(LiFTSettings(), adapter, made, **options).adapter is adapter


@pytest.mark.parametrize(
    "settings", [{"head": "shared"}, {"head_scale": 1.0}, {"head": "langevin"}, {"noise_scale": 0.1}], ids=str
)
def test_what_is_given_is_not_asked_about(settings: dict[str, Any]) -> None:
    adapter, given = adapt_backbone(network(), config(), seed=0), LiFTSettings(**settings)
    settled = heads_settled(given, adapter, tasks(), trial=True)
    assert settled.adapter is adapter and settled.settings == given and settled.layer is None


def test_a_value_without_a_dimension_of_its_own_is_read_before_its_layer_too() -> None:
    net = nn.Sequential(*network(), Squeezed())
    adapter = adapt_backbone(net, config(), seed=0)
    made = [Task(task.name, (task.train.inputs[""], task.train.target[:, 0]), kind="regression") for task in
            tasks()]  # fmt: skip
    apart = without_value_layer(adapter, made)
    assert apart is not None
    x = torch.randn(5, INPUTS)
    torch.testing.assert_close(apart(x, theta=apart.initial), network()[:2](x))


@pytest.mark.parametrize(
    ("net", "layers", "number"),
    [
        (lambda: network(), ["2"], 12),  # theta has no effect before the layer
        (lambda: nn.Sequential(*network(), nn.Softplus()), ["0"], 12),  # something comes after it
        (lambda: network(), ["0"], 3),
    ],
    ids=["the layer alone", "softplus", "three tasks"],
)
def test_where_nothing_before_the_value_can_be_read_or_asked_the_network_stays(
    net: Any, layers: list[str], number: int
) -> None:
    adapter = adapt_backbone(net(), peft.LoraConfig(r=1, target_modules=layers), seed=0)
    assert without_value_layer(adapter, tasks(number)) is None


# --------------------------------------------------------------------------------------------------------- whole runs


def test_new_tasks_are_missed_less_than_by_the_value_where_each_mixes_the_features(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = tasks(36)
    seen = [Task(task.name, task.train, kind="regression") for task in made[:16]]

    def misses(head: str) -> Tensor:
        prior = lift(head=head).meta_train(seen, progress=False)
        assert (prior.adapter.before_head is None) == (head == "shared")
        rows = [task.test for task in made[16:] if task.test is not None]
        posteriors = prior.adapt_many(made[16:], seed=0)
        each = [(p.predict(r) - r.target).square().mean() for p, r in zip(posteriors, rows, strict=True)]
        return torch.stack(each).log()

    with caplog.at_level(logging.INFO, "pyro_lift"):
        gain = misses("shared") - misses("solve")
    assert "The heads stay." in caplog.text
    assert float(gain.mean()) > 3.0 * float(gain.std()) / len(gain) ** 0.5


def test_where_the_value_is_better_the_run_is_the_one_with_the_network_as_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyro_lift.lift.loses_to", lambda heads, layer: True)
    left, alone = (lift(head=head).meta_train(tasks(8), progress=False) for head in ("solve", "shared"))
    assert left.adapter.before_head is None and left.settings == replace(alone.settings, head=left.settings.head)
    assert torch.equal(left.mixture.get().mean, alone.mixture.get().mean)


def test_a_run_with_heads_leaves_the_callers_network_alone_and_is_saved(tmp_path: Path) -> None:
    made, net = tasks(), network()
    prior = lift(net).meta_train(made[:10], progress=False)
    assert prior.adapter.before_head is not None
    assert all(torch.equal(x, network().state_dict()[name]) for name, x in net.state_dict().items())
    posterior, rows = prior.adapt(made[11]), made[11].test
    assert rows is not None
    prior.save_pretrained(tmp_path / "prior")
    posterior.save_pretrained(tmp_path / "posterior")
    again = LiFTPrior.from_pretrained(tmp_path / "prior", net).adapt(made[11])
    for read in (again, TaskPosterior.from_pretrained(tmp_path / "posterior", net)):
        assert torch.equal(read.predict(rows), posterior.predict(rows))
        assert torch.equal(read.predict_sd(rows), posterior.predict_sd(rows))


def test_a_run_of_before_goes_on_with_the_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, said = tasks(), "It is tried as it stands"
    then = {name: value for name, value in RULES.items() if name != "value layer"}
    for rules, asks in ((then, False), (RULES, True)):
        run = lift()
        session = Session(
            tmp_path / str(asks), config=run_config(run.settings, run.seed, run.adapter, made, rules=rules)
        )
        with caplog.at_level(logging.INFO, "pyro_lift"):
            (prior,) = run.meta_train_many(made, [1], session=session, progress=False, crossed=True)
        assert (said in caplog.text) == asks and (asks or prior.adapter.before_head is None)
