"""The layers below an adapter: which of a network's layers it has done with before the adapter is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_lift.models.activation_checkpointing import layer_lists
from pyro_lift.models.blocks import Slot

__all__ = ["STATE", "PrefixPlan", "find_prefix"]

#: Stands for a layer's state in the description of its result.
STATE = ("state", None)
#: The description of a layer that computes something beside its states.
WHOLE = ("whole", None)


class PrefixPlan(NamedTuple):
    """The layers that are passed by.

    Attributes:
        name: of the list of layers.
        layers: in the order of their calls; the last one returns the states that are kept.
        results: what each of them returns: per item its state (``"state"``), an input that it hands on (a name or a
            place), or a constant.
        whole: the layers that are run all the same, for other results than their states (the first layer's position
            bias in T5).
        of: layers of the whole list.
        textlike: whether states have a place for every token.
    """

    name: str
    layers: list[nn.Module]
    results: list[Any]
    whole: frozenset[int]
    of: int
    textlike: bool


class _Call(NamedTuple):
    """A call of a layer: its list, its place there, and what it returned, described."""

    name: str
    place: int
    result: Any


def find_prefix(network: nn.Module, slots: Sequence[Sequence[Slot]], run: Callable[[], Any]) -> PrefixPlan | str:
    """Run the network once, and find the layers that it has done with before anything of the adapter is called.

    Args:
        network: that carries the adapter.
        slots: the places of the adapter's tensors.
        run: calls the network on some rows, once or several times.

    Returns:
        The layers; or why there are none, in words.
    """
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return "the network is compiled"
    lists = layer_lists(network)
    if not lists:
        return "the network has no list of layers"
    owners = {id(place.module) for places in slots for place in places}
    holding = {id(m) for m in network.modules() if any(id(inner) in owners for inner in m.modules())}
    places = {id(layer): (name, k) for name, layers in lists.items() for k, layer in enumerate(layers)}
    around = {id(m) for m in network.modules() if any(id(inner) in places for inner in m.modules())} - set(places)
    calls: list[_Call] = []
    shapes: list[torch.Size] = []
    begun, mask = False, None

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal mask
        mask = kwargs.get("attention_mask") if mask is None else mask

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal begun
        begun = True  # and stays so: of a second call nothing is noted

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not begun and id(module) in places:
            calls.append(_Call(*places[id(module)], _described(args, kwargs, output)))
            state = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
            shapes.append(state.shape if isinstance(state, Tensor) else torch.Size())

    handles: list[Any] = [network.register_forward_pre_hook(entered, with_kwargs=True)]
    try:
        for module in network.modules():
            # What holds the adapter and lists of layers is only around them; its own tensors would be leaves of it.
            if id(module) in holding and (id(module) not in around or id(module) in owners):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if id(module) in places:
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not begun:
        return "no layer that holds the adapter is called"
    return _plan(lists, calls, shapes, mask)


def _plan(
    lists: Mapping[str, Sequence[nn.Module]], calls: Sequence[_Call], shapes: Sequence[torch.Size], mask: Tensor | None
) -> PrefixPlan | str:
    if not calls:
        return "the adapter begins at the first layer, or below it"
    name = max(lists, key=lambda name: sum(call.name == name for call in calls))
    chosen = [(call, shape) for call, shape in zip(calls, shapes, strict=True) if call.name == name]
    if len({call.place for call, _ in chosen}) < len(chosen):
        return f"a layer of {name!r} is called several times"
    if any(call.result is None for call, _ in chosen):
        return f"a layer of {name!r} returns no states"
    whole = frozenset(k for k, (call, _) in enumerate(chosen) if call.result == WHOLE)
    if len(whole) == len(chosen):
        return f"the layers of {name!r} below the adapter give more than their states"
    shape = chosen[-1][1]
    textlike = mask is not None and mask.dim() == 2 and len(shape) >= 2 and shape[1] == mask.shape[1]
    layers = [lists[name][call.place] for call, _ in chosen]
    return PrefixPlan(name, layers, [call.result for call, _ in chosen], whole, len(lists[name]), textlike)


def _described(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Describe a layer's result, so that it can be made up without the layer; None where it has no states."""
    if isinstance(output, Tensor):
        return STATE
    if type(output) not in (tuple, list) or not output or not isinstance(output[0], Tensor):
        return None
    items: list[tuple[str, Any]] = [STATE]
    for item in output[1:]:
        if item is None or not _has_tensors(item):
            items.append(("constant", item))
            continue
        handed = [("place", k) for k, x in enumerate(args) if x is item]
        handed += [("name", k) for k, x in kwargs.items() if x is item]  # type: ignore[misc]
        if not handed:
            return WHOLE
        items.append(handed[0])
    return items


def _has_tensors(x: Any) -> bool:
    return bool([leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)])
