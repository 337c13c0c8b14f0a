"""Texts in passes sorted by length: the numbers and their order are those of one pass."""

from __future__ import annotations

import peft
import pytest
import tiny_backbones as tiny
import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.lengths import PASS_TOKENS, by_length, passes

LONGEST = 24


def masks(lengths: Tensor, longest: int = LONGEST) -> Tensor:
    return (torch.arange(longest) < lengths.unsqueeze(-1)).long()


def test_passes_hold_every_row_once_and_nothing_longer_than_they_say() -> None:
    lengths = torch.randint(1, LONGEST + 1, (3, 200))
    chosen = passes(masks(lengths))
    assert len(chosen) > 1
    assert torch.equal(torch.cat([part.rows for part in chosen], -1).sort(-1).values, torch.arange(200).expand(3, -1))
    for part in chosen:
        assert int(lengths.gather(-1, part.rows).max()) == part.length


def test_a_pass_is_made_only_where_it_saves_more_than_its_start() -> None:
    lengths = torch.tensor([4] * 8 + [LONGEST] * 8)
    saved = 8 * (LONGEST - 4)
    assert saved > PASS_TOKENS
    assert [part.length for part in passes(masks(lengths))] == [4, LONGEST]
    assert len(passes(masks(lengths[6:10]))) == 1
    assert len(passes(masks(torch.full((500,), LONGEST)))) == 1


def test_padding_that_no_row_needs_is_cut_off() -> None:
    (part,) = passes(masks(torch.tensor([3, 5, 4])))
    assert part.length == 5


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_output_is_in_the_order_of_the_rows(lead: tuple[int, ...]) -> None:
    lengths = torch.randint(1, LONGEST + 1, (*lead, 64))
    ids = torch.randint(1, 9, (*lead, 64, LONGEST))
    mask = masks(lengths)
    seen: list[int] = []

    def sums(named: dict[str, Tensor]) -> Tensor:
        seen.append(named["input_ids"].shape[-1])
        value = (named["input_ids"] * named["attention_mask"]).sum(-1, keepdim=True).float()
        return torch.cat([value, -value], -1)

    got = by_length(sums, {"input_ids": ids, "attention_mask": mask})
    expected = (ids * mask).sum(-1).float()
    assert torch.equal(got, torch.stack([expected, -expected], -1))
    assert seen == sorted(seen) and len(seen) > 1


def reader() -> tuple[RandomAdapter, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = tiny.bert(2).eval()
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["query", "value"]), seed=0)
    lengths = torch.randint(1, LONGEST + 1, (2, 40))
    named = {"input_ids": torch.randint(5, tiny.V, (2, 40, LONGEST)), "attention_mask": masks(lengths)}
    adapter(theta=adapter.initial, **{name: x[0] for name, x in named.items()})
    return adapter, named


@pytest.mark.parametrize("block", [False, True])
def test_features_and_gradients_are_those_of_one_pass(block: bool) -> None:
    adapter, named = reader()
    theta = (adapter.initial + 0.1 * torch.randn(2, adapter.dim)).requires_grad_()
    at = theta if block else theta[0]
    inputs = named if block else {name: x[0] for name, x in named.items()}
    assert adapter._sorts((), inputs)
    got, expected = adapter(theta=at, **inputs), adapter._run(at, (), inputs, False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(got.shape)
    gradients = [torch.autograd.grad((x * weight).sum(), theta)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_token_outputs_keep_their_places() -> None:
    task = tiny.causal_task("a")
    net = tiny.gpt2(2).eval()
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), seed=0)
    output = adapter(theta=adapter.initial, **task.train.named)
    assert not adapter._sorts((), task.train.named)
    assert output.shape[:2] == task.train.inputs["input_ids"].shape
