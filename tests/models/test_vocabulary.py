"""Tokens that the network does not know are refused by name, in inputs and targets, before the first step."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_backbones import bert, gpt2, matching_task
from transformers import GPT2Config, GPT2LMHeadModel

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import recipe
from pyro_lift.models.observation import check_width
from pyro_lift.models.vocabulary import doubts_of_inputs

WORDS = 20


@pytest.fixture(scope="module")
def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return RandomAdapter(peft.get_peft_model(network, config))


def tokens(name: str = "known", *, token: int | None = None, target: int | None = None, part: str = "train") -> Task:
    """Six rows of five tokens; of one part the fourth row holds another input or target at its third place."""
    parts = {}
    for each in ("train", "dev", "test"):
        ids = torch.arange(30).view(6, 5) % WORDS
        targets = (ids + 1) % WORDS
        if each == part and token is not None:
            ids[3, 2] = token
        if each == part and target is not None:
            targets[3, 2] = target
        parts[each] = ({"input_ids": ids}, targets)
    return Task(name, parts["train"], kind="tokens", dev=parts["dev"], test=parts["test"])


@pytest.mark.parametrize("part", ["train", "dev", "test"])
@pytest.mark.parametrize("token", [WORDS, -1, 1000])
def test_an_unknown_input_is_refused_with_its_place(adapter: RandomAdapter, part: str, token: int) -> None:
    tasks = [tokens(), tokens("odd", token=token, part=part)]
    with pytest.raises(ValueError, match=rf"task 'odd', {part} data, 'input_ids': token {token} in row 3; .* {WORDS}"):
        check_width(adapter, tasks, None)


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_an_unknown_target_is_refused_with_its_place(adapter: RandomAdapter, part: str) -> None:
    tasks = [tokens(), tokens("odd", target=WORDS, part=part)]
    with pytest.raises(ValueError, match=rf"task 'odd', {part} data, targets: token {WORDS} in row 3; .* {WORDS}"):
        check_width(adapter, tasks, None)


def test_all_known_tokens_and_ignored_targets_pass(adapter: RandomAdapter) -> None:
    assert check_width(adapter, [tokens(token=WORDS - 1, target=-100), tokens("b", target=WORDS - 1)], None) == WORDS


def test_a_target_below_zero_is_told_what_does_not_count() -> None:
    with pytest.raises(ValueError, match=r"token -5 is below 0\. Targets that do not count"):
        tokens(target=-5)


def test_the_front_door_refuses_them_too(adapter: RandomAdapter) -> None:
    lift = LiFT(adapter, seed=0, samples=8, burn_in=0, sgd_steps=0)
    with pytest.raises(ValueError, match="task 'odd', train data, targets: token 99"):
        lift.meta_train([tokens(), tokens("odd", target=99)], progress=False)


def test_a_prior_refuses_a_matching_task_before_its_head_is_solved() -> None:
    torch.manual_seed(0)
    lift = LiFT(bert(), peft.LoraConfig(r=2, target_modules=["query"]), seed=0, samples=8, burn_in=0, sgd_steps=0)
    prior = lift.meta_train([matching_task("a"), matching_task("b")], progress=False, calibrate=False)
    odd = matching_task("odd")
    odd.train.inputs["input_ids"][3, 2] = 99
    for adapt in (lambda: prior.adapt(odd), lambda: prior.adapt_many([matching_task("c"), odd])):
        with pytest.raises(ValueError, match="task 'odd', train data, 'input_ids': token 99 in row 3"):
            adapt()


@pytest.mark.parametrize("kind", ["tokens", "matching"])
def test_adaptation_looks_at_the_rows_of_a_new_task_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make: Any = tokens if kind == "tokens" else matching_task
    if kind == "tokens":
        network: Any = gpt2()
        config = recipe(network, rank=2)
    else:
        network, config = bert(), peft.LoraConfig(r=2, target_modules=["query"])
    lift = LiFT(network, config, seed=0, samples=8, burn_in=0, sgd_steps=0)
    prior = lift.meta_train([make("a"), make("b")], progress=False, calibrate=False)
    seen: list[str] = []

    def counted(network: Any, rows: Any, where: str) -> Any:
        seen.append(where)
        return doubts_of_inputs(network, rows, where)

    monkeypatch.setattr("pyro_lift.models.door.doubts_of_inputs", counted)
    prior.adapt(make("c"), steps=4, draws=2)
    once = [f"task 'c', {part} data" for part in (("train", "dev", "test") if kind == "tokens" else ("train",))]
    assert sorted(seen) == sorted(once)
    seen.clear()
    prior.adapt_many([make("c"), make("d")], steps=4, draws=2)
    assert sorted(seen) == sorted([*once, *(where.replace("'c'", "'d'") for where in once)])
