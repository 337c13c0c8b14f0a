"""What is no text among texts to predict, and bare tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from text_backbones import encoded, posterior_of
from torch import Tensor, nn

from pyro_lift import Task, TaskPosterior
from pyro_lift.models.backbones import adapt_backbone, recipe


@pytest.fixture(scope="module")
def classes() -> TaskPosterior:
    from tiny_backbones import FAMILIES

    torch.manual_seed(0)
    backbone = FAMILIES["bert"].make().eval()
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    return TaskPosterior(adapter, encoded("bert"), adapter.initial + torch.randn(2, adapter.dim))


NO_TEXTS: list[tuple[Any, str]] = [
    ([None], r"inputs\[0\] is None; .*are texts.*Fill in a text"),
    ([3], r"inputs\[0\] is 3; .*are texts"),
    ([2.5, float("nan")], r"inputs\[0\] is 2.5; "),
    ([b"red"], r"inputs\[0\] is b'red'; "),
    ([("red", "cat")], r"inputs\[0\] is a pair of strings; .*Join its strings to one"),
    ([["red", "cat", "dog"]], r"inputs\[0\] is a list of strings; "),
]


@pytest.mark.parametrize(("given", "message"), NO_TEXTS)
def test_what_is_no_text_is_told_with_its_place(classes: TaskPosterior, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        classes.predict(given)
    with pytest.raises(TypeError, match=message):
        posterior_of("bart").generate(given, max_new_tokens=2)
    with pytest.raises(TypeError, match=message):
        posterior_of("bart").predict(given)


def test_messages_outside_a_conversation_are_told(classes: TaskPosterior) -> None:
    with pytest.raises(TypeError, match=r"inputs\[0\] is a mapping; .*A conversation is a list of messages"):
        classes.predict([{"role": "user", "content": "red"}])


def test_no_row_is_told_alike_to_texts_and_numbers(classes: TaskPosterior) -> None:
    for posterior in (classes, by_keyword("pixel_values")):
        with pytest.raises(ValueError, match="an empty list; expected at least one row"):
            posterior.predict([])


def test_bare_tokens_of_rows_with_a_mask_are_told_the_mapping_to_give(classes: TaskPosterior) -> None:
    tokens = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a Tensor given, .* 2 inputs: 'attention_mask', 'input_ids'. Give a mapping"):
        classes.predict(tokens)
    assert classes.predict({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).shape == (2, 2)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(pixel_values))


def by_keyword(name: str) -> TaskPosterior:
    torch.manual_seed(0)
    adapter = adapt_backbone(Keyword(), peft.LoraConfig(r=1, target_modules=["linear"]), seed=0)
    task = Task("pictures", ({name: torch.randn(6, 4)}, torch.arange(6) % 3))
    return TaskPosterior(adapter, task, adapter.initial[None])


def test_a_bare_tensor_is_the_only_input_that_rows_have() -> None:
    posterior, x = by_keyword("pixel_values"), torch.randn(2, 4)
    expected = posterior.predict({"pixel_values": x})
    for form in (x, x.numpy(), np.asarray(x, dtype=np.float64), x.tolist()):
        torch.testing.assert_close(posterior.predict(form), expected)
