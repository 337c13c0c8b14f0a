r"""Non-hierarchical Bayes, task-wise PEFT: the Bayesian form of No Meta Train.

.. math:: p(\theta_* \mid D_*) \propto \mathcal N(\theta_*; m_0, \sigma^2 I)\, p(D_* \mid \theta_*)

Cost: nothing before a task comes; then as No Meta Train.

Our choices: m_0 is the adapter's own start (at zero a LoRA has no gradient); the sampler is the one of LiFT's
adaptation, SGLD with a preconditioner that is frozen half way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.distributions import Independent, Normal

from pyro_lift.inference.adaptation.inner_loop import Hooks
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import langevin
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.no_meta_train import NoMetaTrainState
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation, multiples
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["TaskwisePEFT"]


@dataclass(frozen=True)
class TaskwisePEFT:
    """Task-wise PEFT: SGLD on each task alone, so that tasks share nothing.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings.
        sigma: standard deviation of the prior.
        temperature: of the noise.
        n_inflate: power on the likelihood.

    References:
        LiFT, section E.2 and Table 7.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    sigma: float = 0.3
    temperature: float = 1.0
    n_inflate: float = 1.0

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma)
        check_number("n_inflate", self.n_inflate)
        check_number("temperature", self.temperature, open_below=False)

    @property
    def space(self) -> SearchSpace:
        """The step, the prior's width and the likelihood's power, all in adaptation: nothing is meta-trained."""
        rates = multiples("learning_rate", self.budget.learning_rate, (0.05, 0.1, 0.25, 0.5, 2.0, 4.0, 10.0))
        powers = multiples("n_inflate", self.n_inflate, (3.0, 10.0, 30.0))
        widths = multiples("sigma", self.sigma, (0.3, 3.0))
        return SearchSpace(adapt={**adaptation(self.budget), "rate": rates, "power": powers, "sigma": widths})

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> NoMetaTrainState:
        """Learn nothing."""
        del tasks, on_step
        return NoMetaTrainState(self.adapter.initial.clone())

    @at_top_level()
    def adapt(self, state: NoMetaTrainState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Run SGLD on the new task under the prior."""
        b = self.budget
        rule = langevin(b.learning_rate, temperature=self.temperature, adapt_steps=b.steps // 2)
        prior = Independent(Normal(state.theta, self.sigma), 1)
        return finetune(
            self.adapter, task, state.theta, b, Hooks(prior), rule=rule, n_inflate=self.n_inflate, seed=seed
        )
