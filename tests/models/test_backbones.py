"""Backbones of every family: the adapter at its start, its gradients, other PEFT kinds, loading, one whole round."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from tiny_backbones import FAMILIES, D, Family, N, bart, bert, causal_task, gpt2, hf_vit, matching_task, seq2seq_task
from torch import Tensor, nn

from pyro_lift import LiFT, Task
from pyro_lift.data.digits import digit_backbone
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import outputs


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def plain_output(model: nn.Module, task: Task) -> Tensor:
    model.eval()
    named = {k: x for k, x in task.train.named.items() if not k.startswith("label_")}
    output: Any = model(**named)
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return torch.as_tensor(getattr(output, name))
    return torch.as_tensor(output)


def test_the_adapter_at_its_initialisation_is_the_backbone(family: Family) -> None:
    model, task = family.make(), family.task("t")
    with torch.no_grad():
        own = plain_output(model, task)
        adapter = adapt_backbone(model, recipe(model, rank=2), postprocess=lambda out: out)
        named = {k: x for k, x in task.train.named.items() if not k.startswith("label_")}
        output: Any = adapter(theta=adapter.initial, **named)
        ours = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    torch.testing.assert_close(torch.as_tensor(ours), own, atol=1e-6, rtol=1e-6)


def test_every_adapter_weight_gets_a_gradient_away_from_zero(family: Family) -> None:
    torch.manual_seed(2)
    model, task = family.make(), family.task("t")
    adapter = adapt_backbone(model, recipe(model, rank=2))
    theta = (adapter.initial + 0.3 * torch.randn(adapter.dim)).requires_grad_()
    output = outputs(adapter, task.train, theta, None)
    if family.head_scale is not None:
        output = output @ torch.randn(D, 3)
    (grad,) = torch.autograd.grad(log_likelihood(task.kind, output, task.train.target).sum(), theta)
    still = [entry.name for entry in adapter.layout if not bool((grad[entry.part] != 0).all())]
    assert still == []


def test_one_round_of_meta_training_adaptation_prediction_and_export(family: Family, tmp_path: Path) -> None:
    model = family.make()
    plain = copy.deepcopy(model)
    tasks = [family.task(f"t{i}") for i in range(3)]
    settings = {"sgd_steps": 3, "burn_in": 3, "samples": 6, "batch_size": 4, "head_scale": family.head_scale}
    lift = LiFT(model, recipe(model, rank=2), seed=0, **settings)  # type: ignore[arg-type]
    prior = lift.meta_train(tasks[:2], progress=False)
    posterior = prior.adapt(tasks[2], steps=4, draws=2)
    probabilities = posterior.predict(tasks[2].train)
    assert len(probabilities) == N
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    loaded = peft.PeftModel.from_pretrained(plain, posterior.to_peft(tmp_path / "adapter"))
    with torch.no_grad(), lift.adapter.bound(posterior.thetas.mean(0)):
        ours, theirs = plain_output(lift.adapter.backbone, tasks[2]), plain_output(loaded, tasks[2])
    torch.testing.assert_close(theirs, ours)
    assert not torch.equal(theirs, plain_output(family.make(), tasks[2]))


KINDS: dict[str, Callable[[], Any]] = {
    "rslora": lambda: peft.LoraConfig(r=2, target_modules=["query"], use_rslora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["query"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["query"]),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["query"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["query"]),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_of_other_kinds_are_the_backbone_at_their_start_and_learn(kind: str) -> None:
    model, task = bert(), matching_task("t")
    with torch.no_grad():
        own = plain_output(model, task)
    adapter = adapt_backbone(model, KINDS[kind](), postprocess=lambda out: out.last_hidden_state)
    named = {k: x for k, x in task.train.named.items() if not k.startswith("label_")}
    with torch.no_grad():
        torch.testing.assert_close(adapter(theta=adapter.initial, **named), own, atol=1e-5, rtol=1e-5)
    theta = (adapter.initial + 0.1 * torch.randn(adapter.dim)).requires_grad_()
    (grad,) = torch.autograd.grad((adapter(theta=theta, **named) * torch.randn(N, 6, D)).sum(), theta)
    assert bool(torch.isfinite(grad).all()) and float((grad != 0).double().mean()) > 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(r=2, target_modules=["query"], use_dora=True), "use_dora=True is not supported"),
        (peft.LoraConfig(r=2, target_modules=["query"], lora_dropout=0.1), "lora_dropout=0.1"),
        (peft.AdaLoraConfig(target_modules=["query"], total_step=10), "ADALORA adapter is not supported: it prunes"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING adapter is not supported"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), None),
    ],
)
def test_kinds_that_do_not_fit_a_sampler_are_refused_by_name(config: Any, message: str | None) -> None:
    if message is None:
        assert adapt_backbone(bert(), config).dim > 0
        return
    with pytest.raises(ValueError, match=message):
        adapt_backbone(bert(), config)


def test_a_family_without_a_recipe_names_its_linear_layers() -> None:
    with pytest.raises(ValueError, match=r"no recipe for a 'Sequential' backbone.*of its linear layers: 0"):
        recipe(nn.Sequential(nn.Linear(2, 2)))


def test_some_layers_of_a_network_whose_layers_are_its_own_children() -> None:
    """PEFT finds a layer's number only behind a name in front of its list."""
    digits = digit_backbone(pretrained=False)
    last = adapt_backbone(digits, recipe(digits, layers_to_transform=[2]), seed=0)
    assert {entry.name.split(".blocks.")[1][0] for entry in last.layout} == {"2"}
    whole = adapt_backbone(digits, recipe(digits), seed=0)
    assert whole.dim == 3 * last.dim
    encoder = bert()  # whose layers PEFT finds
    some = adapt_backbone(encoder, recipe(encoder, layers_to_transform=[0]), seed=0)
    assert all(".layer.0." in entry.name for entry in some.layout)


def test_any_module_with_linear_layers_works_with_its_own_targets() -> None:
    net = nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, 3))
    adapter = adapt_backbone(net, recipe(net, target_modules=["0", "2"]))
    assert adapter(torch.randn(2, 4), theta=adapter.initial).shape == (2, 3)


@pytest.mark.parametrize("kind", ["seq2seq", "encoder", "causal", "vision"])
def test_backbones_load_from_a_folder(kind: Any, tmp_path: Path) -> None:
    model = {"seq2seq": bart, "encoder": bart, "causal": gpt2, "vision": hf_vit}[kind]()
    model.half().save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_backbone(tmp_path, kind)
    assert not loaded.training and next(loaded.parameters()).dtype == torch.float32
    adapter = adapt_backbone(loaded, recipe(loaded, rank=2))
    assert adapter.dim > 0


def test_a_timm_backbone_loads_from_a_folder(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config: dict[str, Any] = {"architecture": "vit_tiny_patch16_224", "num_classes": 3}
    config |= {"model_args": {"img_size": 32, "depth": 1}, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_backbone(tmp_path, "timm")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_a_bfloat16_backbone_keeps_the_adapter_and_the_draws_in_float32(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)  # type: ignore[operator]
    model = load_backbone(tmp_path, "encoder", dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    adapter, task = adapt_backbone(model, recipe(model, rank=2)), matching_task("t")
    assert adapter.initial.dtype == torch.float32
    theta = (adapter.initial + 0.1 * torch.randn(adapter.dim)).requires_grad_()
    output = outputs(adapter, task.train, theta, None)
    (grad,) = torch.autograd.grad(log_likelihood("matching", output, task.train.target).sum(), theta)
    assert grad.dtype == torch.float32 and bool(torch.isfinite(grad).all())
    full = adapt_backbone(load_backbone(tmp_path, "encoder"), recipe(model, rank=2))
    with torch.no_grad():
        torch.testing.assert_close(output.float(), outputs(full, task.train, theta, None), atol=0.5, rtol=0.05)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "seq2seq", "causal"])
def test_gradient_checkpointing_gives_the_same_gradient_and_does_compute_again(
    kind: Any, block: bool, tmp_path: Path
) -> None:
    make, tasks = {"encoder": (bert, matching_task), "seq2seq": (bart, seq2seq_task), "causal": (gpt2, causal_task)}[
        kind
    ]
    model, task = make(), tasks("t")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    grads, calls = [], []  # type: ignore[var-annotated]
    for checkpointing in (False, True):
        loaded = load_backbone(tmp_path, kind, gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        adapter = adapt_backbone(loaded, recipe(loaded, rank=2))
        count = [0]

        def counted(*_: Any, count: list[int] = count) -> None:
            count[0] += 1

        first = next(m for n, m in loaded.named_modules() if n.endswith(("query", "q_proj", "c_attn")))
        first.register_forward_hook(counted)
        theta = adapter.initial + 0.1
        named, target = task.train.named, task.train.target
        if block:
            theta = torch.stack([theta, theta - 0.05])
            named = {k: torch.stack([x, x]) for k, x in named.items()}
            target = torch.stack([target, target])
        with torch.no_grad():
            adapter(theta=theta, **named)  # the trial of the first rows
        count[0] = 0
        output = adapter(theta=theta.requires_grad_(), **named)
        if block:
            output, target = output.flatten(0, 1), target.flatten(0, 1)
        grads += torch.autograd.grad(log_likelihood(task.kind, output, target).sum(), theta)
        calls.append(count[0])
    torch.testing.assert_close(grads[1], grads[0])
    assert calls == [1, 2]


# torch looks at .grad of every tensor that it traces; ours are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_backbone_gives_the_same_output_and_gradient_at_every_theta(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)  # type: ignore[operator]
    task = matching_task("t")
    values, grads = [], []  # type: ignore[var-annotated]
    for backend in (False, "eager"):  # all of torch.compile but the code generator, which takes a minute
        loaded = load_backbone(tmp_path, "encoder", compile=backend)
        torch.manual_seed(1)
        adapter = adapt_backbone(loaded, recipe(loaded, rank=2))
        for shift in (0.1, 0.2):
            theta = (adapter.initial + shift).requires_grad_()
            values.append(outputs(adapter, task.train, theta, None))
            grads += torch.autograd.grad(log_likelihood("matching", values[-1], task.train.target).sum(), theta)
        pair = torch.stack([adapter.initial + 0.1, adapter.initial + 0.2])
        values.append(adapter(theta=pair, **{k: torch.stack([x, x]) for k, x in task.train.named.items()}))
    for plain, compiled in zip(values[:3], values[3:], strict=True):
        torch.testing.assert_close(compiled, plain, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(grads[2:], grads[:2], atol=2e-5, rtol=1e-4)


def test_unknown_kinds_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'seq2seq'"):
        load_backbone("x", "seq2sec")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        load_backbone("x", "encoder", dtype="float16")  # type: ignore[arg-type]


def test_where_no_layer_has_the_names_that_peft_is_told_the_layers_are_named() -> None:
    network = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), act=nn.Tanh(), last=nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"nope.*Its layers with weights are called 'first', 'last'\.$"):
        adapt_backbone(network, peft.LoraConfig(r=1, target_modules=["nope"]))


def test_where_no_layer_has_the_number_that_peft_is_told_the_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="layers_to_transform chooses from, are numbered 0 to 1"):
        adapt_backbone(bert(2), peft.LoraConfig(r=1, target_modules=["query"], layers_to_transform=[2]))
