r"""Many adapters in one pass: each row of a block goes through the adapter of its own task.

The frozen weights are shared, so a block of B tasks with b rows each is one pass over B b rows. Only the adapter's own
products differ by task, and they are small: for LoRA, with :math:`x_k` the rows of task k,

.. math:: y_k = x_k W^\top + s\,(x_k A_k^\top)\,B_k^\top, \qquad k = 1..B,

two batched products of rank r beside one large product. Nothing of PEFT is rewritten: for the length of the call the
adapter's own ``nn.Linear`` layers (``lora_A``, ``lora_B``, a copied head) multiply by task, and the layer around them
runs as it is.

This needs every adapter tensor to sit in an ``nn.Linear`` that is *called*, and the block's rows to stay in order along
the first dimension all the way through. Both are checked in numbers, once, at the first block; a network that fails
goes task by task instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["BlockCall", "Slot", "bound", "flattened", "slots_of"]

log = logging.getLogger("pyro_lift")

#: A block's output may differ from a single pass by this share of what exchanging two tasks' adapters changes.
TOLERANCE = 0.05


class Slot(NamedTuple):
    """A place in the network that holds an adapter tensor."""

    module: nn.Module
    attribute: str


def slots_of(network: nn.Module, tensors: Sequence[Tensor]) -> list[list[Slot]]:
    """Find the places of each tensor; several where the network ties them."""
    places: dict[int, list[Slot]] = {id(tensor): [] for tensor in tensors}
    for module in network.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in places:
                places[id(parameter)].append(Slot(module, attribute))
    return [places[id(tensor)] for tensor in tensors]


@contextmanager
def bound(slots: Sequence[Sequence[Slot]], tensors: Sequence[Tensor], kept: Sequence[Slot] = ()) -> Iterator[None]:
    """Put tensors into the slots for the length of a context; whatever happens, the network's own come back.

    It is what ``torch.func.functional_call`` does, without looking up every name of the network at every call.

    Args:
        slots: the places of each tensor.
        tensors: what to put there.
        kept: places whose tensors a layer replaces while it runs; they come back too.
    """
    before = [places[0].module._parameters[places[0].attribute] for places in slots]
    held = [module._parameters[attribute] for module, attribute in kept]
    try:
        _put(slots, tensors)
        yield
    finally:
        _put(slots, before)
        _put([[slot] for slot in kept], held)


def _put(slots: Sequence[Sequence[Slot]], tensors: Sequence[Tensor | None]) -> None:
    for places, tensor in zip(slots, tensors, strict=True):
        for module, attribute in places:
            module._parameters[attribute] = tensor  # type: ignore[assignment]


class _LinearByTask:
    """``nn.Linear.forward`` with one weight ``[B, out, in]`` (and bias ``[B, out]``) per task."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        B, wide, narrow = self.weight.shape
        rows = x.reshape(B, -1, narrow).to(self.weight.dtype)
        out = rows @ self.weight.mT
        if self.bias is not None:
            out = out + self.bias.unsqueeze(1)
        return out.view(*x.shape[:-1], wide)


class BlockCall:
    """A network as a function of a block of adapters.

    Args:
        slots: where the adapter's tensors are in the network, as :func:`slots_of` gives them.
        read: from positional and named inputs to a tensor with one leading row per input row; told as a third
            argument whether they are a block's, ``[B, b, ...]``.
        kept: as in :func:`bound`.
    """

    def __init__(self, slots: Sequence[Sequence[Slot]], read: Callable[..., Tensor], kept: Sequence[Slot] = ()) -> None:
        self.slots, self.read, self.kept = slots, read, kept
        #: Whether one pass serves a block; None until the first block has been tried.
        self.one_pass: bool | None = None if _all_linear(slots) else False

    def __call__(
        self,
        tensors: Sequence[Tensor],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        read: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Run the network: adapter tensors ``[B, ...]`` and inputs ``[B, b, ...]`` to outputs ``[B, b, ...]``.

        ``read`` may take the place of the reading that the object was made with.
        """
        read = read or self.read
        if self.one_pass is None:
            self.one_pass = self._agrees(tensors, inputs, named, read)
            if not self.one_pass:
                log.warning("blocks go task by task: this network does not keep a block's rows in order.")
        if self.one_pass:
            return self._together(tensors, inputs, named, read)
        return torch.stack([self._alone(k, tensors, k, inputs, named, read) for k in range(len(tensors[0]))])

    def _together(
        self,
        tensors: Sequence[Tensor],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        read: Callable[..., Tensor],
    ) -> Tensor:
        B = len(tensors[0])
        layers = self._layers(tensors)
        try:
            for module, layer in layers:
                module.__dict__["forward"] = layer
            with bound((), (), self.kept):
                rows = read(inputs, named, True)
        finally:
            for module, _ in layers:
                module.__dict__.pop("forward", None)
        if self.one_pass is None and not all(layer.calls for _, layer in layers):
            raise _NotByCallError
        return rows.view(B, -1, *rows.shape[1:])

    def _layers(self, tensors: Sequence[Tensor]) -> list[tuple[nn.Module, _LinearByTask]]:
        parts: dict[int, dict[str, Tensor]] = {}
        modules: dict[int, nn.Module] = {}
        for places, tensor in zip(self.slots, tensors, strict=True):
            for module, attribute in places:
                modules[id(module)] = module
                parts.setdefault(id(module), {})[attribute] = tensor
        return [(modules[k], _LinearByTask(part["weight"], part.get("bias"))) for k, part in parts.items()]

    def _alone(
        self,
        adapter: int,
        tensors: Sequence[Tensor],
        task: int,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        read: Callable[..., Tensor],
    ) -> Tensor:
        with bound(self.slots, [tensor[adapter] for tensor in tensors], self.kept):
            return read([_rows(x, task) for x in inputs], _named_rows(named, task))

    @torch.no_grad()
    def _agrees(
        self,
        tensors: Sequence[Tensor],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        read: Callable[..., Tensor],
    ) -> bool:
        """Check that one pass gives each task what its own pass gives, with adapters made to differ by a lot."""
        generator = torch.Generator().manual_seed(0)
        far = [x + (0.1 * torch.randn(x.shape, generator=generator)).to(x) for x in tensors]
        last = len(tensors[0]) - 1
        try:
            block = self._together(far, inputs, named, read)
        except (RuntimeError, _NotByCallError):  # a reshape that the network's order of dimensions does not allow
            self._alone(0, far, 0, inputs, named, read)  # or inputs that no task could be given: theirs is the error
            return False
        for task, other in ((0, last), (last, 0)):
            alone = self._alone(task, far, task, inputs, named, read)
            wrong = self._alone(other, far, task, inputs, named, read)
            if alone.shape != block[task].shape:
                return False
            allowed = TOLERANCE * (alone - wrong).norm() + 1e-5 * alone.norm()
            if not bool((block[task] - alone).norm() <= allowed):
                return False
        return True


class _NotByCallError(Exception):
    """Raised when a layer's weight is used without calling the layer."""


def _all_linear(slots: Sequence[Sequence[Slot]]) -> bool:
    """Check that the adapter is made of whole ``nn.Linear`` layers."""
    places = [slot for tensor_slots in slots for slot in tensor_slots]
    held = {(id(module), attribute) for module, attribute in places}
    return all(
        type(module) is nn.Linear and {(id(module), name) for name, _ in module.named_parameters()} <= held
        for module, _ in places
    )


def _rows(x: Any, task: int) -> Any:
    return x[task] if isinstance(x, Tensor) else x


def _named_rows(named: Mapping[str, Any], task: int) -> dict[str, Any]:
    return {name: _rows(x, task) for name, x in named.items()}


def flattened(x: Any) -> Any:
    """Flatten ``[B, b, ...]`` to ``[B b, ...]``; anything but a tensor passes as it is."""
    return x.flatten(0, 1) if isinstance(x, Tensor) else x
