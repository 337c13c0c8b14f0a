"""What a network computes beside its weights: heads, activations, epsilons; to tell networks of equal weights apart.

A network of transformers is described by its configuration, whose fields keep their names from version to version, as
its classes and their attributes do not. Any other module is described by its class and by its plain attributes: those
of numbers, truth values, words, tuples of them, and functions, by their name. Statistics that are no weights (a
BatchNorm's) are described by a digest. What one of two descriptions lacks, as of another version of a library, is no
difference between them.

Left out is what makes no difference to a prediction:

- names, versions and labels: where the network came from, and what its classes are called;
- number types, quantisation, attention's implementation, caches, devices: how it is computed. They differ by rounding,
  and a prior holds in half precision too. How weights are quantised is compared on its own;
- dropout, starts of weights, losses, momentum, recomputed activations: what is of training alone;
- what ``generate`` reads, and what may be returned beside the output;
- sizes of layers and shared weights, which the weights tell;
- seeds and times: what was drawn from a seed is told where it is a weight or a buffer;
- what begins with an underscore, and what ``forward`` itself assigns or changes in place: state, not a setting.

Two fields count only where a network reads them:

- ``pad_token_id``, where a ``forward`` does (``pad_token_id`` or ``padding_idx``): classification by a causal network
  finds the last token by it, RoBERTa counts positions from it. BERT and a GPT-2 that gives tokens never look at it, and
  it is often set after loading (to the token that ends a text, for ``generate``). BART reads it only where its decoder
  is given nothing, and is compared all the same;
- ``max_position_embeddings``, but where all positions are rotations that do not depend on it (``rope_type`` ``default``
  or ``linear``). A table of positions is a weight, whose shape tells; DeBERTa's buckets and the other rotations are
  computed from it.

Not looked at is what cannot be written down: plain tensors that are no buffers, ``functools.partial``, lambdas and what
a function keeps of its surroundings, dictionaries, sets, arrays and other objects. Nor is what ``forward`` itself says.
"""

from __future__ import annotations

import hashlib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.models.changed_by_forward import changed_by_forward, names_read_by

__all__ = ["architecture_of", "changed_settings", "digests_of_values", "same_values"]

#: Values of each tensor that its digest reads; those of a fine-tuned copy differ nearly everywhere.
PROBES = 256
#: Longest words and tuples that are taken for a setting.
LONGEST = 100
#: Relative difference of numbers that were computed alike on two machines.
ROUNDING = 1e-6

#: Fields of a configuration that make no difference to a prediction, by the reason.
FIELDS_LEFT_OUT = {
    "where it came from, and what its classes are called": (
        "name_or_path architectures auto_map transformers_version id2label label2id num_labels problem_type "
        "finetuning_task task_specific_params"
    ),
    "how it is computed": (
        "attn_implementation experts_implementation use_cache cache_implementation chunk_size_feed_forward "
        "quantization_config compression_config torchscript pruned_heads pretraining_tp"
    ),
    "of training alone": "ctc_loss_reduction ctc_zero_infinity label_smoothing",
    "of generate, or of what makes the inputs": (
        "bos_token_id eos_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
        "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
        "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix"
    ),
    "beside the output": (
        "return_dict return_dict_in_generate use_return_dict output_attentions output_hidden_states output_scores "
        "output_router_logits"
    ),
    "told by the weights": "vocab_size tie_word_embeddings tie_encoder_decoder",
}
#: Attributes of a module that make none.
ATTRIBUTES_LEFT_OUT = {
    "where it came from": "name model_name name_or_path",
    "how it is computed": "device inplace fused_attn forward",
    "shortcuts of PyTorch to the same numbers": (
        "enable_nested_tensor use_nested_tensor mask_check activation_relu_or_gelu"
    ),
    "of training alone": "training momentum sparse scale_grad_by_freq",
    "told by the weights": (
        "in_features out_features in_channels out_channels num_embeddings embedding_dim normalized_shape num_features "
        "num_parameters elementwise_affine affine"
    ),
}
_FIELDS, _ATTRIBUTES = (
    frozenset(" ".join(reasons.values()).split()) for reasons in (FIELDS_LEFT_OUT, ATTRIBUTES_LEFT_OUT)
)
#: Either, by a part of the name.
LEFT_OUT_PARTS = re.compile(
    r"drop|dtype|(^|_)init(_|ializer|$)|checkpoint|_loss|^mask_(time|feature)_|(^|_)seeds?(_|$)|random_state|timestamp"
    r"|^created(_at)?$"
)
#: Names under which a ``forward`` reads ``config.pad_token_id``.
PADDING = ("pad_token_id", "padding_idx")
#: Rotations of positions that do not depend on how many there may be.
WITHOUT_LENGTH = ("default", "linear")
#: Ends the name of a buffer's other digest.
IN_HALF = " in float16"
#: Libraries whose modules say nothing of themselves: adapters and codes, which are compared on their own.
COMPARED_ELSEWHERE = ("peft", "bitsandbytes", "torchao")
#: Libraries that rename and rebuild their modules from version to version.
REBUILT = ("transformers", "transformers_modules", "timm")
#: Classes that pass on what they are given, or only hold other modules.
PASSING = (nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: Where a wrapper holds the module inside: PEFT's layers, its whole copies, and a compiled module.
INSIDE = ("base_layer", "original_module", "_orig_mod")


def architecture_of(network: nn.Module) -> dict[str, Any]:
    """Describe what a network computes beside its weights, as plain data by name.

    Args:
        network: plain or with PEFT's layers inside, under whose names those of the plain one stand.

    Returns:
        ``"config.num_attention_heads"`` for a field of a configuration of transformers, ``"2.class"`` and ``"2.eps"``
        for a module, ``"1.running_mean"`` for a tensor that is no weight; only what is given, so nothing is None.
    """
    return dict(sorted(_described(network, "", set(), None)))


def changed_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two descriptions that differ, by name, as they were saved and as they are given.

    Args:
        saved: of :func:`architecture_of`, as JSON gives it back.
        given: of today.
    """
    both = [name for name in saved if name in given and not name.endswith(IN_HALF)]
    changed = {name: (saved[name], given[name]) for name in both if not _same(saved[name], given[name])}
    rounded = {name: [[x[k] for k in (name, name + IN_HALF) if k in x] for x in (saved, given)] for name in changed}
    return {name: values for name, values in changed.items() if not same_values(*rounded[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=ROUNDING)
    return bool(one == other)


def digests_of_values(x: Tensor) -> list[str]:
    """Return short hashes of some values of a tensor: in bfloat16 and, where it is another, by way of float16.

    One read in half precision is the same tensor. A copy in float16 is rounded a second time on the way to bfloat16,
    and then has the second hash of the tensor that it was made from.
    """
    step = max(x.numel() // PROBES, 1)
    probe = x.reshape(-1)[::step][:PROBES]
    ways = [probe, probe.half()] if probe.is_floating_point() else [probe]
    found = [w.to(torch.bfloat16).float().cpu().numpy().tobytes() for w in ways]
    return [hashlib.sha256(way).hexdigest()[:12] for way in dict.fromkeys(found)]


def same_values(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether these are :func:`digests_of_values` of a tensor and of itself, or of its copy in half precision."""
    return not set(one).isdisjoint(other)


def _described(module: nn.Module, at: str, seen: set[int], unread: frozenset[str] | None) -> Iterator[tuple[str, Any]]:
    """Walk a module and those inside it, each once; ``unread`` by a network whose configuration is told, else None."""
    library = _library(type(module))
    if library == "peft" or "_orig_mod" in module._modules:
        inner = next((x for name in INSIDE if (x := module._modules.get(name)) is not None), None)
        if inner is not None:  # without what the wrapper adds
            yield from _described(inner, at, seen, unread)
        return
    if id(module) in seen:
        return
    seen.add(id(module))
    config: Any = getattr(module, "config", None)
    if unread is None and hasattr(config, "to_dict") and "transformers" in map(_library, type(module).__mro__):
        unread = frozenset() if _reads_padding(module) else frozenset(PADDING)
        yield from _fields(config.to_dict(), f"{at}config.", unread)
    if library not in COMPARED_ELSEWHERE:
        yield from ((f"{at}{name}", value) for name, value in _own(module, library, unread))
    for name, child in module.named_children():
        yield from _described(child, f"{at}{name}.", seen, unread)


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _fields(config: Mapping[Any, Any], at: str, unread: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Walk the fields of a configuration that count, those of the configurations inside it too."""
    here = unread | {"max_position_embeddings"} if _rotates_without_length(config) else unread
    for name, value in config.items():
        if not isinstance(name, str) or name in _FIELDS or name in here or not _counts(name):
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{at}{name}.", unread)
        elif (plain := _plain(value)) is not None:
            yield f"{at}{name}", plain


def _reads_padding(network: nn.Module) -> bool:
    """Whether a forward pass of a network of transformers looks at which token is padding; torch's layers do not."""
    kinds = {type(module) for module in network.modules()}
    kinds = {kind for kind in kinds if _library(kind) not in ("torch", *COMPARED_ELSEWHERE)}
    return any(not names_read_by(kind.forward).isdisjoint(PADDING) for kind in kinds)


def _rotates_without_length(config: Mapping[Any, Any]) -> bool:
    ropes = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    if "rope_theta" not in config and not any(isinstance(rope, Mapping) for rope in ropes):
        return False
    return all(kind in WITHOUT_LENGTH for rope in ropes if isinstance(rope, Mapping) for kind in _rotations(rope))


def _rotations(rope: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the kinds of rotation of a network, or of its sorts of layers."""
    for name, value in rope.items():
        if name in ("rope_type", "type"):
            yield value
        elif isinstance(value, Mapping):
            yield from _rotations(value)


def _own(module: nn.Module, library: str, unread: frozenset[str] | None) -> Iterator[tuple[str, Any]]:
    """Describe a module by itself, without those inside it."""
    kind: Any = type(module)
    for name, x in module._buffers.items():
        if x is not None and x.is_floating_point() and name not in module._non_persistent_buffers_set:
            for end, digest in zip(("", IN_HALF), digests_of_values(x.detach()), strict=False):
                yield name + end, f"values {digest}"
    if kind in PASSING or "drop" in kind.__name__.lower() or library in ("transformers", "transformers_modules"):
        return
    state = changed_by_forward(kind) | (unread or frozenset())
    for name, value in vars(module).items():
        if name not in _ATTRIBUTES and _counts(name) and name not in state:
            plain = _plain(value)
            if plain is not None:
                yield name, plain
    is_function = not module._parameters and not module._modules  # an activation: its class is all that it says
    if is_function or not (unread is not None or library in REBUILT):
        yield "class", kind.__name__


def _counts(name: str) -> bool:
    return not name.startswith("_") and LEFT_OUT_PARTS.search(name) is None


def _plain(value: Any) -> Any:
    """Return a setting as JSON gives it back; None for what is no setting."""
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return None if value.__name__ == "<lambda>" else f"{value.__name__}()"
    if isinstance(value, (tuple, list)) and len(value) <= LONGEST:
        parts = [_plain(item) for item in value]
        return None if any(part is None for part in parts) else parts
    if type(value) is str:
        return value if len(value) <= LONGEST else None
    if type(value) is float:
        return value if math.isfinite(value) else repr(value)
    return value if type(value) in (bool, int) else None
