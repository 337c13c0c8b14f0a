"""Adapters and models as they are served: PEFT folders for a server of many LoRAs, and whole merged models.

What vLLM and LoRAX ask of a LoRA folder: ``adapter_config.json`` and ``adapter_model.safetensors`` at its top, one rank
and one set of target modules, no bias of its own, no DoRA, no ``modules_to_save``; and a name that can stand in a URL.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.peft_layers import peft_layers
from pyro_lift.models.quantised import dequantise, dequantised_layer, quantisation_of
from pyro_lift.saving.folders import export_prior, library_exports
from pyro_lift.saving.parts import SavablePrior
from pyro_lift.saving.peft_folder import adapter_config
from pyro_lift.support.archive import new_files, write_json
from pyro_lift.support.options import check_distinct

__all__ = ["check_served", "export_served", "save_merged", "served_name", "write_manifest"]

MANIFEST = "adapters.json"
#: Options of a LoRA that servers of many adapters do not know.
UNSERVED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
)
#: Largest ranks that a vLLM server can be started with (``--max-lora-rank``).
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_name(name: str) -> str:
    """Turn a task's name into one for a folder and a URL: letters, digits, dots, dashes and underscores.

    Example:
        >>> served_name("tweet eval/stance: Climate")
        'tweet-eval-stance-Climate'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"


def check_served(adapter: RandomAdapter) -> dict[str, Any]:
    """Refuse an adapter that a server of many LoRAs does not load; describe one that it does.

    Returns:
        ``rank``, ``max_lora_rank`` (the smallest that a vLLM server must be started with), ``target_modules`` and
        ``base_model``.

    Raises:
        ValueError: another kind than LoRA, or an option that servers do not know; names it.
    """
    config: Any = adapter_config(adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"a {kind} adapter cannot be served: servers of many adapters load LoRA alone.")
    for name in UNSERVED:
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)!r}: servers of many LoRAs do not load such an adapter.")
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r}: servers of many LoRAs load adapters without biases of their own.")
    if config.r > SERVED_RANKS[-1]:
        raise ValueError(f"r={config.r}: servers of many LoRAs load ranks up to {SERVED_RANKS[-1]}.")
    targets = config.target_modules
    return {
        "rank": config.r,
        "max_lora_rank": next(rank for rank in SERVED_RANKS if rank >= config.r),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "base_model": config.base_model_name_or_path,
    }


def write_manifest(adapter: RandomAdapter, folders: Mapping[str, Path], where: Path) -> Path:
    """Write ``adapters.json``: what all adapters have in common, and the folder of each by its name."""
    about = {**check_served(adapter), "adapters": {name: path.name for name, path in folders.items()}}
    write_json(where / MANIFEST, about)
    return where / MANIFEST


def save_merged(adapter: RandomAdapter, theta: Tensor, folder: Path, tokenizer: Any = None) -> Path:
    """Write the whole network with adapter weights ``theta`` ``[D]`` added to its own, as transformers loads it.

    The adapter and its network stay as they are; while it is merged the network is in memory twice. Of a quantised
    network the whole is written in full precision: rounded to codes again, it would be another one.

    Raises:
        ValueError: a network that is not of transformers, or an adapter that is no PEFT adapter.
    """
    adapter_config(adapter)
    adapter.check_use()
    network: Any = adapter.backbone
    if not hasattr(network.get_base_model(), "save_pretrained"):
        raise ValueError(
            f"{type(network.get_base_model()).__name__} has no save_pretrained; export the adapter (to_peft) in place "
            "of a merged model."
        )
    with adapter.bound(theta.detach().to(adapter.initial)):
        twin = copy.deepcopy(network)
        if quantisation_of(network) is not None:
            _dequantise(twin, str(adapter.adapter_name))
    merged = twin.merge_and_unload(adapter_names=[str(adapter.adapter_name)])
    with new_files(folder, "config.json", stale=_adapter_files()) as new:
        merged.save_pretrained(new)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(new)
    return folder


def _dequantise(twin: Any, name: str) -> None:
    """Put plain linear layers, adapters merged in, where a PEFT model has an adapter on a quantised layer."""
    base = twin.get_base_model()
    for place, layer in peft_layers(base).items():
        if quantisation_of(layer) is not None:
            plain = dequantised_layer(layer.get_base_layer())
            plain.weight.data += layer.get_delta_weight(name).detach().to(plain.weight)
            parent, _, attribute = place.rpartition(".")
            setattr(base.get_submodule(parent), attribute, plain)
    dequantise(base)


def _adapter_files() -> Sequence[str]:
    """Name what would make transformers take the folder for an adapter."""
    return ("adapter_config.json", "adapter_model.safetensors")


def export_served(prior: SavablePrior, folder: Path) -> dict[str, Path]:
    """Write the adapters of a prior for a server of many LoRAs; each adapter's folder by its name.

    Raises:
        ValueError: an adapter that such servers do not load, or two tasks of one name in the end; before any is
            written.
    """
    check_served(prior.adapter)
    exports = library_exports(prior)
    names = [served_name(name) for name in exports]
    check_distinct("names of the adapters", names, "Rename one of the tasks.")
    folders = {
        name: export_prior(prior, folder / name, which) for name, which in zip(names, exports.values(), strict=True)
    }
    write_manifest(prior.adapter, folders, folder)
    return folders
