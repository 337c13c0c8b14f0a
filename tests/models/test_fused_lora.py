"""LoRA's linear layers in one operation: PEFT's own numbers, first and second derivatives, and only where it may."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from tiny_backbones import FAMILIES
from torch import Tensor, nn

from pyro_lift.models import adapters
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.fused_lora import _FusedForward, _FusedLinear, fused_linear
from pyro_lift.models.peft_layers import peft_layers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_formula_with_its_first_and_second_derivatives(groups: int, bias: bool) -> None:
    x, A, B = normal(groups, 4, 5), normal(groups, 2, 5, seed=1), normal(groups, 3, 2, seed=2)
    weight, c = normal(3, 5, seed=3), normal(3, seed=4) if bias else None
    expected = x @ weight.T + (0.0 if c is None else c) + 0.7 * (x @ A.mT) @ B.mT
    torch.testing.assert_close(_FusedLinear.apply(x, weight, c, A, B, 0.7), expected)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return _FusedLinear.apply(x, weight, c, A, B, 0.7)  # type: ignore[no-any-return]

    inputs = tuple(t.clone().requires_grad_() for t in (x, A, B))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_rows_of_a_block_go_through_the_factors_of_their_own_task() -> None:
    base, x = nn.Linear(5, 3).double().requires_grad_(False), normal(6, 7, 5)  # three tasks of two rows
    A, B = normal(3, 2, 5, seed=1), normal(3, 3, 2, seed=2)
    block = fused_linear(x, base, A, B, 2.0)
    for k in range(3):
        own = fused_linear(x[2 * k : 2 * k + 2], base, A[k], B[k], 2.0)
        torch.testing.assert_close(block[2 * k : 2 * k + 2], own)


def adapter_of(family: str) -> RandomAdapter:
    torch.manual_seed(0)
    backbone = FAMILIES[family].make()
    return adapt_backbone(backbone, recipe(backbone, 2), seed=0).double()  # type: ignore[no-any-return]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the layers that run fused."""
    calls: list[int] = []
    plain: Any = vars(adapters)["fused"]

    def counting(layers: Any, name: Any) -> Any:
        context = plain(layers, name)
        original = fused_linear

        def one(*args: Any) -> Tensor:
            calls.append(1)
            return original(*args)

        monkeypatch.setattr("pyro_lift.models.fused_lora.fused_linear", one)
        return context

    monkeypatch.setattr(adapters, "fused", counting)
    return calls


def results(call: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient, and a product with the second derivative, in theta."""
    leaf = theta.clone().requires_grad_()
    out = call(leaf)
    (first,) = torch.autograd.grad((out.sin() * normal(*out.shape)).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * normal(*first.shape, seed=1)).sum(), leaf)
    return out.detach(), first.detach(), second


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
@pytest.mark.parametrize("block", [False, True], ids=["alone", "block"])
def test_a_network_gives_what_it_gives_as_peft_wrote_it(
    family: str, block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(family)
    rows = FAMILIES[family].task("a").train.take(torch.arange(4))
    noise = 0.1 * normal(2, adapter.dim, seed=1)
    theta = adapter.initial + (noise if block else noise[0])
    rows = replace(rows, inputs={k: x.double() if x.is_floating_point() else x for k, x in rows.inputs.items()})
    stacked = {name: torch.stack([x, x.flip(0)]) for name, x in rows.named.items()}
    positional = tuple(torch.stack([x, x.flip(0)]) for x in rows.positional)

    def call(theta: Tensor) -> Tensor:
        inputs, named = (positional, stacked) if block else (rows.positional, rows.named)
        output: Tensor = adapter(*inputs, theta=theta, **named)
        return output

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # which can be differentiated twice
        call(theta)
        calls = counted(monkeypatch)
        fast = results(call, theta)
        assert calls
        monkeypatch.setattr(adapters, "fused", lambda *_: nullcontext())
        plain = results(call, theta)
    for found, expected in zip(fast, plain, strict=True):
        assert float(expected.norm()) > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    assert not any("forward" in layer.__dict__ for layer in peft_layers(adapter.backbone).values())


@pytest.mark.parametrize("change", ["hook", "own bias", "bias", "autocast", "patched"])
def test_layers_that_do_more_run_as_they_are(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    named: dict[str, dict[str, Any]] = {"own bias": {"bias": "lora_only"}, "bias": {"lora_bias": True}}
    options = named.get(change, {})
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0"], **options), seed=0)
    (layer,) = peft_layers(adapter.backbone).values()
    seen: list[int] = []
    if change == "hook":
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    if change == "patched":
        own = type(layer).forward
        layer.__dict__["forward"] = lambda x: (seen.append(1), own(layer, x))[1]
    calls = counted(monkeypatch)
    with torch.autocast("cpu", enabled=change == "autocast"):
        adapter(torch.randn(5, 4), theta=adapter.initial.clone().requires_grad_())
    assert not calls
    assert bool(seen) == (change in ("hook", "patched"))
    assert ("forward" in layer.__dict__) == (change == "patched")


def test_what_goes_wrong_inside_leaves_the_layers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    adapter = adapt_backbone(net, peft.LoraConfig(r=1, target_modules=["0"]), seed=0)
    (layer,) = peft_layers(adapter.backbone).values()
    with pytest.raises(RuntimeError):
        adapter(torch.randn(5, 7), theta=adapter.initial)
    assert not isinstance(layer.forward, _FusedForward)
    assert torch.isfinite(adapter(torch.randn(5, 4), theta=adapter.initial)).all()
