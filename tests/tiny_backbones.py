"""Tiny random backbones of every family, and tasks that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

from pyro_lift import Task
from pyro_lift.models.likelihoods import next_tokens, shift_right

V, D, N = 24, 16, 8


class Family(NamedTuple):
    """A tiny random backbone and tasks that fit it."""

    make: Callable[..., nn.Module]
    task: Callable[[str], Task]
    head_scale: float | None


def ids(length: int = 6) -> Tensor:
    return torch.randint(5, V, (N, length))


def seq2seq_task(name: str) -> Task:
    target, x = ids(4), ids()
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "decoder_input_ids": shift_right(target, 2)}
    return Task(name, (inputs, target), "tokens")


def causal_task(name: str) -> Task:
    x = ids()
    mask = torch.ones_like(x)
    return Task(name, ({"input_ids": x, "attention_mask": mask}, next_tokens(x, mask)), "tokens")


def matching_task(name: str) -> Task:
    x, labels = ids(), torch.randint(5, V, (3, 3))
    texts = {"input_ids": labels, "attention_mask": torch.ones_like(labels)}
    rows = ({"input_ids": x, "attention_mask": torch.ones_like(x)}, torch.arange(N) % 3)
    return Task(name, rows, "matching", label_texts=texts)


def picture_task(key: str) -> Callable[[str], Task]:
    return lambda name: Task(name, ({key: torch.randn(N, 3, 8, 8)}, torch.arange(N) % 3))


def bart(layers: int = 1) -> nn.Module:
    config = hf.BartConfig(
        vocab_size=V, d_model=D, encoder_layers=layers, decoder_layers=1, encoder_attention_heads=2, dropout=0.1,
        decoder_attention_heads=2, encoder_ffn_dim=D, decoder_ffn_dim=D, max_position_embeddings=32,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)  # type: ignore[no-any-return]


def t5(layers: int = 1) -> nn.Module:
    config = hf.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=D, num_layers=layers, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def gpt2(layers: int = 1) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=V, n_positions=32, n_embd=D, n_layer=layers, n_head=2))  # type: ignore[no-any-return]


def bert(layers: int = 1) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=D,
        max_position_embeddings=32,
    )  # fmt: skip
    return hf.BertModel(config)  # type: ignore[no-any-return]


def hf_vit(layers: int = 1) -> nn.Module:
    config = hf.ViTConfig(
        image_size=8, patch_size=4, hidden_size=D, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=D
    )
    return hf.ViTModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def timm_vit(layers: int = 1) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=D, depth=layers, num_heads=2)  # type: ignore[no-any-return]


FAMILIES = {
    "bart": Family(bart, seq2seq_task, None),
    "t5": Family(t5, seq2seq_task, None),
    "gpt2": Family(gpt2, causal_task, None),
    "bert": Family(bert, matching_task, None),
    "vit": Family(hf_vit, picture_task("pixel_values"), 0.5),
    "timm": Family(timm_vit, picture_task("x"), None),
}
