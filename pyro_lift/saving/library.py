"""A library of LoRAs that exist already: PEFT folders read into one space, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import MOVES_BASE, adapt_backbone
from pyro_lift.models.lora_factors import lora_pairs
from pyro_lift.models.networks import plain_network
from pyro_lift.saving.peft_folder import (
    PEFT_CONFIG,
    adapter_config,
    config_from_dict,
    config_to_dict,
    read_config,
    read_peft,
)

__all__ = ["COMMON_START", "SHARED", "LoRALibrary", "common_start", "read_library"]


#: What must be the same in all adapters for their weights to be coordinates of one space, with the reason.
SHARED: dict[str, tuple[Any, str]] = {
    "peft_type": (None, "other kinds of adapters have other tensors"),
    "r": (None, "adapters of other ranks have other shapes"),
    "rank_pattern": ({}, "adapters of other ranks have other shapes"),
    "target_modules": (None, "adapters of other layers have other tensors"),
    "layers_to_transform": (None, "adapters of other layers have other tensors"),
    "use_rslora": (False, "rsLoRA scales by alpha / sqrt(r), plain LoRA by alpha / r"),
    "use_dora": (False, "DoRA has norms beside the product"),
    "lora_alpha": (None, "the same factors under another scale are another adapter"),
    "alpha_pattern": ({}, "the same factors under another scale are another adapter"),
    "fan_in_fan_out": (False, "the factors are transposed"),
    "bias": ("none", "trained biases are not part of the adapter"),
    "modules_to_save": (None, "copied layers are not part of the adapter"),
}


#: Below this cosine of the A factors two adapters did not start from the same ones (which gives nearly 1; chance, 0).
COMMON_START = 0.5


class LoRALibrary(NamedTuple):
    """Adapters in one space.

    Attributes:
        adapter: the network as a function of theta.
        names: of the adapters, their folders'.
        thetas: ``[N, D]``.
    """

    adapter: RandomAdapter
    names: tuple[str, ...]
    thetas: Tensor


def read_library(
    folders: Sequence[str | Path], backbone: nn.Module, options: Mapping[str, Any] | None = None
) -> LoRALibrary:
    """Read PEFT folders as vectors of one space; see :func:`prior_from_adapters`."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} adapters given: a prior over adapters needs at least two.")
    configs = [read_config(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        _check_config(path, config)
        _check_same(paths[0], configs[0], path, config)
    adapter = _attached(paths[0], configs[0], backbone, options or {})
    thetas = torch.stack([read_peft(path, adapter) for path in paths])
    return LoRALibrary(adapter, tuple(path.name for path in paths), thetas)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"{path / PEFT_CONFIG}: a {config['peft_type']} adapter; only LoRA is learned from.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVES_BASE):
        raise ValueError(
            f"{path / PEFT_CONFIG}: init_lora_weights={start!r} moves the base model's own weights too. Convert the "
            "adapter first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if config.get("use_dora"):
        raise ValueError(f"{path / PEFT_CONFIG}: use_dora=True is not supported: DoRA has norms beside the product.")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        name = "modules_to_save" if config.get("modules_to_save") else "bias"
        raise ValueError(f"{path / PEFT_CONFIG}: {name}={config[name]!r}: only the low-rank factors are learned from.")


def _check_same(first: Path, wanted: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> None:
    for name, (default, why) in SHARED.items():
        was, given = (_plain(c.get(name, default)) for c in (wanted, config))
        if was != given:
            raise ValueError(f"{path / PEFT_CONFIG}: {name}={given!r}, but {was!r} in {first}: {why}.")
    was, given = (str(c.get("base_model_name_or_path") or "").rstrip("/") for c in (wanted, config))
    if was and given and was != given:
        raise ValueError(f"{path / PEFT_CONFIG}: an adapter of the base model {given!r}, but {was!r} in {first}.")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _attached(path: Path, config: dict[str, Any], backbone: nn.Module, options: Mapping[str, Any]) -> RandomAdapter:
    from peft import PeftModel

    backbone = plain_network(backbone)
    if isinstance(backbone, (RandomAdapter, PeftModel)):
        adapter = backbone if isinstance(backbone, RandomAdapter) else adapt_backbone(backbone, **options)
        own = config_to_dict(adapter_config(adapter))
        _check_same(Path("the backbone's own adapter"), own, path, config)
        return adapter
    name = str(getattr(backbone, "name_or_path", "") or "").rstrip("/")
    told = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if name and told and Path(name).name != Path(told).name:
        raise ValueError(f"{path / PEFT_CONFIG}: an adapter of the base model {told!r}, not of {name!r}.")
    # Dropout was for training, and the sampler brings its own noise.
    ready = config_from_dict({**config, "lora_dropout": 0.0, "inference_mode": False}, path / PEFT_CONFIG)
    try:
        return adapt_backbone(backbone, ready, seed=0, **options)
    except ValueError as error:
        raise ValueError(f"{path / PEFT_CONFIG}: does not fit {type(backbone).__name__}: {error}") from error


def common_start(library: LoRALibrary) -> tuple[float, str, str] | None:
    """Find the least cosine between the A factors of two adapters, and their names; None without A factors."""
    parts = [library.thetas[:, a.part] for a, _ in lora_pairs(library.adapter)]
    if not parts:
        return None
    A = torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)
    cosine = A @ A.T
    least = int(cosine.argmin())
    i, j = divmod(least, len(A))
    return float(cosine[i, j]), library.names[i], library.names[j]
