"""Many adapters in one pass: equal, in numbers, to one pass each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter

B, ROWS, TOKENS = 3, 4, 5


def _bart() -> tuple[nn.Module, list[str]]:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config), ["q_proj", "k_proj", "v_proj", "out_proj"]


def _t5() -> tuple[nn.Module, list[str]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config), ["q", "k", "v", "o"]


def _bert() -> tuple[nn.Module, list[str]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(config), ["query", "key", "value", "attention.output.dense"]


def _vit() -> tuple[nn.Module, str]:
    from timm.models import VisionTransformer

    from pyro_lift.models.backbones import TIMM_ATTENTION

    net = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    return net, TIMM_ATTENTION


def _tokens(*shape: int) -> Tensor:
    return torch.randint(4, 50, shape)


def _mask() -> Tensor:
    mask = torch.ones(B, ROWS, TOKENS, dtype=torch.long)
    mask[:, :, -1] = torch.randint(0, 2, (B, ROWS))
    return mask


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Callable[[], dict[str, Tensor]]]] = {
    "bart": (
        _bart,
        lambda: {
            "input_ids": _tokens(B, ROWS, TOKENS),
            "attention_mask": _mask(),
            "decoder_input_ids": _tokens(B, ROWS, 3),
        },
    ),
    "t5": (_t5, lambda: {"input_ids": _tokens(B, ROWS, TOKENS), "decoder_input_ids": _tokens(B, ROWS, 3)}),
    "bert": (_bert, lambda: {"input_ids": _tokens(B, ROWS, TOKENS), "attention_mask": _mask()}),
    "vit": (_vit, lambda: {"x": torch.randn(B, ROWS, 1, 8, 8)}),
}


def _adapted(net: nn.Module, targets: Any, **options: Any) -> RandomAdapter:
    return RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=targets, **options)))


def _spread(adapter: RandomAdapter, count: int = B) -> Tensor:
    return adapter.initial + 0.3 * torch.randn(count, adapter.dim, dtype=adapter.initial.dtype)


def _output_and_gradient(adapter: RandomAdapter, theta: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    leaf = theta.clone().requires_grad_()
    output = adapter(theta=leaf, **inputs)
    weights = torch.linspace(-1.0, 1.0, output[0].numel() if theta.dim() > 1 else output.numel()).to(output)
    (gradient,) = torch.autograd.grad((output.flatten(-output.dim() + (theta.dim() > 1)) * weights).sum(), leaf)
    return output.detach(), gradient


@pytest.mark.parametrize("name", NETWORKS)
def test_a_block_equals_its_tasks_one_by_one(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    build, make_inputs = NETWORKS[name]
    adapter, inputs = _adapted(*build()), make_inputs()
    theta = _spread(adapter)
    output, gradient = _output_and_gradient(adapter, theta, inputs)
    assert adapter._block.one_pass is True
    for k in range(B):
        alone, alone_gradient = _output_and_gradient(adapter, theta[k], {n: x[k] for n, x in inputs.items()})
        torch.testing.assert_close(output[k], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient[k], alone_gradient, rtol=1e-9, atol=1e-10)
    assert (output[0] - output[1]).norm() > 1e-3


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"modules_to_save": ["classifier"]}, {"bias": "lora_only"}])
def test_other_kinds_of_adapters(options: dict[str, Any]) -> None:
    """A head that is trained too goes along in one pass; single biases do not, and go task by task."""
    torch.set_default_dtype(torch.float64)
    adapter = _adapted(*_bert(), **options)
    theta = _spread(adapter)
    inputs = {"input_ids": _tokens(B, ROWS, TOKENS)}
    output = adapter(theta=theta, **inputs)
    assert adapter._block.one_pass is ("bias" not in options)
    for k in range(B):
        torch.testing.assert_close(output[k], adapter(input_ids=inputs["input_ids"][k], theta=theta[k]))


def test_the_first_block_is_tried_even_where_all_tasks_agree() -> None:
    adapter = _adapted(*_bert())
    theta = adapter.initial.expand(B, -1)
    output = adapter(input_ids=_tokens(B, ROWS, TOKENS), theta=theta)
    assert adapter._block.one_pass is True
    assert output.shape[:2] == (B, ROWS)


class _Shuffled(nn.Module):
    """Reverses its rows before the adapted layer, which then mixes up the tasks of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(0)).flip(0)  # type: ignore[no-any-return]


class _Uncalled(nn.Module):
    """Uses its layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.mT


def test_a_network_that_mixes_rows_goes_task_by_task() -> None:
    adapter = _adapted(_Shuffled(), ["layer"])
    theta, x = _spread(adapter), torch.randn(B, ROWS, 4)
    output = adapter(x, theta=theta)
    assert adapter._block.one_pass is False
    for k in range(B):
        torch.testing.assert_close(output[k], adapter(x[k], theta=theta[k]))


def test_inputs_that_no_task_could_be_given_say_nothing_of_blocks(caplog: pytest.LogCaptureFixture) -> None:
    adapter = _adapted(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), ["0", "2"])
    theta = _spread(adapter)
    with pytest.raises(RuntimeError, match=r"Expected size|cannot be multiplied"):
        adapter(torch.randn(B, ROWS, 7), theta=theta)
    assert "task by task" not in caplog.text and adapter._block.one_pass is None
    adapter(torch.randn(B, ROWS, 4), theta=theta)
    assert adapter._block.one_pass


def test_a_layer_that_is_not_called_goes_task_by_task() -> None:
    net = _Uncalled()
    net.layer.bias.requires_grad_(False)
    net.layer.bias = None  # type: ignore[assignment]
    frozen = nn.Linear(4, 4)
    whole = nn.Sequential(frozen, net)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter = RandomAdapter(whole)
    theta, x = _spread(adapter), torch.randn(B, ROWS, 4)
    output = adapter(x, theta=theta)
    assert adapter._block.one_pass is False
    torch.testing.assert_close(output[1], adapter(x[1], theta=theta[1]))


def test_the_network_gets_its_own_tensors_back() -> None:
    adapter = _adapted(*_bert())
    before = dict(adapter.backbone.named_parameters())
    with pytest.raises(ValueError, match="unpack"):
        adapter(input_ids=torch.zeros(1, 1, 1, 1, dtype=torch.long), theta=adapter.initial)
    adapter(input_ids=_tokens(B, ROWS, TOKENS), theta=_spread(adapter))
    after = dict(adapter.backbone.named_parameters())
    assert all(after[name] is p for name, p in before.items()) and after.keys() == before.keys()
    assert not any("forward" in module.__dict__ for module in adapter.backbone.modules())
