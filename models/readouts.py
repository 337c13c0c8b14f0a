"""Readouts: how a network is called and its output read, where one call with the row's inputs is not enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pyro_lift.models.likelihoods import IGNORED, log_likelihood, shift_right
from pyro_lift.support.options import check_literal, check_number

__all__ = ["ABSENT", "LabelMatching", "LabelScoring", "Pooling", "Readout", "pool", "read", "readout_for"]


Pooling = Literal["mean", "first", "last"]
#: The similarity of a text that is absent: times any scale above 0.01 it leaves no probability.
ABSENT = -1e4
#: Inputs of a text that may be filled up: where there is no token, and where only one lot of texts has the input, whose
#: other texts are a first segment each.
FILLED = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}


#: From the network, as a function of its inputs, and a batch's named inputs to the output of a likelihood.
Readout = Callable[[Callable[..., Any], Mapping[str, Tensor]], Tensor]


def pool(hidden: Tensor, mask: Tensor | None = None, how: Pooling = "mean") -> Tensor:
    """Reduce hidden states to one vector a text, ``[..., d]``.

    Args:
        hidden: hidden states ``[..., L, d]``.
        mask: 1 where there is a token, 0 where there is padding, ``[..., L]``; None has no padding.
        how: the mean over the tokens, the first token (``[CLS]``), or the last one that is not padding.
    """
    if how == "first":
        return hidden[..., 0, :]
    if mask is None:
        return hidden.mean(-2) if how == "mean" else hidden[..., -1, :]
    weight = mask.to(hidden.dtype)
    if how == "last":  # the place of the last 1, wherever the padding is
        place = mask.shape[-1] - 1 - mask.flip(-1).argmax(-1)
        weight = torch.nn.functional.one_hot(place, mask.shape[-1]).to(hidden.dtype)
    return (hidden * weight.unsqueeze(-1)).sum(-2) / weight.sum(-1, keepdim=True).clamp_min(1.0)


def _states(output: Any) -> Tensor:
    return torch.as_tensor(getattr(output, "last_hidden_state", output))


@dataclass(frozen=True)
class LabelMatching:
    r"""Readout by label matching: logits are scaled similarities of the encoded input to the encoded label texts.

    .. math:: o_c = s \cos\big(f_\theta(x), f_\theta(\ell_c)\big), \qquad f_\theta = \text{pool} \circ \text{encoder}

    Inputs and label texts go through the same adapter, in one forward pass or two. The label texts are those of the
    task, ``label_input_ids`` ``[C, L]``, or every row's own options, ``option_input_ids`` ``[b, C, L]``; their masks
    are ``label_attention_mask`` and ``option_attention_mask``. An option whose mask is all zeros is absent: its logit
    is the most negative number.

    Whatever else the rows have by name (``token_type_ids`` of pairs, ``position_ids``) goes to the encoder with them,
    and ``label_token_type_ids`` with the label texts.

    Args:
        scale: s; with it a logit ranges over ``[-s, s]``.
        pooling: of the encoder's states; see :func:`pool`.
        pad_token: what fills the shorter texts.
    """

    scale: float = 20.0
    pooling: Pooling = "mean"
    pad_token: int = 0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_literal("pooling", self.pooling, Pooling)

    def __call__(self, network: Callable[..., Any], named: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits ``[b, C]``; for a block ``[B, b, ...]``, those of all its rows ``[B b, C]``."""
        _, similarity, present = self._compared(network, named)
        logits = (self.scale * similarity).masked_fill(~present, torch.finfo(similarity.dtype).min)
        return torch.as_tensor(logits.flatten(0, -2))

    def head_inputs(self, network: Callable[..., Any], named: Mapping[str, Tensor]) -> Tensor:
        """Compute what a task's own head takes (:mod:`~pyro_lift.models.heads`), one row an input.

        Label texts of the task: the encoded inputs, of length one, and their similarities, ``[b, E + C]``. Options of
        every row: the similarities alone, ``[b, C]``. An absent text has the similarity :data:`ABSENT`.
        """
        inputs, similarity, present = self._compared(network, named)
        similarity = similarity.masked_fill(~present, ABSENT)
        if "option_input_ids" in named:
            return similarity.flatten(0, -2)
        return torch.cat([inputs, similarity], -1).flatten(0, -2)

    def _compared(self, network: Callable[..., Any], named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Encoded inputs ``[..., b, E]``, similarities ``[..., b, C]``, and which texts there are."""
        texts, text_mask, of_row = _texts(named)
        first, second = _besides(named), _besides(named, "option_" if of_row else "label_")
        first |= _trimmed(named["input_ids"], named["attention_mask"], first)
        b, C = first["input_ids"].shape[-2], texts.shape[-2]
        present = text_mask.any(-1)
        # A text without any token would have softmax over nothing: let it have one, it is left out below.
        text_mask = torch.cat([torch.ones_like(text_mask[..., :1]), text_mask[..., 1:]], -1)
        second |= {"input_ids": texts, "attention_mask": text_mask}
        if of_row:
            place = texts.dim() - 3
            second = {name: x.flatten(place, place + 1) for name, x in second.items()}
        inputs, labels = self._encoded(network, first, second)
        if of_row:
            return inputs, (inputs.unsqueeze(-2) * labels.unflatten(-2, (b, C))).sum(-1), present
        return inputs, inputs @ labels.mT, present.unsqueeze(-2)

    def names_read(self, named: Mapping[str, Tensor]) -> set[str]:
        """Return the names under which the encoder is given the rows' inputs, and the label texts'."""
        texts = "option_" if "option_input_ids" in named else "label_"
        return {"input_ids", "attention_mask", *_besides(named), *_besides(named, texts)}

    def _encoded(
        self, network: Callable[..., Any], first: dict[str, Tensor], second: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Encode two lots of texts, each with all its inputs, as vectors ``[..., n, d]``.

        In one pass, or in two where the padding of the shorter texts would be more than a quarter of it, or where one
        lot has an input for which the other knows no value.
        """
        shapes = [lot["input_ids"].shape for lot in (first, second)]
        lengths, rows = [shape[-1] for shape in shapes], [shape[-2] for shape in shapes]
        length = max(lengths)
        padding = sum(n * (length - filled) for n, filled in zip(rows, lengths, strict=True))
        names = dict.fromkeys(("input_ids", "attention_mask", *first, *second))
        if 4 * padding > sum(rows) * length or not names.keys() <= FILLED.keys():
            return self._vectors(network, first), self._vectors(network, second)
        fills = {**FILLED, "input_ids": self.pad_token}
        lots = [
            {n: _fill(lot[n] if n in lot else torch.zeros_like(lot["input_ids"]), length, fills[n]) for n in names}
            for lot in (first, second)
        ]
        vectors = self._vectors(network, {name: torch.cat([lot[name] for lot in lots], -2) for name in names})
        return vectors[..., : rows[0], :], vectors[..., rows[0] :, :]

    def _vectors(self, network: Callable[..., Any], texts: Mapping[str, Tensor]) -> Tensor:
        ids = texts["input_ids"]
        flat = {name: x.flatten(0, ids.dim() - 2) for name, x in texts.items()}
        states = _states(network(**flat))
        return normalize(pool(states, flat["attention_mask"], self.pooling), dim=-1).view(*ids.shape[:-1], -1)


def _besides(named: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the further inputs of the rows (or of their label texts, without the prefix), such as token types."""
    if prefix:
        named = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
    else:
        named = {name: x for name, x in named.items() if not name.startswith(("label_", "option_"))}
    return {name: x for name, x in named.items() if name not in ("input_ids", "attention_mask")}


def _texts(named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, bool]:
    """Return the texts to match, their mask, and whether each row has texts of its own."""
    of_row = "option_input_ids" in named
    whose = "option" if of_row else "label"
    if f"{whose}_input_ids" not in named:
        raise ValueError(
            f"no label texts among the inputs {', '.join(named)}: give the task label_texts, or its rows options."
        )
    return named[f"{whose}_input_ids"], named[f"{whose}_attention_mask"], of_row


def _trimmed(ids: Tensor, mask: Tensor, besides: Mapping[str, Tensor], step: int = 8) -> dict[str, Tensor]:
    """Cut the columns on the right that no row of the minibatch fills; lengths are few, for ``torch.compile``.

    A task is padded to its longest text, most minibatches are shorter, and the label texts are as long as the inputs.
    What stands beside the tokens is cut where it has a place for each of them.
    """
    filled = mask.flatten(0, -2).any(0).nonzero()
    length = -(-(int(filled[-1]) + 1 if len(filled) else 1) // step) * step
    at_tokens = {name: x for name, x in besides.items() if x.shape[: ids.dim()] == ids.shape}
    cut = {"input_ids": ids, "attention_mask": mask, **at_tokens}
    return {name: x.narrow(ids.dim() - 1, 0, min(length, ids.shape[-1])) for name, x in cut.items()}


def _fill(x: Tensor, length: int, value: int) -> Tensor:
    return pad(x, (0, length - x.shape[-1]), value=value)


@dataclass(frozen=True)
class LabelScoring:
    r"""Readout by label scoring: logits are a text-to-text model's log probabilities of the label strings.

    .. math:: o_c = \sum_t \log p(\ell_{c,t} \mid \ell_{c,<t}, x)

    The strings are fed by teacher forcing; softmax over the labels gives class probabilities. The labels are
    ``label_input_ids`` ``[C, L]`` or ``option_input_ids`` ``[b, C, L]`` with their masks, as for
    :class:`LabelMatching`.

    Args:
        start_token: what the decoder begins with (``config.decoder_start_token_id``).
        length_normalised: whether to divide a label's score by its number of tokens.
    """

    start_token: int
    length_normalised: bool = False

    def __call__(self, network: Callable[..., Any], named: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits ``[b, C]``; for a block ``[B, b, ...]``, those of all its rows ``[B b, C]``."""
        texts, text_mask, of_row = _texts(named)
        lead, b, (C, L) = named["input_ids"].shape[:-2], named["input_ids"].shape[-2], texts.shape[-2:]
        if not of_row:
            texts, text_mask = (x.unsqueeze(-3).expand(*lead, b, C, L) for x in (texts, text_mask))
        texts, text_mask = texts.reshape(-1, L), text_mask.reshape(-1, L)
        rest = {
            name: x.flatten(0, len(lead)).repeat_interleave(C, 0)
            for name, x in named.items()
            if not name.startswith(("label_", "option_", "decoder_"))
        }
        target = texts.masked_fill(text_mask == 0, IGNORED)
        output = network(**rest, decoder_input_ids=shift_right(target, self.start_token))
        score = log_likelihood("tokens", torch.as_tensor(getattr(output, "logits", output)), target)
        count = text_mask.sum(-1)
        if self.length_normalised:
            score = score / count.clamp_min(1)
        return score.masked_fill(count == 0, torch.finfo(score.dtype).min).view(-1, C)


def readout_for(named: Mapping[str, Tensor], readout: Readout | None = None) -> Readout | None:
    """Choose the readout given, or label matching where the inputs have label texts; never that without texts."""
    has_texts = "label_input_ids" in named or "option_input_ids" in named
    if readout is None:
        return LabelMatching() if has_texts else None
    return None if isinstance(readout, LabelMatching) and not has_texts else readout


def read(output: Any, mask: Tensor | None = None) -> Tensor:
    """Read a network's output as the likelihood expects it.

    ``logits`` where there are any, as an attribute or a key; else of ``last_hidden_state`` the features for a head of
    the task's own: the mean over the tokens of a text, the class token of a picture (which has no mask); else the
    output itself.

    Raises:
        ValueError: an output that is none of these.
    """
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if value is not None:
            states = torch.as_tensor(value)
            return states if name == "logits" else pool(states, mask, "first" if mask is None else "mean")
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the network returns a {type(output).__name__} without logits or last_hidden_state. Say which tensor is "
            "meant: adapt_backbone(..., postprocess=lambda output: output[0]), for example."
        )
    return output


def gives_features(network: Any, output: Any) -> bool:
    """Whether an output is features, not answers: hidden states without logits, or timm without a head."""
    unwrap = getattr(network, "get_base_model", None)
    base = unwrap() if unwrap else network
    if type(base).__module__.startswith("timm."):
        return getattr(base, "num_classes", None) == 0
    held = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    return held.get("last_hidden_state") is not None and held.get("logits") is None
