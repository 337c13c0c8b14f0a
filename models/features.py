"""Features of a network, the activations before its head, for retrieval and for prototypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.penultimate import watched_linear
from pyro_lift.models.readouts import pool, read
from pyro_lift.models.task import Rows

__all__ = ["Reader", "all_features", "features", "head_features"]

#: From the network, some rows and its weights ``[D]`` to one vector a row ``[n, E]``.
Reader = Callable[[RandomAdapter, Rows, Tensor], Tensor]
#: Beginnings of the names of what is no input of the encoder: tasks are compared by their inputs.
NOT_INPUTS = ("label_", "option_", "decoder_")


def features(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    """Embed each row as one vector, ``[n, E]``; differentiable in theta ``[D]``.

    A timm model gives the activations before its classifier; a transformers model its last hidden states, averaged
    over the tokens of a text (for an encoder-decoder, the encoder's) or at the class token of an image; any other
    network its output. Label texts and decoder inputs are ignored: tasks are compared by their inputs.
    """
    with adapter.bound(theta):
        return _features(adapter, _plain(adapter.backbone), rows)


@torch.no_grad()
def head_features(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    """Embed each row as what the network's own head sees, ``[n, E]``, without a graph.

    As :func:`features`, except for a network of the user's own that ends in a linear layer: that is its head, and its
    input the features (:mod:`~pyro_lift.models.penultimate`). Where it ends in another layer, they are its output.
    """
    network: Any = _plain(adapter.backbone)
    if hasattr(network, "forward_head") or hasattr(network, "config"):
        return features(adapter, rows, theta)
    with adapter.bound(theta), watched_linear(network) as last:
        output = torch.as_tensor(read(adapter.prefix.call(network, rows.positional, rows.named)))
    seen = last.features_of(output, len(rows))
    return output if seen is None else seen


@torch.no_grad()
def all_features(
    adapter: RandomAdapter, rows: Rows, theta: Tensor, reader: Reader = features, *, batch_size: int = 256
) -> Tensor:
    """Compute the features ``[n, E]`` of any number of rows, without a graph."""
    parts = range(0, len(rows), batch_size)
    return torch.cat([reader(adapter, rows.take(slice(i, i + batch_size)), theta) for i in parts])


def _plain(backbone: nn.Module) -> nn.Module:
    """Unwrap the network from PEFT's model, its adapted layers in place."""
    unwrap: Any = getattr(backbone, "get_base_model", None)
    inner: nn.Module = unwrap() if unwrap else backbone
    return inner


def _features(adapter: RandomAdapter, network: Any, rows: Rows) -> Tensor:
    call = adapter.prefix.call  # layers below the adapter, once a row
    rows = replace(rows, inputs={name: adapter.typed(x) for name, x in rows.inputs.items()})
    if hasattr(network, "forward_head"):
        states = call(network.forward_features, rows.positional, {})
        return torch.as_tensor(network.forward_head(states, pre_logits=True))
    if not hasattr(network, "config"):
        return torch.as_tensor(call(network, rows.positional, rows.named))
    # Whatever the rows have beside their texts or pictures belongs to them: token types, positions, masks.
    named: dict[str, Any] = {name: x for name, x in rows.inputs.items() if name and not name.startswith(NOT_INPUTS)}
    if "pixel_values" in named:
        return pool(call(network, (), named).last_hidden_state, how="first")
    body = network.get_encoder() if getattr(network.config, "is_encoder_decoder", False) else network.base_model
    named.setdefault("attention_mask", None)
    states = call(body, (), named).last_hidden_state
    return pool(states, named["attention_mask"])
