"""Adapter weights as PEFT's own folders: ``adapter_model.safetensors`` beside ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.peft_layers import file_name, peft_layers
from pyro_lift.support.archive import DamagedError

if TYPE_CHECKING:
    import peft

__all__ = [
    "PEFT_CONFIG",
    "PEFT_WEIGHTS",
    "adapter_config",
    "config_from_dict",
    "config_to_dict",
    "read_config",
    "read_peft",
    "write_peft",
]

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(adapter: RandomAdapter, theta: Tensor, folder: Path) -> Path:
    """A folder with these weights ``[D]`` that ``peft.PeftModel.from_pretrained(base, folder)`` loads.

    It holds this adapter alone, at the top, whatever its name in the PEFT model and whatever others that one has.

    Raises:
        ValueError: weights of another length; a network that is not a PEFT model, or no longer the adapter's.
    """
    adapter_config(adapter)
    adapter.check_use()
    name, theta = str(adapter.adapter_name), theta.detach().to(adapter.initial)
    if theta.shape != adapter.initial.shape:
        raise ValueError(f"weights of shape {tuple(theta.shape)}; the adapter has {adapter.dim}.")
    with adapter.bound(theta):
        # "auto" would ask the hub whether the vocabulary was resized; ours never is.
        adapter.backbone.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)  # type: ignore[operator]
    if name != "default":  # PEFT puts it into a folder of its name
        for file in (folder / name).iterdir():
            os.replace(file, folder / file.name)
        (folder / name).rmdir()
    return folder


def adapter_config(adapter: RandomAdapter) -> peft.PeftConfig:
    """Configuration of the adapter in its PEFT model.

    Raises:
        ValueError: a network that is not a PEFT model, whose weights PEFT cannot save.
    """
    configs = getattr(adapter.backbone, "peft_config", {})
    if adapter.adapter_name not in configs or not hasattr(adapter.backbone, "save_pretrained"):
        raise ValueError(
            f"{type(adapter.backbone).__name__} is not a PEFT model, so there is no PEFT adapter to write. Wrap the "
            "network with peft.get_peft_model, or pass LiFT the plain network and a peft_config."
        )
    return configs[adapter.adapter_name]


def config_to_dict(config: peft.PeftConfig) -> dict[str, Any]:
    """Convert a PEFT configuration to JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    plain["inference_mode"] = False
    return plain


def _frozen(adapter: RandomAdapter, names: Set[str]) -> dict[str, Tensor]:
    """Those of these names that PEFT saves with the adapter and that are not part of theta."""
    if not names:
        return {}
    from peft import get_peft_model_state_dict

    name = str(adapter.adapter_name)
    saved = get_peft_model_state_dict(adapter.backbone, adapter_name=name, save_embedding_layers=False)
    return {name: saved[name] for name in names & saved.keys()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))


def config_from_dict(values: dict[str, Any], where: Path) -> peft.PeftConfig:
    """Make a PEFT configuration again, from the dictionary of :func:`config_to_dict`.

    Raises:
        ValueError: a kind or a value that this version of PEFT does not know; names the file.
    """
    from peft import PeftConfig

    try:
        # The base model is the one it is attached to now; PEFT warns of any other name.
        return PeftConfig.from_peft_type(**{**values, "base_model_name_or_path": None})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: this version of PEFT cannot read the adapter's configuration ({error!r})."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` of a PEFT folder.

    Raises:
        ValueError: no PEFT folder; names it.
    """
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise DamagedError(f"{folder}: no {PEFT_CONFIG} here; expected a PEFT adapter's folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path}: not JSON ({error}); the file is damaged.") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise DamagedError(f"{path}: no key 'peft_type'; expected a PEFT adapter's configuration.")
    return values


def read_peft(folder: Path, adapter: RandomAdapter) -> Tensor:
    """Read the weights ``[D]`` of a PEFT folder, in the order of this adapter.

    Raises:
        ValueError: a file that is missing or cannot be read, a tensor that is missing, unknown, misshapen or not
            finite; names the file and the tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        extra = " adapter_model.bin is pickle, which is not read: save it again as safetensors." if pickled else ""
        raise DamagedError(f"{folder}: no {PEFT_WEIGHTS} here.{extra}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: cannot be read ({error}); the file is damaged.") from error
    layers = peft_layers(adapter.backbone)
    known = {file_name(entry.name, layers): entry for entry in adapter.layout}
    for name in known:
        if name not in tensors:
            raise DamagedError(f"{path}: tensor {name!r} is missing. Other target modules, or another base model?")
    frozen = _frozen(adapter, tensors.keys() - known.keys())
    for name, x in tensors.items():
        if name in frozen:  # VeRA's shared projections
            if not torch.equal(x, frozen[name].cpu()):
                raise DamagedError(f"{path}: tensor {name!r} is another than this adapter's, and it is not learned.")
            continue
        if name not in known:
            raise DamagedError(f"{path}: tensor {name!r} is not part of the adapter. Other target modules?")
        if x.shape != known[name].shape:
            want = tuple(known[name].shape)
            raise DamagedError(f"{path}: tensor {name!r} has shape {tuple(x.shape)}, not {want}. Another rank or base?")
        if not x.is_floating_point():
            raise DamagedError(f"{path}: tensor {name!r} is {x.dtype}; expected floating-point weights.")
        if not bool(torch.isfinite(x).all()):
            raise DamagedError(f"{path}: tensor {name!r} holds values that are not finite.")
    return torch.cat([tensors[name].reshape(-1) for name in known]).to(adapter.initial)
