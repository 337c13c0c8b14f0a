r"""How probable given texts are under the draws, and how sure of each token the draws are, together and apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.generation.inputs import Prompts, are_strings, generating_network, places_in_sight, read_prompts
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.doubts import refuse_doubtful
from pyro_lift.models.likelihoods import IGNORED, shift_right
from pyro_lift.models.networks import without_compilation
from pyro_lift.models.vocabulary import doubt_of_tokens, words_of
from pyro_lift.support.options import check_number

__all__ = ["TextScores", "score_texts"]


class TextScores(NamedTuple):
    r"""Scores of given texts under S draws, in nats.

    Attributes:
        log_prob: ``[n]``, :math:`\log \frac1S \sum_s p(y \mid x, \theta^{(s)})` of the whole text.
        tokens: what was scored ``[n, L]``, -100 past a text's end.
        token_log_prob: ``[n, L]``, :math:`\log \bar p(y_t)` with
            :math:`\bar p(v) = \frac1S \sum_s p(v \mid y_{<t}, x, \theta^{(s)})`; 0 past the end. They do not add up
            to ``log_prob``: there a draw that explains the beginning counts for more in the rest.
        entropy: ``[n, L]``, :math:`H(\bar p)`, of the draws together; 0 past the end.
        mutual_information: ``[n, L]``, :math:`H(\bar p) - \frac1S \sum_s H(p_s)`, the part of the entropy that the
            draws disagree on; the rest they share. Never negative, 0 past the end.
    """

    log_prob: Tensor
    tokens: Tensor
    token_log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each text, ``[n]``."""
        return (self.tokens != IGNORED).sum(-1)

    @property
    def per_token(self) -> Tensor:
        """``log_prob`` divided by the number of tokens, ``[n]``: comparable between short and long texts."""
        return self.log_prob / self.lengths.clamp_min(1)


@torch.no_grad()
def score_texts(
    adapter: RandomAdapter,
    thetas: Tensor,
    inputs: Any,
    outputs: Any,
    encoding: TextEncoding | None = None,
    *,
    batch_size: int = 16,
) -> TextScores:
    """Score given texts under draws of an adapter, by teacher forcing.

    Args:
        adapter: the network as a function of theta.
        thetas: draws ``[S, D]``.
        inputs: as :func:`~pyro_lift.generation.inputs.read_prompts` reads them.
        outputs: one text an input: a list of strings, which are encoded as the task's answers were (with an end token
            where these had one); or tokens ``[n, L]`` as ``generate`` gives them. Padding at a row's end, and whatever
            follows the first end token, does not count; padding tokens that a network has written itself do.
        encoding: how strings are encoded.
        batch_size: rows of one pass of the network; each draw takes one.

    Raises:
        TypeError: a network that writes no text; inputs or outputs of another form.
        ValueError: another number of outputs than of inputs, or one without a token; tokens that the network does not
            know.
    """
    check_number("batch_size", batch_size, least=1, open_below=False, whole=True)
    network = generating_network(adapter.backbone)
    prompts = read_prompts(inputs, network, encoding)
    target = _targets(outputs, network, encoding)
    if len(target) != len(prompts):
        raise ValueError(f"{len(target)} outputs for {len(prompts)} inputs; give one an input.")
    if (empty := (target == IGNORED).all(-1)).any():
        raise ValueError(f"outputs, row {int(empty.nonzero()[0])}: no token to score.")
    if (words := words_of(network)) is not None:
        refuse_doubtful([doubt_of_tokens(target.masked_fill(target == IGNORED, 0), words, "outputs")])
    adapter.check_use()
    parts = []
    with without_compilation(network):
        for number, batch in enumerate(prompts.batches(batch_size)):
            named = {name: x.to(adapter.initial.device) for name, x in batch.items()}
            some = target[number * batch_size : (number + 1) * batch_size].to(adapter.initial.device)
            with places_in_sight(network, batch["input_ids"].shape[1], partial(len, target[0])):
                parts.append(_scored(adapter, network, thetas, Prompts(named, prompts.strings, prompts.causal), some))
    return TextScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _targets(outputs: Any, network: Any, encoding: TextEncoding | None) -> Tensor:
    """Return the tokens to score ``[n, L]``, -100 where nothing counts."""
    if are_strings(outputs):
        if encoding is None:
            raise TypeError("outputs: strings, but nothing says how to encode them: the task was given in tensors.")
        return encoding.new_answers(outputs)
    try:
        target = torch.as_tensor(outputs).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"outputs: expected strings, or tokens [n, L] ({str(error).splitlines()[0][:80]}).") from error
    if target.dim() != 2 or target.is_floating_point():
        raise ValueError(f"outputs: {target.dtype} of shape {list(target.shape)}; expected token numbers [n, L].")
    config = network.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, Sequence) else [config.eos_token_id]
    is_end = torch.isin(target, torch.tensor([end for end in ends if end is not None], dtype=target.dtype))
    after = is_end.cumsum(-1) - is_end.long() > 0
    padding = torch.zeros_like(after)
    if config.pad_token_id is not None and config.pad_token_id not in ends:
        padding = _padding(target, config.pad_token_id)
    return target.masked_fill(after | padding, IGNORED)


def _padding(target: Tensor, pad: int) -> Tensor:
    """Tell padding at a row's end from padding tokens that were written: before others, or with nothing beside them."""
    empty = (target == pad) | (target == IGNORED)
    at_end = empty.flip(-1).cumprod(-1).flip(-1).bool()
    return at_end & ~empty.all(-1, keepdim=True)


def _scored(adapter: RandomAdapter, network: Any, thetas: Tensor, prompts: Prompts, target: Tensor) -> TextScores:
    counts = target != IGNORED
    token = target.masked_fill(~counts, 0).unsqueeze(-1)
    named, first = _teacher_forced(network, prompts, target)
    whole, mean, entropies = [], None, torch.zeros(target.shape, device=target.device)
    for theta in thetas:
        with adapter.bound(theta):
            logits = network(**named).logits
        if first is not None:  # the places whose next tokens are the text
            places = first.unsqueeze(-1) + torch.arange(target.shape[1], device=target.device)
            logits = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        log_p = torch.log_softmax(logits.float(), -1)
        p = log_p.exp()
        whole.append((log_p.gather(-1, token).squeeze(-1) * counts).sum(-1))
        entropies += _entropy(p)
        mean = p if mean is None else mean + p
    assert mean is not None
    mean = mean / len(thetas)
    log_prob = torch.logsumexp(torch.stack(whole), 0) - math.log(len(thetas))
    entropy = _entropy(mean)
    shared = entropies / len(thetas)
    chosen = mean.gather(-1, token).squeeze(-1).clamp_min(torch.finfo(mean.dtype).tiny).log()
    masked = (x.masked_fill(~counts, 0.0) for x in (chosen, entropy, (entropy - shared).clamp_min(0.0)))
    return TextScores(log_prob, target, *masked)


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _teacher_forced(network: Any, prompts: Prompts, target: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the network's inputs, and for a causal model the place before each text's first token, ``[n]``."""
    if not prompts.causal:
        start = network.generation_config.decoder_start_token_id
        start = network.config.decoder_start_token_id if start is None else start
        return {**prompts.named, "decoder_input_ids": shift_right(target, start)}, None
    # Prompt and text with all padding behind them, as in training: absolute positions begin at each row's first token.
    mask = torch.cat([prompts.named["attention_mask"].bool(), target != IGNORED], -1)
    ids = torch.cat([prompts.named["input_ids"], target.masked_fill(target == IGNORED, 0)], -1)
    order = (~mask).long().argsort(dim=-1, stable=True)
    lengths = prompts.named["attention_mask"].sum(-1)
    # A row's places past its end are read from somewhere and masked: let there be as many for every row.
    room = int(lengths.max()) + target.shape[1]
    ids, mask = ids.gather(-1, order)[:, :room], mask.gather(-1, order)[:, :room]
    return {"input_ids": ids, "attention_mask": mask.long()}, lengths - 1
