"""PEFT adapters as random nn modules: one flat random site, bound to the network without copying it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_lift.models.blocks import BlockCall, Slot, bound, flattened, slots_of
from pyro_lift.models.readouts import Readout, read, readout_for

__all__ = ["AdapterTensor", "RandomAdapter"]


class AdapterTensor(NamedTuple):
    """Where one adapter tensor stands in the flat vector."""

    name: str
    shape: torch.Size
    part: slice

    @property
    def module(self) -> str:
        """The adapted module's name, without PEFT's wrappers and the tensor's own name."""
        name = self.name.removeprefix("base_model.model.")
        return name.split(".lora_")[0]


class RandomAdapter(PyroModule):
    r"""A backbone with a PEFT adapter, as a function of the adapter's weights theta in R^D.

    The network is frozen; its trainable adapter tensors, in order of name, are the coordinates of one vector. A call
    binds a vector to the network for the length of that call: one set of weights in memory, however many tasks or
    draws. A block of vectors goes through the network in one pass, each with its own rows
    (:mod:`pyro_lift.models.blocks`).

    Args:
        backbone: a PEFT model (``peft.get_peft_model``); its tensors with ``requires_grad`` are the adapter.
        prior: makes the random site ``theta`` of a call without ``theta``: a distribution over ``[D]``, or a
            function of this module that returns one. Without it, ``theta`` must be given.
        readout: from the network and a batch's named inputs to the tensor a likelihood wants, as
            :class:`~pyro_lift.models.readouts.LabelMatching`; None goes by the inputs and by what the output
            holds (:func:`~pyro_lift.models.readouts.read`).
        postprocess: from the network's output to the tensor a likelihood wants, in place of a readout.

    Attributes:
        initial: the adapter's own initial weights ``[D]``. All tasks start here: zero is a saddle (a LoRA product
            with both factors zero has no gradient), and averages over tasks mean something only in one common gauge.
        layout: name, shape and place of every adapter tensor.

    Example:
        >>> import peft, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> adapted = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["0"]))
        >>> adapter = RandomAdapter(adapted)
        >>> adapter.dim, adapter(torch.ones(4, 3), theta=adapter.initial).shape
        (5, torch.Size([4, 2]))
    """

    initial: Tensor
    _slots: list[list[Slot]]
    _block: BlockCall

    def __init__(
        self,
        backbone: nn.Module,
        prior: Distribution | Callable[[RandomAdapter], Distribution] | None = None,
        *,
        readout: Readout | None = None,
        postprocess: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        trainable = sorted((name, p) for name, p in backbone.named_parameters() if p.requires_grad)
        if not trainable:
            raise ValueError(
                "the backbone has no trainable tensor, so there is no adapter to make random. Wrap it first: "
                "peft.get_peft_model(backbone, peft.LoraConfig(target_modules=...))."
            )
        total = sum(p.numel() for p in backbone.parameters())
        self.dim = sum(p.numel() for _, p in trainable)
        if self.dim == total:
            raise ValueError(
                f"all {total} weights of the backbone are trainable. Wrap it with peft.get_peft_model first; "
                "RandomAdapter makes the trainable tensors random and takes the others as they are."
            )
        self.layout = _layout(trainable)
        self.register_buffer("initial", torch.cat([p.detach().reshape(-1) for _, p in trainable]).clone())
        # Dropout would make the likelihood itself random, and the sampler's noise is calibrated without it.
        backbone.eval()
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        # Outside the registry: PyroModule would look for random sites in every submodule at every access.
        object.__setattr__(self, "backbone", backbone)
        object.__setattr__(self, "_slots", slots_of(backbone, [p for _, p in trainable]))
        object.__setattr__(self, "_block", BlockCall(self._slots, self._read))
        self._sizes = [math.prod(entry.shape) for entry in self.layout]
        if readout is not None and postprocess is not None:
            raise TypeError("give a readout or a postprocess, not both.")
        self.readout, self.postprocess = readout, postprocess
        if prior is not None:
            self.theta = PyroSample(prior)

    def bind(self, theta: Tensor) -> dict[str, Tensor]:
        """The adapter's tensors by name, as views of ``theta``: ``[D]``, or with leading dimensions."""
        return dict(zip([entry.name for entry in self.layout], self._tensors(theta), strict=True))

    def bound(self, theta: Tensor) -> AbstractContextManager[None]:
        """A context in which ``backbone`` itself has the adapter weights ``theta`` ``[D]``."""
        return bound(self._slots, self._tensors(theta))

    def _tensors(self, theta: Tensor) -> list[Tensor]:
        # One split: its backward is one concatenation, where a slice a tensor would add up as many vectors of length D.
        parts = theta.split(self._sizes, -1)
        lead = theta.shape[:-1]
        return [part.view(*lead, *entry.shape) for part, entry in zip(parts, self.layout, strict=True)]

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`bind`; every tensor must be there, with its shape, and no other.

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

    def forward(self, *inputs: Any, theta: Tensor | None = None, **named: Any) -> Tensor:
        """The network's output under adapter weights ``theta``.

        Args:
            inputs: positional inputs of the backbone.
            theta: ``[D]``; or ``[B, D]``, and then every input has a leading dimension B of its own and each row
                goes through its own adapter. None samples the site ``theta`` from the prior.
            named: keyword inputs of the backbone.
        """
        if theta is None:
            theta = self.theta
        if theta.shape[-1] != self.dim:
            raise ValueError(f"theta has {theta.shape[-1]} coordinates, the adapter {self.dim}.")
        if theta.dim() == 1:
            return self._call(theta, inputs, named)
        if theta.shape[0] == 1:
            one = {k: v[0] for k, v in named.items()}
            return self._call(theta[0], tuple(x[0] for x in inputs), one).unsqueeze(0)
        return self._block(self._tensors(theta), inputs, named)

    def _call(self, theta: Tensor, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        with self.bound(theta):
            return self._read(inputs, named)

    def _read(self, inputs: Sequence[Any], named: Mapping[str, Any], block: bool = False) -> Tensor:
        """What the likelihood wants of the bound network; of a block, one leading row per row of any task."""
        readout = None if self.postprocess else readout_for(named, self.readout)
        if readout is not None:  # it knows how its texts lie in a block
            return readout(self.backbone, named)
        if block:
            inputs, named = [flattened(x) for x in inputs], {k: flattened(x) for k, x in named.items()}
        output = self.backbone(*inputs, **named)
        return self.postprocess(output) if self.postprocess else read(output, named.get("attention_mask"))

    def norms(self, theta: Tensor) -> dict[str, Tensor]:
        """Euclidean norm of each adapted module's tensors, for ``theta`` of shape ``[..., D]``."""
        squares: dict[str, Tensor] = {}
        for entry in self.layout:
            part = theta[..., entry.part].square().sum(-1)
            squares[entry.module] = squares[entry.module] + part if entry.module in squares else part
        return {name: value.sqrt() for name, value in squares.items()}

    def to(self, *args: Any, **kwargs: Any) -> RandomAdapter:
        """Move the backbone and the initial weights."""
        self.backbone.to(*args, **kwargs)
        super().to(*args, **kwargs)
        return self

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, tensors={len(self.layout)}, backbone={type(self.backbone).__name__}"


def _layout(trainable: list[tuple[str, nn.Parameter]]) -> tuple[AdapterTensor, ...]:
    entries, start = [], 0
    for name, parameter in trainable:
        stop = start + math.prod(parameter.shape)
        entries.append(AdapterTensor(name, parameter.shape, slice(start, stop)))
        start = stop
    return tuple(entries)
