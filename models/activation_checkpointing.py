"""Activation checkpointing for a network whose adapter is bound only for the length of a call.

The usual tools compute a layer again in the backward pass with the weights it has *then*. Ours has other weights in the
call (:func:`pyro_lift.models.blocks.bound`), so each layer notes what it was called with and finds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_layers", "layer_lists"]


def checkpoint_layers(network: nn.Module) -> int:
    """Let every layer keep only its inputs, and return the number of layers.

    A layer is a member of an outermost ``nn.ModuleList``, or of an ``nn.Sequential`` named ``blocks`` (timm's).

    Raises:
        ValueError: no such layer.
    """
    layers = [layer for part in layer_lists(network).values() for layer in part]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(network).__name__} has no list of layers (an nn.ModuleList) to checkpoint."
        )
    for layer in layers:
        layer.forward = _Checkpointed(layer, layer.forward)
    for module in network.modules():  # T5's encoder and decoder have each a configuration of their own
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.use_cache = False  # a second pass would write to the cache twice
    return len(layers)


def layer_lists(network: nn.Module, prefix: str = "") -> dict[str, list[nn.Module]]:
    """Return the layers of every outermost ``nn.ModuleList``, or ``nn.Sequential`` named ``blocks``, by its name."""
    lists: dict[str, list[nn.Module]] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList) or (name == "blocks" and isinstance(child, nn.Sequential)):
            lists[prefix + name] = list(child)
        else:
            lists |= layer_lists(child, f"{prefix}{name}.")
    return lists


class _Checkpointed:
    """A layer's forward that keeps its inputs only. An object, not a closure, so that a copied layer gets its own."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **named)
        noted = _note(self.layer)

        def again(*inputs: Any) -> Any:
            with _as_noted(noted):
                return self.forward(*inputs, **named)

        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)


Noted = list[tuple[nn.Module, dict[str, Any], Any]]


def _note(layer: nn.Module) -> Noted:
    """Note the weights of every module of a layer, and the forward that has been put in its place for this call."""
    return [
        (module, dict(module._parameters), module.__dict__.get("forward"))
        for module in layer.modules()
        if module is not layer and (module._parameters or "forward" in module.__dict__)
    ]


@contextmanager
def _as_noted(noted: Noted) -> Iterator[None]:
    present = [(module, dict(module._parameters), module.__dict__.get("forward")) for module, _, _ in noted]
    try:
        _put(noted)
        yield
    finally:
        _put(present)


def _put(noted: Noted) -> None:
    for module, parameters, forward in noted:
        module._parameters.update(parameters)
        if forward is not None:
            module.__dict__["forward"] = forward
        else:
            module.__dict__.pop("forward", None)
