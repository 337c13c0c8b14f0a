"""The small backbones kept in the repository: they load, and know more than nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ROOT

from pyro_lift.data.encode import TextToText, check_tokenizer
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.likelihoods import IGNORED, log_likelihood

LINES = [
    ("It was a cold evening, and the wind", "blew about the house."),
    ("She turned to him with a smile,", "and said that she was very happy."),
]


def per_token(context: list[str]) -> float:
    """Mean loss of a token of the second lines after some context."""
    from transformers import AutoTokenizer

    folder = ROOT / "backbones" / "bart-novels"
    model, tokenizer = load_backbone(folder, "seq2seq"), AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    rows = tuple(TextRow(text, (line,)) for text, (_, line) in zip(context, LINES, strict=True))
    task = TextToText(tokenizer, 2)(TextTask("t", rows, form="next_token", metric="Perplexity"))
    adapter = adapt_backbone(model, recipe(model))
    with torch.no_grad():
        output = adapter(theta=adapter.initial, **task.train.named)
        total = log_likelihood("tokens", output, task.train.target).sum()
    return -float(total) / int((task.train.target != IGNORED).sum())


def test_the_small_bart_knows_english() -> None:
    assert per_token([text for text, _ in LINES]) < 0.7 * math.log(8192)


def test_the_small_vit_tells_pictures_apart() -> None:
    network = load_backbone(ROOT / "backbones" / "vit-patches", "vision")
    adapter = adapt_backbone(network, recipe(network))
    with torch.no_grad():
        features = adapter(theta=adapter.initial, pixel_values=torch.rand(3, 3, 32, 32) * 2 - 1)
    assert features.shape == (3, 192)
    assert float(features.std(0).mean()) > 1e-3


@pytest.mark.parametrize("name", ["bart-novels", "vit-patches"])
def test_the_weights_are_small_and_half_precision_and_have_a_card(name: str) -> None:
    from safetensors.torch import load_file

    folder = ROOT / "backbones" / name
    assert (folder / "model.safetensors").stat().st_size < 30e6
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert "examples/pretrain_" in (folder / "README.md").read_text()
