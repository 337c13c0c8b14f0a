"""Targets of a causal network that are its own inputs, as transformers' labels are, are refused and never learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from text_backbones import llama, written
from tiny_backbones import V, causal_task, gpt2
from torch import Tensor

import pyro_lift
from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.likelihoods import IGNORED, next_tokens, shift_left
from pyro_lift.models.observation import check_width

REFUSED = r"every target that counts is the input token .* next_tokens\(input_ids, attention_mask\).*shift_left"
FAST: dict[str, Any] = {"sgd_steps": 0, "burn_in": 0, "samples": 8, "seed": 0}


def rows(seed: int = 0, prompt: int = 0, padding: int = 0) -> dict[str, Tensor]:
    """Six texts of seven tokens in transformers' form, -100 over a prompt and the padding."""
    x = torch.randint(5, V, (6, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(x)
    if padding:
        mask[1::2, -padding:] = 0
        x = x.masked_fill(mask == 0, 0)
    labels = x.masked_fill(mask == 0, IGNORED)
    labels[:, :prompt] = IGNORED
    return {"input_ids": x, "attention_mask": mask, "labels": labels}


def shifted(name: str = "right", seed: int = 1, parts: Any = None) -> Task:
    x = rows(seed)
    inputs = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
    return Task(name, (inputs, shift_left(x["labels"])), "tokens", **(parts or {}))


@pytest.fixture(scope="module")
def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    network = gpt2()
    return adapt_backbone(network, recipe(network, rank=2), seed=0)


@pytest.fixture(scope="module")
def prior(adapter: RandomAdapter) -> LiFTPrior:
    return LiFT(adapter, **FAST).meta_train([shifted("a", 1), shifted("b", 2)], progress=False)


@pytest.mark.parametrize("options", [{}, {"prompt": 3}, {"padding": 2}, {"prompt": 6}, {"prompt": 2, "padding": 3}])
def test_labels_of_transformers_are_refused_with_their_place(adapter: RandomAdapter, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"task 'hf', train data: {REFUSED}"):
        check_width(adapter, [shifted(), Task("hf", rows(**options), "tokens")], None)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_causal_network_is_meant(make: Any) -> None:
    network = make()
    known = adapt_backbone(network, recipe(network, rank=2), seed=0)
    with pytest.raises(ValueError, match=REFUSED):
        check_width(known, [Task("hf", rows(), "tokens")], None)


@pytest.mark.parametrize("part", ["dev", "test"])
def test_so_are_those_of_rows_to_be_judged_by(adapter: RandomAdapter, part: str) -> None:
    with pytest.raises(ValueError, match=rf"task 'hf', {part} data: {REFUSED}"):
        check_width(adapter, [shifted("hf", parts={part: rows(3, prompt=2)})], None)


def test_every_door_refuses_them(prior: LiFTPrior, tmp_path: Path) -> None:
    hf_task, right = Task("hf", rows(), "tokens"), [shifted("a", 1), shifted("b", 2)]
    save_file(rows(), str(tmp_path / "train.safetensors"))
    of_file = read_tensor_task(tmp_path)
    lift = LiFT(prior.adapter, **FAST)
    doors = {
        "meta_train": lambda: lift.meta_train([*right, hf_task], progress=False),
        "adapt": lambda: prior.adapt(hf_task),
        "adapt_many": lambda: prior.adapt_many([right[0], hf_task]),
        "calibrate": lambda: prior.calibrate([hf_task]),
        "file": lambda: prior.adapt(of_file),
        "compare": lambda: pyro_lift.compare([*right, shifted("c", 3), hf_task], prior.adapter, budget="4 s"),
        "tune": lambda: lift.tune([*right, hf_task], budget="2 s", progress=False),
    }
    for name, door in doors.items():
        with pytest.raises(ValueError, match=REFUSED):
            print(name, door())


def test_the_way_out_is_what_next_tokens_makes() -> None:
    x = rows(padding=2)
    assert torch.equal(shift_left(x["labels"]), next_tokens(x["input_ids"], x["attention_mask"]))
    prompt = torch.full((6,), 3)
    with_prompt = rows(prompt=3, padding=2)
    assert torch.equal(
        shift_left(with_prompt["labels"]), next_tokens(x["input_ids"], x["attention_mask"], prompt=prompt)
    )


def constant(length: int = 5) -> Tensor:
    return torch.arange(6, 12).unsqueeze(-1).expand(6, length).contiguous()


@pytest.mark.parametrize("last", [True, False])
def test_one_token_over_and_over_is_right_both_ways(adapter: RandomAdapter, last: bool) -> None:
    target = constant().clone()
    if not last:
        target[:, -1] = IGNORED
    assert check_width(adapter, [Task("t", ({"input_ids": constant()}, target), "tokens")], None) == V


def test_targets_that_follow_are_left_alone(adapter: RandomAdapter) -> None:
    text = torch.randint(5, V, (6, 8), generator=torch.Generator().manual_seed(0))
    text[0] = 7  # one row of a task says nothing of the others
    again = text[:, :-1].clone()
    again[:, -1] = again[:, -2]
    target = torch.full_like(again, IGNORED)
    target[:, -2] = again[:, -1]  # the token that comes is the last one again
    tasks = [
        Task("whole", ({"input_ids": text[:, :-1]}, text[:, 1:]), "tokens"),
        Task("again", ({"input_ids": again}, target), "tokens"),
        causal_task("c"),
    ]
    assert check_width(adapter, tasks, None) == V


def test_an_encoder_s_targets_stand_at_their_place() -> None:
    config = hf.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    task = Task("masked", rows(), "tokens")
    for network in (hf.BertForMaskedLM(config), hf.BertForTokenClassification(config)):
        if hasattr(network, "classifier"):  # as many tags as there are words
            network.classifier = torch.nn.Linear(16, V)
        known = adapt_backbone(network, peft.LoraConfig(r=2, target_modules=["query"]), seed=0)
        assert check_width(known, [task], None) == V


def test_a_network_that_is_read_with_a_shift_of_the_caller_s_is_left_alone() -> None:
    network = gpt2()
    config = recipe(network, rank=2)
    known = adapt_backbone(network, config, seed=0, postprocess=lambda output: output.logits.roll(1, 1))
    assert check_width(known, [Task("hf", rows(), "tokens")], None) == V


def test_rows_to_write_from_may_have_them() -> None:
    posterior = written("gpt2").posterior
    x = rows(prompt=4)
    inputs = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
    prompts = {name: value[:, :4] for name, value in inputs.items()}
    for target in (x["labels"], shift_left(x["labels"])):
        given = Task("t", (inputs, target), "tokens").train
        assert torch.equal(posterior.generate(given, max_new_tokens=3), posterior.generate(prompts, max_new_tokens=3))
