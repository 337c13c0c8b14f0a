"""Recipes of today's families, tiny and random: what the adapter says is what plain PEFT says, and texts are equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from text_backbones import TODAY, written

from pyro_lift import TaskPosterior
from pyro_lift.models.backbones import RECIPES, adapt_backbone, recipe
from pyro_lift.saving.peft_folder import write_peft

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.mark.parametrize("targets", ["recipe", "all-linear"])
@pytest.mark.parametrize("name", TODAY)
def test_a_family_writes_what_plain_peft_writes(name: str, targets: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if targets == "recipe" else {"target_modules": targets}
    known = written(name, draws=2, **options)
    assert known.backbone.config.model_type in RECIPES
    known.posterior.to_peft(tmp_path, 1)
    network = peft.PeftModel.from_pretrained(copy.deepcopy(known.backbone), tmp_path).eval()
    given = 1 if known.backbone.config.is_encoder_decoder else IDS.shape[1]
    theirs = network.generate(input_ids=IDS, num_beams=2, max_new_tokens=5)[:, given:]
    ours = known.posterior.generate(IDS, which=1, num_beams=2, max_new_tokens=5)
    assert ours.tolist() == theirs.tolist()
    twice = TaskPosterior(known.posterior.adapter, known.posterior.task, known.posterior.thetas[1:].repeat(2, 1))
    assert twice.generate(IDS, which="draws", num_beams=2, max_new_tokens=5).tolist() == theirs.tolist()
    assert torch.isfinite(known.posterior.score(IDS, ours).log_prob).all()


@pytest.mark.parametrize("targets", ["recipe", "all-linear"])
def test_modernbert_carries_an_adapter_that_plain_peft_loads(targets: str, tmp_path: Path) -> None:
    config = hf.ModernBertConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    backbone = hf.ModernBertModel(config).eval()
    options: dict[str, Any] = {} if targets == "recipe" else {"target_modules": targets}
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2, **options), seed=0)
    theta = adapter.initial + 0.3 * torch.randn(adapter.dim)
    write_peft(adapter, theta, tmp_path)
    network = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
    with torch.no_grad():
        theirs = network(input_ids=IDS).last_hidden_state.mean(1)
        rows = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        torch.testing.assert_close(adapter(**rows, theta=theta), theirs)
        assert not torch.allclose(theirs, adapter(**rows, theta=adapter.initial))
