"""Layers below the adapter, computed once a row: the numbers are those of the whole network, whoever calls it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny_backbones as tiny
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, Task
from pyro_lift.inference.adaptation.predict import label_probabilities, predict
from pyro_lift.models.activation_checkpointing import checkpoint_layers
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.block_likelihood import block_log_likelihood, stack_rows
from pyro_lift.models.features import features
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import outputs
from pyro_lift.models.prefix import PrefixMode
from pyro_lift.models.readouts import LabelScoring
from pyro_lift.models.row_states import RowStates

LAYERS = 4
#: Names of the modules that the adapter is on: of the last two of four layers, and of a decoder all.
TARGETS = {
    "bart": r".*(encoder\.layers\.[23]|decoder\.layers\.\d)\.self_attn\.(q_proj|v_proj)",
    "t5": r".*(encoder\.block\.[23]|decoder\.block\.\d)\.layer\.0\.SelfAttention\.(q|v)",
    "gpt2": r".*h\.[23]\.attn\.c_attn",
    "bert": r".*layer\.[23]\.attention\.self\.(query|value)",
    "vit": r".*layers?\.[23]\..*(query|q_proj|v_proj|value)",
    "timm": r".*blocks\.[23]\.attn\.qkv",
}
BELOW = 2


def ragged(task: Task, side: str = "right") -> Task:
    """The same task with texts of several lengths."""
    inputs = dict(task.train.inputs)
    mask = inputs.get("attention_mask")
    if mask is None:
        return task
    lengths = 2 + torch.arange(len(mask)) % (mask.shape[1] - 1)
    filled = torch.arange(mask.shape[1]) < lengths.unsqueeze(1)
    inputs["attention_mask"] = (filled if side == "right" else filled.flip(1)).long()
    target = task.train.target
    if target.shape == mask.shape:  # a causal model learns nothing from padding
        target = torch.where(inputs["attention_mask"] == 1, target, -100)
    return Task(task.name, (inputs, target), task.kind, task.num_classes, label_texts=task.label_texts)


def pair(family: str, **options: Any) -> tuple[RandomAdapter, RandomAdapter]:
    """The same adapter with and without what lies below it kept."""
    torch.manual_seed(3)
    net = tiny.FAMILIES[family].make(LAYERS).eval()

    on = adapt_backbone(net, config(family), seed=0, frozen_prefix="on", **options)
    return on, adapt_backbone(net, config(family), seed=0, frozen_prefix="off", **options)


def config(family: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")


def somewhere(adapter: RandomAdapter, *lead: int) -> Tensor:
    return adapter.initial + 0.1 * torch.randn(*lead, adapter.dim)


def loss_at(adapter: RandomAdapter, task: Task, index: Tensor | slice, theta: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    rows = task.train.take(index)
    value = log_likelihood(task.kind, outputs(adapter, rows, theta, None), rows.target)
    if value.dim() > 1:
        value = value.sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), theta)[0]


def kind_of(family: str, task: Task) -> Task:
    """A task without a head of its own: features are regressed on, which uses all of them."""
    if family != "vit":
        return task
    return Task(task.name, (task.train.inputs, torch.randn(tiny.N, tiny.D)), "regression")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradient_are_those_of_the_whole_network(family: str, side: str) -> None:
    with_it, without = pair(family)
    task = ragged(kind_of(family, tiny.FAMILIES[family].task("a")), side)
    for index in (slice(0, 3), torch.tensor([5, 1, 7]), slice(None), torch.tensor([0, 6])):
        theta = somewhere(with_it)
        for got, expected in zip(
            loss_at(with_it, task, index, theta), loss_at(without, task, index, theta), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert with_it.prefix.plan is not None
    assert len(with_it.prefix.plan.layers) == BELOW
    assert with_it.prefix.states.found > 0
    assert without.prefix.plan is None and len(without.prefix.states) == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_below_run_once_a_row(family: str) -> None:
    with_it, _ = pair(family)
    task = ragged(kind_of(family, tiny.FAMILIES[family].task("a")))
    theta = somewhere(with_it)
    loss_at(with_it, task, slice(None), theta)
    assert with_it.prefix.plan is not None
    calls: list[int] = []
    last = with_it.prefix.plan.layers[-1]
    forward = type(last).forward
    last.__dict__["forward"] = lambda *args, **kwargs: (calls.append(1), forward(last, *args, **kwargs))[1]
    for _ in range(3):
        loss_at(with_it, task, torch.randperm(tiny.N)[:5], theta)
    assert not calls
    with with_it.prefix.paused():
        loss_at(with_it, task, slice(None), theta)
    assert calls


@pytest.mark.parametrize("family", ["bart", "t5", "bert", "gpt2", "timm"])
def test_blocks_of_tasks_have_the_numbers_of_the_whole_network(family: str) -> None:
    with_it, without = pair(family)
    tasks = [ragged(tiny.FAMILIES[family].task(name)) for name in "abc"]
    block = stack_rows([task.train.take(slice(k, k + 4)) for k, task in enumerate(tasks)], [8, 8, 8], tasks[0].kind)
    theta = somewhere(with_it, 3)
    for _ in range(2):
        got = block_log_likelihood(with_it, tasks[0].kind, block, theta, None, 1.0)
        expected = block_log_likelihood(without, tasks[0].kind, block, theta, None, 1.0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit", "timm"])
def test_meta_training_adaptation_and_predictions_are_the_same(family: str) -> None:
    tasks = [ragged(tiny.FAMILIES[family].task(name)) for name in "abc"]
    found = []
    for adapter in pair(family):
        lift = LiFT(
            adapter,
            sgd_steps=2,
            burn_in=3,
            samples=4,
            batch_size=4,
            seed=0,
            head_scale=tiny.FAMILIES[family].head_scale,
        )
        prior = lift.meta_train(tasks[:2], progress=False)
        posterior = prior.adapt(tasks[2], steps=6, draws=3)
        mean = prior.mixture.get().mean
        found.append((mean, posterior.thetas, posterior.predict(tasks[2].train)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "bert", "vit"])
def test_features_are_the_same(family: str) -> None:
    with_it, without = pair(family)
    rows, theta = ragged(tiny.FAMILIES[family].task("a")).train, somewhere(with_it)
    with_it(*rows.positional, theta=theta, **rows.named)
    for _ in range(2):
        torch.testing.assert_close(features(with_it, rows, theta), features(without, rows, theta), rtol=1e-5, atol=1e-6)
    assert with_it.prefix.states.found > 0


def test_similarities_that_heads_stand_on_are_the_same() -> None:
    with_it, without = pair("bert")
    named, theta = ragged(tiny.matching_task("a")).train.named, somewhere(with_it)
    for _ in range(2):
        got, expected = (adapter(theta=theta, head_inputs=True, **named) for adapter in (with_it, without))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert with_it.prefix.states.found >= 2 * (tiny.N + 3) - (tiny.N + 3)


def test_label_scores_are_the_same() -> None:
    with_it, without = pair("bart")
    rows, thetas = ragged(tiny.seq2seq_task("a")).train, somewhere(with_it, 2)
    with_it(theta=thetas[0], **rows.named)
    texts = {"input_ids": torch.randint(5, tiny.V, (3, 3)), "attention_mask": torch.ones(3, 3, dtype=torch.long)}
    got, expected = (
        label_probabilities(adapter, thetas, rows, texts, LabelScoring(start_token=2)) for adapter in (with_it, without)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert with_it.prefix.states.found > 0


def test_predictions_of_several_draws_are_the_same() -> None:
    with_it, without = pair("bert")
    task = ragged(tiny.matching_task("a"))
    thetas = somewhere(with_it, 3)
    got = predict(with_it, thetas, task.train, "matching")
    torch.testing.assert_close(got, predict(without, thetas, task.train, "matching"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "timm", "bart"])
def test_activations_that_are_computed_again_are_the_same(family: str) -> None:
    torch.manual_seed(3)
    net = tiny.FAMILIES[family].make(LAYERS).eval()
    plain = copy.deepcopy(net)
    checkpoint_layers(net)
    with_it = adapt_backbone(net, config(family), seed=0, frozen_prefix="on")
    without = adapt_backbone(plain, config(family), seed=0, frozen_prefix="off")
    task, theta = ragged(tiny.FAMILIES[family].task("a")), somewhere(without)
    for _ in range(2):
        for got, expected in zip(
            loss_at(with_it, task, slice(None), theta), loss_at(without, task, slice(None), theta), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- what does not fit


def adapted(net: nn.Module, target: Any, mode: PrefixMode = "auto", **options: Any) -> RandomAdapter:
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=target), seed=0, frozen_prefix=mode, **options)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (r".*layer\.\d\.attention\.self\.query", "begins at the first layer"),
        (r".*(layer\.0|layer\.3)\.attention\.self\.query", "begins at the first layer"),
        (r".*(word_embeddings|layer\.3\.attention\.self\.query)", "begins at the first layer, or below it"),
    ],
)
def test_an_adapter_that_reaches_down_is_refused(target: str, reason: str) -> None:
    task, net = tiny.matching_task("a"), tiny.bert(LAYERS)
    plain = adapted(net, target)
    plain(theta=plain.initial, **task.train.named)
    assert plain.prefix.plan is None
    assert reason in str(plain.prefix.reason)
    asked = adapted(net, target, "on")
    with pytest.raises(ValueError, match=f"frozen_prefix='on', but no layer can be passed by: .*{reason}"):
        asked(theta=asked.initial, **task.train.named)


class Layered(nn.Module):
    """A small network of three layers."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = x if self.between is None else self.between(x)
        return x


def test_a_layer_that_adds_to_something_outside_is_found_out() -> None:
    class Leaking(Layered):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for layer in self.layers:
                x = torch.tanh(layer(x))
                total = total + x
            return total

    adapter = adapted(Leaking(), ["layers.2"])
    adapter(torch.randn(5, 4), theta=adapter.initial)
    assert adapter.prefix.plan is None
    assert "the output is off by" in str(adapter.prefix.reason)


def test_a_mode_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen_prefix"):
        adapted(Layered(), ["layers.2"], "yes")  # type: ignore[arg-type]


def test_a_network_without_layers_goes_without() -> None:
    adapter = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["1"])
    adapter(torch.randn(5, 4), theta=adapter.initial)
    assert adapter.prefix.reason == "the network has no list of layers"


def test_a_layer_that_is_called_twice_is_refused() -> None:
    class Twice(Layered):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[2](self.layers[0](self.layers[0](x)))  # type: ignore[no-any-return]

    adapter = adapted(Twice(), ["layers.2"])
    adapter(torch.randn(5, 4), theta=adapter.initial)
    assert "called several times" in str(adapter.prefix.reason)


def test_dropout_and_hooks_see_the_whole_network() -> None:
    adapter = adapted(Layered(), ["layers.2"], "on")
    x = torch.randn(5, 4)
    adapter(x, theta=adapter.initial)
    assert adapter.prefix.plan is not None
    seen: list[Any] = []
    handle = adapter.prefix.plan.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        adapter(x, theta=adapter.initial)
    assert len(seen) == 2
    handle.remove()
    adapter.prefix.plan.layers[0].train()
    before = adapter.prefix.states.found
    adapter(x, theta=adapter.initial)
    assert adapter.prefix.states.found == before


def test_inputs_that_gradients_are_taken_at_go_through_all_layers() -> None:
    adapter = adapted(Layered(), ["layers.2"], "on")
    x = torch.randn(5, 4, requires_grad=True)
    adapter(x.detach(), theta=adapter.initial)
    (gradient,) = torch.autograd.grad(adapter(x, theta=adapter.initial).sum(), x)
    assert bool((gradient != 0).all())


def test_pictures_that_are_changed_are_other_rows() -> None:
    with_it, without = pair("timm")
    x, theta = torch.randn(4, 3, 8, 8), somewhere(with_it)
    for k in range(5):
        changed = x + 1e-6 * k
        torch.testing.assert_close(
            with_it(x=changed, theta=theta), without(x=changed, theta=theta), rtol=1e-5, atol=1e-6
        )
    assert len(with_it.prefix.states) == 20


# ------------------------------------------------------------------------------------------------------- whose it is


def test_two_objects_on_one_backbone_are_independent_and_leave_it_as_it_was() -> None:
    net = tiny.bert(LAYERS).eval()
    attributes = {name: dict(vars(module)) for name, module in net.named_modules()}
    frozen = {name: p.clone() for name, p in net.named_parameters()}
    task = ragged(tiny.matching_task("a"))
    lifts = [
        LiFT(net, peft.LoraConfig(r=2, target_modules=rf".*layer\.[{k}3]\.attention\.self\.query"), seed=0)
        for k in (1, 2)
    ]
    plain = net(**task.train.inputs).last_hidden_state
    for _ in range(2):
        for lift in lifts:
            lift.adapter(theta=lift.adapter.initial, **task.train.named)
    plans = [lift.adapter.prefix.plan for lift in lifts]
    assert [len(plan.layers) for plan in plans if plan is not None] == [1, 2]
    assert lifts[0].adapter.prefix.states is not lifts[1].adapter.prefix.states
    torch.testing.assert_close(net(**task.train.inputs).last_hidden_state, plain, rtol=0.0, atol=0.0)
    assert all(torch.equal(p, frozen[name]) for name, p in net.named_parameters())
    assert {name: dict(vars(module)) for name, module in net.named_modules()}.keys() == attributes.keys()
    assert all(vars(module).keys() == attributes[name].keys() for name, module in net.named_modules())


def test_weights_below_that_are_written_to_make_all_states_old() -> None:
    torch.manual_seed(0)
    net = Layered()
    adapter, x = adapted(net, ["layers.2"], "on"), torch.randn(5, 4)
    adapter(x, theta=adapter.initial)
    with torch.no_grad():
        net.layers[0].weight.add_(1.0)  # type: ignore[operator, union-attr]
    with adapter.prefix.paused():
        expected = adapter(x, theta=adapter.initial)
    torch.testing.assert_close(adapter(x, theta=adapter.initial), expected)


def test_another_type_or_another_start_computes_anew_what_it_has_to() -> None:
    with_it, without = pair("bert")
    task = ragged(tiny.matching_task("a"))
    with_it(theta=with_it.initial, **task.train.named)
    view = with_it.beginning_at(with_it.initial + 1.0)
    assert view.prefix.states is with_it.prefix.states
    view.double()
    assert view.prefix.states is not with_it.prefix.states
    got = view(theta=view.initial, **task.train.named)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got.float(), without(theta=view.initial.float(), **task.train.named), rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------------------------------------------- memory


def test_what_does_not_fit_into_memory_goes_to_a_file(caplog: pytest.LogCaptureFixture) -> None:
    with_it, without = pair("bert")
    task, theta = ragged(tiny.matching_task("a")), somewhere(with_it)
    with_it.prefix.memory_bytes = 0
    with_it.prefix.forget()
    with caplog.at_level(logging.INFO, "pyro_lift"):
        for _ in range(3):
            got = loss_at(with_it, task, slice(0, 6), theta)
    loss_at(with_it, task, slice(None), theta)
    states = with_it.prefix.states
    assert states.file_bytes > 0 and "go to a file" in caplog.text
    for index in (slice(None), slice(5, 8), torch.tensor([7, 0])):
        for got_part, expected in zip(
            loss_at(with_it, task, index, theta), loss_at(without, task, index, theta), strict=True
        ):
            torch.testing.assert_close(got_part, expected, rtol=1e-5, atol=1e-5)
    assert got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_come_back_as_they_were_from_memory_and_from_the_file(dtype: torch.dtype, tmp_path: Any) -> None:
    states = RowStates(memory_bytes=4 * 3 * dtype.itemsize, folder=tmp_path)
    rows = {(k, 0, ""): torch.randn(1 + k % 3, 3).to(dtype) for k in range(6)}
    kept = [states.add(key, row) for key, row in rows.items()]
    again = [states.add(key, row) for key, row in rows.items() if key not in states]
    assert 0 < sum(kept) < 6 and sum(kept) + sum(again) == 6
    assert states.nbytes <= 4 * 3 * dtype.itemsize and states.file_bytes > 0
    assert not list(tmp_path.iterdir())  # without a name
    keys = list(rows)[::-1]
    got = states.gather(keys, 3, torch.zeros(1, dtype=dtype), {})
    for key, part in zip(keys, got, strict=True):
        assert torch.equal(part[: len(rows[key])], rows[key])


def test_a_full_disk_keeps_no_more_and_says_so(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    states = RowStates(memory_bytes=0, folder=tmp_path)
    assert [states.add((0, 0, ""), torch.ones(2, 3)) for _ in range(2)] == [False, True]
    assert states._file is not None
    states._file.limit = 30
    assert [states.add((1, 0, ""), torch.ones(2, 3)) for _ in range(2)] == [False, False]
    assert "no more room" in caplog.text
    fresh = {(1, 0, ""): torch.full((2, 3), 2.0)}
    got = states.gather([(1, 0, ""), (0, 0, "")], 2, torch.zeros(1), fresh)
    assert got[:, 0, 0].tolist() == [2.0, 1.0]


def test_a_recipe_for_the_last_layers_is_recognised() -> None:
    net = tiny.bert(LAYERS).eval()
    adapter = adapt_backbone(net, recipe(net, 2, layers_to_transform=[3]), seed=0)
    adapter(theta=adapter.initial, **tiny.matching_task("a").train.named)
    assert "3 of 4" in repr(adapter.prefix)
