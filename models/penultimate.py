"""What the last linear layer of a network sees, where its output is the network's: features without a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["LastCall", "Seen", "is_linear", "watched", "watched_linear"]


class Seen(NamedTuple):
    """What a module was given first, and what came of it; ``version`` counts the output's changes in place by then."""

    layer: nn.Module
    given: Any
    output: Any
    version: int


class LastCall:
    """The input and the output of that of some modules that was the last to finish.

    A layer with LoRA finishes after the layers that it is made of, so that it counts as one.
    """

    def __init__(self) -> None:
        #: None before any of them was called.
        self.seen: Seen | None = None

    def see(self, layer: nn.Module, given: Any, output: Any) -> None:
        """Note a module's input and output."""
        self.seen = Seen(layer, given, output, _version(output) if isinstance(output, Tensor) else 0)

    def features_of(self, result: Tensor, rows: int) -> Tensor | None:
        """Return the layer's input ``[n, E]`` where its output is the network's ``result``, in whatever shape.

        None where something comes after the layer, and where its input is no vector a row.
        """
        if self.seen is None:
            return None
        _, features, output, version = self.seen
        if not (isinstance(features, Tensor) and isinstance(output, Tensor)):
            return None
        if not _share_memory(output, result) or output.numel() != result.numel() or _version(output) != version:
            return None
        return features if features.dim() == 2 and len(features) == rows else None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one is other or one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except RuntimeError:  # a tensor that stands for another has no memory of its own
        return False


def _version(x: Tensor) -> int:
    """Count the changes in place of a tensor; one of inference mode does not."""
    return 0 if x.is_inference() else int(x._version)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, adapted by PEFT or not."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def watched_linear(network: nn.Module) -> Any:
    """Watch the linear layers of a network, PEFT's adapted ones among them, while the context lasts."""
    return watched([module for module in network.modules() if is_linear(module)])


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[LastCall]:
    """Watch some modules while the context lasts.

    Their ``forward`` is replaced and put back. Hooks would be shared with the network that the caller keeps.
    """
    last = LastCall()
    before = [(module, module.forward, "forward" in vars(module)) for module in modules]

    def watching(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            last.see(layer, next(iter((*args, *kwargs.values())), None), output)
            return output

        return run

    try:
        for module, forward, _ in before:
            vars(module)["forward"] = watching(module, forward)
        yield last
    finally:
        for module, forward, patched in before:
            if patched:
                vars(module)["forward"] = forward
            else:
                vars(module).pop("forward", None)
