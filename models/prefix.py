r"""The frozen prefix: layers below the adapter, computed once a row.

Where an adapter sits in the last layers of a network, the states that enter its first layer do not depend on theta,

.. math:: f_\theta(x) = g_\theta\big(h(x)\big),

so h(x) is computed once for each row and kept (:mod:`~pyro_lift.models.row_states`), found again by the row's own bits
(:mod:`~pyro_lift.models.row_keys`). Whoever calls the network, with whatever minibatch, finds them. The network runs as
it is, from its inputs on; only the layers below are passed by for the length of the call, and the last of them returns
what is kept.

Which layers these are is seen in a pass of the network itself, and whether passing them by is right is checked in
numbers, once, at other adapter weights than those at which states were computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_lift.models.activation_checkpointing import layer_lists
from pyro_lift.models.blocks import Slot
from pyro_lift.models.networks import HOOKS
from pyro_lift.models.prefix_plan import STATE, PrefixPlan, find_prefix
from pyro_lift.models.row_keys import Key, Keyed, row_keys
from pyro_lift.models.row_states import RowStates
from pyro_lift.support.options import check_literal

__all__ = ["FrozenPrefix", "PrefixMode"]

log = logging.getLogger("pyro_lift")

PrefixMode = Literal["auto", "on", "off"]

#: Largest difference, relative to the output, between a pass with the layers below and one without them.
AGREEMENT = 1e-4


class FrozenPrefix:
    """What a network computes below its adapter, kept for every row.

    Args:
        mode: ``"auto"`` where there are layers below the adapter, ``"on"`` to be told where there are none, ``"off"``.
        memory_bytes: as of :class:`~pyro_lift.models.row_states.RowStates`.

    Attributes:
        states: of the rows so far.
        plan: the layers that are passed by; None where there are none, or no row has been seen yet.
        reason: why there are none.
    """

    def __init__(self, mode: PrefixMode = "auto", memory_bytes: int | None = None) -> None:
        check_literal("frozen_prefix", mode, PrefixMode)
        self.mode, self.memory_bytes = mode, memory_bytes
        self.states = RowStates(memory_bytes)
        self.plan: PrefixPlan | None = None
        self.reason: str | None = "frozen_prefix='off'" if mode == "off" else None
        self._modules: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._weights: list[Tensor] = []
        self._versions: tuple[int, ...] = ()
        self._pausing = False
        #: Calls that have passed layers by.
        self.passes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenPrefix:
        """Make one for a copy of the network: its layers are others, what rows give is the same."""
        twin = FrozenPrefix(self.mode, self.memory_bytes)
        twin.states = self.states
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenPrefix, (self.mode, self.memory_bytes)

    def __repr__(self) -> str:
        layers = "none" if self.plan is None else f"{len(self.plan.layers)} of {self.plan.of} in {self.plan.name!r}"
        return f"FrozenPrefix(layers={layers}, {self.states!r})"

    @property
    def settled(self) -> bool:
        """Whether it is known which layers are passed by."""
        return self.plan is not None or self.reason is not None

    def forget(self) -> None:
        """Let go of all states, and look at the network anew: its weights are others, or elsewhere."""
        self.states = RowStates(self.memory_bytes)
        if self.mode != "off":
            self.plan = self.reason = None

    def settle(
        self, network: nn.Module, slots: Sequence[Sequence[Slot]], read: Callable[[int], Tensor], mask: Tensor | None
    ) -> None:
        """Find the layers below the adapter, and check in numbers that nothing else changes without them.

        Args:
            network: that carries the adapter.
            slots: the places of the adapter's tensors.
            read: runs the network on some rows, and reads its output, at a random point of that number.
            mask: of the rows' tokens ``[n, L]``.

        Raises:
            ValueError: there are none, and the mode is ``"on"``; says why.
        """
        with torch.inference_mode(False), torch.no_grad():
            plan = find_prefix(network, slots, lambda: read(0))
            if isinstance(plan, PrefixPlan):
                self.plan, self._modules = plan, [m for layer in plan.layers for m in layer.modules()]
                self._hooks = [vars(m)[name] for m in self._modules for name in HOOKS if name in vars(m)]
                self._note(network, slots, plan)
                self.reason = self._disagreement(read, mask)
            else:
                self.reason = plan
        if self.reason is None:
            assert isinstance(plan, PrefixPlan)
            count = f"{len(plan.layers)} of {plan.of} layers ({plan.name})"
            log.info("%s lie below the adapter: their states are computed once a row.", count)
            return
        self.plan, self.states = None, RowStates(self.memory_bytes)
        log.debug("no layers below the adapter are passed by: %s", self.reason)
        if self.mode == "on":
            raise ValueError(f"frozen_prefix='on', but no layer can be passed by: {self.reason}.")

    def _disagreement(self, read: Callable[[int], Tensor], mask: Tensor | None) -> str | None:
        read(1)  # computes states
        self.passes = 0
        kept = read(2)
        with self.paused():
            plain = read(2)
        if mask is not None and plain.dim() == 3 and plain.shape[:2] == mask.shape:
            kept, plain = kept * mask.unsqueeze(-1), plain * mask.unsqueeze(-1)
        if self.passes == 0:
            return "the network's rows cannot be told by its inputs"
        finite = plain.isfinite() & (plain.abs() < 1e30)
        off = torch.where(finite, kept - plain, 0.0).float().norm()
        size = torch.where(finite, plain, 0.0).float().norm()
        allowed = AGREEMENT if plain.dtype in (torch.float32, torch.float64) else 0.05
        if kept.shape != plain.shape or not bool(off <= allowed * size + 1e-12):
            return f"without the layers below, the output is off by {float(off / size):.1e}"
        return None

    def _note(self, network: nn.Module, slots: Sequence[Sequence[Slot]], plan: PrefixPlan) -> None:
        """Remember the weights that states depend on, all but the adapter's and those of the layers above."""
        own = {id(place.module._parameters[place.attribute]) for places in slots for place in places}
        above = {id(p) for layers in layer_lists(network).values() for layer in layers for p in layer.parameters()}
        below = {id(p) for layer in plan.layers for p in layer.parameters()}
        self._weights = [p for p in network.parameters() if id(p) not in own and id(p) not in above - below]
        self._versions = self._seen()

    def _seen(self) -> tuple[int, ...]:
        return tuple(p._version for p in self._weights)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The network as it is, for the length of a context."""
        before, self._pausing = self._pausing, True
        try:
            yield
        finally:
            self._pausing = before

    def _unnoticed(self) -> bool:
        """Whether passing the layers by goes unnoticed: no hook wants their values, no dropout is on."""
        busy = any(module.training or module._compiled_call_impl is not None for module in self._modules)
        return not busy and not any(self._hooks)

    def call(self, network: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Run the network, or a part of it that holds the layers, on some rows; pass by what is known of them.

        Args:
            network: called with the inputs.
            inputs: positional ones.
            named: those by keyword.
        """
        plan = self.plan
        if plan is None or self._pausing or not self._unnoticed():
            return network(*inputs, **named)
        if self._seen() != self._versions:  # a weight was written to
            self.states, self._versions = RowStates(self.memory_bytes), self._seen()
        keyed = row_keys(inputs, named, trimmed=plan.textlike)
        if keyed is None:
            return network(*inputs, **named)
        fresh = self._computed(network, inputs, named, keyed)
        if fresh is None:
            return network(*inputs, **named)

        def kept(hidden: Tensor) -> Tensor:
            return self.states.gather(keyed.keys, hidden.shape[1] if plan.textlike else None, hidden, fresh)

        self.passes += 1
        with _passed_by(plan, kept):
            return network(*inputs, **named)

    def _computed(
        self,
        network: Callable[..., Any],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        keyed: Keyed,
    ) -> dict[Key, Tensor] | None:
        """Compute the states of rows that are not there; return those for which there is no room.

        On a CPU row by row, without padding: what is kept of a row then does not depend, in its last digits, on the
        rows it first came with, and a run that goes on from a checkpoint has the same numbers.
        """
        plan, missing = self.plan, self.states.missing(keyed.keys)
        assert plan is not None
        fresh: dict[Key, Tensor] = {}
        if not missing:
            return fresh
        on_cpu = all(x.device.type == "cpu" for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        with torch.inference_mode(False), torch.no_grad():
            for group in [[k] for k in missing] if on_cpu else [missing]:
                length = None if keyed.lengths is None else max(keyed.lengths[k] for k in group)
                try:
                    states = _below(plan, network, *_rows(inputs, named, group, keyed.width, length))
                except _NoStatesError:
                    return None
                for j, k in enumerate(group):
                    own = states[j] if keyed.lengths is None else states[j][: keyed.lengths[k]]
                    if not self.states.add(keyed.keys[k], own):
                        fresh[keyed.keys[k]] = own
        return fresh


def _rows(
    inputs: Sequence[Any], named: Mapping[str, Any], group: Sequence[int], width: int | None, length: int | None
) -> tuple[list[Any], dict[str, Any]]:
    """Take some rows of the inputs, and of their tokens the first ones."""

    def taken(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x[list(group)]
        return x[:, :length] if length is not None and x.dim() == 2 and x.shape[1] == width else x

    return [taken(x) for x in inputs], {name: taken(x) for name, x in named.items()}


# ------------------------------------------------------------------------------------------------- layers passed by


class _NoStatesError(Exception):
    """Raised when a pass does not come to the last layer below the adapter."""


class _Below(Exception):  # noqa: N818
    """Ends a pass at the last layer below the adapter, whose states it carries."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("the last layer below the adapter")
        self.states = states


def _below(plan: PrefixPlan, network: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """Run the layers below the adapter and return the states that the last one gives."""
    last = plan.layers[-1]
    forward, patched = last.forward, "forward" in last.__dict__

    def ending(*args: Any, **kwargs: Any) -> Any:
        raise _Below(_first_state(forward(*args, **kwargs)))

    last.__dict__["forward"] = ending
    try:
        network(*inputs, **named)
    except _Below as end:
        return end.states
    finally:
        _restore(last, forward, patched)
    raise _NoStatesError


@contextmanager
def _passed_by(plan: PrefixPlan, kept: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = [(layer, layer.forward, "forward" in layer.__dict__) for layer in plan.layers]
    last = len(plan.layers) - 1
    try:
        for k, (layer, forward, _) in enumerate(before):
            if k < last and k in plan.whole:
                continue
            run = forward if k in plan.whole else None
            layer.__dict__["forward"] = _Passing(plan.results[k], kept if k == last else None, run)
        yield
    finally:
        for layer, forward, patched in before:
            _restore(layer, forward, patched)


def _restore(layer: nn.Module, forward: Any, patched: bool) -> None:
    if patched:
        layer.__dict__["forward"] = forward
    else:
        layer.__dict__.pop("forward", None)


class _Passing:
    """The forward of a layer that is passed by: it hands its state on, or gives what is kept."""

    def __init__(
        self, result: Any, kept: Callable[[Tensor], Tensor] | None, run: Callable[..., Any] | None = None
    ) -> None:
        self.result, self.kept, self.run = result, kept, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = _first_input(args, kwargs)
        given = state if self.kept is None else self.kept(state)
        if self.run is not None:
            output = self.run(*args, **kwargs)
            return type(output)([given, *output[1:]])
        if self.result == STATE:
            return given
        items = [given if item == STATE else _handed_on(item, args, kwargs) for item in self.result]
        return tuple(items)


def _first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _first_state(output: Any) -> Tensor:
    state = output if isinstance(output, Tensor) else output[0]
    assert isinstance(state, Tensor)
    return state.detach()


def _handed_on(item: tuple[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    where, what = item
    return args[what] if where == "place" else kwargs[what] if where == "name" else what
