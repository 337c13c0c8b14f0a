"""Shapes of backbones for benchmarks: networks with random weights, and tasks that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from pyro_lift.models.task import Task

__all__ = ["BACKBONES", "LABEL_TOKENS", "ROWS", "TOKENS", "VOCABULARY", "Shape"]


#: Attention of some of a timm ViT's blocks.
TIMM = r".*blocks\.({})\.attn\.(qkv|proj)"

ROWS, TOKENS, LABEL_TOKENS, VOCABULARY = 16, 64, 8, 50265


@dataclass(frozen=True)
class Shape:
    """A backbone with random weights, and one task for it."""

    make: Callable[[], nn.Module]
    task: Callable[[int], Task]
    #: Of a minibatch.
    rows: int = ROWS
    #: Of the network, or of its encoder.
    layers: int = 1
    #: Pattern of the adapted modules of some layers, where they cannot be given by number alone.
    targets: str | None = None
    #: Whether the network gives features, for heads of the tasks' own.
    features: bool = False


def _bart(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, dropout=0.0,
    )  # fmt: skip
    model: nn.Module = BartForConditionalGeneration(config)
    return model


def _vit(size: int, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    from timm.models import VisionTransformer

    net: nn.Module = VisionTransformer(
        img_size=size, patch_size=patch, num_classes=10, embed_dim=width, depth=depth, num_heads=heads
    )
    return net


def _t5(layers: int, width: int, hidden: int, heads: int, vocabulary: int = 32128) -> nn.Module:
    """Make a network of T5 1.1's shape."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=hidden, num_layers=layers, num_heads=heads,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def _text_task(vocabulary: int, number: int, rows: int = ROWS, tokens: int = TOKENS) -> Task:
    generator = torch.Generator().manual_seed(number)
    draw = partial(torch.randint, 5, vocabulary, generator=generator)
    x, target = draw(size=(2 * rows, tokens)), draw(size=(2 * rows, LABEL_TOKENS))
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "decoder_input_ids": target.roll(1, -1)}
    return Task(f"text{number}", (inputs, target), "tokens")


def _bert(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    """Make a network of MiniLM's kind, without a head."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def _class_task(vocabulary: int, number: int, rows: int = 50, longest: int = TOKENS) -> Task:
    """Make texts of 8 tokens to the longest, any length as likely as another, of three classes."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(5, vocabulary, (rows, longest), generator=generator)
    lengths = torch.randint(8, longest + 1, (rows, 1), generator=generator)
    mask = (torch.arange(longest) < lengths).long()
    return Task(f"classes{number}", ({"input_ids": x * mask, "attention_mask": mask}, torch.arange(rows) % 3))


def _picture_task(size: int, number: int) -> Task:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(2 * ROWS, 3, size, size, generator=generator)
    return Task(f"pictures{number}", ({"x": x}, torch.arange(2 * ROWS) % 10))


#: The shapes of the paper's backbones, and small ones whose own cost does not hide what is beside it.
BACKBONES: dict[str, Shape] = {
    "bart-base": Shape(partial(_bart, 6, 768, 12, VOCABULARY), partial(_text_task, VOCABULARY)),
    "vit-b16": Shape(partial(_vit, 224, 16, 768, 12, 12), partial(_picture_task, 224), layers=12, targets=TIMM),
    "bart-small": Shape(partial(_bart, 2, 128, 4, 1000), partial(_text_task, 1000)),
    "vit-small": Shape(partial(_vit, 32, 8, 128, 4, 4), partial(_picture_task, 32), layers=4, targets=TIMM),
    "minilm": Shape(partial(_bert, 6, 384, 12, 30522), partial(_class_task, 30522), layers=6, features=True),
    "minilm-tiny": Shape(
        partial(_bert, 3, 16, 2, 50), partial(_class_task, 50, rows=12, longest=16), layers=3, features=True
    ),
    "bart-tiny": Shape(partial(_bart, 1, 16, 2, 50), partial(_text_task, 50)),
    "vit-tiny": Shape(partial(_vit, 8, 4, 16, 2, 2), partial(_picture_task, 8), layers=2, targets=TIMM),
    # Few rows and tokens: what fits beside 3 billion weights, and what is over in a minute without a GPU.
    "t5-xl": Shape(partial(_t5, 24, 2048, 5120, 32), partial(_text_task, 32128, rows=4, tokens=64), 4),
    "t5-large": Shape(partial(_t5, 24, 1024, 2816, 16), partial(_text_task, 32128, rows=2, tokens=16), 2),
    "t5-tiny": Shape(partial(_t5, 1, 16, 32, 2, 50), partial(_text_task, 50, rows=4, tokens=32), 4),
}
