"""PEFT's layers inside a network: whose adapter is in use, and what the adapter's tensors are called in its files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

__all__ = [
    "active_adapter",
    "adapter_tensors",
    "check_in_use",
    "check_places",
    "default_name",
    "file_name",
    "peft_layers",
]


def peft_layers(network: nn.Module) -> dict[str, Any]:
    """Layers that PEFT has put into a network, by name: tuners, and copies of whole modules."""
    if "peft" not in sys.modules:  # whoever has such layers has imported it
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def active_adapter(network: nn.Module) -> str | None:
    """Name of the one adapter of a PEFT model that is in use; None for a network without PEFT's layers.

    Raises:
        ValueError: several are active, which no vector of one adapter determines.
    """
    names = {name for layer in peft_layers(network).values() for name in layer.active_adapters}
    tuner: Any = getattr(network, "base_model", None)
    names |= set(getattr(tuner, "active_adapters", None) or ())
    if len(names) > 1:
        raise ValueError(
            f"several PEFT adapters are active ({', '.join(sorted(names))}); theta is the weights of one. "
            "Call model.set_adapter(name) first."
        )
    return names.pop() if names else None


def check_in_use(layers: Iterable[Any], adapter: str | None) -> None:
    """Refuse layers that do not use this adapter's weights at all.

    Raises:
        ValueError: merged into the base weights, switched off, or another adapter is active; names the way back.
    """
    for layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                "PEFT has merged the adapter into the base weights, so the network does not use theta. "
                "Call unmerge_adapter() on the PEFT model."
            )
        if layer._disable_adapters:
            raise ValueError(
                "PEFT has disabled the adapter, so the network does not use theta. Leave disable_adapter(), or call "
                "base_model.enable_adapter_layers() on the PEFT model."
            )
        active = layer._active_adapter
        if active != adapter and active != [adapter]:
            raise ValueError(
                f"the PEFT adapter in use is {active!r}, not {adapter!r}, whose weights theta is. "
                f"Call set_adapter({adapter!r}) on the PEFT model."
            )


def check_places(network: nn.Module, layers: dict[str, Any], adapter: str | None) -> None:
    """Refuse layers whose adapter has no effect whatever its weights: scaled by zero, or read past by PyTorch.

    Raises:
        ValueError: names the layer and the way out.
    """
    modules = dict(network.named_modules())
    for name, layer in layers.items():
        if (getattr(layer, "scaling", None) or {}).get(adapter) == 0:
            raise ValueError(
                f"the adapter at {name!r} is scaled by zero (lora_alpha, alpha_pattern): it has no effect."
            )
        parent, _, attribute = name.rpartition(".")
        attention = modules.get(parent)
        if attribute != "out_proj" or not isinstance(attention, nn.MultiheadAttention):
            continue
        wrapped = any(vars(other).get("_modules", {}).get("base_layer") is attention for other in layers.values())
        if wrapped or hasattr(
            layer, "modules_to_save"
        ):  # a copy of the whole layer: its weight is the one that is read
            continue
        raise ValueError(
            f"the adapter at {name!r} would have no effect: nn.MultiheadAttention reads out_proj's weight and never "
            f"calls the layer. Target the attention itself (target_modules=[{parent.rpartition('.')[2]!r}, ...]; LoRA "
            "has a layer for it), or leave out_proj out."
        )


def adapter_tensors(network: nn.Module) -> dict[str, str]:
    """Every parameter that belongs to an adapter, by its name in the network; the value is that adapter's name."""
    layers = peft_layers(network)
    owners = {name: _owner(name, layers) for name, _ in network.named_parameters()}
    return {name: owner[1][1] for name, owner in owners.items() if owner is not None}


def _owner(name: str, layers: dict[str, Any]) -> tuple[str, Sequence[str]] | None:
    """Find the layer that a parameter is an adapter's part of, and its path inside: ``lora_A``, adapter, ``weight``."""
    path = name.split(".")
    for stop in range(len(path) - 1, -1, -1):
        layer = layers.get(".".join(path[:stop]))
        if layer is None:
            continue
        inner = path[stop:]
        kinds = (*layer.adapter_layer_names, *layer.other_param_names, "modules_to_save")
        return (".".join(path[:stop]), inner) if len(inner) > 1 and inner[0] in kinds else None
    return None


def file_name(name: str, layers: dict[str, Any]) -> str:
    """Return a tensor's name in PEFT's files, which leave out the adapter's own name and nothing else.

    Args:
        name: in the PEFT model, as ``base_model.model.0.lora_A.default.weight``.
        layers: of the model, as :func:`peft_layers` gives them.
    """
    owner = _owner(name, layers)
    if owner is None:
        return name
    layer, (kind, _, *rest) = owner
    return ".".join([part for part in (layer, kind if kind != "modules_to_save" else "", *rest) if part])


def default_name(name: str, layers: dict[str, Any]) -> str:
    """Return a tensor's name where PEFT's own default name stands for the adapter's."""
    owner = _owner(name, layers)
    if owner is None:
        return name
    layer, (kind, _, *rest) = owner
    return ".".join([part for part in (layer, kind, "default", *rest) if part])
