"""Which tensors of a network are the coordinates of an adapter's vector: the trainable ones, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["coordinates_of", "note_coordinates"]

#: Networks that an adapter stands on, and the names of its tensors: they are frozen by then.
_NOTED: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def note_coordinates(backbone: nn.Module, names: Sequence[str]) -> None:
    """Keep the names of an adapter's tensors, by which another adapter on the same network finds them."""
    _NOTED[backbone] = tuple(names)


def coordinates_of(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the adapter's tensors, in order of name.

    Raises:
        ValueError: none, or all of the network's; one that is tied to another.
    """
    known = _NOTED.get(backbone, ())
    trainable = sorted((name, p) for name, p in backbone.named_parameters() if p.requires_grad or name in known)
    if not trainable:
        loaded = "PeftModel.from_pretrained(..., is_trainable=True)"
        raise ValueError(
            "the backbone has no trainable tensor, so there is no adapter to make random. Wrap it first: "
            f"peft.get_peft_model(backbone, peft.LoraConfig(target_modules=...)); or load an adapter by {loaded}."
        )
    total = sum(p.numel() for p in backbone.parameters())
    if sum(p.numel() for _, p in trainable) == total:
        raise ValueError(
            f"all {total} weights of the backbone are trainable. Wrap it with peft.get_peft_model first; "
            "RandomAdapter makes the trainable tensors random and takes the others as they are."
        )
    if compiled := [name for name, _ in trainable if "_orig_mod" in name.split(".")]:
        raise ValueError(
            f"the adapter tensor {compiled[0]!r} is inside a network compiled by torch.compile(network), whose prefix "
            "would be part of every exported name. Wrap the plain network, and compile afterwards: model.compile()."
        )
    _check_apart(trainable)
    return trainable


def _check_apart(trainable: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Refuse tensors that share memory: as coordinates they would stand twice, and PEFT saves one of them."""
    places: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in trainable:
        if not p.is_floating_point():
            raise ValueError(f"the adapter tensor {name!r} is {p.dtype}; expected floating-point weights.")
        start = int(p.storage_offset() * p.element_size())
        last = sum((int(n) - 1) * int(s) for n, s in zip(p.shape, p.stride(), strict=True))
        end = start + (last + 1) * p.element_size()
        places.setdefault(p.untyped_storage().data_ptr(), []).append((start, end, name))
    for spans in places.values():
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise ValueError(
                    f"the adapter tensors {first!r} and {second!r} share their memory, so that they cannot be "
                    "coordinates of their own. Adapt one of the tied layers only (ensure_weight_tying=False)."
                )
