r"""One network under several draws of its adapter at once, as transformers' ``generate`` takes a network.

At every step each draw reads the tokens so far with a cache of its own, and what is decoded from is the average

.. math:: p(y_t \mid y_{<t}, x) = \tfrac1S \sum_s p(y_t \mid y_{<t}, x, \theta^{(s)}).

``generate`` sees one network, one encoder output and one cache, so that beams, sampling, penalties and stopping rules
are transformers' own. Its one cache holds those of all draws: reordered for beams, all are.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.generation.options import said
from pyro_lift.models.adapters import RandomAdapter

__all__ = ["CachesSideBySide", "averaged_logits", "network_of_draws"]

#: Options that ask for tensors of one network, of which there are several here.
ONE_NETWORK_ONLY = ("output_attentions", "output_hidden_states", "output_logits")
#: Options that bring what was computed under other weights.
PREPARED = ("past_key_values", "cache", "encoder_outputs", "inputs_embeds")


class CachesSideBySide:
    """The caches of several draws, which are reordered, cropped and repeated together.

    Everything else, such as its length, is asked of the first: all have read the same tokens.
    """

    #: A compiled step would be of one draw.
    is_compileable = False

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = list(caches)

    def __getattr__(self, name: str) -> Any:
        if name == "caches":  # being copied, and empty yet
            raise AttributeError(name)
        return getattr(self.caches[0], name)

    def __len__(self) -> int:
        return len(self.caches[0])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row go on from the row that its beam came from."""
        self._each("reorder_cache", beam_idx)

    def crop(self, *arguments: Any) -> None:
        """Forget the last tokens."""
        self._each("crop", *arguments)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each("batch_select_indices", indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self._each("reset")

    def activate_past_recording(self) -> None:
        """Let cropping bring earlier states back."""
        self._each("activate_past_recording")

    def _each(self, name: str, *arguments: Any) -> None:
        for cache in self.caches:
            getattr(cache, name)(*arguments)


def averaged_logits(logits: Sequence[Tensor]) -> Tensor:
    r"""Average the draws' probabilities, as logits ``[..., V]`` in float32.

    .. math:: o = \log \tfrac1S \sum_s \mathrm{softmax}(o_s) + \tfrac1S \sum_s \log \sum_v e^{o_{s,v}}

    The second term is the same for all tokens: it puts the scores where one draw's are, for rules such as the
    repetition penalty, which look at their sign. One draw's logits are their own average.
    """
    if len(logits) == 1:
        return logits[0]
    total, normaliser = None, None
    for o in logits:
        o = o.float()
        z = torch.logsumexp(o, -1, keepdim=True)
        total = o - z if total is None else torch.logaddexp(total, o - z)
        normaliser = z if normaliser is None else normaliser + z
    assert total is not None and normaliser is not None
    return total - math.log(len(logits)) + normaliser / len(logits)


def network_of_draws(adapter: RandomAdapter, network: Any, thetas: Tensor) -> Any:
    """Make a network whose output averages the draws' token probabilities; its weights are the given one's.

    Args:
        adapter: the network as a function of theta.
        network: the one inside it that generates.
        thetas: draws ``[S, D]``.
    """
    draws, forward = len(thetas), network.forward
    twin = copy.copy(network)  # its modules and weights are the network's; what is set on it below is its own

    @functools.wraps(forward)
    def averaged(*args: Any, **kwargs: Any) -> Any:
        side = next((x for x in kwargs.values() if isinstance(x, CachesSideBySide)), None)
        logits: list[Tensor] = []
        caches: dict[str, list[Any]] = {}
        for s, theta in enumerate(thetas):
            named = {name: _of_draw(name, value, s, draws) for name, value in kwargs.items()}
            with adapter.bound(theta):
                output = forward(*args, **named)
            logits.append(output.logits)
            for name, value in output.items():
                if _is_cache(value):
                    caches.setdefault(name, []).append(value)
        # Without caches given, as guidance calls the network beside ``generate``, the draws have made their own.
        kept = {name: CachesSideBySide(of) if side is None else side for name, of in caches.items()}
        return type(output)(logits=averaged_logits(logits), **kept)

    @functools.wraps(network._prepare_cache_for_generation)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        result = network._prepare_cache_for_generation(*args, **kwargs)
        inputs = next(x for x in (*args, *kwargs.values()) if isinstance(x, dict))
        for name, value in inputs.items():
            if _is_cache(value):
                inputs[name] = CachesSideBySide([value, *(copy.deepcopy(value) for _ in range(draws - 1))])
        return result

    twin.forward, twin._prepare_cache_for_generation = averaged, prepare
    if network.config.is_encoder_decoder:
        encoders = _EncoderOfDraws(adapter, network.get_encoder(), thetas)
        twin.get_encoder = lambda *_, **__: encoders
    return twin


def check_options(options: Mapping[str, Any], network: Any) -> None:
    """Refuse options that have no meaning for an average of several networks.

    Args:
        options: of the call.
        network: the one that generates, whose generation config counts too.

    Raises:
        ValueError: names the option, and the way out.
    """
    for name in ONE_NETWORK_ONLY:
        if value := said(name, options, network):
            raise ValueError(f"{name}={value}: with which='draws' there are several networks. Use which=0.")
    for name in (*PREPARED, "assistant_model"):
        if options.get(name) is not None:
            raise ValueError(f"{name} cannot be given with which='draws': each draw has its own.")


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "reorder_cache")


def _of_draw(name: str, value: Any, draw: int, draws: int) -> Any:
    """Return one draw's part of an input."""
    if isinstance(value, CachesSideBySide):
        return value.caches[draw]
    if name != "encoder_outputs" or value is None:
        return value
    width = value.last_hidden_state.shape[-1] // draws
    return type(value)(last_hidden_state=value.last_hidden_state[..., draw * width : (draw + 1) * width])


class _EncoderOfDraws:
    """An encoder whose states are those of all draws side by side, ``[n, L, S d]``, so that rows stay rows."""

    def __init__(self, adapter: RandomAdapter, encoder: Any, thetas: Tensor) -> None:
        self.adapter, self.encoder, self.thetas = adapter, encoder, thetas
        self.main_input_name = getattr(encoder, "main_input_name", "input_ids")
        self.forward = encoder.forward  # whose parameters transformers looks at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for theta in self.thetas:
            with self.adapter.bound(theta):
                outputs.append(self.encoder(*args, **kwargs))
        states = torch.cat([output.last_hidden_state for output in outputs], -1)
        return type(outputs[0])(last_hidden_state=states)
