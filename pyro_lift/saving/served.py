"""Adapters and models as they are served: PEFT folders for a server of many LoRAs, and whole merged models.

What vLLM and LoRAX ask of a LoRA folder: ``adapter_config.json`` and ``adapter_model.safetensors`` at its top with
nothing but ``lora_A`` and ``lora_B`` of linear layers, one rank and one scale, no bias of its own, no DoRA, no
``modules_to_save``, the base model as it is; and a name that can stand in a URL. LoRAX takes a kind of layer only where
the adapter is on all of its layers, and passes over the others in silence.

References:
    vLLM's ``vllm/lora/peft_helper.py``, ``lora_model.py`` and ``config/lora.py``; LoRAX's
    ``lorax_server/adapters/lora.py``; both read in 2026.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import MOVES_BASE
from pyro_lift.models.peft_layers import peft_layers
from pyro_lift.models.quantised import dequantise, dequantised_layer, quantisation_of
from pyro_lift.saving.folders import export_prior, library_exports
from pyro_lift.saving.parts import SavablePrior
from pyro_lift.saving.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS, adapter_config
from pyro_lift.support.archive import new_files, write_json
from pyro_lift.support.options import check_distinct

__all__ = ["check_served", "export_served", "save_merged", "served_name", "write_manifest"]

log = logging.getLogger("pyro_lift")

MANIFEST = "adapters.json"
#: Options of a LoRA that servers of many adapters do not know.
UNSERVED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
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
        ``rank``, ``max_lora_rank`` (the smallest that a vLLM server must be started with), ``target_modules``,
        ``base_model``, ``quantisation`` of the base, and ``notes``: what one of the servers does not do with it.

    Raises:
        ValueError: another kind than LoRA, an option that servers do not know, a start that moves the base's weights,
            or layers that are not linear; names it.
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
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith(MOVES_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} has moved the base model's weights, and a server has the base as it was. "
            "Merge the adapter (posterior.merge_and_save) in its place."
        )
    strange = [entry.name for entry in adapter.layout if not re.search(r"\.lora_[AB]\.", entry.name)]
    if strange:
        raise ValueError(f"the adapter tensor {strange[0]!r} is no factor of a linear layer: servers do not load it.")
    targets = config.target_modules
    return {
        "rank": config.r,
        "max_lora_rank": next(rank for rank in SERVED_RANKS if rank >= config.r),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "base_model": config.base_model_name_or_path,
        "quantisation": quantisation_of(adapter.backbone),
        "notes": _notes(adapter),
    }


def _notes(adapter: RandomAdapter) -> list[str]:
    """Say what a server does with these adapters that nobody would expect."""
    notes = []
    adapted = {re.sub(r"\.\d+\.", ".#.", f".{name}") for name in peft_layers(adapter.backbone)}
    alike = [name for name, layer in _plain_layers(adapter) if re.sub(r"\.\d+\.", ".#.", f".{name}") in adapted]
    if alike:
        notes.append(
            f"{alike[0].removeprefix('base_model.model.')!r} and {len(alike) - 1} more layers of its kind have no "
            "adapter: LoRAX loads a kind of layer only where all have one, and passes over the rest in silence."
        )
    network: Any = getattr(adapter.backbone, "config", None)
    if getattr(network, "is_encoder_decoder", False) or not hasattr(adapter.backbone, "prepare_inputs_for_generation"):
        notes.append("the base is not a causal language model: look up whether your server knows its family with LoRA.")
    return notes


def _plain_layers(adapter: RandomAdapter) -> list[tuple[str, nn.Module]]:
    """List the layers with a weight that have no adapter and are no part of one."""
    layers = peft_layers(adapter.backbone)
    return [
        (name, module)
        for name, module in adapter.backbone.named_modules()
        if name not in layers and "weight" in module._parameters and not re.search(r"\.(lora_[AB]|base_layer)", name)
    ]


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
    return (PEFT_CONFIG, PEFT_WEIGHTS)


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
    for note in _notes(prior.adapter):
        log.warning("adapters for servers: %s", note)
    return folders
