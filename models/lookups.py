"""Whole numbers held against the tables that a network of one's own looks them up in, before the first step.

Networks of transformers say which their word embeddings are. Others are called with one row, and each table
(``nn.Embedding``, ``nn.EmbeddingBag``) that is given a part of an input as it stands says how many entries it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.doubts import Doubt
from pyro_lift.models.networks import private_stream, without_compilation
from pyro_lift.models.task import Rows
from pyro_lift.models.vocabulary import TOKENS, words_of

__all__ = ["doubts_of_lookups"]

#: A limit that no whole number reaches.
NONE = torch.iinfo(torch.int64).max
#: Names, shapes and types of a row's inputs; and the limit of every number of a row, by input.
Sort = frozenset[tuple[str, torch.Size, torch.dtype]]
_LIMITS: WeakKeyDictionary[nn.Module, dict[Sort, dict[str, Tensor]]] = WeakKeyDictionary()


class _UnknownError(Exception):
    """Ends a pass before a table is asked for what it does not have."""


def doubts_of_lookups(adapter: RandomAdapter, rows: Rows, where: str) -> Iterator[Doubt]:
    """Ask whether whole-number inputs are in the tables that the network looks them up in.

    Args:
        adapter: the network as a function of theta; called with the first row, once for each sort of rows.
        rows: that it is to read.
        where: begins the messages, which name the input, the row and the number.
    """
    not_asked = ("attention_mask", TOKENS) if words_of(adapter.backbone) is not None else ("attention_mask",)
    asked = {
        name: x
        for name, x in rows.inputs.items()
        if not x.is_floating_point() and x.dtype != torch.bool and not name.endswith(not_asked)
    }
    tables = (nn.Embedding, nn.EmbeddingBag)
    if not asked or not any(isinstance(module, tables) for module in adapter.backbone.modules()):
        return
    sort = frozenset((name, x.shape[1:], x.dtype) for name, x in rows.inputs.items())
    known = _LIMITS.setdefault(adapter.backbone, {})
    limits = known.get(sort)
    if limits is None:
        limits, whole = _limits(adapter, rows, asked)
        if whole:  # else there may be tables that the pass did not come to
            known[sort] = limits
    for name, most in limits.items():
        x = asked[name]
        wrong = _outside(x, most.to(x.device, non_blocking=True).view(x.shape[1:]))
        yield Doubt(wrong.any(), partial(_unknown, wrong, x, most, f"{where}, {name!r}" if name else where))


@torch.no_grad()
def _limits(adapter: RandomAdapter, rows: Rows, asked: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Call the network with the first row; return the limit of each number of the inputs that tables were given.

    And whether the pass came to its end. What the network raises is said where its output is needed.
    """
    row = rows.take(slice(0, 1)).to(adapter.initial.device)
    own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in row.inputs.items()}
    row = Rows(own, row.target, row.shared)
    limits = {name: torch.full((own[name].numel(),), NONE) for name in asked}

    def hook(table: Any, args: tuple[Any, ...]) -> None:
        for name in asked:
            places = _places(own[name], args[0] if args else None)
            if places is None:
                continue
            limits[name][places] = limits[name][places].clamp_max(int(table.num_embeddings))
            if bool(_outside(own[name].flatten().cpu(), limits[name]).any()):
                raise _UnknownError

    tables = [m for m in adapter.backbone.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    hooks = [table.register_forward_pre_hook(hook) for table in tables]
    whole = True
    try:
        with adapter.bound(adapter.initial), private_stream(0, adapter.backbone), without_compilation(adapter.backbone):
            adapter.backbone(*row.positional, **row.named)
    except torch.OutOfMemoryError:
        raise
    except (_UnknownError, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        whole = False
    finally:
        for each in hooks:
            each.remove()
    return {name: each for name, each in limits.items() if bool((each < NONE).any())}, whole


def _outside(x: Tensor, limits: Tensor) -> Tensor:
    return (x >= limits) | ((x < 0) & (limits < NONE))


def _places(x: Tensor, given: Any) -> Tensor | None:
    """Return which numbers of an input a table was given, where it was given a part of the input itself."""
    if not isinstance(given, Tensor) or given.dtype != x.dtype:
        return None
    try:
        mine, other = x.untyped_storage().data_ptr(), given.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors without memory of their own
        return None
    if mine == 0 or mine != other:
        return None
    return torch.arange(x.numel()).as_strided(given.shape, given.stride(), given.storage_offset()).flatten()


def _unknown(wrong: Tensor, x: Tensor, limits: Tensor, where: str) -> str:
    place = torch.nonzero(wrong)[0].tolist()
    limit = int(limits.view(x.shape[1:])[tuple(place[1:])])
    return (
        f"{where}: {int(x[tuple(place)])} in row {place[0]}; the network looks it up in a table of {limit}, from 0. "
        "Number tokens and categories as the network does, and pad rows with one of its own."
    )
