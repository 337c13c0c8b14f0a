"""Whole numbers that a network of one's own has no entry for are refused with their place, and others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, Task
from pyro_lift.inference.baselines.linear_probe import LinearProbe
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.observation import check_width

WORDS, PLACES = 20, 6


class Tagger(nn.Module):
    """Tokens with places of their own, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(PLACES, 8)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        states: Tensor = self.words(tokens) + self.places(at)
        return torch.as_tensor(self.out(torch.tanh(self.mix(states))))


class Table(nn.Module):
    """Two columns of categories, each with a table of its own, and one that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(3, 8), nn.Embedding(50, 8)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = self.first(x[:, 0]) + self.second(x[:, 1]) + 1e-3 * x[:, 2:].to(self.mix.weight.dtype)
        return torch.as_tensor(self.out(torch.tanh(self.mix(states))))


def adapter_of(network: nn.Module) -> RandomAdapter:
    torch.manual_seed(0)
    return adapt_backbone(network, peft.LoraConfig(r=2, target_modules=["mix"]), seed=0)


def tags(name: str = "t", token: int | None = None, row: int = 3, part: str = "train") -> Task:
    parts = {}
    for k, each in enumerate(("train", "dev", "test")):
        x = torch.randint(0, WORDS, (5, PLACES), generator=torch.Generator().manual_seed(k))
        if token is not None and each == part:
            x[row, 2] = token
        parts[each] = (x, (x + 1).clamp(0, WORDS - 1))
    return Task(name, parts["train"], "tokens", dev=parts["dev"], test=parts["test"])


def table(name: str, value: int = 0, row: int = 0, column: int = 0) -> Task:
    x = torch.tensor([[2, 49, 1000], [0, 3, -5], [1, 40, 7], [2, 2, 2]])
    x[row, column] = value or x[row, column]
    return Task(name, (x, torch.arange(4) % 2), num_classes=2)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("token", [WORDS, -1])
@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_an_unknown_token_is_refused_with_its_place(part: str, token: int, row: int) -> None:
    adapter = adapter_of(Tagger())
    refused = rf"task 'odd', {part} data: {token} in row {row}; the network looks it up in a table of {WORDS}, from 0"
    for _ in range(2):  # the same words where the rows' sort is known already
        with pytest.raises(ValueError, match=refused):
            check_width(adapter, [tags("odd", token, row, part)], None)
        assert check_width(adapter, [tags()], None) == WORDS


def test_tokens_are_not_taken_for_places() -> None:
    """A first row that counts upwards is equal to its places, whose table is shorter."""
    adapter = adapter_of(Tagger())
    x = torch.stack([torch.arange(PLACES), torch.full((PLACES,), WORDS - 1)])
    assert check_width(adapter, [Task("t", (x, x), "tokens")], None) == WORDS


@pytest.mark.parametrize(("column", "value", "most"), [(0, 3, 3), (1, 50, 50), (1, -1, 50)])
@pytest.mark.parametrize("row", [0, 2])
def test_columns_have_tables_of_their_own(row: int, column: int, value: int, most: int) -> None:
    adapter = adapter_of(Table())
    assert check_width(adapter, [table("t")], None) == 2
    with pytest.raises(ValueError, match=rf"task 'odd', train data: {value} in row {row}; .* a table of {most}"):
        check_width(adapter, [table("odd", value, row, column)], None)


def test_every_door_says_so() -> None:
    def lift(network: nn.Module) -> LiFT:
        return LiFT(adapter_of(network), sgd_steps=0, burn_in=0, samples=8, seed=0)

    prior = lift(Tagger()).meta_train([tags("a"), tags("b")], progress=False)
    rows = lift(Table())
    tables = rows.meta_train([table("a"), table("b")], progress=False, calibrate=False)
    odd, category = tags("odd", WORDS + 3), table("odd", 3, 2)
    doors: list[Callable[[], Any]] = [
        lambda: lift(Tagger()).meta_train([tags("a"), odd], progress=False),
        lambda: prior.adapt(odd),
        lambda: prior.adapt_many([tags("a"), odd]),
        lambda: tables.adapt(category),
        lambda: rows.meta_train([table("odd", 3, 2), table("b")], progress=False),
        lambda: rows.tune([table("odd", 3, 2), table("b"), table("c")], budget="1 s", progress=False),
        lambda: LinearProbe(rows.adapter).meta_train([table("a"), category]),
        lambda: LinearProbe(rows.adapter).adapt(LinearProbe(rows.adapter).meta_train([table("a")]), category),
    ]
    for door in doors:
        with pytest.raises(
            ValueError, match=r"task 'odd', train data: (23 in row 3|3 in row 2); the network looks it up"
        ):
            door()
    posterior = prior.adapt(tags("new"), steps=4, draws=2)
    with pytest.raises(ValueError, match="inputs: 23 in row 3; the network looks it up"):
        posterior.predict(odd.train.inputs[""])
