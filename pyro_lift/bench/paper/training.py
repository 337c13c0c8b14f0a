"""From a group of contestants to methods that are meta-trained: one meta-training a group, then each contestant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from pyro_lift.bench.paper.contestants import CONTESTANTS, GROUPS, Contestant
from pyro_lift.bench.paper.problems import PaperProblem
from pyro_lift.bench.paper.sizes import Sizes
from pyro_lift.defaults import TEMPERATURE, resolved
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.library import train_library
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.inference.baselines.search_space import Changes
from pyro_lift.lift import LiFT
from pyro_lift.methods.fixed_theta import FixedTheta
from pyro_lift.methods.lift import LiFTMethod, LiFTState
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.settings import LiFTSettings
from pyro_lift.tuning.methods import method_candidates, with_changes

__all__ = ["Trained", "adaptations_of", "budget_of", "method_of", "step_of", "trained"]

#: Minibatches of an outer step: with fewer of them there are more steps.
TASKS_PER_STEP = 2
#: Of LiFT's gradients, those of its chain; joint training and its trial have the others. Of so few they need more.
CHAIN_SHARE = 0.25
#: Visits that it has at least: a mixture of five components needs draws.
FEWEST_VISITS = 9


class Trained(NamedTuple):
    """A contestant after meta-training, ready to adapt at any rate."""

    name: str
    method: Baseline[Any]
    state: Any

    def at(self, changes: Changes) -> Baseline[Any]:
        """Return the method with other settings of adaptation."""
        return with_changes(self.method, changes)


def step_of(adapter: RandomAdapter) -> float:
    """Return the network's own step, LiFT's default rate: 0.05 of the size of the adapter's weights."""
    rate = resolved(LiFTSettings(), adapter).learning_rate
    assert isinstance(rate, float)
    return rate


def budget_of(sizes: Sizes, adapter: RandomAdapter, seed: int) -> Budget:
    """Return what all contestants are given alike."""
    own = step_of(adapter)
    meta = own if sizes.meta_rate is None else sizes.meta_rate
    return Budget(
        warm_up=sizes.warm_up,
        visits=sizes.visits,
        warm_up_learning_rate=meta,
        meta_learning_rate=meta,
        steps=sizes.steps,
        learning_rate=rates_of(sizes, adapter)[0],
        batch_size=sizes.batch_size,
        draws=sizes.draws,
        heads=HeadPolicy(),
        seed=seed,
    )


def rates_of(sizes: Sizes, adapter: RandomAdapter) -> tuple[float, ...]:
    """Return the rates of adaptation that a contestant chooses from."""
    unit = step_of(adapter) if sizes.relative else 1.0
    return tuple(unit * rate for rate in sizes.rates)


def adaptations_of(method: Baseline[Any], sizes: Sizes, adapter: RandomAdapter) -> list[Changes]:
    """Return the settings of adaptation that a method chooses from: the first trials of the one tuner.

    They are rates. LiFT's largest comes with another power on the likelihood, where the rates are the network's own.
    """
    rates = rates_of(sizes, adapter)
    if isinstance(method, LiFTMethod) and sizes.relative:
        return [{"learning_rate": rates[0], **c.adapt} for c in method_candidates(method, len(rates))]
    return [{"learning_rate": rate} for rate in rates]


def method_of(contestant: Contestant, problem: PaperProblem, seed: int, **options: Any) -> Baseline[Any]:
    """Set up a contestant."""
    sizes, adapter = problem.sizes, problem.adapter
    factory: Any = BASELINES[contestant.method]
    given: dict[str, Any] = {**contestant.options, **options}
    target = getattr(factory, "func", factory)
    if issubclass(target, (LiFTMethod, FixedTheta)):
        base: LiFTSettings = getattr(factory, "keywords", {}).get("settings", LiFTSettings())
        changed = {**sizes.lift, **_differing(base), **contestant.lift, "thinning": sizes.thinning}
        if "beta" in contestant.lift and "n_inflate" not in changed:
            changed["temperature"] = TEMPERATURE  # widths alone are ablated; given alone, they would switch it to 1
        given["settings"] = LiFTSettings(**{**changed, "components": max(contestant.components, 1)})
    budget = budget_of(sizes, adapter, seed)
    if issubclass(target, LiFTMethod):
        if sizes.burn_in is not None:
            given["burn_in"] = sizes.burn_in
        if sizes.meta_rate is None:  # left to the method: joint training is put on trial, within its gradients
            given["on_trial"] = True
            visits = min(sizes.visits, max(round(CHAIN_SHARE * (sizes.warm_up + sizes.visits)), FEWEST_VISITS))
            budget = replace(budget, warm_up=sizes.warm_up + sizes.visits - visits, visits=visits)
    if "tasks_per_step" in {f.name for f in fields(target)}:
        given["tasks_per_step"] = TASKS_PER_STEP
    if contestant.method == "lora-tuned":
        given["rates"] = rates_of(sizes, adapter)
    method: Baseline[Any] = factory(adapter, budget, **given)
    return method


def _differing(settings: LiFTSettings) -> dict[str, Any]:
    """Return what a registry's entry sets: the fields that are not the default's."""
    plain = LiFTSettings()
    return {
        f.name: getattr(settings, f.name)
        for f in fields(settings)
        if getattr(settings, f.name) != getattr(plain, f.name) and f.name != "components"
    }


def trained(group: str, problem: PaperProblem, seed: int, wanted: Sequence[str] | None = None) -> Iterator[Trained]:
    """Meta-train a group once and yield its contestants.

    Args:
        group: of :data:`~pyro_lift.bench.paper.contestants.GROUPS`.
        problem: the tasks and the network.
        seed: of everything random.
        wanted: contestants of the group; None takes all.
    """
    names = [name for name in GROUPS[group] if wanted is None or name in wanted]
    tasks: Sequence[Task] = problem.tasks.train
    methods = {name: method_of(CONTESTANTS[name], problem, seed) for name in names}
    first = methods[names[0]]
    if isinstance(first, LiFTMethod):
        lift = LiFT(first.adapter, settings=first.chain_settings(), adapt=first.adapt_settings(), seed=seed)
        components = [CONTESTANTS[name].components for name in names]
        priors = lift.meta_train_many(tasks, components, progress=False)
        steps = first.budget.warm_up + first.budget.visits
        for name, prior in zip(names, priors, strict=True):
            yield Trained(name, methods[name], LiFTState(prior, steps))
        return
    if group == "retriever" or isinstance(first, FixedTheta):
        library = train_library(problem.adapter, tasks, first.budget)
        for name in names:
            method = replace(methods[name], library=library)  # type: ignore[type-var, call-arg]
            yield Trained(name, method, method.meta_train(tasks))
        return
    for name, method in methods.items():
        yield Trained(name, method, method.meta_train(tasks))
