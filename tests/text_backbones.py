"""Tiny random networks that write text, and posteriors of a few random draws around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from text_tokenizers import tokenizer
from tiny_backbones import V, bart, causal_task, gpt2, seq2seq_task, t5
from torch import nn

from pyro_lift import Task, TaskPosterior
from pyro_lift.data.encode import LabelMatching, NextToken, TextToText
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.models.backbones import adapt_backbone, recipe

SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **SPECIAL))  # type: ignore[no-any-return]


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **SPECIAL, tie_word_embeddings=True))  # type: ignore[no-any-return]


class Writer(NamedTuple):
    """A network that writes text, and a task that fits it."""

    make: Callable[[], Any]
    task: Callable[[str], Task]


WRITERS = {
    "bart": Writer(bart, seq2seq_task),
    "t5": Writer(t5, seq2seq_task),
    "gpt2": Writer(gpt2, causal_task),
    "llama": Writer(llama, causal_task),
    "qwen2": Writer(qwen2, causal_task),
}
#: Families that are not held to every test of the ones above.
TODAY = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, **SPECIAL, head_dim=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SIZES, **SPECIAL, head_dim=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, **SPECIAL, head_dim=4, sliding_window=4)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, **SPECIAL, head_dim=4, sliding_window=4)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES, **SPECIAL)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, **SPECIAL)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, **SPECIAL)),
    "t5 gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, eos_token_id=2,
        )
    ),
}  # fmt: skip
CAUSAL = ("gpt2", "llama", "qwen2")


class Written(NamedTuple):
    """A backbone without adapter, and a posterior of random draws on a copy of it."""

    backbone: Any
    posterior: TaskPosterior


def written(name: str, draws: int = 3, scale: float = 0.5, **options: Any) -> Written:
    """Random draws that are far enough apart to write different texts; options are of the adapter."""
    torch.manual_seed(5)
    backbone: Any = (WRITERS[name].make if name in WRITERS else TODAY[name])().eval()
    if name in ("bart", "t5", "gpt2"):
        backbone.generation_config.pad_token_id = 0
        backbone.generation_config.eos_token_id = 2
        backbone.generation_config.bos_token_id = 1
        backbone.generation_config.forced_eos_token_id = None
    for p in backbone.parameters():  # an initialisation of 0.02 writes one token again and again
        if p.dim() > 1:
            p.data.mul_(8.0)
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2, **options), seed=0)
    thetas = adapter.initial + scale * torch.randn(draws, adapter.dim)
    task = seq2seq_task if backbone.config.is_encoder_decoder else causal_task
    return Written(backbone, TaskPosterior(adapter, task("new"), thetas))


ROWS = (TextRow("red cat", ("one",)), TextRow("blue dog", ("two three",)), TextRow("green bird", ("four",)))
TEXTS = ["red dog", "green cat is a bird", "blue"]


def encoded(name: str, task: str = "colours") -> Task:
    kind = {"bart": "seq2seq", "t5": "seq2seq", "bert": "encoder"}.get(name, "causal")
    if kind == "encoder":
        rows = tuple(TextRow(row.input, ("good" if k % 2 else "bad",)) for k, row in enumerate(ROWS))
        return LabelMatching(tokenizer(kind))(TextTask(task, rows, form="classification", labels=("good", "bad")))
    made: Any = TextToText(tokenizer(kind), start_token=2) if kind == "seq2seq" else NextToken(tokenizer(kind))
    return made(TextTask(task, ROWS))  # type: ignore[no-any-return]


def posterior_of(name: str) -> TaskPosterior:
    known = written(name).posterior
    return TaskPosterior(known.adapter, encoded(name), known.thetas)
