"""Check that a network uses the weights it is given: every adapter tensor's gradient reaches the output, or is refused.

A likelihood that does not depend on theta leaves the prior as it is, and a chain over it looks like any other. The
gradient is taken at a random point, because at LoRA's own start (B = 0) that of A is zero. A tensor that is not part of
the graph at all is told from one whose gradient is zero for these rows, which happens (a unit that is off, attention
over one token).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_lift.models.networks import private_stream, without_compilation

__all__ = ["Candidate", "Probe", "ReachError", "check_reach", "synthetic_rows"]

#: Spread of the random point around the adapter's start.
SPREAD = 0.1
#: Random points before a gradient that is zero everywhere is believed.
POINTS = 3
#: Numbers beyond it stand for minus infinity (a masked logit), and are left out.
HUGE = 1e30
#: Made-up rows of a network that is known by its layers only: one row would leave a router's other experts out.
MADE_UP = 32
#: Largest difference, relative to the output, between a pass with gradients and one without; bfloat16's is below 0.02.
AGREEMENT = 0.05
#: Largest one between two passes alike; sums in another order are within it.
SAME = 1e-3


class ReachError(ValueError):
    """Adapter weights do not reach the network's output."""


class Probe(NamedTuple):
    """A network as a function of adapter tensors, and the point at which these tensors start.

    Attributes:
        network: for its buffers and random streams, which are put back.
        call: from adapter tensors, positional and named inputs to the output.
        names: of the tensors.
        start: the tensors.
    """

    network: nn.Module
    call: Callable[[Sequence[Tensor], Sequence[Any], Mapping[str, Any]], Any]
    names: Sequence[str]
    start: Sequence[Tensor]


class Candidate(NamedTuple):
    """Made-up inputs.

    Attributes:
        inputs: positional.
        named: by keyword.
        conclusive: whether a tensor that these rows do not reach is reached by none: the network has no other input.
    """

    inputs: tuple[Tensor, ...]
    named: dict[str, Tensor]
    conclusive: bool


def check_reach(
    probe: Probe, inputs: Sequence[Any], named: Mapping[str, Any], *, allow_none: bool = False
) -> list[str]:
    """Refuse a network in which some adapter tensor is no part of what the output of these rows is computed from.

    Args:
        probe: the network.
        inputs: positional inputs.
        named: inputs by keyword.
        allow_none: whether some tensors may be, as those of experts that no row was sent to.

    Returns:
        Names of tensors whose gradient is zero all the same, at every point that was tried.

    Raises:
        ReachError: names the tensors and the way out.
    """
    generator = torch.Generator().manual_seed(0)
    zero = set(probe.names)
    with _as_it_was(probe.network), without_compilation(probe.network):
        for _ in range(POINTS):
            zero &= _zero_gradients(probe, generator, inputs, named, allow_none)
            if not zero:
                break
    return [name for name in probe.names if name in zero]


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """Random streams, buffers and flags come back as they were; no weight of the network's own asks for a gradient.

    Activation checkpointing of the network's own would compute a layer again with the weights that are there in the
    backward pass. Where these ask for gradients too, torch does not notice that they are others.
    """
    buffers = [(x, x.clone()) for x in network.buffers()]
    asking = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for x, old in buffers:
                x.copy_(old)


def _zero_gradients(
    probe: Probe, generator: torch.Generator, inputs: Sequence[Any], named: Mapping[str, Any], allow_none: bool
) -> set[str]:
    """Names of the tensors whose gradient is zero at a random point."""

    def output_at(point: Sequence[Tensor], stream: int = 0) -> Tensor:
        with private_stream(stream, probe.network):
            return _numbers(probe.call(point, inputs, named))

    point = _random_point(probe.start, generator)
    with torch.enable_grad():
        output = output_at(point)
        gradients = dict(zip(probe.names, _gradients(output, point), strict=True))
    unused = [name for name, gradient in gradients.items() if gradient is None]
    if len(unused) == len(point):
        raise ReachError(
            "no gradient reaches the adapter from the network's output: the network does not use theta. Its layers are "
            "not called (a fused path that reads their weights?), or a no_grad() or detach() stands between."
        )
    if unused and not allow_none:
        raise ReachError(
            f"{len(unused)} of {len(point)} adapter tensors do not reach the network's output: {', '.join(unused[:3])}"
            f"{', ...' if len(unused) > 3 else ''}. Leave their modules out (target_modules=..., exclude_modules=...). "
            "Where only some rows reach them, as in a mixture of experts, pass adapt_backbone(allow_unreached=True)."
        )
    zero = {name for name, gradient in gradients.items() if gradient is None or not bool((gradient != 0).any())}
    with torch.no_grad():
        plain = output_at(point)
        if (off := _difference(output.detach(), plain)) > AGREEMENT:
            raise ReachError(
                f"without gradients the network gives another output than with them (off by {off:.0%}): a fused path "
                "reads other weights than the adapter's. Predictions would not be the trained network's."
            )
        if (off := _difference(plain, output_at(point, stream=1))) > SAME:
            raise ReachError(
                f"the network's output is random in eval mode (off by {off:.1%} from one call to the next), and with "
                "it the likelihood; the sampler brings its own, calibrated noise. Give F.dropout(..., training="
                "self.training), or take the noise out."
            )
        if len(zero) < len(point) and torch.equal(plain, output_at(_random_point(probe.start, generator))):
            raise ReachError(
                "the network gives the same output at another theta: it keeps what it computed before for these rows."
            )
    return zero


def _random_point(start: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [(x + SPREAD * torch.randn(x.shape, generator=generator).to(x)).detach().requires_grad_() for x in start]


def _difference(x: Tensor, y: Tensor) -> float:
    """Norm of the difference relative to the first one's, over what is finite in both."""
    if x.shape != y.shape:
        return float("inf")
    kept = x.isfinite() & y.isfinite() & (x.abs() < HUGE)
    x, y = torch.where(kept, x, 0.0).float(), torch.where(kept, y, 0.0).float()
    return float((x - y).norm() / x.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _numbers(output: Any) -> Tensor:
    """Collect all floating-point numbers of an output in one vector."""
    parts = [output] if isinstance(output, Tensor) else tree_leaves(output)
    kept = [x.flatten() for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    if not kept:
        raise TypeError(f"the network returns {type(output).__name__} without a floating-point tensor.")
    return torch.cat([x.to(kept[0]) for x in kept])


def _gradients(output: Tensor, point: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(point)
    generator = torch.Generator().manual_seed(1)  # a plain sum would be constant after a softmax
    weight = torch.randn(output.shape, generator=generator).to(output)
    kept = torch.where(output.detach().isfinite() & (output.detach().abs() < HUGE), output, 0.0)
    try:
        return torch.autograd.grad((kept * weight).sum(), list(point), allow_unused=True)
    except RuntimeError as error:
        raise ReachError(
            f"the network's backward pass fails with an adapter bound for the length of a call ({error}). Activation "
            "checkpointing of its own? Use load_backbone(gradient_checkpointing=True) or checkpoint_layers instead."
        ) from error


# ------------------------------------------------------------------------------------------------------- made-up rows


def synthetic_rows(network: nn.Module) -> Iterator[Candidate]:
    """Candidates for rows that the network may take, made from what it says of itself; there may be none."""
    unwrap: Any = getattr(network, "get_base_model", None)
    base: nn.Module = unwrap() if unwrap else network
    weight = next((p for p in base.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    if hasattr(base, "config") and hasattr(base, "main_input_name"):
        rows = _of_transformers(base, weight)
    elif type(base).__module__.startswith("timm."):
        rows = _of_timm(base, weight)
    else:
        rows = _of_layers(base, weight)
    yield from rows


def _of_transformers(base: Any, weight: Tensor) -> Iterator[Candidate]:
    config = base.config
    if base.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(config, "num_channels", 3)
        yield Candidate((), {"pixel_values": _normal(weight, 2, channels, height, width)}, True)
    elif base.main_input_name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        if vocabulary < 2:
            return
        ids = (3 + 5 * torch.arange(12).view(2, 6)) % vocabulary
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary:  # some heads stand on the last token's state
            ids = torch.cat([torch.where(ids == end, (end + 1) % vocabulary, ids), torch.full((2, 1), end)], 1)
        ids = ids.to(weight.device)
        named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield Candidate((), named, True)
        yield Candidate((), {**named, "decoder_input_ids": ids[:, :3]}, True)


def _of_timm(base: Any, weight: Tensor) -> Iterator[Candidate]:
    first = next((module for module in base.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    sizes = [getattr(getattr(base, "patch_embed", None), "img_size", None)]
    sizes += [(getattr(base, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]]
    for size in sizes:
        if size is not None:
            yield Candidate((_normal(weight, 2, channels, *size),), {}, True)


def _of_layers(base: nn.Module, weight: Tensor) -> Iterator[Candidate]:
    """Make inputs by the first layers' shapes: the widths of linear layers, the channels of convolutions, tokens."""
    parameters = list(inspect.signature(base.forward).parameters.values())
    conclusive = len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD
    shapes: dict[tuple[int, ...], None] = {}
    for module in _leaves(base):
        width = getattr(module, "embed_dim", None) or getattr(module, "in_features", None)
        width = width or getattr(module, "input_size", None)
        channels = int(getattr(module, "in_channels", 0))
        if isinstance(module, nn.Embedding):
            ids = (1 + torch.arange(5 * MADE_UP).view(-1, 5)) % module.num_embeddings
            yield Candidate((ids.to(weight.device),), {}, conclusive)
        elif isinstance(module, nn.Conv1d):
            shapes |= {(MADE_UP, channels, 32): None}
        elif isinstance(module, nn.Conv2d):
            shapes |= {(MADE_UP, channels, side, side): None for side in (32, 28, 64, 224, 8)}
        elif isinstance(width, int):
            shapes |= {(MADE_UP, width): None, (MADE_UP, 5, width): None}
    for shape in shapes:
        yield Candidate((_normal(weight, *shape),), {}, conclusive)


def _leaves(base: nn.Module, count: int = 3) -> list[nn.Module]:
    """Find the first modules that have weights of their own and a known width, an attention as a whole."""
    leaves: list[nn.Module] = []
    for name, module in base.named_modules():
        known = isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, nn.RNNBase))
        if known and ".lora_" not in name:
            leaves.append(module)
    return leaves[:count]


def _normal(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(like)
