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
- what begins with an underscore, and what ``forward`` itself assigns: state, not a setting.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["architecture_of", "changed_settings", "digest_of_values"]

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
LEFT_OUT_PARTS = re.compile(r"drop|dtype|(^|_)init(_|ializer|$)|checkpoint|_loss|^mask_(time|feature)_")
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
    return dict(sorted(_described(network, "", set(), configured=False)))


def changed_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two descriptions that differ, by name, as they were saved and as they are given.

    Args:
        saved: of :func:`architecture_of`, as JSON gives it back.
        given: of today.
    """
    both = [name for name in saved if name in given]
    return {name: (saved[name], given[name]) for name in both if not _same(saved[name], given[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=ROUNDING)
    return bool(one == other)


def digest_of_values(x: Tensor) -> str:
    """Return a short hash of some values of a tensor, in bfloat16: one read in half precision is the same tensor."""
    step = max(x.numel() // PROBES, 1)
    probe = x.reshape(-1)[::step][:PROBES].to(torch.bfloat16).float().cpu()
    return hashlib.sha256(probe.numpy().tobytes()).hexdigest()[:12]


def _described(module: nn.Module, at: str, seen: set[int], *, configured: bool) -> Iterator[tuple[str, Any]]:
    """Walk a module and those inside it, each once; ``configured`` inside a network whose configuration is told."""
    library = _library(type(module))
    if library == "peft" or "_orig_mod" in module._modules:
        inner = next((x for name in INSIDE if (x := module._modules.get(name)) is not None), None)
        if inner is not None:  # without what the wrapper adds
            yield from _described(inner, at, seen, configured=configured)
        return
    if id(module) in seen:
        return
    seen.add(id(module))
    config: Any = getattr(module, "config", None)
    if not configured and hasattr(config, "to_dict") and "transformers" in map(_library, type(module).__mro__):
        configured = True
        yield from _fields(config.to_dict(), f"{at}config.")
    if library not in COMPARED_ELSEWHERE:
        yield from ((f"{at}{name}", value) for name, value in _own(module, library, configured))
    for name, child in module.named_children():
        yield from _described(child, f"{at}{name}.", seen, configured=configured)


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _fields(config: Mapping[Any, Any], at: str) -> Iterator[tuple[str, Any]]:
    """Walk the fields of a configuration that count, those of the configurations inside it too."""
    for name, value in config.items():
        if not isinstance(name, str) or name in _FIELDS or not _counts(name):
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{at}{name}.")
        elif (plain := _plain(value)) is not None:
            yield f"{at}{name}", plain


def _own(module: nn.Module, library: str, configured: bool) -> Iterator[tuple[str, Any]]:
    """Describe a module by itself, without those inside it."""
    kind = type(module)
    for name, x in module._buffers.items():
        if x is not None and x.is_floating_point() and name not in module._non_persistent_buffers_set:
            yield name, f"values {digest_of_values(x.detach())}"
    if kind in PASSING or "drop" in kind.__name__.lower() or library in ("transformers", "transformers_modules"):
        return
    state = _assigned(kind.forward)
    for name, value in vars(module).items():
        if name not in _ATTRIBUTES and _counts(name) and name not in state:
            plain = _plain(value)
            if plain is not None:
                yield name, plain
    is_function = not module._parameters and not module._modules  # an activation: its class is all that it says
    if is_function or not (configured or library in REBUILT):
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


@cache
def _assigned(forward: Callable[..., Any]) -> frozenset[str]:
    """Name the attributes that a forward pass assigns: a count of calls, a shape that was seen."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
