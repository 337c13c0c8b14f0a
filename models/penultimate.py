"""What the last linear layer of a network sees, where its output is the network's: features without a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["LastLinear", "watched_linear"]


class LastLinear:
    """The input and the output of the linear layer that was the last to finish.

    A layer with LoRA finishes after the layers that it is made of, so that it counts as one.
    """

    def __init__(self) -> None:
        self._seen: tuple[Tensor, Tensor, int] | None = None

    def see(self, features: Any, output: Any) -> None:
        """Note a layer's input and output; of what is no tensor there is nothing to note."""
        both = isinstance(features, Tensor) and isinstance(output, Tensor)
        self._seen = (features, output, _version(output)) if both else None

    def features_of(self, result: Tensor, rows: int) -> Tensor | None:
        """Return the layer's input ``[n, E]`` where its output is the network's ``result``, in whatever shape.

        None where something comes after the layer, and where its input is no vector a row.
        """
        if self._seen is None:
            return None
        features, output, version = self._seen
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


@contextmanager
def watched_linear(network: nn.Module) -> Iterator[LastLinear]:
    """Watch the linear layers of a network, PEFT's adapted ones among them, while the context lasts.

    Their ``forward`` is replaced and put back. Hooks would be shared with the network that the caller keeps.
    """
    last = LastLinear()
    layers = [m for m in network.modules() if isinstance(getattr(m, "base_layer", m), nn.Linear)]
    before = [(layer, layer.forward, "forward" in vars(layer)) for layer in layers]

    def watching(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            last.see(next(iter((*args, *kwargs.values())), None), output)
            return output

        return run

    try:
        for layer, forward, _ in before:
            vars(layer)["forward"] = watching(forward)
        yield last
    finally:
        for layer, forward, patched in before:
            if patched:
                vars(layer)["forward"] = forward
            else:
                vars(layer).pop("forward", None)
