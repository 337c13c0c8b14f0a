r"""Non-hierarchical Bayes, shared PEFT: one random adapter for all tasks, sampled by SGLD.

.. math:: p(\theta \mid D_{1..N}) \propto \mathcal N(\theta; m_0, \sigma^2 I)\, \prod_i p(D_i \mid \theta)

Its draws after burn-in give a mean and a variance. Adaptation starts at the mean.

Cost: one minibatch a step, as joint training; memory three more vectors.

Our choices (LiFT's E.2 says no more than "SGLD on shared parameters"): the start is the jointly trained one, m_0 the
adapter's own start as in LiFT, a third of the visits burn in; adaptation is SGLD with its noise and, by default,
without that posterior as a prior: ``prior_adaptation=True`` puts it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_lift.inference.adaptation.gradients import differentiate
from pyro_lift.inference.adaptation.inner_loop import Hooks, mean_loss, minibatches
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.update_rules import Terms, langevin
from pyro_lift.inference.baselines.episodes import Heads, check_tasks
from pyro_lift.inference.baselines.finetune import finetune, noise_generator
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation, joint_shares, multiples
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.priors import LocalGaussian
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number
from pyro_lift.watching.watch import tell

__all__ = ["SharedPEFT", "SharedPEFTState"]


class SharedPEFTState(NamedTuple):
    """Mean and variance of the draws ``[D]``, how many there were, and steps made."""

    mean: Tensor
    variance: Tensor
    draws: int
    meta_steps: int


@dataclass(frozen=True)
class SharedPEFT:
    """A single posterior for all tasks.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings.
        sigma: standard deviation of the prior.
        temperature: of the noise, in meta-training and in adaptation.
        n_inflate: power on the likelihood.
        prior_adaptation: whether a new task's prior is the posterior of the old ones.

    References:
        LiFT, section E.2 and Table 7.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    sigma: float = 0.3
    temperature: float = 1.0
    n_inflate: float = 1.0
    prior_adaptation: bool = False

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma)
        check_number("n_inflate", self.n_inflate)
        check_number("temperature", self.temperature, open_below=False)

    @property
    def space(self) -> SearchSpace:
        """The chain's step, the prior's width, the likelihood's power, the share of joint training, and adaptation."""
        meta = {
            "meta rate": multiples("meta_learning_rate", self.budget.meta_learning_rate, (0.3, 3.0)),
            "sigma": multiples("sigma", self.sigma, (0.3, 3.0)),
            "power": multiples("n_inflate", self.n_inflate, (3.0, 10.0, 30.0)),
            "joint": joint_shares(self.budget),
        }
        return SearchSpace(meta, adaptation(self.budget))

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> SharedPEFTState:
        """Joint training, then SGLD on the union of the tasks."""
        b = self.budget
        tasks = check_tasks(tasks, self.adapter.initial.device)
        theta = warm_up(self.adapter, tasks, b)
        generator = torch.Generator().manual_seed(b.seed)
        noise = noise_generator(generator, theta)
        heads = Heads(self.adapter, tasks, b, b.meta_learning_rate)
        batches = [minibatches(task.train, b.batch_size, generator) for task in tasks]
        burn_in = b.visits // 3
        rule = langevin(b.meta_learning_rate, temperature=self.temperature, adapt_steps=max(burn_in, 1))
        state = rule.init(theta)
        prior = LocalGaussian(self.adapter.initial, torch.full_like(theta, self.sigma**-2))
        terms = Terms(prior, self.n_inflate * sum(len(task.train) for task in tasks), noise)
        total, squares = torch.zeros_like(theta, dtype=torch.float64), torch.zeros_like(theta, dtype=torch.float64)
        for step in range(b.visits):
            i = step % len(tasks)
            weights = heads.weights(i, theta).leaves()
            loss = mean_loss(self.adapter, tasks[i], batches[i](), weights, noise_scale=b.noise_scale)
            if not torch.isfinite(loss):
                name = tasks[i].name
                raise DivergedError(f"step {step}, task {name!r}: the loss is {float(loss)}.", step, (name,))
            g = differentiate(loss, weights)
            theta, state = rule.update(theta, g.theta, state, terms)
            heads.update(i, g.head)
            if step >= burn_in:
                total, squares = total + theta, squares + theta.double().square()
            phase = "burn-in" if step < burn_in else "sample"
            tell(on_step, phase=phase, loss=loss.detach(), tasks=(tasks[i].name,))
        n = b.visits - burn_in
        mean = total / n
        variance = (squares / n - mean.square()).clamp_min(1e-12)
        return SharedPEFTState(mean.to(theta), variance.to(theta), n, b.warm_up + b.visits)

    @at_top_level()
    def adapt(self, state: SharedPEFTState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Run SGLD on the new task from the posterior's mean."""
        b = self.budget
        rule = langevin(b.learning_rate, temperature=self.temperature, adapt_steps=b.steps // 2)
        prior = Independent(Normal(state.mean, state.variance.sqrt()), 1) if self.prior_adaptation else None
        return finetune(self.adapter, task, state.mean, b, Hooks(prior), rule=rule, n_inflate=self.n_inflate, seed=seed)
