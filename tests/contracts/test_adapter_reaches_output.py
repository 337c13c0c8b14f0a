"""theta is what the network uses: every way of adapting a network gives its own export's output, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_lift import LiFT, RandomAdapter, Task
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.saving.peft_folder import read_peft, write_peft

V, D = 24, 16
Lora = peft.LoraConfig
Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Net(nn.Module):
    """Named layers, and what is done with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def two(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def plainly(net: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(net.b(torch.tanh(net.a(x))))


def encoder(mask: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def run(net: Any, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = mask
        states = net.encoder(x, src_key_padding_mask=padding if mask else None)
        return torch.as_tensor(net.head(states[:, :-1].mean(1)))

    return Net(run, encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(8, 3))


def attention() -> nn.Module:
    run = lambda net, x: net.head(net.attn(x, x, x)[0].mean(1))  # noqa: E731
    return Net(run, attn=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3))


def embedding() -> nn.Module:
    return Net(lambda net, x: net.head(net.embed(x).mean(1)), embed=nn.Embedding(20, 8), head=nn.Linear(8, 3))


def convolution() -> nn.Module:
    layers = {"c": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 3)}
    return Net(lambda net, x: net.head(net.norm(net.c(x)).mean((2, 3))), **layers)


def normed() -> nn.Module:
    with warnings.catch_warnings():  # torch would like the newer one used, which is the next layer
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    return Net(lambda net, x: net.head(net.s(net.n(net.o(x)))), o=old, n=new, s=spectral, head=nn.Linear(4, 3))


def shared() -> nn.Module:
    net = two(lambda net, x: net.b(torch.tanh(net.c(torch.tanh(net.a(x))))))
    net.c = net.a
    return net


def routed() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        chosen, out = (x.sum(-1) > 0).long(), torch.zeros_like(x)
        for k, expert in enumerate((net.a, net.c)):
            out[chosen == k] = expert(x[chosen == k])
        return torch.as_tensor(net.b(out))

    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 3), c=nn.Linear(4, 4))


def llama(**options: Any) -> nn.Module:
    sizes = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(  # type: ignore[no-any-return]
        hf.LlamaConfig(vocab_size=V, num_key_value_heads=2, max_position_embeddings=32, **sizes, **options)
    )


def bert(kind: Any = hf.BertModel, **options: Any) -> nn.Module:
    sizes = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    network: nn.Module = kind(hf.BertConfig(vocab_size=V, max_position_embeddings=32, **sizes, **options))
    return network


def albert() -> nn.Module:
    sizes = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 3, "num_attention_heads": 2}
    return hf.AlbertModel(hf.AlbertConfig(vocab_size=V, embedding_size=8, max_position_embeddings=32, **sizes))  # type: ignore[no-any-return]


def t5(kind: Any = hf.T5ForConditionalGeneration) -> nn.Module:
    sizes = {"d_model": D, "d_kv": 8, "d_ff": D, "num_layers": 1, "num_heads": 2}
    network: nn.Module = kind(hf.T5Config(vocab_size=V, decoder_start_token_id=0, pad_token_id=0, **sizes))
    return network


def timm_vit(**options: Any) -> nn.Module:
    from timm.models import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": D, "depth": 2, "num_heads": 2, "num_classes": 3}
    network: nn.Module = VisionTransformer(**{**sizes, **options})
    return network


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")  # type: ignore[return-value]


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def numbers(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(shape),), {})


def tokens() -> Inputs:
    ids = torch.randint(3, V, (4, 6))
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens_for_a_decoder() -> Inputs:
    return (), {**tokens()[1], "decoder_input_ids": torch.randint(3, V, (4, 3))}


class Way(NamedTuple):
    """A network, an adapter for it, and rows."""

    network: Callable[[], nn.Module]
    config: Callable[[], Any]
    rows: Callable[[], Inputs] = numbers(5, 4)


BOTH = ["a", "b"]
WAYS: dict[str, Way] = {
    **{
        f"init={start}": Way(
            lambda: two(plainly),
            lambda start=start: Lora(r=2, target_modules=BOTH, init_lora_weights=start),  # type: ignore[misc]
        )
        for start in (True, False, "gaussian", "orthogonal", "pissa", "olora")
    },
    "rslora": Way(lambda: two(plainly), lambda: Lora(r=2, target_modules=BOTH, use_rslora=True)),
    "lora_bias": Way(lambda: two(plainly), lambda: Lora(r=2, target_modules=BOTH, lora_bias=True)),
    "bias=all": Way(lambda: two(plainly), lambda: Lora(r=2, target_modules=["a"], bias="all")),
    "bias=lora_only": Way(lambda: two(plainly), lambda: Lora(r=2, target_modules=["a"], bias="lora_only")),
    "modules_to_save": Way(lambda: two(plainly), lambda: Lora(r=2, target_modules=["a"], modules_to_save=["b"])),
    "patterns": Way(
        lambda: two(plainly), lambda: Lora(r=2, target_modules=BOTH, rank_pattern={"b": 1}, alpha_pattern={"a": 5})
    ),
    "target_parameters": Way(
        lambda: two(plainly), lambda: Lora(r=2, target_modules=[], target_parameters=["a.weight", "b.weight"])
    ),
    "all-linear": Way(mlp, lambda: Lora(r=2, target_modules="all-linear")),
    "embedding": Way(
        embedding, lambda: Lora(r=2, target_modules=["embed", "head"]), lambda: ((torch.randint(0, 20, (4, 5)),), {})
    ),
    "convolution": Way(convolution, lambda: Lora(r=2, target_modules=["c", "head"]), numbers(3, 3, 8, 8)),
    "convolution LoHa": Way(convolution, lambda: peft.LoHaConfig(r=2, target_modules=["c"]), numbers(3, 3, 8, 8)),
    "convolution LoKr": Way(convolution, lambda: peft.LoKrConfig(r=2, target_modules=["c"]), numbers(3, 3, 8, 8)),
    "IA3": Way(lambda: two(plainly), lambda: peft.IA3Config(target_modules=BOTH, feedforward_modules=["b"])),
    "VeRA": Way(lambda: two(plainly), lambda: peft.VeraConfig(r=2, target_modules=BOTH)),
    "FourierFT": Way(lambda: two(plainly), lambda: peft.FourierFTConfig(n_frequency=5, target_modules=BOTH)),
    "LN tuning": Way(encoder, lambda: peft.LNTuningConfig(target_modules=["norm1", "norm2"]), numbers(5, 6, 8)),
    "attention": Way(attention, lambda: Lora(r=2, target_modules=["attn"]), numbers(5, 6, 8)),
    "encoder": Way(encoder, lambda: Lora(r=2, target_modules=["linear1", "linear2", "self_attn"]), numbers(5, 6, 8)),
    "encoder, masked": Way(lambda: encoder(True), lambda: Lora(r=2, target_modules=["linear1"]), numbers(5, 6, 8)),
    "encoder IA3": Way(
        encoder, lambda: peft.IA3Config(target_modules=["linear1"], feedforward_modules=[]), numbers(5, 6, 8)
    ),
    "parametrised weights": Way(normed, lambda: Lora(r=2, target_modules=["o", "n", "s", "head"])),
    "a layer at two places": Way(shared, lambda: Lora(r=2, target_modules=["a", "b", "c"])),
    "experts": Way(routed, lambda: Lora(r=2, target_modules=["a", "b", "c"])),
    "compiled": Way(lambda: compiled(mlp()), lambda: Lora(r=2, target_modules=["0", "2"])),
    "compiled inside": Way(
        lambda: Net(plainly, a=compiled(nn.Linear(4, 4)), b=nn.Linear(4, 3)), lambda: Lora(r=2, target_modules=BOTH)
    ),
    "compiled in place": Way(lambda: compiled_in_place(mlp()), lambda: Lora(r=2, target_modules=["0", "2"])),
    "float64": Way(
        lambda: mlp().double(), lambda: Lora(r=2, target_modules=["0"]), lambda: ((torch.randn(5, 4).double(),), {})
    ),
    "bfloat16": Way(
        lambda: mlp().bfloat16(),
        lambda: Lora(r=2, target_modules=["0"], modules_to_save=["2"]),
        lambda: ((torch.randn(5, 4).bfloat16(),), {}),
    ),
    "tied head": Way(lambda: llama(tie_word_embeddings=True), lambda: Lora(r=2, target_modules=["lm_head"]), tokens),
    "tied copy": Way(
        lambda: llama(tie_word_embeddings=True),
        lambda: Lora(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        tokens,
    ),
    "eager attention": Way(
        lambda: llama(attn_implementation="eager"), lambda: Lora(r=2, target_modules="all-linear"), tokens
    ),
    "some layers": Way(llama, lambda: Lora(r=2, target_modules=["q_proj"], layers_to_transform=[1]), tokens),
    "layers shared by ALBERT": Way(albert, lambda: Lora(r=2, target_modules=["query"]), tokens),
    "a classifier's copied head": Way(
        lambda: bert(hf.BertForSequenceClassification, num_labels=3),
        lambda: Lora(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        tokens,
    ),
    "T5": Way(t5, lambda: Lora(r=2, target_modules=["q", "wo"]), tokens_for_a_decoder),
    "T5's encoder": Way(lambda: t5(hf.T5EncoderModel), lambda: Lora(r=2, target_modules=["q"]), tokens),
    "timm": Way(timm_vit, lambda: Lora(r=2, target_modules=["qkv"]), numbers(2, 3, 8, 8)),
}


def answer(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return torch.as_tensor(output).float()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", WAYS)
def test_an_adapter_gives_the_output_of_its_own_export_on_the_plain_network(name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    torch.manual_seed(1)
    network = way.network()
    torch.manual_seed(1)
    plain: Any = way.network().eval()
    plain = getattr(plain, "_orig_mod", plain)
    state = {key: x.clone() for key, x in network.state_dict().items()}
    asking, training = [p.requires_grad for p in network.parameters()], network.training
    inputs, named = way.rows()
    streams = torch.get_rng_state()
    adapter = adapt_backbone(network, way.config(), seed=3, postprocess=answer)
    assert torch.equal(torch.get_rng_state(), streams), "the caller's random stream was moved"

    theta = adapter.initial + 0.2 * torch.randn(adapter.dim).to(adapter.initial)
    leaf = theta.clone().requires_grad_()
    output = adapter(*inputs, theta=leaf, **named)
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), leaf)
    assert [entry.name for entry in adapter.layout if not bool((gradient[entry.part] != 0).any())] == []
    with torch.no_grad():
        torch.testing.assert_close(adapter(*inputs, theta=theta, **named), output.detach(), atol=1e-4, rtol=1e-4)

    if name == "compiled inside":
        plain.a = plain.a._orig_mod
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(plain, str(write_peft(adapter, theta, tmp_path / "export")))
    # In eval mode PyTorch's own fused path reads past what PEFT has loaded; dropout is zero here.
    loaded.train(isinstance(plain, Net) and hasattr(plain, "encoder"))
    exported = answer(loaded(*inputs, **named)).detach()
    torch.testing.assert_close(exported, output.detach(), atol=1e-4, rtol=1e-4)
    assert float((exported - adapter(*inputs, theta=adapter.initial, **named).detach()).abs().max()) > 1e-4
    torch.testing.assert_close(read_peft(tmp_path / "export", adapter), theta, atol=2e-2, rtol=1e-2)

    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == asking and network.training == training


def no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        states = net.a(x)
    return torch.as_tensor(net.b(states))


def remembering() -> Callable[[Any, Tensor], Tensor]:
    kept: dict[bool, Tensor] = {}

    def run(net: Any, x: Tensor) -> Tensor:
        graph = torch.is_grad_enabled()
        if graph not in kept:
            kept[graph] = net.b(net.a(x))
        return kept[graph]

    return run


def recomputing(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: checkpoint(lambda y: net.b(torch.tanh(y)), net.a(x), use_reentrant=reentrant)


def timm_with_its_own_checkpointing() -> nn.Module:
    network: Any = timm_vit()
    network.set_grad_checkpointing(True)
    return network  # type: ignore[no-any-return]


def with_a_peft_layer() -> nn.Module:
    network = two(plainly)
    peft.inject_adapter_in_model(Lora(r=2, target_modules=["a"]), network)
    return network


REFUSED: dict[str, tuple[Way, str]] = {
    "a layer that is not called": (
        Way(lambda: two(lambda net, x: net.b(x @ net.a.weight.T)), lambda: Lora(r=2, target_modules=BOTH)),
        r"2 of 4 adapter tensors do not reach the network's output: .*a\.lora_A",
    ),
    "a layer whose result is not used": (
        Way(lambda: bert(), lambda: Lora(r=2, target_modules="all-linear")),
        r"do not reach the network's output: .*pooler",
    ),
    "no_grad": (Way(lambda: two(no_grad), lambda: Lora(r=2, target_modules=BOTH)), "do not reach"),
    "no_grad around all": (
        Way(lambda: two(no_grad), lambda: Lora(r=2, target_modules=["a"])),
        "the network does not use theta",
    ),
    "detached": (
        Way(lambda: two(lambda net, x: net.b(net.a(x).detach())), lambda: Lora(r=2, target_modules=BOTH)),
        "do not reach",
    ),
    "another network without gradients": (
        Way(
            lambda: two(lambda net, x: net.b(net.a(x) if torch.is_grad_enabled() else net.a.base_layer(x))),
            lambda: Lora(r=2, target_modules=BOTH),
        ),
        "without gradients the network gives another output",
    ),
    "dropout that does not look at the mode": (
        Way(
            lambda: two(lambda net, x: net.b(nn.functional.dropout(net.a(x), 0.1))),
            lambda: Lora(r=2, target_modules=BOTH),
        ),
        "random in eval mode",
    ),
    "an output kept from before": (
        Way(lambda: two(remembering()), lambda: Lora(r=2, target_modules=BOTH)),
        "same output at another theta",
    ),
    "an attention's out_proj": (
        Way(attention, lambda: Lora(r=2, target_modules=["out_proj", "head"])),
        r"never calls the layer. Target the attention itself \(target_modules=\['attn'",
    ),
    "an encoder's out_proj": (
        Way(encoder, lambda: Lora(r=2, target_modules=["out_proj"])),
        r"target_modules=\['self_attn'",
    ),
    "scale zero": (Way(mlp, lambda: Lora(r=2, target_modules=["0"], lora_alpha=0)), "scaled by zero"),
    "scale zero in one layer": (
        Way(mlp, lambda: Lora(r=2, target_modules=["0", "2"], alpha_pattern={"2": 0})),
        "'base_model.model.2' is scaled by zero",
    ),
    "checkpointing of its own": (
        Way(lambda: two(recomputing(False)), lambda: Lora(r=2, target_modules=BOTH)),
        "backward pass fails with an adapter bound",
    ),
    "reentrant checkpointing": (
        Way(lambda: two(recomputing(True)), lambda: Lora(r=2, target_modules=BOTH)),
        "backward pass fails|do not reach",
    ),
    "timm's checkpointing": (
        Way(timm_with_its_own_checkpointing, lambda: Lora(r=2, target_modules=["qkv"])),
        r"load_backbone\(gradient_checkpointing=True\)",
    ),
    "tied factors": (
        Way(
            lambda: llama(tie_word_embeddings=True),
            lambda: Lora(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
        ),
        "share their memory",
    ),
    "lazy layers": (
        Way(lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), lambda: Lora(r=2, target_modules=["1"])),
        "'0.weight' has no shape yet",
    ),
    "DataParallel": (
        Way(lambda: nn.DataParallel(mlp()), lambda: Lora(r=2, target_modules=["module.0"])),
        "Pass network.module",
    ),
    "PEFT's layers inside": (
        Way(with_a_peft_layer, lambda: Lora(r=2, target_modules=["b"])),
        "has a PEFT layer inside already, at 'a'",
    ),
    "a random start that moves the base": (
        Way(mlp, lambda: Lora(r=2, target_modules=["0"], init_lora_weights="pissa_niter_4")),
        "Use 'pissa'",
    ),
    "DoRA": (Way(mlp, lambda: Lora(r=2, target_modules=["0"], use_dora=True)), "use_dora=True is not supported"),
    "trained tokens": (
        Way(embedding, lambda: Lora(r=2, target_modules=["head"], trainable_token_indices={"embed": [1]})),
        "trained tokens are not layers",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_does_not_use_theta_is_refused_when_the_adapter_is_made(name: str) -> None:
    way, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        adapt_backbone(way.network(), way.config())


def test_where_no_row_can_be_made_up_the_first_real_one_is_tried() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            states = self.a(x) if y is None else self.a(x) + self.b(y)
            return torch.as_tensor(self.head(torch.tanh(states)))

    config = Lora(r=2, target_modules=["a", "b", "head"])
    adapter = adapt_backbone(Pair(), config)
    assert adapter(torch.randn(3, 4), theta=adapter.initial, y=torch.randn(3, 5)).shape == (3, 3)
    with pytest.raises(ValueError, match=r"do not reach the network's output: .*\.b\.lora_A"):
        adapt_backbone(Pair(), config)(torch.randn(3, 4), theta=torch.zeros(adapter.dim))
    tasks = [Task(f"t{i}", ({"x": torch.randn(6, 4)}, torch.arange(6) % 3)) for i in range(2)]
    with pytest.raises(ValueError, match="do not reach"):
        LiFT(Pair(), config, sgd_steps=1, burn_in=1, samples=2).meta_train(tasks, progress=False)
    allowed = adapt_backbone(Pair(), config, allow_unreached=True)
    assert allowed(torch.randn(3, 4), theta=allowed.initial).shape == (3, 3)


def test_an_output_that_rounds_the_adapter_away_is_refused_at_the_first_rows() -> None:
    net = two(lambda net, x: torch.round(net.b(net.a(x))))
    adapter = adapt_backbone(net, Lora(r=2, target_modules=BOTH))
    with pytest.raises(ValueError, match="zero in every adapter weight"):
        adapter(torch.randn(3, 4), theta=adapter.initial)


def test_a_configuration_read_from_a_folder_is_trained_again(tmp_path: Path) -> None:
    adapter = adapt_backbone(mlp(), Lora(r=2, target_modules=["0"]))
    read = peft.PeftConfig.from_pretrained(str(write_peft(adapter, adapter.initial, tmp_path / "adapter")))
    assert read.inference_mode and adapt_backbone(mlp(), read).dim == adapter.dim
    assert read.inference_mode


def test_the_probe_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # type: ignore[assignment, operator]
            return torch.as_tensor(self.b(self.a(x) + 0.0 * torch.rand(1)))

    network = Counting()
    state = torch.get_rng_state()
    model = peft.get_peft_model(network, Lora(r=2, target_modules=["a", "b"], init_lora_weights=False))
    torch.set_rng_state(state)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    RandomAdapter(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asking


def test_the_frozen_weights_of_an_attention_do_not_drift() -> None:
    """PEFT adds the product to the base weights for each call and subtracts it again, which leaves a rounding error."""
    adapter = adapt_backbone(attention(), Lora(r=2, target_modules=["attn"]))
    frozen = {name: p.clone() for name, p in adapter.backbone.named_parameters()}
    for _ in range(20):
        adapter(torch.randn(2, 3, 8), theta=torch.randn(adapter.dim))
        adapter(torch.randn(2, 2, 3, 8), theta=torch.randn(2, adapter.dim))
    assert all(torch.equal(p, frozen[name]) for name, p in adapter.backbone.named_parameters())
