"""LiFT itself, through its front door, and its ablations: one protocol, so that one table compares all.

This file stands a floor above its neighbours: it calls :mod:`pyro_lift.lift`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from pyro_lift.defaults import resolved
from pyro_lift.inference.adaptation.meta_testing import best_start, meta_test_program
from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.adaptation.unmoved import STACKED_FROM
from pyro_lift.inference.adaptation.update_rules import langevin
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.protocol import Budget, Posterior
from pyro_lift.inference.baselines.search_space import (
    Dimension,
    SearchSpace,
    adaptation,
    joint_shares,
    multiples,
    values,
)
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.lift import LiFT
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.options import check_literal, check_number
from pyro_lift.tuning.candidates import META, adaptations, times, told

__all__ = ["LiFTMethod", "LiFTState", "asks_unseen"]

Ablation = Literal["none", "reg", "noise"]


#: LiFT's name for heads that the budget does not have solved.
_HEAD: dict[Literal["step", "shared"], Literal["langevin", "shared"]] = {"step": "langevin", "shared": "shared"}


class LiFTState(NamedTuple):
    """The prior, and visits made."""

    prior: LiFTPrior
    meta_steps: int


def asks_unseen(tasks: Sequence[Task]) -> bool:
    """Whether tasks that joint training has not seen are asked, as they are by default: what no one else can say.

    Regressions for their noise, and tokens of few rows for the draws that stay. Of classes all methods have their
    temperature from the same place.
    """
    few = all(len(task.train) < STACKED_FROM for task in tasks)
    return all(task.kind == "regression" or (task.kind == "tokens" and few) for task in tasks)


@dataclass(frozen=True)
class LiFTMethod:
    """LiFT in the table of methods.

    Args:
        adapter: the network as a function of theta.
        budget: the warm-up is LiFT's joint training, from the warm start where there is one; a third of the visits burn
            in, the rest are draws.
        settings: of meta-training; what the budget names is taken from the budget.
        burn_in: visits before the first draw; None takes a third of the budget's.
        ablation: ``"reg"``, Reg(X): adaptation keeps the start and the noise and drops the mixture; ``"noise"``,
            Noise(X): it keeps start and mixture and drops the noise.
        on_trial: whether joint training is put on trial (:mod:`pyro_lift.tuning.halves`), at LiFT's own rates in place
            of the budget's; its gradients are among the warm-up's.
        power: on the likelihood in adaptation, over that of meta-training.

    References:
        LiFT, section 2.3; its Tables 5, 8 and 9 for the ablations.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    settings: LiFTSettings = field(default_factory=LiFTSettings)
    ablation: Ablation = "none"
    burn_in: int | None = None
    on_trial: bool = False
    power: float = 1.0

    def __post_init__(self) -> None:
        check_literal("ablation", self.ablation, Ablation)
        check_number("power", self.power)

    @property
    def space(self) -> SearchSpace:
        """What LiFT is tuned over (:data:`pyro_lift.tuning.candidates.META`), around the settings that it has."""
        b, s = self.budget, resolved(self.chain_settings(), self.adapter)
        assert s.temperature is not None
        stated = {"settings.temperature": s.temperature, "settings.n_inflate": s.n_inflate}
        widths = {
            f"x {x:g}": {**stated, "settings.beta": times(s.beta, x), "settings.sigma": times(s.sigma, x)}
            for x in META["beta"][1:]
        }
        meta: dict[str, Dimension] = {
            "joint": joint_shares(b, [min(x * b.warm_up / (b.warm_up + b.visits), 0.8) for x in META["joint"][1:]]),
            "rate of the chain": multiples("meta_learning_rate", b.meta_learning_rate, META["learning_rate"][1:]),
            "beta": widths,
            "temperature": multiples("settings.temperature", s.temperature, META["temperature"][1:]),
        }
        if not self.on_trial:  # which chooses it
            joint = multiples("warm_up_learning_rate", b.warm_up_learning_rate, META["sgd_learning_rate"][1:])
            meta["joint rate"] = joint
        if s.phi_update == "gibbs":
            meta["translation"] = values("settings.translation", s.translation, ("falling", "saga", "none"))
        if b.heads.update == "solve":
            meta["head"] = values("settings.head", s.head, ("solve", "laplace"))
        rates = {
            told({"rate": rate, "power": power}): {"learning_rate": rate * b.learning_rate, "power": power}
            for rate, power in adaptations(b.steps)[1:]
        }
        return SearchSpace(meta, {**adaptation(b), "rate": rates})

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> LiFTState:
        """Run the chain; ``on_step`` is called after each transition."""
        lift = LiFT(self.adapter, settings=self.chain_settings(), adapt=self.adapt_settings(), seed=self.budget.seed)
        # Where LiFT chooses for itself it asks tasks that it has not seen, as it does by default.
        crossed = lift.settings.noise_scale is None and asks_unseen(tasks)
        shown: dict[str, Any] = {"progress": False, "on_step": on_step, "crossed": crossed}
        prior = lift.meta_train_many(tasks, [lift.settings.components], start=self.budget.warm_start, **shown)[0]
        return LiFTState(prior, self.budget.warm_up + self.budget.visits)

    def chain_settings(self) -> LiFTSettings:
        """Return the settings of the chain, with the budget filled in."""
        b = self.budget
        burn_in = b.visits // 3 if self.burn_in is None else self.burn_in
        return replace(
            self.settings,
            sgd_steps=b.warm_up,
            sgd_learning_rate=None if self.on_trial else b.warm_up_learning_rate,
            sgd_includes_trial=self.on_trial,
            burn_in=burn_in,
            samples=max((b.visits - burn_in) // self.settings.thinning, 1),
            learning_rate=b.meta_learning_rate,
            batch_size=b.batch_size,
            head_scale=b.heads.scale,
            head=self.settings.head if b.heads.update == "solve" else _HEAD[b.heads.update],
            head_lr_scale=b.heads.lr_scale,
            noise_scale=self.settings.noise_scale if self.on_trial else b.noise_scale,
        )

    def adapt_settings(self) -> AdaptSettings:
        """Return the settings of adaptation, with the budget filled in."""
        stopping = self.budget.stopping
        return AdaptSettings(
            steps=self.budget.steps,
            learning_rate=self.budget.learning_rate,
            temperature=0.0 if self.ablation == "noise" else None,
            n_inflate=None if self.power == 1.0 else self.power * (self.settings.n_inflate or 1.0),
            batch_size=self.budget.batch_size,
            draws=self.budget.draws,
            many_rows=0,  # methods that are compared have the same heads
            **{} if stopping is None else {"dev_every": stopping.every, "patience": stopping.patience},
        )

    @at_top_level()
    def adapt(self, state: LiFTState, task: Task, *, seed: int | None = None) -> Posterior:
        """Run the new task's chain under the mixture, or under none."""
        if self.ablation != "reg":
            # Its own settings, whatever those of the state are: ablations share one meta-training.
            settings = asdict(self.adapt_settings())
            return state.prior.adapt(task, seed=self.budget.seed if seed is None else seed, **settings)
        return self._without_mixture(state.prior, task, seed)

    @at_top_level()
    def adapt_many(self, state: LiFTState, tasks: Sequence[Task]) -> list[Posterior]:
        """Run the chains of several new tasks in one pass."""
        if self.ablation == "reg":
            return [self.adapt(state, task) for task in tasks]
        settings = asdict(self.adapt_settings())
        return list(state.prior.adapt_many(tasks, block_size=len(tasks), seed=self.budget.seed, **settings))

    def _without_mixture(self, prior: LiFTPrior, task: Task, seed: int | None) -> Ensemble:
        s, mixture = prior.settings, prior.mixture.get()
        task = task.to(self.adapter.initial.device)
        program = meta_test_program(self.adapter, task, mixture, beta=prior.beta, head_scale=s.head_scale)
        rule = langevin(
            self.budget.learning_rate,
            temperature=1.0 if s.temperature is None else s.temperature,
            second_moment=prior.second_moment.get("theta"),
            adapt_steps=self.budget.steps // 2,
        )
        start = best_start(program, mixture).theta
        return finetune(
            self.adapter, task, start, self.budget, rule=rule, n_inflate=self.power * (s.n_inflate or 1.0), seed=seed
        )
