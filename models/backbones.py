"""Backbones by name or folder, and their adapters: timm and transformers, through PEFT."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pyro_lift.models.activation_checkpointing import checkpoint_layers
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.networks import COMPILER, check_network, plain_network, private_stream, share_hooks, sharing_copy
from pyro_lift.models.peft_layers import active_adapter, file_name, peft_layers
from pyro_lift.models.quantised import Quantisation, loading_config, quantisation_of
from pyro_lift.support.hub_names import check_findable, not_found, reason_of
from pyro_lift.support.options import check_literal
from pyro_lift.support.wording import some_names

if TYPE_CHECKING:
    import peft

__all__ = [
    "MOVES_BASE",
    "RECIPES",
    "TIMM_ATTENTION",
    "BackboneKind",
    "DType",
    "adapt_backbone",
    "check_peft",
    "load_backbone",
    "load_timm",
    "recipe",
]

#: LoRA targets of a timm ViT. Plain ``["qkv", "proj"]`` would also hit ``patch_embed.proj``, a convolution. The fused
#: qkv has one A for query, key and value together, where the paper has one each.
TIMM_ATTENTION = r".*attn\.(qkv|proj)"

#: Target layers by family (``config.model_type`` of transformers, or ``"timm"``): query, key, value and output of every
#: attention, as in the paper.
RECIPES: dict[str, str | list[str]] = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "t5": ["q", "k", "v", "o"],
    "mt5": ["q", "k", "v", "o"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gemma2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gemma3_text": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "smollm3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense"],
    "phi3": ["qkv_proj", "o_proj"],  # one A for query, key and value together
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "bert": ["query", "key", "value", "attention.output.dense"],
    "roberta": ["query", "key", "value", "attention.output.dense"],
    "modernbert": ["Wqkv", "attn.Wo"],  # one A for query, key and value together
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin"],
    "vit": [],  # by transformers' version, see _vit_layers
    "timm": TIMM_ATTENTION,
}

#: Adapters that are a fixed function of trainable tensors, so that a vector bound to these tensors is the adapter.
#: Everything else is refused, with the reason.
SUPPORTED = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "VERA", "FOURIERFT", "LN_TUNING")
REFUSED = {
    "ADALORA": "it prunes ranks during its own training schedule, which a sampler does not run",
    "PROMPT_TUNING": "its weights are virtual tokens, not layers",
    "P_TUNING": "its weights are virtual tokens, not layers",
    "PREFIX_TUNING": "its weights are virtual tokens, not layers",
    "MULTITASK_PROMPT_TUNING": "its weights are virtual tokens, not layers",
    "XLORA": "it mixes several adapters; ours is one",
    "POLY": "it mixes several adapters by task number; ours is one",
}

#: Initialisations of LoRA that move the base model's own weights.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

BackboneKind = Literal["seq2seq", "causal", "encoder", "vision", "timm"]
DType = Literal["float32", "bfloat16"]


def load_backbone(
    name: str | Path,
    kind: BackboneKind,
    *,
    dtype: DType = "float32",
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
    quantization: Quantisation | None = None,
    **options: Any,
) -> nn.Module:
    """Load a pre-trained backbone, ready for :func:`adapt_backbone`.

    The adapter's own weights, and with them all the sampler keeps, are float32 whatever the backbone's dtype.

    Args:
        name: a folder, or a name on the hub (a timm name for ``"timm"``).
        kind: ``"seq2seq"`` (BART, T5), ``"causal"`` (GPT-like), ``"encoder"`` (BERT-like; of an encoder-decoder its
            encoder), ``"vision"`` (a ViT of transformers, without a head) or ``"timm"``.
        dtype: of the frozen weights and their products.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: whether ``torch.compile`` compiles the backbone's forward pass at its first call; or its backend.
        quantization: ``"4bit"`` (NF4) or ``"8bit"``, by bitsandbytes; another configuration of transformers is an
            option, ``quantization_config``.
        options: of the library's own loader.

    Raises:
        ValueError: an unknown kind or dtype; a model that is not of that kind, or whose file lacks weights of that
            kind, which would be random; nothing to checkpoint; a quantisation that this kind has not.
        ImportError: bitsandbytes is not installed.
        OSError: nothing of that name, neither a folder here nor a model of the hub.
    """
    check_literal("kind", kind, BackboneKind)
    check_literal("dtype", dtype, DType)
    if quantization is not None:
        check_literal("quantization", quantization, Quantisation)
        if kind == "timm":
            raise ValueError(f"quantization={quantization!r}: timm loads in full precision; kind='vision' takes ViTs.")
        if "quantization_config" in options:
            raise ValueError("give quantization or quantization_config, not both.")
        options = {**options, "quantization_config": loading_config(quantization, getattr(torch, dtype))}
    check_findable(name)
    try:
        if kind == "timm":
            model = _from_timm(name, options).to(getattr(torch, dtype))
        else:
            model = _from_transformers(str(name), kind, getattr(torch, dtype), options)
    except Exception as error:  # whatever the library met, the name is the reason
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise OSError(not_found(name, error)) from error
        message = f"{name}: cannot be loaded as a {kind!r} backbone ({reason_of(error)}).{_kind_hint(name, kind)}"
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
    model.eval()
    if gradient_checkpointing:
        checkpoint_layers(model)
    if compile:
        backend = compile if isinstance(compile, str) else "inductor"
        setattr(model, COMPILER, backend)
        model.compile(backend=backend)
    return model


def _kind_hint(name: str | Path, kind: str) -> str:
    """Say what a folder's config.json says that it is, where that is another kind."""
    try:
        config = json.loads((Path(name) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "" if Path(name).is_dir() else f" There is no folder {str(name)!r} here: is the name right?"
    if not isinstance(config, dict) or "model_type" not in config:
        return " Its config.json is timm's: kind='timm'." if "architecture" in config and kind != "timm" else ""
    family = str(config["model_type"])
    text = "seq2seq" if config.get("is_encoder_decoder") else "causal' or 'encoder"
    return f" Its config.json says {family!r}: kind='{'vision' if family == 'vit' else text}'."


def _from_timm(name: str | Path, options: dict[str, Any]) -> nn.Module:
    import timm

    source = f"local-dir:{name}" if Path(name).is_dir() else str(name)
    model: nn.Module = timm.create_model(source, **{"pretrained": True, **options})
    return model


def _from_transformers(name: str, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    import transformers

    loaders = {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "causal": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
        "vision": transformers.AutoModel,
    }
    if kind == "vision":
        options = {"add_pooling_layer": False, **options}
    model: Any
    model, report = loaders[kind].from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    # A pooler is never read: features are the hidden states.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"{len(missing)} weights are not in the file and would be random: {', '.join(missing[:3])}")
    network: nn.Module = model
    if kind == "encoder" and getattr(model.config, "is_encoder_decoder", False):
        network = model.get_encoder()
    return network


def recipe(backbone: nn.Module, rank: int = 4, **options: Any) -> peft.LoraConfig:
    """Choose LoRA on the attention of a known family: query, key, value and output, with ``lora_alpha = 2 rank``.

    Args:
        backbone: of a family in :data:`RECIPES`.
        rank: of every product.
        options: of ``peft.LoraConfig``, in place of the recipe's.

    Raises:
        ValueError: a family without a recipe; names the linear layers there are to choose from.
    """
    from peft import LoraConfig

    family = _family(backbone)
    targets: str | list[str] | None = _vit_layers(backbone) if family == "vit" else RECIPES.get(family)
    targets = options.pop("target_modules", targets)
    if not targets:
        layers = sorted({n.split(".")[-1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"no recipe for a {family!r} backbone; recipes: {', '.join(sorted(RECIPES))}. Pass target_modules=[...] "
            f"of its linear layers: {', '.join(layers[:12])}."
        )
    if family == "gpt2":
        options = {"fan_in_fan_out": True, **options}
    chosen = options.get("layers_to_transform")
    if chosen is not None and (names := _at_top(backbone, targets, [chosen] if isinstance(chosen, int) else chosen)):
        targets, options = names, {name: x for name, x in options.items() if name != "layers_to_transform"}
    return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": targets, **options})


def _family(backbone: nn.Module) -> str:
    if hasattr(backbone, "config") and hasattr(backbone.config, "model_type"):
        return str(backbone.config.model_type)
    return "timm" if type(backbone).__module__.startswith("timm.") else type(backbone).__name__


def _at_top(backbone: nn.Module, targets: str | list[str], layers: Sequence[int]) -> list[str]:
    """Name the targets inside some layers by their full names, where PEFT does not find them; none where it does.

    It reads a layer's number only behind a name in front of its list, of ``encoder.layer.3`` but not of ``blocks.3``,
    and not at all where the targets are a pattern.
    """
    found = []
    for name, _ in backbone.named_modules():
        number = re.match(r"[^.]+\.(\d+)\." if isinstance(targets, list) else r"(?:[^.]+\.)*?(\d+)\.", name)
        if number is None or int(number[1]) not in layers:
            continue
        if re.fullmatch(targets, name) if isinstance(targets, str) else name.endswith(tuple(f".{x}" for x in targets)):
            found.append(name)
    return found


def _vit_layers(backbone: nn.Module) -> list[str]:
    """Name query, key, value and output of transformers' ViT, as this version calls them."""
    names = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    if any(name.endswith(".query") for name in names):
        return ["query", "key", "value", "attention.output.dense"]
    return ["q_proj", "k_proj", "v_proj", "o_proj"]


def check_peft(config: peft.PeftConfig) -> None:
    """Refuse adapters that a vector of weights does not determine, or that bring noise of their own.

    Raises:
        ValueError: names the kind or the option, and why.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
    if kind in REFUSED or kind not in SUPPORTED:
        why = REFUSED.get(kind, "it has not been tried with a sampler")
        raise ValueError(f"a {kind} adapter is not supported: {why}. Supported: {', '.join(SUPPORTED)}.")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise ValueError(
            f"init_lora_weights={start!r} is not supported: it moves the base model's weights by a random amount, anew "
            "whenever the adapter is loaded. Use 'pissa', which is exact."
        )
    for name in ("lora_dropout", "module_dropout", "rank_dropout", "vera_dropout"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"{name}={getattr(config, name)}: the sampler brings its own, calibrated noise. Use {name}=0."
            )
    for name, why in (
        ("use_dora", "DoRA's product depends on the norm of the frozen weights plus its own, at every call"),
        ("use_qalora", "it needs quantised layers"),
        ("trainable_token_indices", "trained tokens are not layers"),
        ("alora_invocation_tokens", "it acts only after certain tokens"),
        ("arrow_config", "it mixes several adapters; ours is one"),
        ("monteclora_config", "it brings noise of its own"),
        ("velora_config", "its gradients are approximate"),
        ("kasa_config", "it has not been tried with a sampler"),
        ("use_bdlora", "it has not been tried with a sampler"),
    ):
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)} is not supported: {why}.")


@torch.inference_mode(False)
@torch.enable_grad()
def adapt_backbone(
    backbone: nn.Module, peft_config: peft.PeftConfig | None = None, *, seed: int | None = None, **options: Any
) -> RandomAdapter:
    """Attach an adapter to a backbone, as a :class:`~pyro_lift.models.adapters.RandomAdapter`.

    A plain backbone is left as it is: PEFT's layers go into a copy of its modules, which shares its weights. A PEFT
    model is used itself.

    Args:
        backbone: a PEFT model already, or any module that ``peft.get_peft_model`` accepts.
        peft_config: the adapter to attach; None for a backbone that has one.
        seed: of the adapter's initial weights; None draws them from torch's global stream.
        options: of :class:`~pyro_lift.models.adapters.RandomAdapter`.

    Raises:
        TypeError: a plain backbone without a config, or one with an adapter and a config too; a config that is none.
        ValueError: a config with dropout, a kind that is not supported, or one that PEFT cannot apply; a network that
            does not use the adapter's weights, or whose export would not hold them all.
    """
    from peft import PeftConfig, PeftModel

    if isinstance(backbone, RandomAdapter):
        raise TypeError("the backbone is a RandomAdapter already; use it as it is.")
    backbone = plain_network(backbone)
    if isinstance(backbone, PeftModel):
        if peft_config is not None:
            raise TypeError("the backbone has an adapter already; leave peft_config out, or pass the plain backbone.")
        _check_model(backbone)
        return RandomAdapter(backbone, **options)
    check_network(backbone)
    if inside := next(iter(peft_layers(backbone)), None):
        raise ValueError(
            f"the backbone has a PEFT layer inside already, at {inside!r}. Pass the PEFT model itself, take the "
            "adapter out first (its unload()), or load the backbone again."
        )
    if peft_config is None:
        raise TypeError(
            f"{type(backbone).__name__} has no adapter. Pass peft_config=peft.LoraConfig(target_modules=...); "
            "recipe(backbone), of pyro_lift.models.backbones, writes one for the architectures it knows."
        )
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected a configuration of PEFT's, such as "
            "peft.LoraConfig(r=4, target_modules=...)."
        )
    check_peft(peft_config)
    if quantisation_of(backbone) is not None:
        _check_on_quantised(peft_config)
    memo: dict[int, Any] = {}
    # Some starts subtract their product from the weights in place.
    moves = str(getattr(peft_config, "init_lora_weights", "")).startswith(MOVES_BASE)
    twin = (copy.deepcopy(backbone) if moves else sharing_copy(backbone, memo)).eval()
    with warnings.catch_warnings():  # PEFT asks transformers by an older name whether it checkpoints
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        with private_stream(seed, twin):
            prepared = copy.deepcopy(peft_config)
            prepared.inference_mode = False  # a configuration read from a folder would have nothing to train
            adapted = _wrapped(twin, prepared)
    share_hooks(backbone, memo)  # after PEFT's own, which belong to the copy alone
    adapter = RandomAdapter(adapted, **options)
    adapted.requires_grad_(False)
    return adapter


def _wrapped(network: nn.Module, config: peft.PeftConfig) -> Any:
    """Let PEFT put its layers in; where none is of the names it is told, say which there are.

    Raises:
        ValueError: no layer of the names.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(network, config)  # type: ignore[arg-type]
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        layers = dict.fromkeys(name.rsplit(".", 1)[-1] for name, m in network.named_modules() if hasattr(m, "weight"))
        known = " recipe(backbone) chooses among them." if _family(network) in RECIPES else ""
        numbers = [int(n) for name, _ in network.named_modules() for n in re.findall(r"\.(\d+)\.", name)]
        if getattr(config, "layers_to_transform", None) is not None and numbers:
            known += f" Its layers, which layers_to_transform chooses from, are numbered 0 to {max(numbers)}."
        raise ValueError(f"{error} Its layers with weights are called {some_names(list(layers))}.{known}") from error


def _check_on_quantised(config: peft.PeftConfig) -> None:
    """Refuse what a quantised base cannot carry.

    Raises:
        ValueError: another adapter than LoRA, or a start that moves the base's weights.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
    if kind != "LORA":
        raise ValueError(f"a {kind} adapter on a quantised network has not been tried; LoRA has.")
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith(MOVES_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} moves the base's own weights, and those of a quantised network are codes. "
            "Load the network in full precision, or leave init_lora_weights out."
        )


def _check_model(model: Any) -> None:
    """Refuse a PEFT model whose trained tensors are not one supported adapter's, as PEFT would save it.

    Raises:
        ValueError: names what stands in the way.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if any(isinstance(module, PeftModel) for module in model.modules() if module is not model):
        raise ValueError(
            "a PEFT model inside a PEFT model: its export would not find its base. Wrap the plain network."
        )
    name = active_adapter(model)
    config = model.active_peft_config if name is None else model.peft_config[name]
    check_peft(config)
    layers = peft_layers(model)
    saved = get_peft_model_state_dict(model, adapter_name=name or "default", save_embedding_layers=False)
    for tensor, parameter in model.named_parameters():
        if parameter.requires_grad and file_name(tensor, layers) not in saved:
            raise ValueError(
                f"the trainable tensor {tensor!r} is not part of the PEFT adapter {name!r} and would be missing from "
                "every export. Freeze it (requires_grad_(False)), or name its module in modules_to_save."
            )


def load_timm(name: str, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """Make a timm model by name, its weights from a safetensors file (no pickle), or random without one."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(name, pretrained=False, **options)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint))
    ready: nn.Module = model.eval()
    return ready
