"""Inputs of another type than the network's weights: both types and the way out stand in the message."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, Task
from pyro_lift.posterior import TaskPosterior


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.conv(x).mean((2, 3))))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.table(x).mean(1)))


def meta_train(network: nn.Module, x: Tensor, modules: list[str]) -> TaskPosterior:
    tasks = [Task(f"t{k}", (x, torch.arange(len(x)) % 3), num_classes=3) for k in range(2)]
    lift = LiFT(network, peft.LoraConfig(r=1, target_modules=modules), sgd_steps=2, burn_in=2, samples=4, seed=0)
    return lift.meta_train(tasks, progress=False).adapt(tasks[0], steps=4, draws=2)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_float32_rows_of_a_half_precision_network_are_told_both_types(weights: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=rf"inputs torch.float32 \[1, 4\].*weights are {weights}.*x.to\({weights}\)"
    ) as e:
        meta_train(dense().to(weights), torch.randn(6, 4), ["0", "2"])
    assert "network.float()" in str(e.value)
    meta_train(dense().to(weights), torch.randn(6, 4).to(weights), ["0", "2"])


@pytest.mark.parametrize(
    ("network", "x", "modules"),
    [
        (dense(), torch.ones(6, 4, dtype=torch.long), ["0", "2"]),
        (dense(), torch.ones(6, 4, dtype=torch.uint8), ["0", "2"]),
        (dense().half(), torch.ones(6, 4, dtype=torch.long), ["0", "2"]),
        (Pictures(), torch.ones(6, 1, 8, 8, dtype=torch.uint8), ["conv", "head"]),
    ],
)
def test_whole_numbers_to_a_network_of_floats_are_told_the_type_to_give(
    network: nn.Module, x: Tensor, modules: list[str]
) -> None:
    weights = next(network.parameters()).dtype
    with pytest.raises(ValueError, match=rf"inputs {x.dtype} .*Its weights are {weights}.*numbers with a point"):
        meta_train(network, x, modules)


def test_floats_to_be_looked_up_are_told_to_be_whole() -> None:
    with pytest.raises(ValueError, match=r"inputs torch.float32 .*by whole numbers: give x.long\(\)"):
        meta_train(Lookup(), torch.ones(6, 5), ["table", "head"])


def test_other_reasons_say_nothing_of_types() -> None:
    with pytest.raises(ValueError, match="cannot be called") as e:
        meta_train(dense(), torch.ones(6, 5), ["0", "2"])
    assert "Its weights are" not in str(e.value)
