"""Lengths of texts held against the places that a network has for tokens, before the first step.

A network with a table of places fails at the first token without one, with words that name neither the text nor the
table; on an accelerator that ends the process. Networks that compute places from distances (T5), or as they go along
(rotations), have no table and read texts of any length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyro_lift.models.conventions import base_of
from pyro_lift.models.doubts import Doubt
from pyro_lift.models.task import Rows

__all__ = ["Places", "doubts_of_lengths", "places_of"]

#: What the tables of places are called in transformers.
TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
#: Ends of the names of tables of such a kind; a plain ``Embedding`` is one too. Others fold a text's end back.
KINDS = ("LearnedPositionalEmbedding", "SinusoidalPositionalEmbedding")
#: What configurations of networks for several sorts of input have.
COMPOSED = ("vision_config", "audio_config")


class Places(NamedTuple):
    """A table of places.

    Attributes:
        of_decoder: whether it is the decoder's, of an encoder-decoder.
        most: tokens that a text may have.
        counted: which places of a row take one: all, those that the mask leaves, or those of no padding token.
        padding: that token.
    """

    of_decoder: bool
    most: int
    counted: Literal["all", "masked", "padded"]
    padding: int = -1


#: What was found, by network.
_PLACES: WeakKeyDictionary[nn.Module, list[Places]] = WeakKeyDictionary()


def places_of(backbone: nn.Module) -> list[Places]:
    """Return a network's tables of places; none where it has no hard limit, or is not one of transformers."""
    if backbone not in _PLACES:
        _PLACES[backbone] = _found(base_of(backbone))
    return _PLACES[backbone]


def _found(network: Any) -> list[Places]:
    config = getattr(network, "config", None)
    if config is None or any(hasattr(config, name) for name in COMPOSED):  # pictures have places too
        return []
    found = []
    for name, module in network.named_modules():
        kind = type(module).__name__
        known = isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or kind.endswith(KINDS))
        if name.rpartition(".")[2] not in TABLES or not known:
            continue
        of_decoder = bool(getattr(config, "is_encoder_decoder", False)) and ".decoder." in f".{name}"
        if "attention_mask" in inspect.signature(module.forward).parameters:  # OPT
            found.append(Places(of_decoder, module.num_embeddings - getattr(module, "offset", 0), "masked"))
        elif type(module) is nn.Embedding and module.padding_idx is not None:  # RoBERTa: places begin behind it
            padding = module.padding_idx
            found.append(Places(of_decoder, module.num_embeddings - padding - 1, "padded", padding))
        else:
            found.append(Places(of_decoder, module.num_embeddings - getattr(module, "offset", 0), "all"))
    return found


def doubts_of_lengths(backbone: nn.Module, rows: Rows, where: str, *, matching: bool = False) -> Iterator[Doubt]:
    """Ask whether texts have more tokens than the network has places for; rows that bring places are not asked.

    Args:
        backbone: a network of transformers, or another, which is not asked.
        rows: that it is to read.
        where: begins the messages, which name the row, both lengths, and the way out.
        matching: whether they are read by label matching, which leaves out columns that no text fills.
    """
    named = {**rows.inputs, **rows.shared}
    texts = {name: x for name, x in named.items() if name == "" or name.endswith("input_ids")}
    texts = {name: x for name, x in texts.items() if not x.is_floating_point() and x.dim() > 1}
    if not texts or any(name.endswith("position_ids") for name in named):
        return
    tables = places_of(backbone)
    written = any(table.of_decoder for table in tables)
    for name, x in texts.items():
        of_decoder = written and name.startswith(("decoder_", "label_", "option_"))
        mask = named.get(f"{name.removesuffix('input_ids')}attention_mask")
        for table in tables:
            if table.of_decoder == of_decoder and x.shape[-1] > table.most:
                length = _lengths(table, x, mask, cut=matching and name == "input_ids")
                wrong = (length > table.most).flatten(1).any(1) if length.dim() > 1 else length > table.most
                of_text = f"{where}, {name!r}" if name else where
                yield Doubt(wrong.any(), partial(_too_long, base_of(backbone), table, wrong, length, of_text))


def _lengths(table: Places, x: Tensor, mask: Tensor | None, *, cut: bool) -> Tensor:
    """Count the places that each text ``[..., L]`` takes."""
    mask = torch.ones_like(x) if mask is None or mask.shape != x.shape else mask.ne(0).long()
    if table.counted == "masked":
        return mask.sum(-1)
    if table.counted == "padded":
        return (x != table.padding).sum(-1)
    whole = torch.full_like(mask[..., 0], x.shape[-1])
    if not cut:
        return whole
    last = (mask * torch.arange(1, x.shape[-1] + 1, device=x.device)).amax(-1)
    return torch.minimum(whole, -(-last.clamp_min(1) // 8) * 8)


def _too_long(network: nn.Module, table: Places, wrong: Tensor, length: Tensor, where: str) -> str:
    row = int(torch.nonzero(wrong)[0])
    count = int(length[row].max())
    padding = ", padding included" if table.counted == "all" else ""
    return (
        f"{where}: row {row} has {count} tokens{padding}; {type(network).__name__} has places for {table.most}. Cut "
        f"the texts to max_length={table.most}: of the encoder, of [tasks], or of the tokenizer (truncation=True)."
    )
