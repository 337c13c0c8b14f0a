"""Frozen networks in 4 or 8 bits: what they are loaded as, shared by reference, and computed with gradients.

bitsandbytes (4 and 8 bits) and torchao (8 bits) keep a layer's weight as codes and scales. The adapter on top is
float32 as ever. Two shortcuts of bitsandbytes on a CPU are switched off in an adapter's network: with the first call
without gradients it repacks 4-bit weights in place, for a bfloat16 product that knows no gradients; and in eval mode it
rounds the inputs of 8-bit layers too, by the largest among the batch, so that a row's output depends on the rows beside
it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "Quantisation",
    "as_saved",
    "check_quantised",
    "codes_of",
    "dequantise",
    "dequantised_layer",
    "loading_config",
    "own_layers",
    "plain_weight",
    "quantisation_of",
    "size_of",
    "with_gradients",
]

#: Bits of the frozen weights, as a caller names them.
Quantisation = Literal["4bit", "8bit"]

#: Ways of loading that a sampler has been tried with.
TRIED = "bitsandbytes in 4 or 8 bits, torchao in 8 bits"


def loading_config(bits: Quantisation, dtype: torch.dtype) -> Any:
    """Make transformers' configuration of a base in 4 bits (NF4) or 8 bits, for bitsandbytes.

    Args:
        bits: of a weight.
        dtype: in which products are computed.

    Raises:
        ImportError: bitsandbytes is not installed; says how it is.
    """
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ImportError(f"quantization={bits!r} needs bitsandbytes: pip install 'pyro-lift[quantised]'.")
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


# ------------------------------------------------------------------------------------------------------- what there is


def _kind(parameter: Any) -> str | None:
    """Name the way in which a weight is kept; None for a plain one. No library is imported for it."""
    cls = type(parameter)
    if cls.__name__ in ("Params4bit", "Int8Params") and cls.__module__.startswith("bitsandbytes."):
        return "4bit" if cls.__name__ == "Params4bit" else "8bit"
    return "torchao" if cls.__module__.startswith("torchao.") else None


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Walk the layers whose weight is quantised, each with its name and kind."""
    for name, module in network.named_modules():
        kind = _kind(module._parameters.get("weight"))
        if kind is not None:
            yield name, module, kind


def quantisation_of(network: nn.Module) -> dict[str, Any] | None:
    """Describe how the network's weights are quantised, as JSON; None where they are not.

    Returns:
        ``method`` (the library), ``bits``, ``type`` (``"nf4"``, ``"int8"``) and ``weights``, how many there are.
    """
    weights: list[tuple[Any, str]] = [(module.weight, kind) for _, module, kind in _layers(network)]
    if not weights:
        return None
    weight, kind = weights[0]
    about: dict[str, Any] = {"method": "bitsandbytes", "bits": 8, "type": "int8"}
    if kind == "4bit":
        about = {"method": "bitsandbytes", "bits": 4, "type": str(weight.quant_type)}
    elif kind == "torchao":
        name = type(weight).__name__
        about = {"method": "torchao", "bits": 8 if "Int8" in name else 4, "type": name}
    return {**about, "weights": len(weights)}


def as_saved(about: Mapping[str, Any] | None) -> str:
    """Say in words how a base is loaded, from what :func:`quantisation_of` says of it."""
    return "in full precision" if about is None else f"in {about['bits']} bits ({about['method']}, {about['type']})"


def check_quantised(network: nn.Module) -> None:
    """Refuse a network that is quantised in a way that has not been tried, or by layers that know no gradients.

    Raises:
        ValueError: names the method, and those that have been tried.
    """
    unwrap: Any = getattr(network, "get_base_model", None)
    base: Any = unwrap() if unwrap else network
    about = quantisation_of(network)
    if getattr(base, "is_quantized", False) and about is None:
        method = getattr(base, "quantization_method", None)
        raise ValueError(
            f"the network is quantised by {getattr(method, 'value', method)}, which has not been tried with a sampler. "
            f"Load it by {TRIED}, or in full precision."
        )
    if about is not None and about["method"] == "torchao" and about["type"] != "Int8Tensor":
        raise ValueError(
            f"torchao's {about['type']} has not been tried with a sampler (PEFT's layers know Int8Tensor alone). Load "
            f"the network by {TRIED}, or in full precision."
        )


def codes_of(parameter: Tensor) -> Tensor:
    """Return the numbers that a weight is kept as: codes, of 4 bits the blocks' scales too; a plain one itself."""
    kind = _kind(parameter)
    if kind == "torchao":
        names, _ = parameter.__tensor_flatten__()  # type: ignore[attr-defined]
        return torch.cat([getattr(parameter, name).detach().reshape(-1).float() for name in names])
    if kind is None:
        return parameter
    codes = parameter.detach().as_subclass(Tensor)
    state = getattr(parameter, "quant_state", None)
    return codes if state is None else torch.cat([codes.reshape(-1).float(), state.absmax.reshape(-1).float()])


def size_of(parameter: Tensor) -> int:
    """Count the weights that a parameter stands for; two of 4 bits lie in one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


# -------------------------------------------------------------------------------------------------- shared by reference


def own_layers(network: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare a copy whose quantised layers share codes and scales, and nothing that bitsandbytes writes to.

    Args:
        network: to be copied.
        memo: of ``copy.deepcopy``; takes up what stands for each weight.
    """
    for _, module, kind in _layers(network):
        weight: Any = module.weight
        if kind == "torchao" or id(weight) in memo:
            continue
        memo[id(weight)] = alias = _alias(weight, kind)
        if kind == "4bit":
            memo[id(weight.quant_state)] = alias.quant_state
        else:
            state: Any = module.state
            memo |= {id(x): x for x in (state.CB, state.SCB) if x is not None}


def _alias(weight: Any, kind: str) -> Any:
    """Make another weight with the same codes and scales."""
    if kind == "8bit":
        return type(weight)(
            weight.data,
            requires_grad=weight.requires_grad,
            has_fp16_weights=weight.has_fp16_weights,
            CB=weight.CB,
            SCB=weight.SCB,
        )
    alias = copy.copy(weight)
    alias.quant_state = copy.copy(weight.quant_state)
    if alias.quant_state.nested:
        alias.quant_state.state2 = copy.copy(alias.quant_state.state2)
    alias.module = None
    return alias


def with_gradients(network: nn.Module) -> None:
    """Switch off the shortcuts of bitsandbytes that know no gradients, or mix the rows of a batch."""
    for _, module, kind in _layers(network):
        layer: Any = module
        if kind == "4bit":
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # writes the weight back as it was, but for the last digits of its scales
            layer.quant_state = layer.weight.quant_state
        elif kind == "8bit" and not isinstance(vars(layer).get("forward"), _ByWeights):
            layer.forward = _ByWeights(layer)


class _ByWeights:
    """The forward of an 8-bit layer on a CPU as in training, where only the weights are rounded, not the inputs.

    An object, not a closure, so that a copied layer gets its own.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        before = self.layer.training
        self.layer.training = True
        try:
            return type(self.layer).forward(self.layer, x)  # type: ignore[no-any-return]
        finally:
            self.layer.training = before


# ------------------------------------------------------------------------------------------------------ full precision


def dequantised_layer(layer: nn.Module) -> nn.Linear:
    """Make the plain linear layer that a quantised one stands for."""
    from peft.utils.integrations import dequantize_module_weight

    kind = _kind(layer._parameters.get("weight"))
    if kind == "8bit":
        state: Any = layer.state
        scale = layer.weight.SCB if state.SCB is None else state.SCB  # type: ignore[union-attr]
        weight = layer.weight.data.float() * scale.unsqueeze(1) / 127.0  # type: ignore[union-attr, operator]
    else:
        weight = dequantize_module_weight(layer)
    bias = layer._parameters.get("bias")
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().as_subclass(Tensor), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def plain_weight(layer: Any) -> Any:
    """Return a layer's weight, that of a quantised one as the numbers it stands for; None for a layer without one."""
    weight = getattr(layer, "weight", None)
    return weight if _kind(weight) is None else dequantised_layer(layer).weight


def dequantise(network: nn.Module) -> None:
    """Put plain linear layers in place of a network's quantised ones; transformers then takes it for a plain one."""
    for name, module, _ in list(_layers(network)):
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, dequantised_layer(module))
    quantiser = getattr(network, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(network)
