"""Which frozen network an adapter belongs to: its name, a digest of every weight, and what it computes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.architecture import architecture_of, changed_settings, digests_of_values, same_values
from pyro_lift.models.conventions import base_of
from pyro_lift.models.peft_layers import adapter_tensors
from pyro_lift.models.quantised import as_saved, codes_of, quantisation_of, size_of

__all__ = ["check_base", "describe_base"]


def describe_base(adapter: RandomAdapter) -> dict[str, Any]:
    """Describe a base model: name, class, quantisation, architecture, digests, under names without PEFT's wrappers."""
    network = base_of(adapter.backbone)
    weights = _weights(adapter)
    return {
        "name": _name(network),
        "class": type(network).__name__,
        "parameters": sum(size_of(x) for x in weights.values()),
        "quantisation": quantisation_of(network),
        "architecture": architecture_of(network),
        "tensors": {name: [list(x.shape), *_digests(x.detach())] for name, x in weights.items()},
    }


def check_base(adapter: RandomAdapter, saved: Mapping[str, Any], where: Path) -> None:
    """Raise unless this is the base model the adapter was trained on.

    A copy in float16 or bfloat16 is the same model, in either direction. Of a folder of before there was a description
    of the architecture, the weights alone are compared; one of before there were two digests of a weight refuses
    float16 copies of a network in float32.

    Raises:
        ValueError: names the file, both models and the first weight that is missing, misshapen or different; or, where
            all are the same, the first setting of the architecture that differs, with both values.
    """
    given = describe_base(adapter)
    then, this = (base.get("name") or base.get("class") for base in (saved, given))
    who = f"made for another {this}" if then == this else f"made for {then}, not this {this}"
    loaded, loads = saved.get("quantisation"), given["quantisation"]
    if (was := as_saved(loaded)) != (now := as_saved(loads)):
        raise ValueError(
            f"{where}: made for {then} {was}, not {now}. Load the base model in the "
            "same way (quantization= of load_backbone, quantization_config= of transformers), or pass check_base=False "
            "to use the adapter on it as it is."
        )
    old, new = saved.get("tensors") or {}, given["tensors"]
    if missing := [name for name in old if name not in new]:
        raise ValueError(f"{where}: {who}: the network has no weight {missing[0]!r} ({len(missing)} missing).")
    if extra := [name for name in new if name not in old]:
        raise ValueError(f"{where}: {who}: the network's weight {extra[0]!r} was not there ({len(extra)} in all).")
    for name, (shape, *_) in new.items():
        if shape != old[name][0]:
            raise ValueError(
                f"{where}: {who}: the weight {name!r} has shape {tuple(shape)}, not {tuple(old[name][0])}."
            )
    if other := [name for name in new if not same_values(new[name][1:], old[name][1:])]:
        raise ValueError(
            f"{where}: {who}: the weight {other[0]!r} has other values ({len(other)} of {len(new)} differ). "
            "Load the base model it was trained on, or pass check_base=False if a difference is meant."
        )
    if changed := changed_settings(saved.get("architecture") or {}, given["architecture"]):
        name, (was, now) = next(iter(changed.items()))
        others = f" ({len(changed)} settings differ)" if len(changed) > 1 else ""
        raise ValueError(
            f"{where}: {who}: its weights are the same, but {name} was {was!r} and is {now!r}{others}, so that "
            "it may predict something else. Load the base model as it was, or pass check_base=False if a difference is "
            "meant."
        )


def _digests(weight: Tensor) -> list[str]:
    """Describe a weight's values; a quantised one's are codes, which are rounded by nobody."""
    codes = codes_of(weight)
    return digests_of_values(codes)[: None if codes is weight else 1]


def _name(network: Any) -> str | None:
    name = getattr(network, "name_or_path", None) or getattr(getattr(network, "config", None), "_name_or_path", None)
    cfg = getattr(network, "pretrained_cfg", None)
    if not name and isinstance(cfg, dict):  # timm
        name = cfg.get("hf_hub_id") or cfg.get("architecture")
    return str(name) if name else None


def _weights(adapter: RandomAdapter) -> dict[str, Tensor]:
    left_out = {entry.name for entry in adapter.layout} | _brought_by_peft(adapter)
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in sorted(adapter.backbone.named_parameters())
        if name not in left_out
    }


def _brought_by_peft(adapter: RandomAdapter) -> set[str]:
    """Frozen tensors that PEFT makes: those of other adapters, VeRA's shared projections, OFT's and FourierFT's own.

    A frozen factor of this adapter (LoRA with A held fixed) stays: the adapter means nothing beside another one.
    """
    made = {name for name, owner in adapter_tensors(adapter.backbone).items() if owner != adapter.adapter_name}
    names = [name for name, _ in adapter.backbone.named_parameters()]
    return made | {name for name in names if any(part in name for part in ("vera_", "oft_", "fourierft_"))}
