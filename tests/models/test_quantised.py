"""Bases in 4 and 8 bits: the same function and gradients as the numbers they stand for, and whole rounds."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from command_files import TOML
from text_backbones import ROWS, SIZES, SPECIAL, TEXTS
from text_tokenizers import tokenizer
from tiny_backbones import causal_task, timm_vit
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.commands import adapt, predict, train
from pyro_lift.data.encode import NextToken
from pyro_lift.data.text import TextTask
from pyro_lift.defaults import resolved
from pyro_lift.models.activation_checkpointing import checkpoint_layers
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.networks import sharing_copy
from pyro_lift.models.quantised import dequantise, quantisation_of
from pyro_lift.settings import LiFTSettings

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 64}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
ROWS_OF_IDS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
WAYS = ["4bit", "4bit nested", "8bit", "torchao"]
# What these libraries say of themselves when they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to .*bit linear:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk, wide enough for blocks of 64 weights."""
    torch.manual_seed(3)
    network: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, **SPECIAL))
    for p in network.parameters():
        if p.dim() > 1:
            p.data.mul_(6.0)
    place = tmp_path_factory.mktemp("base")
    network.save_pretrained(place)
    tokenizer("causal").save_pretrained(place)
    return place


def load(place: Path, way: str) -> Any:
    if way == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        bits = {"load_in_8bit": True} if way == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = hf.BitsAndBytesConfig(**bits, bnb_4bit_use_double_quant=way == "4bit nested")
    return hf.AutoModelForCausalLM.from_pretrained(place, quantization_config=config, dtype=torch.float32).eval()


def plain_twin(network: Any) -> Any:
    """The network in full precision that a quantised one stands for."""
    twin = copy.deepcopy(network)
    dequantise(twin)
    return twin


def adapter_of(network: Any, **options: Any) -> RandomAdapter:
    return adapt_backbone(network, recipe(network, rank=2, **options), seed=0)


def output_and_gradient(adapter: RandomAdapter, theta: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    output = adapter(**ROWS_OF_IDS, theta=theta)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output.detach(), torch.autograd.grad((output * weight).sum(), theta)[0]


@pytest.mark.parametrize("way", WAYS)
def test_output_and_gradient_are_those_of_the_numbers_that_the_codes_stand_for(way: str, folder: Path) -> None:
    network = load(folder, way)
    plain = adapter_of(plain_twin(network))
    adapter = adapter_of(network)
    theta = adapter.initial + 0.3 * torch.randn(adapter.dim)
    assert theta.dtype == torch.float32 and torch.equal(adapter.initial, plain.initial)
    expected = output_and_gradient(plain, theta)
    with torch.no_grad():  # the call at which bitsandbytes repacks weights on some CPUs
        torch.testing.assert_close(adapter(**ROWS_OF_IDS, theta=theta), expected[0], atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(output_and_gradient(adapter, theta), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    full = adapter_of(hf.AutoModelForCausalLM.from_pretrained(folder))
    assert not torch.allclose(output_and_gradient(full, theta)[0], expected[0], atol=1e-3)

    pair = torch.stack([theta, theta - 0.1])  # two tasks in one pass
    together = adapter(theta=pair, **{name: torch.stack([x, x]) for name, x in ROWS_OF_IDS.items()})
    torch.testing.assert_close(together[0], expected[0], atol=2e-4, rtol=1e-4)
    adapter.check_use()
    widths = [resolved(LiFTSettings(), a).beta for a in (adapter, full)]
    torch.testing.assert_close(torch.tensor(widths[0]), torch.tensor(widths[1]), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_the_callers_network_and_the_adapters_do_not_disturb_each_other(way: str, folder: Path) -> None:
    network = load(folder, way)
    alone, reference = load(folder, way), adapter_of(load(folder, way))
    theta = reference.initial + 0.3
    expected = output_and_gradient(reference, theta)[0]
    with torch.no_grad():
        own = alone(**ROWS_OF_IDS).logits
        early = adapter_of(network)
        torch.testing.assert_close(network(**ROWS_OF_IDS).logits, own)
        late = adapter_of(network)  # from a network that has been called
    for adapter in (early, late, early.beginning_at(theta)):
        close = 2e-2 if adapter is late and way.startswith("4bit") else 1e-5  # repacking has rounded the scales
        torch.testing.assert_close(output_and_gradient(adapter, theta)[0], expected, atol=close, rtol=close)
        adapter.check_use()
    with torch.no_grad():
        torch.testing.assert_close(network(**ROWS_OF_IDS).logits, own)


def test_codes_are_in_memory_once(folder: Path) -> None:
    for way in ("4bit", "8bit"):
        network = load(folder, way)
        network(**ROWS_OF_IDS)
        twin: Any = sharing_copy(network)
        layer, other = (n.model.layers[0].self_attn.q_proj for n in (network, twin))
        assert layer is not other and layer.weight is not other.weight
        assert layer.weight.data_ptr() == other.weight.data_ptr()
        scales = (layer.state.SCB, other.state.SCB) if way == "8bit" else (layer.weight.absmax, other.weight.absmax)
        assert scales[0].data_ptr() == scales[1].data_ptr()


@pytest.mark.parametrize("way", ["4bit", "8bit"])
def test_a_whole_round_with_a_quantised_base(way: str, folder: Path, tmp_path: Path) -> None:
    network = load(folder, way)
    tasks = [NextToken(tokenizer("causal"))(TextTask(f"t{k}", ROWS)) for k in range(3)]
    lift = LiFT(network, recipe(network, rank=2), seed=0, sgd_steps=3, burn_in=3, samples=6, batch_size=2)
    prior = lift.meta_train(tasks[:2], progress=False)
    posterior = prior.adapt(tasks[2], steps=4, draws=2)
    assert posterior.thetas.dtype == prior.mixture.get().component_distribution.base_dist.loc.dtype == torch.float32
    texts = posterior.generate(TEXTS, which="draws", max_new_tokens=4)
    prior.save_pretrained(tmp_path / "prior")
    posterior.save_pretrained(tmp_path / "posterior")
    about = json.loads((tmp_path / "prior" / "config.json").read_text())["base_model"]
    known = {"4bit": (4, "nf4"), "8bit": (8, "int8")}[way]
    assert (about["quantisation"]["bits"], about["quantisation"]["type"]) == known
    assert about["parameters"] == sum(p.numel() for p in plain_twin(network).parameters())
    again = TaskPosterior.from_pretrained(tmp_path / "posterior", load(folder, way))
    torch.testing.assert_close(again.predict(tasks[2].train), posterior.predict(tasks[2].train))
    assert again.generate(TEXTS, which="draws", max_new_tokens=4) == texts
    full = hf.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"in {known[0]} bits \(bitsandbytes, {known[1]}\), not in full precision"):
        LiFTPrior.from_pretrained(tmp_path / "prior", full)
    assert LiFTPrior.from_pretrained(tmp_path / "prior", full, check_base=False).adapter.dim == lift.adapter.dim

    posterior.merge_and_save(tmp_path / "merged", 1)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert quantisation_of(merged) is None and not getattr(merged, "is_quantized", False)
    with torch.no_grad():
        expected = posterior.adapter(**ROWS_OF_IDS, theta=posterior.thetas[1])
        torch.testing.assert_close(merged(**ROWS_OF_IDS).logits, expected, atol=2e-4, rtol=1e-4)
    exported = peft.PeftModel.from_pretrained(load(folder, way), posterior.to_peft(tmp_path / "peft", 1))
    theirs = exported.train()(**ROWS_OF_IDS).logits  # as in training, where bitsandbytes takes no shortcuts
    torch.testing.assert_close(theirs, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["4bit", "8bit"])
def test_layers_below_the_adapter_and_checkpointed_ones_give_the_same(way: str, folder: Path) -> None:
    network = load(folder, way)
    config = recipe(network, rank=2, layers_to_transform=[1])
    plain = adapt_backbone(network, config, seed=0, frozen_prefix="off")
    passing = adapt_backbone(network, config, seed=0, frozen_prefix="on")
    checkpointed = load(folder, way)
    checkpoint_layers(checkpointed)
    again = adapt_backbone(checkpointed, config, seed=0, frozen_prefix="off")
    theta = plain.initial + 0.2
    expected = output_and_gradient(plain, theta)
    for adapter in (passing, again):
        for ours, theirs in zip(output_and_gradient(adapter, theta), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert passing.prefix.passes > 0


def test_the_command_line_trains_on_a_base_in_four_bits(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for task in ("tasks/a", "tasks/b", "new"):
        (tmp_path / task).mkdir(parents=True)
        rows = "".join(json.dumps({"input": row.input, "output": row.outputs[0]}) + "\n" for row in ROWS)
        (tmp_path / task / "train.jsonl").write_text(rows)
    text = TOML.format(model=folder, kind="causal", tasks=tmp_path / "tasks", out=tmp_path / "prior", extra="")
    (tmp_path / "run.toml").write_text(text.replace('kind = "causal"', 'kind = "causal"\nquantization = "4bit"'))
    prior = train(tmp_path / "run.toml", progress=False)
    assert quantisation_of(prior.adapter.backbone) == {
        "method": "bitsandbytes",
        "bits": 4,
        "type": "nf4",
        "weights": 14,
    }
    adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    lines = predict(tmp_path / "adapted").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line)["log_prob"] < 0.0 for line in lines)
    (tmp_path / "run.toml").write_text(text.replace('kind = "causal"', 'kind = "causal"\nquantization = "3bit"'))
    with pytest.raises(ValueError, match=r"quantization.*3bit.*4bit"):
        train(tmp_path / "run.toml")


def test_what_a_quantised_base_cannot_carry_is_refused_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load(folder, "4bit")
    with pytest.raises(ValueError, match="a IA3 adapter on a quantised network has not been tried; LoRA has"):
        adapt_backbone(network, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="'pissa' moves the base's own weights"):
        adapt_backbone(network, recipe(network, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="kind='vision' takes ViTs"):
        load_backbone("x", "timm", quantization="4bit")
    with pytest.raises(ValueError, match="not both"):
        load_backbone("x", "causal", quantization="4bit", quantization_config={})
    other = timm_vit()
    other.is_quantized, other.quantization_method = True, types.SimpleNamespace(value="gptq")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="quantised by gptq, which has not been tried"):
        adapt_backbone(other, recipe(other))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip install 'pyro-lift\[quantised\]'"):
        load_backbone("x", "causal", quantization="8bit")


def test_a_peft_model_on_a_quantised_base_is_used_itself(folder: Path) -> None:
    network: Any = load(folder, "4bit")
    model = peft.get_peft_model(network, recipe(network, rank=2))
    task: Task = causal_task("t")
    adapter = adapt_backbone(model)
    with torch.no_grad():
        before = adapter(**task.train.named, theta=adapter.initial)
    theta = adapter.initial.clone().requires_grad_()
    after = adapter(**task.train.named, theta=theta)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert bool((torch.autograd.grad(after.square().sum(), theta)[0] != 0).any())
    assert isinstance(adapter.backbone, nn.Module)
