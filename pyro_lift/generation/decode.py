"""Text from a network under one or several vectors of adapter weights, by transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.generation.consensus import most_agreed
from pyro_lift.generation.inputs import Prompts, generating_network, places_in_sight, read_prompts, with_rows_of
from pyro_lift.generation.options import added, said
from pyro_lift.generation.side_by_side import check_options, network_of_draws
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.networks import private_stream, without_compilation
from pyro_lift.support.options import check_literal, check_number
from pyro_lift.support.random_streams import stream_seed

__all__ = ["Consensus", "generate"]

Consensus = Literal["probabilities", "mbr"]
#: Tokens written where nothing says how many: those of the paper's text-to-text experiments.
NEW_TOKENS = 64


class Decoding(NamedTuple):
    """How texts are decoded: options of transformers' ``generate``, rows of a call, seed of draws, padding token."""

    options: Mapping[str, Any]
    batch_size: int
    seed: int
    pad: int


def generate(
    adapter: RandomAdapter,
    thetas: Tensor,
    inputs: Any,
    encoding: TextEncoding | None = None,
    *,
    consensus: Consensus = "probabilities",
    batch_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Write a text for each input.

    Args:
        adapter: the network as a function of theta.
        thetas: weights ``[S, D]``; of several the token probabilities are averaged at every step, or, with
            ``consensus="mbr"``, each writes its own text and the one that the others agree with most is taken.
        inputs: as :func:`~pyro_lift.generation.inputs.read_prompts` reads them.
        encoding: how strings are encoded and decoded.
        consensus: of several draws.
        batch_size: inputs of one call of transformers' ``generate``.
        seed: of sampling; another seed gives other samples. The caller's random streams are left as they are.
        options: of transformers' ``generate``, a ``generation_config`` too. Where neither these nor the backbone's
            generation config say how long a text may be, it is 64 tokens. Stop strings need no ``tokenizer`` where
            strings are encoded.

    Returns:
        A list of strings for strings (``num_return_sequences`` of them for each input, in order), for tensors the new
        tokens ``[n, L]`` without the prompt, the decoder's start token or anything else that was given. With
        ``return_dict_in_generate=True`` transformers' own output, as it is.

    Raises:
        TypeError: a network that writes no text; inputs of another form.
        ValueError: inputs or options that cannot be used; names them; longer texts than the backbone has places for.
    """
    check_literal("consensus", consensus, Consensus)
    check_number("batch_size", batch_size, least=1, open_below=False, whole=True)
    check_number("seed", seed, open_below=False, whole=True)
    network = generating_network(adapter.backbone)
    inputs, options = with_rows_of(inputs, options)
    prompts = read_prompts(inputs, network, encoding)
    whole = bool(said("return_dict_in_generate", options, network))
    if whole and (len(prompts) > batch_size or (consensus == "mbr" and len(thetas) > 1)):
        raise ValueError(
            f"return_dict_in_generate=True with {len(prompts)} inputs, batch_size={batch_size}, {consensus=}: there "
            "would be several outputs. Give fewer inputs or a larger batch_size, and no consensus."
        )
    adapter.check_use()
    if said("stop_strings", options, network) is not None and encoding is not None:
        options = {"tokenizer": encoding.encoder.tokenizer, **options}
    pad = _padding(options, network, encoding)
    decoding = Decoding(added(options, pad_token_id=pad), batch_size, seed, pad)
    if consensus == "mbr" and len(thetas) > 1:
        tokens = _most_agreed(adapter, network, thetas, prompts, decoding, encoding)
    else:
        tokens = _decoded(adapter, network, thetas, prompts, decoding)
    if whole or not prompts.strings:
        return tokens
    assert encoding is not None
    return encoding.decode(tokens)


def _decoded(adapter: RandomAdapter, network: Any, thetas: Tensor, prompts: Prompts, decoding: Decoding) -> Any:
    """Decode with one vector of weights, or with the average of several; new tokens, or the whole output."""
    one = len(thetas) == 1
    if not one:
        check_options(decoding.options, network)
    used = network if one else network_of_draws(adapter, network, thetas)
    device, parts = adapter.initial.device, []
    for number, batch in enumerate(prompts.batches(decoding.batch_size)):
        named = {name: x.to(device) for name, x in batch.items()}
        options = _with_length({**named, **decoding.options}, network)
        with (
            private_stream(stream_seed(decoding.seed, number), network),
            without_compilation(network),
            adapter.bound(thetas[0]) if one else nullcontext(),
            places_in_sight(network, batch["input_ids"].shape[1], partial(_new_tokens, options, network)),
        ):
            output = used.generate(**options)
        if not isinstance(output, Tensor):
            return output
        parts.append(output[:, _given(network, options) :])
    return _joined(parts, decoding.pad)


def _most_agreed(
    adapter: RandomAdapter,
    network: Any,
    thetas: Tensor,
    prompts: Prompts,
    decoding: Decoding,
    encoding: TextEncoding | None,
) -> Tensor:
    """Decode with each draw, and take for each input the tokens of the text that the others agree with most."""
    lots = [
        _decoded(adapter, network, theta.unsqueeze(0), prompts, decoding._replace(seed=stream_seed(decoding.seed, s)))
        for s, theta in enumerate(thetas)
    ]
    pad = decoding.pad
    tokens = _joined(lots, pad).unflatten(0, (len(thetas), len(prompts), -1))  # [S, n, k, L]
    tokens = tokens.transpose(0, 1).flatten(1, 2)
    chosen = []
    for candidates in tokens:
        if encoding is None:
            texts = [" ".join(f"t{token}" for token in row.tolist() if token != pad) for row in candidates]
        else:
            texts = encoding.decode(candidates)
        chosen.append(candidates[most_agreed(texts)])
    return torch.stack(chosen)


def _joined(parts: list[Tensor], pad: int) -> Tensor:
    """Put batches below each other, the shorter ones padded."""
    length = max(x.shape[1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[1]), value=pad) for x in parts])


def _padding(options: Mapping[str, Any], network: Any, encoding: TextEncoding | None) -> int:
    """Return the padding token, one that does no harm where neither the options nor the backbone name one."""
    pad = said("pad_token_id", options, network)
    if pad is None and encoding is not None:
        pad = encoding.encoder.tokenizer.pad_token_id
    if pad is None:
        end = said("eos_token_id", options, network)
        pad = end[0] if isinstance(end, (list, tuple)) else end
    return 0 if pad is None else int(pad)


def _with_length(options: dict[str, Any], network: Any) -> dict[str, Any]:
    """Add a length where nothing says one: 64 tokens, or what the backbone has places for."""
    longest = said("max_length", options, network)
    of_old = longest == network.generation_config.max_length == 20 and "max_length" not in options  # transformers' own
    if said("max_new_tokens", options, network) is not None or (longest is not None and not of_old):
        return options
    length = NEW_TOKENS
    places = getattr(network.config, "max_position_embeddings", None)
    if places is not None:
        length = max(1, min(length, int(places) - _given(network, options)))
    return added(options, max_new_tokens=length)


def _new_tokens(options: dict[str, Any], network: Any) -> int:
    """Count the new tokens that may be written; one at least."""
    new, longest = said("max_new_tokens", options, network), said("max_length", options, network)
    return int(new) if new is not None else max(1, int(longest or 0) - _given(network, options))


def _given(network: Any, options: Mapping[str, Any]) -> int:
    """Count the tokens at the front of an output that were given: the prompt, or what the decoder begins with."""
    if not network.config.is_encoder_decoder:
        return int(options["input_ids"].shape[1])
    begun = cast(Tensor | None, options.get("decoder_input_ids"))
    if begun is None:
        return 1
    start = network.generation_config.decoder_start_token_id
    return int(begun.shape[1]) + int(start is not None and bool((begun[:, 0] != start).all()))
