"""PEFT adapters as random nn modules: one flat random site, bound to the network without copying it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_lift.models.before_head import BeforeHead, named_before_head
from pyro_lift.models.blocks import BlockCall, Slot, bound, flattened, slots_of
from pyro_lift.models.coordinates import coordinates_of, note_coordinates
from pyro_lift.models.fused_lora import fused
from pyro_lift.models.lengths import TEXT_INPUTS, by_length
from pyro_lift.models.networks import (
    WeightProbe,
    check_network,
    plain_network,
    share_hooks,
    sharing_copy,
    without_fast_paths,
)
from pyro_lift.models.peft_layers import active_adapter, adapter_tensors, check_in_use, check_places, peft_layers
from pyro_lift.models.prefix import FrozenPrefix, PrefixMode
from pyro_lift.models.quantised import with_gradients
from pyro_lift.models.reach import POINTS, SPREAD, Probe, ReachError, check_reach, synthetic_rows
from pyro_lift.models.readouts import Readout, gives_features, read, readout_for
from pyro_lift.support.spans import span

__all__ = ["AdapterTensor", "RandomAdapter"]

log = logging.getLogger("pyro_lift")

#: Rows with which the layers below the adapter are looked for.
TRIED = 4


class AdapterTensor(NamedTuple):
    """The place of one adapter tensor in the flat vector."""

    name: str
    shape: torch.Size
    part: slice

    @property
    def module(self) -> str:
        """Name of the adapted module, without PEFT's wrappers and the tensor's own name."""
        name = self.name.removeprefix("base_model.model.")
        return name.split(".lora_")[0]


class RandomAdapter(PyroModule):
    r"""A backbone with a PEFT adapter, as a function of the adapter's weights theta in R^D.

    The network is frozen; its trainable adapter tensors, in order of name, are the coordinates of one vector. A call
    binds a vector to the network for the length of that call: one set of weights in memory, however many tasks or
    draws. A block of vectors goes through the network in one pass, each with its own rows
    (:mod:`pyro_lift.models.blocks`).

    Several adapters may stand on one PEFT model: a call uses the model's structure and frozen weights, and theta. The
    model is put in eval mode, and PyTorch's fused transformer paths, which would read past the adapter, are switched
    off in it; nothing else of it is written. theta is float32 (float64 where a tensor is) whatever the network's dtype.

    Args:
        backbone: a PEFT model (``peft.get_peft_model``); its tensors with ``requires_grad`` are the adapter.
        prior: makes the random site ``theta`` of a call without ``theta``: a distribution over ``[D]``, or a
            function of this module that returns one. Without it, ``theta`` must be given.
        readout: from the network and a batch's named inputs to the tensor a likelihood wants, as
            :class:`~pyro_lift.models.readouts.LabelMatching`; None goes by the inputs and by what the output
            holds (:func:`~pyro_lift.models.readouts.read`).
        postprocess: from the network's output to the tensor a likelihood wants, in place of a readout.
        allow_unreached: whether some adapter tensors may have no effect on the rows the network is first tried with,
            as a mixture's experts that none of these rows is sent to.

    Attributes:
        initial: the adapter's own initial weights ``[D]``. All tasks start here: zero is a saddle (a LoRA product
            with both factors zero has no gradient), and averages over tasks mean something only in one common gauge.
        layout: name, shape and place of every adapter tensor.

    Raises:
        ValueError: a network that does not use the adapter's weights, or not each by itself: merged or disabled by
            PEFT, several adapters, tied tensors, layers that are read past. Where no row can be made up to try it
            with, the first real one is (:meth:`check_reach`).

    Example:
        >>> import peft, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> adapted = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["0"]))
        >>> adapter = RandomAdapter(adapted)
        >>> adapter.dim, adapter(torch.ones(4, 3), theta=adapter.initial).shape
        (5, torch.Size([4, 2]))
    """

    initial: Tensor
    backbone: nn.Module
    #: What the layers below the adapter give, kept for every row.
    prefix: FrozenPrefix
    _slots: list[list[Slot]]
    _kept: list[Slot]
    _block: BlockCall

    def __init__(
        self,
        backbone: nn.Module,
        prior: Distribution | Callable[[RandomAdapter], Distribution] | None = None,
        *,
        readout: Readout | None = None,
        postprocess: Callable[[Any], Tensor] | None = None,
        allow_unreached: bool = False,
        frozen_prefix: PrefixMode = "auto",
    ) -> None:
        super().__init__()
        if readout is not None and postprocess is not None:
            raise TypeError("give a readout or a postprocess, not both.")
        backbone = plain_network(backbone)
        check_network(backbone)
        trainable = coordinates_of(backbone)
        layers = peft_layers(backbone)
        #: Name of the PEFT adapter whose weights theta is; None for a network without PEFT.
        self.adapter_name = active_adapter(backbone)
        check_in_use(layers.values(), self.adapter_name)
        check_places(backbone, layers, self.adapter_name)
        self.dim = sum(p.numel() for _, p in trainable)
        self.layout = _layout(trainable)
        self._sizes = [math.prod(entry.shape) for entry in self.layout]
        # A chain's moves are smaller than half precision's last digit, so theta is float32 at least.
        wide = [p.detach().reshape(-1).to(torch.promote_types(p.dtype, torch.float32)) for _, p in trainable]
        self.register_buffer("initial", torch.cat(wide).clone())
        # Dropout would make the likelihood itself random, and the sampler's noise is calibrated without it.
        backbone.eval()
        if layers:
            without_fast_paths(backbone)
        with_gradients(backbone)
        # Outside the registry: PyroModule would look for random sites in every submodule at every access.
        slots, kept = slots_of(backbone, [p for _, p in trainable]), _rewritten(layers)
        for name, value in {"backbone": backbone, "_slots": slots, "_kept": kept}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_block", BlockCall(self._slots, self._read, self._kept))
        object.__setattr__(self, "prefix", FrozenPrefix(frozen_prefix))
        self._layers = list(layers.values())
        note_coordinates(backbone, [entry.name for entry in self.layout])
        self._note_weights()
        self.readout, self.postprocess = readout, postprocess
        self.allow_unreached, self._reached = allow_unreached, False
        self._features: bool | None = None
        self._before_head: BeforeHead | None = None
        if prior is not None:
            self.theta = PyroSample(prior)
        self._try_made_up_rows()

    def beginning_at(self, initial: Tensor) -> RandomAdapter:
        """Make the same adapter with another start ``[D]``, as an object of its own; the weights stay shared."""
        if initial.shape != self.initial.shape:
            raise ValueError(f"a start of shape {tuple(initial.shape)}; the adapter has {self.dim} weights.")
        memo: dict[int, Any] = {}
        memo[id(self.backbone)] = sharing_copy(self.backbone, memo)
        view = copy.deepcopy(self, memo)
        share_hooks(self.backbone, memo)
        view.initial = initial.detach().to(self.initial).clone()
        note_coordinates(view.backbone, [entry.name for entry in view.layout])
        return view

    def reading(self, before_head: BeforeHead | None) -> RandomAdapter:
        """Make the same adapter on features before the network's own head, in place of its output; an object apart.

        None makes it on the output again.
        """
        view = self.beginning_at(self.initial)
        view._features, view._reached = (None if before_head is None else True), before_head is not None
        view._before_head = None if before_head is None else named_before_head(view.backbone, before_head.name)
        return view

    @property
    def before_head(self) -> BeforeHead | None:
        """Where the features are that are read in place of the network's output; None: that is read."""
        return self._before_head

    def check_use(self) -> None:
        """Refuse a network that no longer is what the adapter was made on; at the beginning of every run.

        Raises:
            ValueError: PEFT's layers were merged, disabled or taken out, a frozen weight was changed in place, or theta
                would not be kept in float32; names the way out.
        """
        check_in_use(self._layers, self.adapter_name)
        present = {id(module) for module in self.backbone.modules()}
        if gone := [e.name for e, s in zip(self.layout, self._slots, strict=True) if id(s[0].module) not in present]:
            raise ValueError(
                f"the adapter tensor {gone[0]!r} is no longer in the network: PEFT's layers were taken out or put in "
                "again since. Make another adapter, or keep one network for each (copy.deepcopy)."
            )
        if self.initial.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the adapter is in {self.initial.dtype}, in which a chain's moves are lost. Call adapter.float(), or "
                'load the backbone alone in half precision: load_backbone(..., dtype="bfloat16").'
            )
        if changed := self._weights.changed(self.backbone):
            raise ValueError(
                f"the frozen weight {changed!r} was changed in place since the adapter was made, and with it what the "
                "adapter's weights mean. Make another adapter, or give each its own network (copy.deepcopy)."
            )
        if any(module.training for module in self.backbone.modules()):
            self.backbone.eval()

    def check_reach(self, *inputs: Any, **named: Any) -> None:
        """Show with some rows that every adapter tensor has an effect on the output; once, later calls do nothing.

        Raises:
            ValueError: names the tensors that have none, and the way out.
        """
        if self._reached or torch.is_inference_mode_enabled():
            return
        zero = check_reach(self._probe(), inputs, named, allow_none=self.allow_unreached)
        if len(zero) == len(self.layout):
            raise ReachError(
                f"the gradient of the network's output is zero in every adapter weight, at {POINTS} random points: "
                "theta has no effect. Does the network round what the adapter gives, or multiply it by zero (a "
                "residual branch that was never trained)?"
            )
        if zero:
            log.warning("the gradient of these adapter tensors is zero on the first rows: %s", ", ".join(zero))
        self._reached = True

    def has_reach(self, *inputs: Any, **named: Any) -> bool:
        """Whether at least one adapter tensor has an effect on what is read of the network, by some rows."""
        try:
            return len(check_reach(self._probe(), inputs, named, allow_none=True)) < len(self.layout)
        except ReachError:
            return False

    @property
    def gives_features(self) -> bool:
        """Whether the last network output that was read is features, for heads to stand on, rather than answers."""
        return bool(self._features)

    def _try_made_up_rows(self) -> None:
        for rows in synthetic_rows(self.backbone):
            try:
                zero = check_reach(self._probe(), rows.inputs, rows.named, allow_none=self.allow_unreached)
            except ReachError:
                if rows.conclusive:
                    raise
                return
            except Exception:  # not what this network takes
                continue
            self._reached = not zero
            return

    def _probe(self) -> Probe:
        def call(tensors: Sequence[Tensor], inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
            with bound(self._slots, tensors, self._kept):
                return self._read(inputs, named)

        return Probe(self.backbone, call, [entry.name for entry in self.layout], self._tensors(self.initial))

    def _note_weights(self) -> None:
        """What the frozen weights are and their one type; the types in which the network has the adapter's tensors."""
        tensors = [places[0].module._parameters[places[0].attribute] for places in self._slots]
        dtypes = [self.initial.dtype if x is None else x.dtype for x in tensors]
        self._dtypes = None if all(dtype == self.initial.dtype for dtype in dtypes) else dtypes
        types = {p.dtype for p in self.backbone.parameters()}
        # Half precision is left to the network: some of its layers may want an input as it is.
        self._network_type = types.pop() if types in ({torch.float32}, {torch.float64}) else None
        names = frozenset(entry.name for entry in self.layout) | frozenset(adapter_tensors(self.backbone))
        self._weights = WeightProbe(self.backbone, names)

    def bind(self, theta: Tensor) -> dict[str, Tensor]:
        """Name the adapter's tensors, as views of ``theta``: ``[D]``, or with leading dimensions."""
        return dict(zip([entry.name for entry in self.layout], self._tensors(theta), strict=True))

    def bound(self, theta: Tensor) -> AbstractContextManager[None]:
        """Make a context in which ``backbone`` itself has the adapter weights ``theta`` ``[D]``."""
        return bound(self._slots, self._tensors(theta), self._kept)

    def _tensors(self, theta: Tensor) -> list[Tensor]:
        # One split: its backward is one concatenation, where a slice a tensor would add up as many vectors of length D.
        parts = theta.split(self._sizes, -1)
        lead = theta.shape[:-1]
        tensors = [part.view(*lead, *entry.shape) for part, entry in zip(parts, self.layout, strict=True)]
        if self._dtypes is None:
            return tensors
        return [tensor.to(dtype) for tensor, dtype in zip(tensors, self._dtypes, strict=True)]

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """Join named tensors to a vector, the inverse of :meth:`bind`: every tensor with its shape, and no other.

        Raises:
            ValueError: names the missing, unknown or misshapen tensor.
        """
        known = {entry.name: entry.shape for entry in self.layout}
        if missing := sorted(known.keys() - tensors.keys()):
            raise ValueError(f"adapter tensor {missing[0]!r} is missing ({len(missing)} in all).")
        if unknown := sorted(tensors.keys() - known.keys()):
            raise ValueError(f"tensor {unknown[0]!r} is not part of this adapter ({len(unknown)} in all).")
        for name, shape in known.items():
            if tensors[name].shape != shape:
                raise ValueError(f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}.")
        return torch.cat([tensors[entry.name].reshape(-1) for entry in self.layout])

    def forward(self, *inputs: Any, theta: Tensor | None = None, head_inputs: bool = False, **named: Any) -> Tensor:
        """Run the network under adapter weights ``theta``.

        Args:
            inputs: positional inputs of the backbone.
            theta: ``[D]``; or ``[B, D]``, and then every input has a leading dimension B of its own and each row
                goes through its own adapter. None samples the site ``theta`` from the prior.
            head_inputs: whether to return what a task's own head takes, where the readout tells it from its logits
                (:meth:`~pyro_lift.models.readouts.LabelMatching.head_inputs`).
            named: keyword inputs of the backbone.
        """
        if theta is None:
            theta = self.theta
        if theta.shape[-1] != self.dim:
            raise ValueError(f"theta has {theta.shape[-1]} coordinates, the adapter {self.dim}.")
        check_in_use(self._layers, self.adapter_name)
        if not self._reached:
            first = inputs if theta.dim() == 1 else tuple(_first(x) for x in inputs)
            self.check_reach(*first, **(named if theta.dim() == 1 else {k: _first(x) for k, x in named.items()}))
        if head_inputs and not self.matches(named):
            head_inputs = False
        if not self.prefix.settled:
            self._settle_prefix(theta, inputs, named)
        if theta.dim() == 2 and theta.shape[0] == 1:
            alone = {name: x[0] for name, x in named.items()}
            each = tuple(x[0] for x in inputs)
            return self.forward(*each, theta=theta[0], head_inputs=head_inputs, **alone).unsqueeze(0)
        if self._sorts(inputs, named):
            return by_length(lambda some: self._run(theta, (), some, head_inputs), named)
        return self._run(theta, inputs, named, head_inputs)

    def matches(self, named: Mapping[str, Any]) -> bool:
        """Whether inputs of these names are read by label matching, whose similarities a task's own head can stand on.

        Another readout, or a postprocess, may score label texts too: it has logits alone.
        """
        return self.postprocess is None and hasattr(readout_for(named, self.readout), "head_inputs")

    def _sorts(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether rows may go in the order of their lengths: texts on a CPU, of which the network gives features."""
        if not self._features or inputs or self.postprocess or readout_for(named, self.readout) is not None:
            return False
        mask = named.get("attention_mask")
        if mask is None or mask.device.type != "cpu" or not named.keys() <= TEXT_INPUTS:
            return False
        return all(x.shape == mask.shape for x in named.values())

    def _settle_prefix(self, theta: Tensor, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Find the layers below the adapter, on a few rows of the first task."""
        if theta.dim() > 1:
            theta, inputs, named = theta[0], [_first(x) for x in inputs], {k: _first(x) for k, x in named.items()}
        inputs = [_some(x) for x in inputs]
        named = {k: x if k.startswith("label_") else _some(x) for k, x in named.items()}

        def read_at(point: int) -> Tensor:
            noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(point))
            with self.bound(theta.detach() + SPREAD * noise.to(theta)):
                return self._read(inputs, named)

        self.prefix.settle(self.backbone, self._slots, read_at, named.get("attention_mask"))

    @span("pyro_lift.forward")
    def _run(self, theta: Tensor, inputs: Sequence[Any], named: Mapping[str, Any], head_inputs: bool) -> Tensor:
        read = self._read_head_inputs if head_inputs else self._read
        # An accelerator waits for the host to start each operation, and there PyTorch's own five start faster.
        with fused(self._layers, self.adapter_name) if theta.device.type == "cpu" else nullcontext():
            if theta.dim() > 1:
                return self._block(self._tensors(theta), inputs, named, read)
            with self.bound(theta):
                return read(inputs, named)

    def _read_head_inputs(self, inputs: Sequence[Any], named: Mapping[str, Any], block: bool = False) -> Tensor:
        """Do what :meth:`_read` does, for a task's own head on top of label matching."""
        readout: Any = readout_for(named, self.readout)
        return self._widened(readout.head_inputs(self.network, named))

    def _read(self, inputs: Sequence[Any], named: Mapping[str, Any], block: bool = False) -> Tensor:
        """Run the bound network and read its output; for a block, with one leading row per row of any task."""
        return self._widened(self._read_as_it_is(inputs, named, block))

    def _widened(self, output: Tensor) -> Tensor:
        half = isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16)
        return output.float() if half else output  # a likelihood adds up many small terms

    def _read_as_it_is(self, inputs: Sequence[Any], named: Mapping[str, Any], block: bool) -> Tensor:
        readout = None if self.postprocess else readout_for(named, self.readout)
        if readout is not None:  # it knows how its texts lie in a block
            return readout(self.network, named)
        if block:
            inputs, named = [flattened(x) for x in inputs], {k: flattened(x) for k, x in named.items()}
        if self._before_head is not None:
            return self._before_head(self.network, inputs, named)
        output = self.network(*inputs, **named)
        if self.postprocess:
            return self.postprocess(output)
        if self._features is None:
            object.__setattr__(self, "_features", gives_features(self.backbone, output))
        return read(output, named.get("attention_mask"))

    def network(self, *inputs: Any, **named: Any) -> Any:
        """Run the bound network as a readout does: its own output, and layers below the adapter only once a row."""
        named = {name: self.typed(x) for name, x in named.items()}
        return self.prefix.call(self.backbone, [self.typed(x) for x in inputs], named)

    def typed(self, x: Any) -> Any:
        """Bring an input of floating-point numbers to the type of all of the network's weights, where that is one."""
        floats = isinstance(x, Tensor) and x.is_floating_point() and self._network_type is not None
        return x.to(self._network_type) if floats else x

    def norms(self, theta: Tensor) -> dict[str, Tensor]:
        """Compute the Euclidean norm of each adapted module's tensors, for ``theta`` of shape ``[..., D]``."""
        squares: dict[str, Tensor] = {}
        for entry in self.layout:
            part = theta[..., entry.part].square().sum(-1)
            squares[entry.module] = squares[entry.module] + part if entry.module in squares else part
        return {name: value.sqrt() for name, value in squares.items()}

    def to(self, *args: Any, **kwargs: Any) -> RandomAdapter:
        """Move the backbone and the initial weights."""
        super().to(*args, **kwargs)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomAdapter:
        """Move the backbone too: ``to``, ``cuda``, ``double`` and the like all come here."""
        super()._apply(fn, recurse)
        self.backbone._apply(fn, recurse)
        self._note_weights()
        self.prefix.forget()
        return self

    def extra_repr(self) -> str:
        """Describe the adapter in ``repr``."""
        return f"dim={self.dim}, tensors={len(self.layout)}, backbone={type(self.backbone).__name__}"


def _layout(trainable: list[tuple[str, nn.Parameter]]) -> tuple[AdapterTensor, ...]:
    entries, start = [], 0
    for name, parameter in trainable:
        stop = start + math.prod(parameter.shape)
        entries.append(AdapterTensor(name, parameter.shape, slice(start, stop)))
        start = stop
    return tuple(entries)


def _rewritten(layers: Mapping[str, Any]) -> list[Slot]:
    """Frozen weights that PEFT's attention layer adds theta's product to and subtracts it from again, at every call.

    Each time leaves a rounding error; put back as they were, they stay what they are.
    """
    attentions = [getattr(layer, "base_layer", None) for layer in layers.values()]
    kept = []
    for attention in attentions:
        if isinstance(attention, nn.MultiheadAttention):
            kept.append(Slot(attention, "in_proj_weight"))
            kept.append(Slot(getattr(attention.out_proj, "base_layer", attention.out_proj), "weight"))
    return kept


def _some(x: Any) -> Any:
    return x[:TRIED] if isinstance(x, Tensor) else x


def _first(x: Any) -> Any:
    return x[0] if isinstance(x, Tensor) else x
