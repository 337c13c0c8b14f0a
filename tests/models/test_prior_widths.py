"""How wide the prior of an adapter may be: by the layer's own size, and by what draws do to the loss."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.chance import chance_loss
from pyro_lift.models.prior_loss import PriorLoss, prior_loss
from pyro_lift.models.task import Task
from pyro_lift.models.weight_scales import OF_LAYER, OF_START, by_weight, harmless_scales, typical_size


def adapter(width: int = 64, rank: int = 8, scale: float = 1.0) -> RandomAdapter:
    torch.manual_seed(0)
    first = nn.Linear(width, width)
    with torch.no_grad():
        first.weight.mul_(scale)
    net = nn.Sequential(first, nn.Tanh(), nn.Linear(width, 3))
    return RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=rank, target_modules=["0", "2"])))


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("rank", [2, 32])
def test_a_draw_of_b_changes_a_layer_by_a_fifth_of_it_or_less(rank: int, scale: float) -> None:
    random = adapter(256, rank, scale)
    widths = dict(zip([entry.name for entry in random.layout], harmless_scales(random), strict=True))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in random.bind(random.initial).items():
        if "lora_A" not in name:
            continue
        layer: Any = random.backbone.get_submodule(name.split(".lora_A")[0])
        width = widths[name]
        assert width == widths[name.replace("lora_A", "lora_B")]
        out = layer.base_layer.weight.shape[0]
        change = layer.scaling["default"] * width * torch.randn(out, rank, generator=generator) @ tensor
        share = float(change.square().mean().sqrt() / layer.base_layer.weight.square().mean().sqrt())
        limited_by_start = width == pytest.approx(OF_START * float(tensor.square().mean().sqrt()), rel=1e-5)
        assert share < OF_LAYER if limited_by_start else share == pytest.approx(OF_LAYER, rel=0.25)


def test_tensors_that_are_no_factors_get_a_fifth_of_their_own_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    random = RandomAdapter(peft.get_peft_model(net, config))
    widths = dict(zip([entry.name for entry in random.layout], harmless_scales(random), strict=True))
    saved = {name: width for name, width in widths.items() if "modules_to_save" in name}
    assert len(saved) == 2
    for name, width in saved.items():
        assert width == pytest.approx(0.2 * float(random.bind(random.initial)[name].square().mean().sqrt()))


def test_widths_are_spread_over_the_weights_and_counted() -> None:
    random = adapter()
    spread = by_weight(random, harmless_scales(random))
    assert isinstance(spread, torch.Tensor) and spread.shape == random.initial.shape
    for entry, width in zip(random.layout, harmless_scales(random), strict=True):
        assert torch.equal(spread[entry.part], torch.full_like(spread[entry.part], width))
    assert by_weight(random, 0.5) == 0.5
    with pytest.raises(ValueError, match="3 numbers for the 4 tensors"):
        by_weight(random, [0.1, 0.2, 0.3])
    factors = torch.cat([x.reshape(-1) for name, x in random.bind(random.initial).items() if "lora_A" in name])
    assert typical_size(random) == pytest.approx(float(factors.square().mean().sqrt()))


def test_chance_is_the_entropy_of_what_is_predicted() -> None:
    classes = Task("c", (torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])))
    assert chance_loss(classes) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    tokens = Task("t", (torch.zeros(2, 3), torch.tensor([[1, 2, -100], [1, 2, 2]])), "tokens")
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert chance_loss(tokens) == pytest.approx(entropy * 5 / 2)
    y = torch.tensor([0.0, 2.0, 4.0])
    best = -torch.distributions.Normal(y.mean(), 0.5).log_prob(y).mean()
    assert chance_loss(Task("r", (torch.zeros(3, 2), y), "regression"), 0.5) == pytest.approx(float(best))


def learned() -> tuple[RandomAdapter, Task]:
    """A network whose first class is where its first input is positive, without the adapter's help."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.randn(256, 8)
    y = (x[:, 0] < 0).long()
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "2"]))), Task("t", (x, y))


@pytest.mark.parametrize("head_scale", [None, 1.0])
def test_harmless_widths_are_harmless_and_wide_ones_are_not(head_scale: float | None) -> None:
    random, task = learned()
    before = torch.get_rng_state()
    near = prior_loss(random, [task], random.initial, by_weight(random, harmless_scales(random)), head_scale=head_scale)
    far = prior_loss(random, [task], random.initial, 30.0, head_scale=head_scale)
    assert torch.equal(before, torch.get_rng_state())
    assert near.harmless and near.at_centre < 0.3 < 0.6 < near.chance
    assert far.at_centre == near.at_centre and (head_scale is not None or not far.harmless)


def test_harm_is_a_tenth_of_the_way_to_chance() -> None:
    assert PriorLoss(0.2, 0.289, 1.1).harmless and not PriorLoss(0.2, 0.291, 1.1).harmless
    assert PriorLoss(3.0, 3.1, 1.1).harmless and not PriorLoss(3.0, 3.12, 1.1).harmless  # untrained: a tenth of chance
