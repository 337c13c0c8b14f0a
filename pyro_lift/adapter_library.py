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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_lift.defaults import one_width, resolved
from pyro_lift.inference.fixed_theta import FixedThetaPosterior, Scale, exact_prior, phi_chain
from pyro_lift.inference.mixture.batch_em import Moments, fit
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.lora_factors import aligned
from pyro_lift.saving.library import COMMON_START, common_start, read_library
from pyro_lift.saving.parts import PriorParts
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.options import check_choice, check_literal, check_number, settings_of

__all__ = ["LibraryMethod", "prior_from_adapters"]

Method = Literal["exact", "mixture", "chain"]
#: Standard deviation of phi around zero, where the settings give none.
SIGMA = 0.3


@dataclass(frozen=True)
class LibraryMethod:
    """A way from fixed adapters to a prior.

    Args:
        method: ``"exact"``, ``"mixture"`` or ``"chain"``.
        components: K, of ``mixture`` and ``chain``.
        beta: standard deviation of a task's weights around phi; None takes the adapters' own root mean square
            distance from their mean, by coordinate.
        scale: of ``chain``, the factor c on one task's gradient: ``"N"`` is unbiased; ``"1"`` is the paper's text, and
            another target.
        step_size: of ``chain``, eta; None takes 0.2 pi^2 beta^2 / N^2 (or / N for scale 1).
        align: rotate each product's factors towards the others' (the products stay what they are), for adapters that
            started from different factors.
        seed: of the chain and of EM.
    """

    method: Method = "exact"
    components: int = 1
    beta: float | None = None
    scale: Scale = "N"
    step_size: float | None = None
    align: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_literal("method", self.method, Method)
        check_literal("scale", self.scale, Scale)
        check_number("components", self.components, least=1, open_below=False, whole=True)
        if self.beta is not None:
            check_number("beta", self.beta)
        if self.method == "exact" and self.components != 1:
            raise ValueError(
                f"components={self.components}: the exact posterior of phi is one Gaussian. Use method='mixture'."
            )


def prior_from_adapters(
    folders: Sequence[str | Path],
    backbone: nn.Module,
    *,
    settings: LiFTSettings | None = None,
    options: Mapping[str, Any] | None = None,
    **method: Any,
) -> PriorParts:
    """Make a prior over the weights of LoRAs that were trained already.

    Args:
        folders: PEFT folders, at least two, of one rank, one set of layers, one scale and one base model.
        backbone: the base model: plain, as a PEFT model or as a RandomAdapter. The folders hold its name alone, which
            is compared where both have one; its weights and settings are not.
        settings: for adaptation, and sigma, burn_in, samples and thinning of ``chain``; None takes the defaults.
        options: of :class:`~pyro_lift.models.adapters.RandomAdapter`, such as a readout.
        method: fields of :class:`LibraryMethod`.

    Raises:
        ValueError: a folder that is not a PEFT adapter, or adapters that cannot share one space; names both. An
            unknown option.
    """
    for name in method:
        check_choice("option", name, [field.name for field in fields(LibraryMethod)])
    way = LibraryMethod(**method)
    library = read_library(folders, backbone, options)
    agreement = common_start(library)
    if way.align:
        library = library._replace(thetas=aligned(library.adapter, library.thetas))
    elif agreement is not None and agreement[0] < COMMON_START:
        warnings.warn(
            f"the A factors of {agreement[1]} and {agreement[2]} have a cosine of {agreement[0]:.2f}: they did not "
            "start from the same initial factors, and averages over such adapters mean little. Train the library from "
            "one common start, or pass align=True, which rotates the factors and leaves the products as they are.",
            UserWarning,
            stacklevel=3,
        )
    spread = float((library.thetas - library.thetas.mean(0)).square().mean().sqrt())
    if way.beta is None and not spread > 0.0:
        raise ValueError(
            "the adapters are all the same, so beta cannot be told from them. Please pass a value for beta."
        )
    s = replace(
        settings_of("settings", settings, LiFTSettings),
        beta=spread if way.beta is None else way.beta,
        components=way.components,
        prior_mean="zero",
    )
    # The prior mean of phi is zero here, from which whole adapters lie far.
    heat = 1.0 if s.temperature is None else s.temperature  # of the chain over phi, which sees no data to be colder for
    s = resolved(s if s.sigma is not None else replace(s, sigma=SIGMA), library.adapter)
    if way.method == "exact":
        mean, variance = exact_prior(library.thetas, one_width(s.beta), one_width(s.sigma))
        width = 1 if s.covariance == "spherical" else library.adapter.dim
        moments = Moments(torch.ones(1), mean.unsqueeze(0), torch.full((1, width), variance))
        mixture = OnlineGaussianMixture.from_moments(moments, len(library.thetas), s.covariance)
    elif way.method == "mixture":
        moments = fit(library.thetas, way.components, s.covariance, seed=way.seed)[0]
        mixture = OnlineGaussianMixture.from_moments(moments, len(library.thetas), s.covariance)
    else:
        mixture = OnlineGaussianMixture(way.components, s.covariance, seed=way.seed)
        for phi in _chain(library.thetas, s, way, heat):
            mixture.update(phi)
    adapter = library.adapter.beginning_at(library.thetas.mean(0))  # the caller's may be another prior's
    results: dict[str, Any] = {
        "adapters": len(library.thetas),
        "method": way.method,
        "spread (sd of a coordinate)": spread,
    }
    if agreement is not None:
        results["least cosine of the A factors"] = agreement[0]
    return PriorParts(adapter, mixture, s, None, {}, way.seed, library.names, results)


def _chain(thetas: Tensor, settings: LiFTSettings, way: LibraryMethod, temperature: float) -> Iterator[Tensor]:
    """Yield the kept draws of the paper's chain, the tasks in turn."""
    s, N = settings, len(thetas)
    centre = torch.zeros_like(thetas[0])
    posterior = FixedThetaPosterior(thetas, centre, one_width(s.beta), one_width(s.sigma), way.scale, temperature)
    eta = 0.2 * math.pi**2 * posterior.beta**2 / (N * posterior.factor) if way.step_size is None else way.step_size
    check_number("step_size", eta)
    generator = torch.Generator(device=thetas.device).manual_seed(way.seed)
    draws = phi_chain(posterior, cycle(range(N)), eta, generator)
    return islice(draws, s.burn_in + s.thinning - 1, s.burn_in + s.samples * s.thinning, s.thinning)
