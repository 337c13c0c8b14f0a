r"""Fixed theta_i: LiFT on a library of LoRAs that are there already; only phi is random.

.. math:: \phi \leftarrow \phi - \tfrac\eta2 \Bigl\{ \frac{\phi - m_0}{\sigma^2}
          + c\,\frac{\phi - \theta_i}{\beta^2} \Bigr\} + \sqrt\eta\,\xi, \qquad i \text{ random}, \quad c \in \{N, 1\}

Cost: the library's minibatches; the chain itself never calls the network. Adaptation is LiFT's.

Our choices: the paper takes one random theta_i's gradient for the sum over all and does not give its factor: c = N is
unbiased and the default, c = 1, the text to the letter, another target that is five times as wide. ``update="gibbs"``
draws phi given all theta_i exactly, without a chain. The step is ``step_share`` of the largest stable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.defaults import one_width, resolved
from pyro_lift.inference.baselines.library import TrainedLibrary, library_space, train_library
from pyro_lift.inference.baselines.protocol import Budget, Posterior
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation
from pyro_lift.inference.fixed_theta import FixedThetaPosterior, Scale, exact_draws, phi_chain, random_order
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.methods.lift import LiFTMethod, LiFTState
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.options import check_literal, check_number, renamed_keywords
from pyro_lift.tuning.candidates import times

__all__ = ["FixedTheta"]

PhiUpdate = Literal["single", "gibbs"]


@renamed_keywords(zoo="library")
@dataclass(frozen=True)
class FixedTheta:
    """LiFT with theta_i fixed.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings.
        settings: LiFT's, for beta, sigma, the mixture, and adaptation.
        update: ``"single"``, the paper's, or ``"gibbs"``.
        scale: c, of the single update.
        chain_steps: of the chain over phi; the first half burns in.
        step_share: of the largest stable step.
        library: a library that is trained already; None trains one.

    References:
        LiFT, section 4.5 and Table 5.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    settings: LiFTSettings = field(default_factory=LiFTSettings)
    update: PhiUpdate = "single"
    scale: Scale = "N"
    chain_steps: int = 1000
    step_share: float = 0.02
    library: TrainedLibrary | None = None

    def __post_init__(self) -> None:
        check_literal("update", self.update, PhiUpdate)
        check_literal("scale", self.scale, Scale)
        check_number("chain_steps", self.chain_steps, least=2, open_below=False, whole=True)
        check_number("step_share", self.step_share)

    @property
    def space(self) -> SearchSpace:
        """The library's rate, beta with sigma, and adaptation."""
        s = resolved(self.lift.chain_settings(), self.adapter)
        stated = {"settings.temperature": s.temperature, "settings.n_inflate": s.n_inflate}
        widths = {
            f"x {x:g}": {**stated, "settings.beta": times(s.beta, x), "settings.sigma": times(s.sigma, x)}
            for x in (0.3, 3.0)
        }
        rates = library_space(self.budget).meta["meta rate"]
        return SearchSpace({"meta rate": rates, "beta": widths}, adaptation(self.budget))

    @property
    def lift(self) -> LiFTMethod:
        """LiFT with the same settings."""
        return LiFTMethod(self.adapter, self.budget, self.settings)

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> LiFTState:
        """Train the library, then run the chain over phi and summarise its draws."""
        library = self.library or train_library(self.adapter, tasks, self.budget, on_step=on_step)
        s = resolved(self.lift.chain_settings(), self.adapter)
        beta, sigma, heat = one_width(s.beta), one_width(s.sigma), s.temperature or 0.0
        s = replace(s, beta=beta, sigma=sigma)
        generator = torch.Generator(device=library.thetas.device).manual_seed(self.budget.seed)
        mixture = OnlineGaussianMixture(s.components, s.covariance)
        centre = self.adapter.initial if s.prior_mean == "adapter" else torch.zeros_like(self.adapter.initial)
        posterior = FixedThetaPosterior(library.thetas, centre, beta, sigma, self.scale, heat)
        for phi in islice(self._draws(posterior, generator), self.chain_steps // 2, self.chain_steps):
            mixture.update(phi)
        prior = LiFTPrior(self.adapter, mixture, s, self.lift.adapt_settings(), seed=self.budget.seed)
        return LiFTState(prior, library.meta_steps)

    @at_top_level()
    def adapt(self, state: LiFTState, task: Task, *, seed: int | None = None) -> Posterior:
        """Run the new task's chain under the mixture, as LiFT does."""
        return self.lift.adapt(state, task, seed=seed)

    def _draws(self, posterior: FixedThetaPosterior, generator: torch.Generator) -> Iterator[Tensor]:
        if self.update == "gibbs":
            return exact_draws(posterior, generator)
        order = random_order(len(posterior.thetas), generator)
        return phi_chain(posterior, order, self.step_share * posterior.step_limit, generator)
