"""A network's last layer is left out where it says nothing of the tasks' classes, and kept where it does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from resumed_runs import stops_at
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.features import before_head
from pyro_lift.models.readouts import pool
from pyro_lift.settings import LiFTSettings
from pyro_lift.tuning.class_layer import without_foreign_classes
from pyro_lift.tuning.head_mean import head_mean
from pyro_lift.tuning.whose_heads import RULES, heads_settled, run_config

CLASSES, WIDTH = 4, 12
SHORT: dict[str, Any] = {"sgd_steps": 20, "burn_in": 5, "samples": 10, "seed": 0}


def labels(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = -torch.rand(len(x), CLASSES, generator=generator).log().neg().log()
    means = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(3))
    return (2.0 * torch.tanh(x) @ means + noise).argmax(-1)


def tasks(number: int = 12, rows: int = 24, *, permuted: bool, classes: int = CLASSES) -> list[Task]:
    """Tasks of one map, whose classes each task may name in an order of its own."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for k in range(number):
        x = torch.randn(rows + 100, 6, generator=generator)
        y = labels(x, generator)
        y = torch.randperm(CLASSES, generator=generator)[y] if permuted else y
        made.append(Task(f"t{k}", (x[:rows], y[:rows]), num_classes=classes, test=(x[rows:], y[rows:])))
    return made


def shifted(number: int = 12, rows: int = 24) -> list[Task]:
    """The same classes in every task, whose inputs lie elsewhere: a network that knows them is off by something."""
    generator, made = torch.Generator().manual_seed(11), []
    for task in tasks(number, rows, permuted=False):
        by = 0.6 * torch.randn(6, generator=generator)
        assert task.test is not None
        near, far = ((part.positional[0] + by, part.target) for part in (task.train, task.test))
        made.append(Task(task.name, near, num_classes=CLASSES, test=far))
    return made


def network(outputs: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs))


@cache
def trained() -> nn.Sequential:
    """A network that knows the classes in the order in which they are numbered."""
    net, generator = network(), torch.Generator().manual_seed(5)
    x = torch.randn(1000, 6, generator=generator)
    y = labels(x, generator)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def config(*layers: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(layers or ("0", "2", "4")))


def adapted(net: nn.Module, *layers: str) -> RandomAdapter:
    return adapt_backbone(net, config(*layers), seed=0)


# --------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("net", "permuted", "leaves"),
    [(trained, False, False), (trained, True, True), (network, False, True), (network, True, True)],
    ids=["knows the classes", "knows others", "new, shared", "new, permuted"],
)
def test_rows_say_whether_the_networks_classes_are_the_tasks(
    net: Callable[[], nn.Module], permuted: bool, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = tasks(permuted=permuted)
    with caplog.at_level(logging.INFO, "pyro_lift"):
        apart = without_foreign_classes(adapted(net()), made, None)
    assert (apart is not None) == leaves
    assert ("that layer is left out" in caplog.text) == (leaves and permuted)
    if apart is not None:
        assert apart.doubtful == (not permuted) and apart.adapter.gives_features


def test_where_nothing_can_be_tried_a_new_layer_stays_under_shared_classes_alone() -> None:
    adapter = adapted(network())
    stays, goes = (heads_settled(LiFTSettings(), adapter, tasks(permuted=permuted)) for permuted in (False, True))
    assert stays.adapter is adapter and stays.settings == LiFTSettings() and stays.layer is None
    assert goes.adapter.before_head is not None and goes.layer is None
    tried = heads_settled(LiFTSettings(), adapter, tasks(permuted=False), trial=True)
    assert tried.adapter.before_head is not None and tried.layer == LiFTSettings()


def test_a_network_that_knows_the_classes_is_tried_beside_heads_that_know_more() -> None:
    adapter, made = adapted(trained()), shifted()
    apart = without_foreign_classes(adapter, made, None)
    assert apart is not None and apart.doubtful and apart.adapter.before_head is not None
    assert without_foreign_classes(adapter, made, None, known_too=False) is None
    around = head_mean(apart.adapter, made)
    assert around is not None and torch.equal(
        around.head.head[:, :-1], torch.as_tensor(trained()[4].weight)
    )  # the layer, not a pool's
    pooled = head_mean(apart.adapter, made, layer=False)
    assert pooled is None or not torch.equal(pooled.head.head, around.head.head)
    stays, tried = (heads_settled(LiFTSettings(), adapter, made, trial=trial) for trial in (False, True))
    assert stays.adapter is adapter and stays.layer is None
    assert tried.adapter.before_head is not None and tried.layer == LiFTSettings()


def test_a_chain_without_trials_is_the_one_with_the_layer_under_shared_classes() -> None:
    def mean(**options: Any) -> Tensor:
        lift = LiFT(network(), config(), **SHORT, **options)
        prior = lift.meta_train(tasks(permuted=False), progress=False, calibrate=False)
        return torch.as_tensor(prior.mixture.get().mean)

    assert torch.equal(mean(), mean(head="shared"))


def test_half_of_the_tasks_with_other_names_are_enough() -> None:
    mixed = [
        *tasks(6, permuted=False),
        *(Task(f"p{k}", t.train, num_classes=4) for k, t in enumerate(tasks(permuted=True))),
    ]
    assert without_foreign_classes(adapted(trained()), mixed[:12], None) is not None


def test_wide_outputs_give_way_to_features_that_say_more_and_to_no_others() -> None:
    made, one = tasks(40, 40, permuted=True), nn.Linear(WIDTH, 5)
    with torch.no_grad():
        one.weight.copy_(torch.ones(5, 1) @ one.weight[:1])  # five times the same
    assert without_foreign_classes(adapted(nn.Sequential(*network()[:4], one)), made, 1.0) is not None
    with torch.no_grad():
        straight = nn.Linear(WIDTH, WIDTH)
        straight.weight.copy_(torch.eye(WIDTH))
    assert without_foreign_classes(adapted(nn.Sequential(*trained()[:4], straight)), made, 1.0) is None


@pytest.mark.parametrize(
    "settings",
    [{"head": "shared"}, {"head": "langevin", "head_scale": 0.5}, {"head": "langevin"}, {"head_scale": 1.0}],
    ids=str,
)
def test_what_is_given_is_not_asked_about(settings: dict[str, Any]) -> None:
    adapter, given = adapted(network()), LiFTSettings(**settings)
    settled = heads_settled(given, adapter, tasks(permuted=True))
    assert settled.adapter is adapter and settled.settings == given and settled.layer is None


class Halved(nn.Module):
    """Scores at the temperature two."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def test_a_log_softmax_after_the_layer_is_none_of_the_features() -> None:
    net, x = nn.Sequential(*trained(), nn.LogSoftmax(-1)), torch.randn(5, 6)
    adapter = adapted(net)
    found = before_head(adapter, (x,), {})
    assert found is not None
    torch.testing.assert_close(adapter.reading(found)(x, theta=adapter.initial), trained()[:4](x))
    assert before_head(adapted(nn.Sequential(*trained(), Halved())), (x,), {}) is None


@pytest.mark.parametrize(
    "adapter",
    [
        lambda: adapted(trained(), "4"),  # theta has no effect before the layer
        lambda: adapted(nn.Sequential(*trained(), Halved())),  # something comes after it
        lambda: adapt_backbone(trained(), config(), seed=0, postprocess=lambda x: 2.0 * x),
    ],
    ids=["the layer alone", "halved", "postprocess"],
)
def test_where_nothing_before_the_scores_can_be_read_heads_stand_on_them(
    adapter: Callable[[], RandomAdapter], caplog: pytest.LogCaptureFixture
) -> None:
    network = adapter()
    with caplog.at_level(logging.INFO, "pyro_lift"):
        found = without_foreign_classes(network, tasks(permuted=True), None)
    assert found is not None and found.adapter is network and found.doubtful and "on these scores" in caplog.text
    assert without_foreign_classes(network, tasks(permuted=False), None) is None
    settled = heads_settled(LiFTSettings(), network, tasks(permuted=True), trial=True)
    assert settled.adapter is network and settled.settings.head_scale == 1.0
    assert heads_settled(LiFTSettings(), network, tasks(permuted=True)).settings == LiFTSettings()


@pytest.mark.parametrize(("number", "rows"), [(3, 24), (12, 1)], ids=["three tasks", "single rows"])
def test_few_tasks_of_some_rows_are_not_asked(number: int, rows: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyro_lift"):
        assert without_foreign_classes(adapted(network()), tasks(number, rows, permuted=True), None) is None
    assert "is not asked" in caplog.text


def test_a_task_of_one_row_leaves_the_others_to_be_asked() -> None:
    made = [*tasks(permuted=True), Task("one", (torch.randn(1, 6), torch.tensor([2])), num_classes=CLASSES)]
    assert without_foreign_classes(adapted(trained()), made, None) is not None


def test_labels_beyond_the_output_are_the_doors_to_refuse() -> None:
    wide = [*tasks(permuted=True), Task("wide", (torch.randn(8, 6), torch.arange(8)), num_classes=8)]
    with pytest.raises(ValueError, match="outside the range of the network's head"):
        LiFT(network(), config(), **SHORT).meta_train(wide, progress=False)


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("layers", [("0", "2", "4"), ("0",), ("2", "4")], ids=str)
def test_a_network_is_read_before_its_layer_alone_and_in_blocks(layers: tuple[str, ...]) -> None:
    net, adapter = network(), adapted(network(), *layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 6, generator=generator)
    found = before_head(adapter, (x[0],), {})
    assert found is not None
    apart = adapter.reading(found)
    torch.testing.assert_close(apart(x[0], theta=apart.initial), net[:4](x[0]))
    theta = apart.initial + 0.3 * torch.randn(3, apart.dim, generator=generator)
    alone = torch.stack([apart(x[k], theta=theta[k]) for k in range(3)])
    torch.testing.assert_close(apart(x, theta=theta), alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], net[:4](x[0]), atol=1e-3)
    assert adapter(x[0], theta=adapter.initial).shape == (5, CLASSES) and adapter.before_head is None
    torch.testing.assert_close(apart.reading(None)(x[0], theta=adapter.initial), net(x[0]))


def classifier(kind: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 40, "num_labels": 2, "pad_token_id": 0}
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(**sizes, **small)), ["query", "value"]
    return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, **small)), ["c_attn"]


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("gpt2", "score"), ("bert", None)])
def test_a_transformers_classifier_is_read_at_its_body(kind: str, head: str | None) -> None:
    net, targets = classifier(kind)
    body: Any = copy.deepcopy(net.base_model)
    body.eval()
    lora = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=None if head is None else [head])
    lora.fan_in_fan_out = kind == "gpt2"  # whose layers have their weights transposed
    adapter = adapt_backbone(net, lora, seed=0)
    ids = torch.randint(1, 40, (2, 3, 6))
    mask = torch.ones_like(ids)
    mask[:, 1, 4:] = 0
    found = before_head(adapter, (), {"input_ids": ids[0], "attention_mask": mask[0]})
    assert found is not None
    apart = adapter.reading(found)
    given = {"input_ids": ids[0], "attention_mask": mask[0]}
    with torch.no_grad():
        states = pool(body(**given).last_hidden_state, mask[0])
        torch.testing.assert_close(apart(theta=apart.initial, **given), states, rtol=1e-4, atol=1e-5)
        theta = apart.initial + 0.1 * torch.randn(2, apart.dim)
        alone = torch.stack([apart(theta=theta[k], input_ids=ids[k], attention_mask=mask[k]) for k in range(2)])
        together = apart(theta=theta, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_without_the_layer_leaves_the_callers_things_alone_and_is_saved(tmp_path: Path) -> None:
    net, made = trained(), tasks(permuted=True)
    before = copy.deepcopy(net.state_dict())
    lift = LiFT(net, config(), **SHORT)
    prior = lift.meta_train(made[:10], progress=False)
    assert prior.adapter.before_head is not None and prior.settings.head_scale == 1.0
    assert lift.adapter.before_head is None and lift.settings.head_scale is None
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    posterior = prior.adapt(made[11])
    rows = made[11].test
    assert rows is not None
    prior.save_pretrained(tmp_path / "prior")
    posterior.save_pretrained(tmp_path / "posterior")
    expected = posterior.predict(rows)
    again = LiFTPrior.from_pretrained(tmp_path / "prior", net).adapt(made[11])
    for read in (again, TaskPosterior.from_pretrained(tmp_path / "posterior", net)):
        torch.testing.assert_close(read.predict(rows), expected, rtol=0, atol=0)
    on_adapter = LiFTPrior.from_pretrained(tmp_path / "prior", prior.adapter)  # read there already
    torch.testing.assert_close(on_adapter.adapt(made[11]).predict(rows), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no module 'base_model.model.4'|does not fit|no place"):
        LiFTPrior.from_pretrained(tmp_path / "prior", net[:4])


def test_a_prior_of_the_output_is_loaded_on_an_adapter_that_is_read_before_it(tmp_path: Path) -> None:
    made = tasks(permuted=False)
    prior = LiFT(trained(), config(), **SHORT).meta_train(made[:10], progress=False)
    assert prior.adapter.before_head is None
    prior.save_pretrained(tmp_path)
    found = before_head(prior.adapter, (made[0].train.inputs[""],), {})
    assert found is not None
    read = LiFTPrior.from_pretrained(tmp_path, prior.adapter.reading(found))
    rows = made[11].test
    assert rows is not None and read.adapter.before_head is None
    torch.testing.assert_close(read.adapt(made[11]).predict(rows), prior.adapt(made[11]).predict(rows), rtol=0, atol=0)


@pytest.mark.parametrize("made", [tasks(52, permuted=True), shifted(52)], ids=["named anew", "shifted"])
def test_new_tasks_are_predicted_better_than_by_the_layer_where_it_is_off(made: list[Task]) -> None:

    def losses(**options: Any) -> Tensor:
        lift = LiFT(trained(), config(), sgd_steps=100, burn_in=10, samples=20, seed=0, **options)
        posteriors = lift.meta_train(made[:12], progress=False).adapt_many(made[12:], seed=0)
        rows = [task.test for task in made[12:] if task.test is not None]
        return torch.tensor([nll(p.predict(r), r.target) for p, r in zip(posteriors, rows, strict=True)])

    gain = losses(head="shared") - losses()
    assert float(gain.mean()) > 3.0 * float(gain.std()) / len(gain) ** 0.5


@pytest.mark.parametrize(
    ("made", "rule", "said"),
    [
        (tasks(permuted=True), "class layer", "that layer is left out"),
        (shifted(), "known classes", "Both ways are tried before the chain"),
    ],
    ids=["others", "known"],
)
def test_a_run_of_before_goes_on_with_the_layer(
    made: list[Task], rule: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    then = {name: value for name, value in RULES.items() if name != rule}
    for rules, asks in ((then, False), (RULES, True)):
        lift = LiFT(trained(), config(), **SHORT)
        session = Session(
            tmp_path / str(asks), config=run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        )
        with caplog.at_level(logging.INFO, "pyro_lift"):
            (prior,) = lift.meta_train_many(made, [1], session=session, progress=False)
        assert (said in caplog.text) == asks and (asks or prior.adapter.before_head is None)


@pytest.mark.parametrize("visits", [50, 200, 400, 500], ids=str)
def test_a_run_that_tries_both_ways_ends_as_the_whole_one_does(
    visits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, options = tasks(8, permuted=False), {**SHORT, "sgd_steps": 200}
    told: list[str] = []
    with caplog.at_level(logging.INFO, "pyro_lift"):
        whole = LiFT(network(), config(), **options).meta_train(
            made, progress=False, callbacks=lambda step: told.append(step.run.kind)
        )
    ways = [record.getMessage().split(":")[0] for record in caplog.records if "on trial, " in record.getMessage()]
    assert set(ways) == {"on trial, heads of the tasks' own", "on trial, the network as it stands"}
    assert visits < len(told), "the run is stopped before its end"
    kept: dict[str, Any] = {"checkpoint_every": 100, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        LiFT(network(), config(), **options).meta_train(made, checkpoint=tmp_path, on_step=stops_at(visits), **kept)
    resumed = LiFT(network(), config(), **options).meta_train(made, resume=tmp_path, **kept)
    assert whole.results == resumed.results
    assert (whole.adapter.before_head is None) == (resumed.adapter.before_head is None)
    mean, again = (prior.mixture.get().component_distribution.mean for prior in (whole, resumed))
    assert torch.equal(mean, again)
