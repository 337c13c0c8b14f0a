"""Features of a network, the activations before its head, for retrieval and for prototypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.before_head import BeforeHead
from pyro_lift.models.conventions import base_of
from pyro_lift.models.networks import without_compilation
from pyro_lift.models.penultimate import Seen, watched_linear
from pyro_lift.models.readouts import pool, read
from pyro_lift.models.task import Rows

__all__ = ["Reader", "all_features", "before_head", "before_layer", "features", "head_features"]

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
        return _features(adapter, base_of(adapter.backbone), rows)


@torch.no_grad()
def head_features(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    """Embed each row as what the network's own head sees, ``[n, E]``, without a graph.

    As :func:`features`, except for a network of the user's own that ends in a linear layer: that is its head, and its
    input the features (:mod:`~pyro_lift.models.penultimate`). Where it ends in another layer, they are its output.
    """
    network: Any = base_of(adapter.backbone)
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
    named.setdefault("attention_mask", None)
    states = call(_encoder_of(network), (), named).last_hidden_state
    return pool(states, named["attention_mask"])


def before_head(adapter: RandomAdapter, inputs: Sequence[Any], named: Mapping[str, Any]) -> BeforeHead | None:
    """Find the features before a network's own head, by a call with some rows; None where there are none.

    A transformers model has them in its body's hidden states. Any other network that ends in a linear layer has them in
    what goes into that (:func:`before_layer`); there is nothing to read where something else than a log softmax comes
    after the layer, or where it sees no vector a row.

    Args:
        adapter: the network, which is called at its start.
        inputs: positional inputs of two rows or more.
        named: inputs by keyword.
    """
    network, body = adapter.backbone, _body_of(adapter.backbone)
    if body is None:
        return before_layer(adapter, inputs, named)
    names = [name for name, module in network.named_modules() if module is body]
    return BeforeHead(names[0], body, network) if names else None


def before_layer(adapter: RandomAdapter, inputs: Sequence[Any], named: Mapping[str, Any]) -> BeforeHead | None:
    """Find what goes into the linear layer that a network ends in, by a call with some rows; None where it has none.

    Of a transformers model these are not :func:`before_head`'s features, but what its own classes are read from.

    Args:
        adapter: the network, which is called at its start.
        inputs: positional inputs of two rows or more.
        named: inputs by keyword.
    """
    network, names = adapter.backbone, {id(m): name for name, m in adapter.backbone.named_modules()}
    rows = len(next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor)))
    with torch.no_grad(), adapter.bound(adapter.initial), without_compilation(network), watched_linear(network) as last:
        output = read(adapter.network(*inputs, **named), named.get("attention_mask"))
    if last.seen is None or (
        last.features_of(output, rows) is None and not _are_its_log_probs(last.seen, output, rows)
    ):
        return None
    # PEFT's copy of a layer stands under the adapter's name, which another PEFT model may have changed.
    name = names[id(last.seen.layer)].partition(".modules_to_save.")[0]
    return BeforeHead(name, network.get_submodule(name), network)


def _are_its_log_probs(seen: Seen, output: Tensor, rows: int) -> bool:
    """Whether an output is the log softmax of what a linear layer gave for a vector a row."""
    given, scores = seen.given, seen.output
    if not (isinstance(given, Tensor) and isinstance(scores, Tensor) and given.dim() == 2 and len(given) == rows):
        return False
    return output.shape == scores.shape and torch.allclose(output, scores.log_softmax(-1), rtol=1e-4, atol=1e-5)


def _body_of(network: nn.Module) -> nn.Module | None:
    """Return the body of a transformers model that has a head: for an encoder-decoder, its encoder; else None."""
    model: Any = base_of(network)
    known = isinstance(getattr(model, "base_model_prefix", None), str)
    if not known or not isinstance(getattr(model, "base_model", None), nn.Module):
        return None
    body = _encoder_of(model)
    return None if body is model else body


def _encoder_of(model: Any) -> nn.Module:
    """Return what encodes the inputs of a transformers model."""
    body: nn.Module = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    return body
