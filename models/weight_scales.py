r"""How far a network's adapter weights may be drawn from their start before the network stops working.

A prior that is one number wide for all weights is wide for some layers and narrow for others. What a draw does to a
LoRA layer is seen in its product: with A of root mean square a, rank r and scale s, noise of standard deviation
:math:`\beta` in B changes the layer's weights by

.. math:: \mathrm{rms}(\Delta W) = s \sqrt r\, a\, \beta,

and a change of 0.2 rms(W) in every layer leaves the networks that we measured as good as they were (the loss of a
MiniLM and a BART rises by at most 0.03 nats a row; from three times that on it climbs fast). Where the product says
that far more is harmless, as for a few dominant directions in W, the start of A itself is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.peft_layers import peft_layers
from pyro_lift.models.quantised import plain_weight

__all__ = ["by_weight", "groups_of_weights", "harmless_scales", "sizes_of_tensors", "typical_size"]

#: Root mean square of a draw's change of a layer, over that of the layer.
OF_LAYER = 0.2
#: Standard deviation of a draw, over the root mean square of the adapter's start in that layer.
OF_START = 0.7
#: Standard deviation where neither is known, as for tensors that begin at zero without a partner.
OTHERWISE = 0.03


def harmless_scales(adapter: RandomAdapter) -> list[float]:
    r"""Standard deviation for every adapter tensor such that a draw around the start changes its layer little.

    .. math:: \beta_m = \min\Big(0.2\,\frac{\mathrm{rms}(W_m)}{s_m\sqrt{r_m}\,a_m},\; 0.7\,a_m\Big)

    for both factors of the LoRA pair of layer m, a being the root mean square of the factor that does not begin at
    zero; 0.2 times its own root mean square for a tensor that is no factor, 0.03 for one that begins at zero.

    Returns:
        One number for each of ``adapter.layout``.
    """
    layers = peft_layers(adapter.backbone)
    start = adapter.bind(adapter.initial)
    sizes = {name: _rms(tensor) for name, tensor in start.items()}
    scales = []
    for entry in adapter.layout:
        layer, _, kind = entry.name.rpartition(".lora_")
        partners = [sizes[other.name] for other in adapter.layout if kind and other.name.startswith(f"{layer}.lora_")]
        if not kind or layer not in layers or not max(partners):
            scales.append(OF_LAYER * sizes[entry.name] or OTHERWISE)
            continue
        size = max(partners)
        scales.append(min([OF_START * size, *_of_product(layers[layer], adapter.adapter_name, size)]))
    return scales


def _of_product(layer: Any, name: str | None, size: float) -> list[float]:
    """The limit that the layer's own weights give, also where they are quantised; none where they cannot be read."""
    weight = plain_weight(getattr(layer, "base_layer", None))
    rank, scaling = (getattr(layer, of, {}).get(name) for of in ("r", "scaling"))
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or not rank or not scaling:
        return []
    whole = _rms(weight)
    return [OF_LAYER * whole / (abs(float(scaling)) * float(rank) ** 0.5 * size)] if whole > 0.0 else []


def typical_size(adapter: RandomAdapter) -> float:
    """Root mean square of the adapter's start, over the weights that do not begin at zero; 0.03 where all do."""
    start = adapter.initial[adapter.initial != 0]
    return _rms(start) if len(start) else OTHERWISE


def by_weight(adapter: RandomAdapter, scales: float | Sequence[float] | str | None) -> float | Tensor:
    """Spread one number a tensor over the tensor's weights: ``[D]``; one number for all stays one number.

    Raises:
        ValueError: not as many numbers as the adapter has tensors; nothing given.
    """
    if scales is None or isinstance(scales, str):
        raise ValueError("the widths of the prior are not filled in: call pyro_lift.settings.resolved first.")
    if isinstance(scales, (int, float)):
        return float(scales)
    if len(scales) != len(adapter.layout):
        raise ValueError(
            f"{len(scales)} numbers for the {len(adapter.layout)} tensors of the adapter: give one number, or one for "
            "each of adapter.layout."
        )
    sizes = torch.tensor(sizes_of_tensors(adapter))
    return torch.tensor(list(scales)).repeat_interleave(sizes).to(adapter.initial)


def sizes_of_tensors(adapter: RandomAdapter) -> list[int]:
    """Return the number of weights of each adapter tensor, in the order of ``adapter.layout``."""
    return [entry.part.stop - entry.part.start for entry in adapter.layout]


def groups_of_weights(adapter: RandomAdapter) -> Tensor:
    """Return the number of the adapter tensor that each weight belongs to, ``[D]``."""
    sizes = torch.tensor(sizes_of_tensors(adapter))
    return torch.arange(len(sizes)).repeat_interleave(sizes).to(adapter.initial.device)


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0
