"""A caller's network, made ready to carry an adapter: a copy of its structure that shares its weights.

PEFT puts its layers into the network it is given. An adapter's network is therefore a copy of the modules, with the
caller's weights by reference: the caller's network stays as it was, any number of adapters stand on it, and the weights
are in memory once.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pyro_lift.models.quantised import check_quantised, codes_of, own_layers

__all__ = [
    "WeightProbe",
    "check_network",
    "plain_network",
    "private_stream",
    "probe_weights",
    "share_hooks",
    "sharing_copy",
    "without_compilation",
    "without_fast_paths",
]

log = logging.getLogger("pyro_lift")

#: Values of each weight that are compared to tell whether it was changed.
PROBES = 64
#: Change of a weight, relative to its norm, that rounding does not explain.
ROUNDING = 1e-4
#: Attributes that hold a module's hooks around its call.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
#: Where :func:`~pyro_lift.models.backbones.load_backbone` notes a network's compiler: a copy is compiled again.
COMPILER = "_pyro_lift_compiler"


def check_network(network: nn.Module) -> None:
    """Refuse wrappers whose names would go into every export, and weights that do not exist yet or know no gradients.

    Raises:
        ValueError: names the wrapper or the weight, and the way out; a network that is quantised in an untried way.
    """
    if type(network).__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise ValueError(
            f"the network is wrapped in {type(network).__name__}, whose prefix would be part of every tensor's name. "
            "Pass network.module; LiFT shares tasks over processes itself (share=...)."
        )
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"the weight {name!r} has no shape yet (a lazy module). Run the network once first.")
        if parameter.is_meta:
            raise ValueError(f"the weight {name!r} has no values yet (on torch's meta device). Load it first.")
        if parameter.is_inference():
            raise ValueError(f"{name!r} was made under torch.inference_mode() and knows no gradients; make it outside.")
    check_quantised(network)


def plain_network(network: nn.Module) -> nn.Module:
    """Unwrap a network from ``torch.compile``; return any other as it is.

    Raises:
        TypeError: no module, such as the name of one.
    """
    if not isinstance(network, nn.Module):
        way = f": load it by pyro_lift.models.backbones.load_backbone({network!r})" if isinstance(network, str) else ""
        raise TypeError(f"backbone={network!r}: expected a torch module{way}.")
    inner = network._modules.get("_orig_mod")
    return network if inner is None else inner


def sharing_copy(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy the modules, sharing every weight and buffer with the original.

    Ties between weights, and modules that stand in several places, stay what they are. ``torch.compile``'s wrappers
    are left out; :func:`~pyro_lift.models.backbones.load_backbone`'s own compilation goes with the copy. Activation
    checkpointing of transformers is switched off in the copy. A network that cannot be copied is returned itself, with
    a word in the log.

    Args:
        network: the original.
        memo: of ``copy.deepcopy``; takes up what became of every module and weight, for copies of what refers to them.
    """
    memo = {} if memo is None else memo
    network = plain_network(network)
    forwards = (vars(module).get("forward") for module in network.modules() if plain_network(module) is module)
    if any(isinstance(forward, types.FunctionType) for forward in forwards):
        log.warning("the network has a forward function of its own, which a copy would share: it is used as it is.")
        memo |= {id(module): module for module in network.modules()}
        return network
    own_layers(network, memo)
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter)
        memo |= {id(x): x for x in module._buffers.values() if x is not None}
        memo |= {id(vars(module)[name]): copy.copy(vars(module)[name]) for name in HOOKS}
        # What takes a hook away refers to it weakly: a copy of it would be dead where the copy's hooks are shared.
        memo |= {id(x): x for x in _handles(module)}
        # A weight that another one is computed into at every call (weight_norm's): no leaf, so it cannot be copied.
        memo |= {id(x): x.detach() for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf}
    prepared = dict(memo)
    try:
        for wrapper in reversed([m for m in network.modules() if plain_network(m) is not m]):
            memo[id(wrapper)] = copy.deepcopy(plain_network(wrapper), memo)
        twin: nn.Module = copy.deepcopy(network, memo)
    except Exception as error:
        log.warning("the network cannot be copied (%s): it is used as it is.", error)
        memo.clear()  # of what was copied before the error, and is half empty
        memo |= prepared | {id(module): module for module in network.modules()}
        return network
    _compile_again(network, twin)
    _compute_once(twin)
    return twin


def share_hooks(network: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks of the caller's network, now and later, be called in its copy too.

    Args:
        network: the caller's.
        memo: of :func:`sharing_copy`.
    """
    for module in plain_network(network).modules():
        twin = memo.get(id(module))
        if twin is not None:
            vars(twin).update({name: vars(module)[name] for name in HOOKS})


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter with the same storage; a subclass (torchao's weights) is shared itself."""
    if type(parameter) is not nn.Parameter:
        return parameter
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def _handles(module: nn.Module) -> Iterator[RemovableHandle]:
    for value in vars(module).values():
        yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, RemovableHandle))


def _compute_once(twin: nn.Module) -> None:
    """Switch the checkpointing of transformers off: a layer computed again would have another call's weights."""
    switched = [module for module in twin.modules() if vars(module).get("gradient_checkpointing") is True]
    for module in switched:
        vars(module)["gradient_checkpointing"] = False
    if switched:
        log.warning(
            "the network's own gradient checkpointing is off in the adapter's copy of it, and saves no memory: a layer "
            "computed again would have another call's weights. Use load_backbone(..., gradient_checkpointing=True)."
        )


def _compile_again(network: nn.Module, twin: nn.Module) -> None:
    lost = False
    for old, new in zip(network.modules(), twin.modules(), strict=False):
        backend = vars(new).get(COMPILER)
        if backend is not None:
            new.compile(backend=backend)
        lost |= backend is None and old._compiled_call_impl is not None
    if lost:
        log.warning("the adapter's network is a copy that is not compiled. Call adapter.backbone.compile(...).")


def without_fast_paths(network: nn.Module) -> None:
    """Switch off the paths of PyTorch's transformer layers that read weights without calling the layers that hold them.

    In eval mode ``nn.TransformerEncoderLayer`` hands its layers' base weights to one fused function, so that an adapter
    in these layers has no effect. The layer's own, slower path gives the same output but at padded places.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused function knows these two; 0 stands for any other
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor = False


@contextmanager
def without_compilation(network: nn.Module) -> Iterator[None]:
    """The network as plain PyTorch runs it, for a call whose shapes are not worth a compilation."""
    compiled = [(m, m._compiled_call_impl) for m in network.modules() if m._compiled_call_impl is not None]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation


@contextmanager
def private_stream(seed: int | None, network: nn.Module) -> Iterator[None]:
    """Torch's random streams begun at a seed, and afterwards where they were; None leaves them to run on.

    Of the devices, only the host and those that hold the network: seeding the others would disturb them.
    """
    if seed is None:
        yield
        return
    devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


class WeightProbe:
    """Samples of every frozen weight, to tell later whether one was changed in place.

    Args:
        network: whose weights are probed.
        leave_out: names of the parameters that may change.

    Raises:
        ValueError: a weight with samples that are not finite.
    """

    def __init__(self, network: nn.Module, leave_out: frozenset[str]) -> None:
        self.leave_out = leave_out
        self.values = probe_weights(network, leave_out)
        for name, values in self.values.items():
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"the frozen weight {name!r} holds values that are not finite, and so will all that the network "
                    "computes. Load the network again; in half precision large weights may have overflowed."
                )

    def changed(self, network: nn.Module) -> str | None:
        """Name of the first weight that has other values than before, by more than rounding; None if none has."""
        now = probe_weights(network, self.leave_out)
        for name, before in self.values.items():
            if name in now and before.shape == now[name].shape:
                difference = (now[name] - before).norm()
                if not bool(difference <= ROUNDING * before.norm()) and not torch.equal(now[name], before):
                    return name
        return None


def probe_weights(network: nn.Module, leave_out: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Evenly spaced values of each weight, ``[<= 64]`` each, on the host."""
    probes = {
        name: _probe(codes_of(parameter).detach())
        for name, parameter in network.named_parameters()
        if name not in leave_out
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, probe in probes.items():
        by_device.setdefault(probe.device, []).append(name)
    for names in by_device.values():  # one transfer a device
        parts = torch.cat([probes[name] for name in names]).cpu().split([len(probes[name]) for name in names])
        probes |= dict(zip(names, parts, strict=True))
    return probes


def _probe(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros(0, dtype=torch.float32)
    x = x if x.is_contiguous() else x.flatten()
    return x.view(-1)[:: max(x.numel() // PROBES, 1)][:PROBES].float()
