"""Recipes of today's families, tiny and random: what the adapter says is what plain PEFT says, and texts are equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from text_backbones import TODAY, WRITERS, written
from torch import Tensor

from pyro_lift import TaskPosterior
from pyro_lift.models.activation_checkpointing import checkpoint_layers
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import RECIPES, adapt_backbone, recipe
from pyro_lift.saving.peft_folder import write_peft


def modernbert() -> Any:
    config = hf.ModernBertConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return hf.ModernBertModel(config).eval()


FAMILIES = sorted({*TODAY, *WRITERS, "modernbert"})
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
    backbone = modernbert()
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


def backbone_of(name: str) -> Any:
    return modernbert() if name == "modernbert" else written(name, draws=2).backbone


def inputs_of(backbone: Any) -> dict[str, Tensor]:
    rows = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return rows | ({"decoder_input_ids": IDS[:, :3]} if backbone.config.is_encoder_decoder else {})


def output_and_gradient(adapter: RandomAdapter, theta: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    output = adapter(**rows, theta=theta)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output.detach(), torch.autograd.grad((output * weight).sum(), theta)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_bfloat16_has_its_adapter_and_gradients_in_float32(name: str) -> None:
    backbone = backbone_of(name)
    for p in backbone.parameters():  # of a usual size again: attention that is all or nothing is lost to rounding
        if p.dim() > 1 and name != "modernbert":
            p.data.div_(32.0 if "t5" in name else 4.0)  # T5's attention is not scaled
    half = copy.deepcopy(backbone).to(torch.bfloat16)
    adapter, full = (adapt_backbone(net, recipe(net, rank=2), seed=0) for net in (half, backbone))
    assert {p.dtype for n, p in adapter.backbone.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert adapter.initial.dtype == torch.float32
    theta = adapter.initial + 0.1 * torch.randn(adapter.dim)
    ours, theirs = (output_and_gradient(a, theta, inputs_of(backbone)) for a in (adapter, full))
    assert ours[0].dtype == ours[1].dtype == torch.float32 and bool(torch.isfinite(ours[1]).all())
    for mine, exact in zip(ours, theirs, strict=True):  # two to three digits
        assert float((mine - exact).norm() / exact.norm()) < 0.15
    if name != "modernbert":
        task = written(name).posterior.task
        posterior = TaskPosterior(adapter, task, torch.stack([theta, theta + 0.1]))
        assert posterior.generate(IDS, which="draws", max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_with_checkpointed_layers_has_the_same_gradients(name: str) -> None:
    backbone = backbone_of(name)
    twin = copy.deepcopy(backbone)
    assert checkpoint_layers(twin) >= 1
    plain, checkpointed = (adapt_backbone(net, recipe(net, rank=2), seed=0) for net in (backbone, twin))
    rows = inputs_of(backbone)
    theta = plain.initial + 0.1 * torch.randn(plain.dim)
    pair, two = torch.stack([theta, theta - 0.1]), {name: torch.stack([x, x]) for name, x in rows.items()}
    for at, given in ((theta, rows), (pair, two)):
        for ours, theirs in zip(*(output_and_gradient(a, at, given) for a in (checkpointed, plain)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if name != "modernbert":
        task = written(name).posterior.task
        posteriors = [TaskPosterior(a, task, pair) for a in (checkpointed, plain)]
        texts = [p.generate(IDS, which="draws", num_beams=2, max_new_tokens=4).tolist() for p in posteriors]
        assert texts[0] == texts[1]
