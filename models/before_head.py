"""What a network's own last layer sees, read in place of its output: features, where its classes are no task's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.models.networks import without_compilation
from pyro_lift.models.penultimate import watched
from pyro_lift.models.readouts import pool

__all__ = ["BeforeHead", "named_before_head"]


@dataclass(frozen=True)
class BeforeHead:
    """Where in a network the features before its own head are.

    Attributes:
        name: of the module in the adapter's network, ``backbone``.
        module: a linear layer, whose input is the features ``[n, E]``; or a transformers model's body, whose hidden
            states they are, averaged over the tokens of a text, or at the class token of a picture.
        network: that it is part of; it runs uncompiled while the module is watched.
    """

    name: str
    module: nn.Module
    network: nn.Module

    @property
    def layer(self) -> Tensor | None:
        """The weights and biases ``[C, E + 1]`` of a linear layer as it stands; None of a body, or where quantised."""
        own = getattr(self.module, "base_layer", self.module)  # an adapter's layer has it inside
        if not isinstance(own, nn.Linear) or not own.weight.is_floating_point():
            return None
        weight = own.weight.detach()
        bias = weight.new_zeros(len(weight)) if own.bias is None else own.bias.detach()
        return torch.cat([weight, bias.unsqueeze(-1)], -1)

    def layer_in_use(self) -> Tensor:
        """Return the weights and biases ``[C, E + 1]`` of a linear layer as it is called, its adapter within."""
        layer = self.layer
        assert layer is not None
        unit = torch.eye(layer.shape[-1] - 1, dtype=layer.dtype, device=layer.device)
        bias = self.module(torch.zeros_like(unit[:1]))
        return torch.cat([(self.module(unit) - bias).mT, bias.mT], -1)

    def __call__(self, call: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        """Run the whole network, and return the features ``[n, E]``, in its own type.

        Raises:
            ValueError: the module was not called.
        """
        with watched([self.module]) as last, without_compilation(self.network):
            call(*inputs, **named)
        seen = last.seen
        if seen is None:
            raise ValueError(f"the network's module {self.name!r} was not called: its features are not to be had.")
        if isinstance(seen.output, Tensor):
            return torch.as_tensor(seen.given)
        states = seen.output[0] if isinstance(seen.output, tuple) else seen.output.last_hidden_state
        return pool(states, named.get("attention_mask"), "first" if "pixel_values" in named else "mean")


def named_before_head(network: nn.Module, name: str) -> BeforeHead:
    """Return the features before a network's own head, by the name of the module that has them.

    Raises:
        ValueError: no module of that name.
    """
    try:
        return BeforeHead(name, network.get_submodule(name), network)
    except AttributeError as error:
        raise ValueError(
            f"the network has no module {name!r}, whose features the tasks' heads stand on. Another network?"
        ) from error
