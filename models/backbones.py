"""Backbones by name or folder, and their adapters: timm and transformers, through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pyro_lift.models.adapters import RandomAdapter

if TYPE_CHECKING:
    import peft

__all__ = ["TIMM_ATTENTION", "adapt_backbone", "load_timm"]

#: LoRA targets of a timm ViT. Plain ``["qkv", "proj"]`` would also hit ``patch_embed.proj``, a convolution. The fused
#: qkv has one A for query, key and value together, where the paper has one each.
TIMM_ATTENTION = r".*attn\.(qkv|proj)"


def adapt_backbone(backbone: nn.Module, peft_config: peft.PeftConfig | None = None, **options: Any) -> RandomAdapter:
    """A backbone with its adapter as a :class:`~pyro_lift.models.adapters.RandomAdapter`.

    Args:
        backbone: a PEFT model already, or any module that ``peft.get_peft_model`` accepts.
        peft_config: the adapter to attach; None for a backbone that has one.
        options: of :class:`~pyro_lift.models.adapters.RandomAdapter`.

    Raises:
        TypeError: a plain backbone without a config, or a PEFT model with one.
        ValueError: a config with dropout, or one that PEFT cannot apply.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(backbone, PeftModel):
        if peft_config is not None:
            raise TypeError("the backbone has an adapter already; leave peft_config out, or pass the plain backbone.")
        return RandomAdapter(backbone, **options)
    if peft_config is None:
        raise TypeError(
            f"{type(backbone).__name__} has no adapter. Pass peft_config=peft.LoraConfig(target_modules=...)."
        )
    if getattr(peft_config, "lora_dropout", 0.0):
        raise ValueError(
            f"lora_dropout={peft_config.lora_dropout}: the sampler brings its own, calibrated noise. Use 0."
        )
    return RandomAdapter(get_peft_model(backbone, peft_config), **options)


def load_timm(name: str, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A timm model by name, its weights from a safetensors file (no pickle), or random without one."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(name, pretrained=False, **options)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint))
    ready: nn.Module = model.eval()
    return ready
