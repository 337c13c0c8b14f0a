r"""A prior from LoRAs that exist already: the hierarchy with every theta_i held fixed (Table 5, "Fixed theta_i").

.. math:: \phi \sim \mathcal N(0, \sigma^2 I), \qquad \theta_i \mid \phi \sim \mathcal N(\phi, \beta^2 I)
          \quad\text{with } \theta_1, \dots, \theta_N \text{ given}

``exact``
    :math:`\phi \mid \theta_{1..N} \sim \mathcal N(v S / \beta^2, v I)`, :math:`v = (N/\beta^2 + 1/\sigma^2)^{-1}`.
``mixture``
    K components fitted by batch EM to the theta_i themselves, with the variance within each.
``chain``
    The paper's: Langevin steps of phi with the gradient of one task at a time (Eq. 9 with J = c (theta_i - phi) /
    beta^2), its draws summarised by online EM.

None of them touches the backbone. All average weights over adapters, which means something only where all adapters
started from the same initial factors: A B = (A R)(R^-1 B) for any R, and a training run keeps the R it began with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_lift.inference.offline_em import Moments, fit
from pyro_lift.inference.online_em import OnlineGaussianMixture
from pyro_lift.inference.sgld import gaussian_noise
from pyro_lift.lift import LiFTPrior, LiFTSettings
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.peft_folder import PEFT_CONFIG, config_from_dict, config_to_dict, read_config, read_peft
from pyro_lift.support.options import check_choice, check_number

__all__ = ["AdapterZoo", "aligned", "exact_prior", "phi_chain", "prior_from_adapters", "read_zoo"]

Method = Literal["exact", "mixture", "chain"]

#: What must be the same in all adapters for their weights to be coordinates of one space, with the reason.
SHARED: dict[str, tuple[Any, str]] = {
    "peft_type": (None, "other kinds of adapters have other tensors"),
    "r": (None, "adapters of other ranks have other shapes"),
    "rank_pattern": ({}, "adapters of other ranks have other shapes"),
    "target_modules": (None, "adapters of other layers have other tensors"),
    "layers_to_transform": (None, "adapters of other layers have other tensors"),
    "use_rslora": (False, "rsLoRA scales by alpha / sqrt(r), plain LoRA by alpha / r"),
    "use_dora": (False, "DoRA has norms beside the product"),
    "lora_alpha": (None, "the same factors under another scale are another adapter"),
    "alpha_pattern": ({}, "the same factors under another scale are another adapter"),
    "fan_in_fan_out": (False, "the factors are transposed"),
    "bias": ("none", "trained biases are not part of the adapter"),
    "modules_to_save": (None, "copied layers are not part of the adapter"),
}
#: Initialisations that move the base model's own weights, so that the adapter alone is not the adapter.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Below this cosine of the A factors two adapters did not start from the same ones (which gives nearly 1; chance, 0).
COMMON_START = 0.5


class AdapterZoo(NamedTuple):
    """Adapters in one space.

    Attributes:
        adapter: the network as a function of theta.
        names: of the adapters, their folders'.
        thetas: ``[N, D]``.
    """

    adapter: RandomAdapter
    names: tuple[str, ...]
    thetas: Tensor


def prior_from_adapters(
    folders: Sequence[str | Path],
    backbone: nn.Module,
    *,
    method: Method = "exact",
    components: int = 1,
    beta: float | None = None,
    scale: Literal["N", "1"] = "N",
    step_size: float | None = None,
    align: bool = False,
    settings: LiFTSettings | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> LiFTPrior:
    """A prior over the weights of LoRAs that were trained already.

    Args:
        folders: PEFT folders, at least two, of one rank, one set of layers, one scale and one base model.
        backbone: the base model: plain, as a PEFT model or as a RandomAdapter.
        method: ``"exact"``, ``"mixture"`` or ``"chain"``.
        components: K, of ``mixture`` and ``chain``.
        beta: standard deviation of a task's weights around phi; None takes the adapters' own root mean square
            distance from their mean, by coordinate.
        scale: of ``chain``, the factor c on one task's gradient: ``"N"`` is unbiased; ``"1"`` is the paper's text, and
            another target.
        step_size: of ``chain``, eta; None takes 0.2 pi^2 beta^2 / N^2 (or / N for scale 1).
        align: rotate each product's factors towards the others' (the products stay what they are), for adapters that
            started from different factors.
        settings: for adaptation, and sigma, burn_in, samples and thinning of ``chain``; None takes the defaults.
        seed: of the chain and of EM.
        options: of :class:`~pyro_lift.models.adapters.RandomAdapter`, such as a readout.

    Raises:
        ValueError: a folder that is not a PEFT adapter, or adapters that cannot share one space; names both.
    """
    check_choice("method", method, ["exact", "mixture", "chain"])
    check_choice("scale", scale, ["N", "1"])
    check_number("components", components, least=1, open_below=False, whole=True)
    if method == "exact" and components != 1:
        raise ValueError(f"components={components}: the exact posterior of phi is one Gaussian. Use method='mixture'.")
    zoo = read_zoo(folders, backbone, options)
    agreement = common_start(zoo)
    if align:
        zoo = zoo._replace(thetas=aligned(zoo.adapter, zoo.thetas))
    elif agreement is not None and agreement[0] < COMMON_START:
        warnings.warn(
            f"the A factors of {agreement[1]} and {agreement[2]} have a cosine of {agreement[0]:.2f}: they did not "
            "start from the same initial factors, and averages over such adapters mean little. Train the library from "
            "one common start, or pass align=True, which rotates the factors and leaves the products as they are.",
            UserWarning,
            stacklevel=3,
        )
    spread = float((zoo.thetas - zoo.thetas.mean(0)).square().mean().sqrt())
    if beta is None and not spread > 0.0:
        raise ValueError(
            "the adapters are all the same, so beta cannot be told from them. Please pass a value for beta."
        )
    s = replace(
        settings or LiFTSettings(), beta=spread if beta is None else beta, components=components, prior_mean="zero"
    )
    if method == "exact":
        mean, variance = exact_prior(zoo.thetas, s.beta, s.sigma)
        width = 1 if s.covariance == "spherical" else zoo.adapter.dim
        moments = Moments(torch.ones(1), mean.unsqueeze(0), torch.full((1, width), variance))
        mixture = _mixture(s, moments, len(zoo.thetas))
    elif method == "mixture":
        mixture = _mixture(s, fit(zoo.thetas, components, s.covariance, seed=seed)[0], len(zoo.thetas))
    else:
        mixture = OnlineGaussianMixture(components, s.covariance, seed=seed)
        for phi in phi_chain(zoo.thetas, s, scale=scale, step_size=step_size, seed=seed):
            mixture.update(phi)
    zoo.adapter.initial.copy_(zoo.thetas.mean(0))
    results: dict[str, Any] = {"adapters": len(zoo.thetas), "method": method, "spread (sd of a coordinate)": spread}
    if agreement is not None:
        results["least cosine of the A factors"] = agreement[0]
    return LiFTPrior(zoo.adapter, mixture, s, seed=seed, tasks=zoo.names, results=results)


def exact_prior(thetas: Tensor, beta: float, sigma: float) -> tuple[Tensor, float]:
    r"""Mean ``[D]`` and variance of :math:`\phi \mid \theta_{1..N}`."""
    v = 1.0 / (len(thetas) / beta**2 + 1.0 / sigma**2)
    return (v / beta**2 * thetas.double().sum(0)).to(thetas.dtype), v


def phi_chain(
    thetas: Tensor, settings: LiFTSettings, *, scale: Literal["N", "1"], step_size: float | None, seed: int
) -> Any:
    r"""Draws of the paper's chain over phi, one fixed :math:`\theta_i` a step in turn; from their mean.

    .. math:: \phi \leftarrow \phi + \tfrac{\eta}{2}\Big(c\,\frac{\theta_i - \phi}{\beta^2}
              - \frac{\phi}{\sigma^2}\Big) + \sqrt{T\eta}\;\xi
    """
    N, s = len(thetas), settings
    c = float(N) if scale == "N" else 1.0
    eta = step_size if step_size is not None else 0.2 * math.pi**2 * s.beta**2 / (N * c)
    check_number("step_size", eta)
    if eta * (c / s.beta**2 + 1.0 / s.sigma**2) >= 4.0:
        raise ValueError(f"step_size={eta:g} is past its stability limit 4 / (c / beta^2 + 1 / sigma^2).")
    generator = torch.Generator(device=thetas.device).manual_seed(seed)
    phi = thetas.mean(0)
    for step in range(s.burn_in + s.samples * s.thinning):
        drift = c * (thetas[step % N] - phi) / s.beta**2 - phi / s.sigma**2
        phi = phi + 0.5 * eta * drift + math.sqrt(s.temperature * eta) * gaussian_noise(phi, generator)
        if step >= s.burn_in and (step - s.burn_in + 1) % s.thinning == 0:
            yield phi


def _mixture(settings: LiFTSettings, moments: Moments, seen: int) -> OnlineGaussianMixture:
    """A finished mixture that counts as N draws."""
    mixture = OnlineGaussianMixture(settings.components, settings.covariance)
    tensors = {f"{part}.{name}": x for part in ("moments", "average") for name, x in moments._asdict().items()}
    numbers = torch.tensor([float(seen), float(seen), 0.0], dtype=torch.float64)
    mixture.load_state_dict({**tensors, "numbers": numbers, "floor": moments.variance.min() * 1e-6})
    return mixture


# ------------------------------------------------------------------------------------------------- reading and refusing


def read_zoo(
    folders: Sequence[str | Path], backbone: nn.Module, options: Mapping[str, Any] | None = None
) -> AdapterZoo:
    """PEFT folders as vectors of one space; see :func:`prior_from_adapters`."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} adapters given: a prior over adapters needs at least two.")
    configs = [read_config(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        _check_config(path, config)
        _check_same(paths[0], configs[0], path, config)
    adapter = _attached(paths[0], configs[0], backbone, options or {})
    thetas = torch.stack([read_peft(path, adapter) for path in paths])
    return AdapterZoo(adapter, tuple(path.name for path in paths), thetas)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"{path / PEFT_CONFIG}: a {config['peft_type']} adapter; only LoRA is learned from.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVES_BASE):
        raise ValueError(
            f"{path / PEFT_CONFIG}: init_lora_weights={start!r} moves the base model's own weights too. Convert the "
            "adapter first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if config.get("use_dora"):
        raise ValueError(f"{path / PEFT_CONFIG}: use_dora=True is not supported: DoRA has norms beside the product.")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        name = "modules_to_save" if config.get("modules_to_save") else "bias"
        raise ValueError(f"{path / PEFT_CONFIG}: {name}={config[name]!r}: only the low-rank factors are learned from.")


def _check_same(first: Path, wanted: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> None:
    for name, (default, why) in SHARED.items():
        was, found = (_plain(c.get(name, default)) for c in (wanted, config))
        if was != found:
            raise ValueError(f"{path / PEFT_CONFIG}: {name}={found!r}, but {was!r} in {first}: {why}.")
    was, found = (str(c.get("base_model_name_or_path") or "").rstrip("/") for c in (wanted, config))
    if was and found and was != found:
        raise ValueError(f"{path / PEFT_CONFIG}: an adapter of the base model {found!r}, but {was!r} in {first}.")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


def _attached(path: Path, config: dict[str, Any], backbone: nn.Module, options: Mapping[str, Any]) -> RandomAdapter:
    from peft import PeftModel

    if isinstance(backbone, (RandomAdapter, PeftModel)):
        adapter = backbone if isinstance(backbone, RandomAdapter) else adapt_backbone(backbone, **options)
        own = config_to_dict(adapter.backbone.active_peft_config)
        _check_same(Path("the backbone's own adapter"), own, path, config)
        return adapter
    name = str(getattr(backbone, "name_or_path", "") or "").rstrip("/")
    told = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if name and told and Path(name).name != Path(told).name:
        raise ValueError(f"{path / PEFT_CONFIG}: an adapter of the base model {told!r}, not of {name!r}.")
    # Dropout was for training, and the sampler brings its own noise.
    ready = config_from_dict({**config, "lora_dropout": 0.0, "inference_mode": False}, path / PEFT_CONFIG)
    with torch.random.fork_rng():
        try:
            return adapt_backbone(backbone, ready, **options)
        except ValueError as error:
            raise ValueError(f"{path / PEFT_CONFIG}: does not fit {type(backbone).__name__}: {error}") from error


# ----------------------------------------------------------------------------------------------------- a common start


class _Product(NamedTuple):
    """Where the two factors of one product stand in the vector: A ``[r, in]``, B ``[out, r]``."""

    A: slice
    B: slice
    rank: int


def _products(adapter: RandomAdapter) -> list[_Product]:
    """The products of plain LoRA on linear layers; others (embeddings, convolutions) have none that we turn."""
    place = {entry.name: entry for entry in adapter.layout}
    found = []
    for name, A in place.items():
        B = place.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
        if B is not None and len(A.shape) == 2 == len(B.shape):
            found.append(_Product(A.part, B.part, A.shape[0]))
    return found


def common_start(zoo: AdapterZoo) -> tuple[float, str, str] | None:
    """The least cosine between the A factors of two adapters, and their names; None without A factors."""
    parts = [zoo.thetas[:, product.A] for product in _products(zoo.adapter)]
    if not parts:
        return None
    A = torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)
    cosine = A @ A.T
    least = int(cosine.argmin())
    i, j = divmod(least, len(A))
    return float(cosine[i, j]), zoo.names[i], zoo.names[j]


def aligned(adapter: RandomAdapter, thetas: Tensor, rounds: int = 10) -> Tensor:
    r"""Each product's factors turned by a rotation of their own towards the mean of all; the products stay.

    Generalised orthogonal Procrustes: for task i and product l, :math:`R = \arg\min \lVert R A_i - \bar A\rVert^2 +
    \lVert B_i R^\top - \bar B\rVert^2` over orthogonal R, which is :math:`V U^\top` of the singular vectors of
    :math:`A_i \bar A^\top + B_i^\top \bar B`; the means begin at the first adapter. Adapters that differ by a rotation
    come to lie on one another; those whose row spaces differ stay apart, as much as they must.

    References:
        Generalized Procrustes analysis, Gower, 1975.
    """
    turned = thetas.clone()
    for product in _products(adapter):
        A = thetas[:, product.A].reshape(len(thetas), product.rank, -1).double()
        B = thetas[:, product.B].reshape(len(thetas), -1, product.rank).double()
        mean_A, mean_B = A[0], B[0]
        for _ in range(rounds):
            U, _, Vh = torch.linalg.svd(A @ mean_A.T + B.mT @ mean_B)
            R = Vh.mT @ U.mT
            new_A, new_B = R @ A, B @ R.mT
            mean_A, mean_B = new_A.mean(0), new_B.mean(0)
        turned[:, product.A] = new_A.reshape(len(thetas), -1).to(thetas)
        turned[:, product.B] = new_B.reshape(len(thetas), -1).to(thetas)
    return turned
