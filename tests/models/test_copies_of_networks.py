"""Networks that are awkward to copy: with checkpointing of transformers' own, or with a part that no copy can have."""

from __future__ import annotations

import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from saved_priors import trained
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.models.backbones import adapt_backbone, recipe


def checkpointing(network: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network.gradient_checkpointing_enable()
    return network


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_a_network_that_checkpoints_by_itself_gives_the_same_prior(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain: Any = trained(name).backbone
    plain.save_pretrained(tmp_path / "base")
    network = checkpointing(type(plain).from_pretrained(tmp_path / "base"))
    folder = trained(name).prior.save_pretrained(tmp_path / "prior")
    with caplog.at_level(logging.WARNING, "pyro_lift"):
        prior = LiFTPrior.from_pretrained(folder, network)
    assert "Use load_backbone(..., gradient_checkpointing=True)" in caplog.text
    assert "cannot be copied" not in caplog.text
    again = adapt_backbone(network, recipe(network, rank=2), seed=0).beginning_at(prior.adapter.initial)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.backbone.modules())
    assert network.is_gradient_checkpointing, "the caller's network stays as it was"
    rows = trained(name).tasks[2].train.named
    theta = prior.adapter.initial
    torch.testing.assert_close(prior.adapter(theta=theta, **rows), trained(name).prior.adapter(theta=theta, **rows))


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.lock = nn.Linear(4, 8), nn.Linear(8, 3), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_a_network_that_cannot_be_copied_is_used_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = [Task(f"t{k}", (torch.randn(8, 4), torch.arange(8) % 3), num_classes=3) for k in range(2)]
    config = peft.LoraConfig(r=2, target_modules=["first", "second"])
    network = Locked()
    lift = LiFT(network, config, sgd_steps=2, burn_in=2, samples=4, seed=0)
    prior = lift.meta_train(tasks, progress=False)
    assert "it is used as it is" in caplog.text
    assert type(network.first) is not nn.Linear, "PEFT's layers are in the network itself"
    expected = prior.adapt(tasks[0], steps=4, draws=2).predict(torch.ones(2, 4))
    loaded = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path), Locked())
    torch.testing.assert_close(loaded.adapt(tasks[0], steps=4, draws=2).predict(torch.ones(2, 4)), expected)
