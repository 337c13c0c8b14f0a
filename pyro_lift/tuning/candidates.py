"""Candidates for LiFT: the given settings first, then others around them, drawn at random with a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pyro_lift.models.task import Task
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.options import check_number
from pyro_lift.tuning.drawn import drawn_points
from pyro_lift.tuning.search import Candidate

__all__ = ["META", "LiFTContender", "adaptations", "lift_candidates", "shortened", "times", "told"]

#: Of each setting of meta-training the multiples of its value that are tried, the first unchanged. ``joint`` is the
#: fraction of the visits that joint training takes, ``length`` that of all of them: where half of the length is as
#: good on held-out tasks, meta-training stops there.
META: Mapping[str, Sequence[float]] = {
    "length": (1.0, 0.5),
    "joint": (1.0, 0.0, 2.0),
    "learning_rate": (1.0, 0.5, 2.0),
    "sgd_learning_rate": (1.0, 0.3, 3.0),
    "temperature": (1.0, 0.1, 10.0),
    "beta": (1.0, 0.5, 2.0),
}
#: Adaptations of fewer steps than this are short.
FEW_STEPS = 50
#: Multiples of its steps.
STEPS: Sequence[float] = (1.0, 2.0)


def adaptations(steps: int) -> list[tuple[float, float]]:
    """Return multiples of adaptation's rate and of the power on the likelihood that are tried, the first unchanged.

    With a larger rate alone the prior pulls back as much faster: where a new task is far away, steps that get there
    need both. Few of them have to be long. Of 16, on answers that are written, four times the network's rate with a
    hundred times the power left 0.42 to 0.50 nats a token where twice with ten times left 0.53 to 0.63; of 100 the
    former learn a task's rows by heart (0.65 beside 0.44).

    Args:
        steps: of adaptation.
    """
    return [(1.0, 1.0), (0.25, 1.0), (4.0, 100.0) if steps < FEW_STEPS else (2.0, 10.0)]


def lift_candidates(
    settings: LiFTSettings, adapt: AdaptSettings, *, trainings: int = 8, heads: bool = False
) -> list[Candidate]:
    """Make candidates: each of several meta-trainings with each rate of adaptation.

    Args:
        settings: of meta-training, every number given (:func:`pyro_lift.defaults.resolved`).
        adapt: of adaptation; the rate that meta-training has where it gives none.
        trainings: that differ in meta-training.
        heads: whether tasks have heads of their own, whose prior is then tried both ways, solved and drawn.
    """
    check_number("trainings", trainings, least=1, open_below=False, whole=True)

    def draw(chosen: random.Random) -> dict[str, Any]:
        multiples: dict[str, Any] = {name: chosen.choice(list(values)) for name, values in META.items()}
        multiples["translation"] = chosen.choice(["falling", "saga", "none"])
        if heads:
            multiples["head"] = chosen.choice(["solve", "laplace"])
        unchanged = (1.0, settings.head, settings.translation or "falling")
        return {name: value for name, value in multiples.items() if value not in unchanged}

    drawn, chosen = drawn_points(draw, trainings), random.Random(0)
    candidates = []
    for multiples in drawn:
        meta = _meta(settings, multiples)
        steps = chosen.choice(STEPS) if multiples else 1.0
        for rate, power in adaptations(adapt.steps):
            name = told({**multiples, "adapt rate": rate, "adapt power": power, "adapt steps": steps})
            candidates.append(Candidate(name or "as given", meta, _adapt(settings, adapt, rate, power, steps)))
    return candidates


def told(multiples: Mapping[str, Any]) -> str:
    """Say what is not as given, such as ``"rate x 2, power x 10"``."""
    changed = {key: value for key, value in multiples.items() if value != 1.0}
    return ", ".join(f"{k} {v}" if isinstance(v, str) else f"{k} x {v:g}" for k, v in changed.items())


def _meta(settings: LiFTSettings, multiples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that some multiples change."""
    values: dict[str, Any] = {}
    length = multiples.get("length", 1.0)
    if length != 1.0:
        values |= _lengths(settings, length)
    if "joint" in multiples:
        base = replace(settings, **values)
        total = base.sgd_steps + base.burn_in + base.samples * base.thinning
        joint = min(round(multiples["joint"] * base.sgd_steps), round(0.9 * total))
        left = total - joint
        values |= {"sgd_steps": joint, "burn_in": left // 3, "samples": max((left - left // 3) // base.thinning, 1)}
    for name in ("learning_rate", "sgd_learning_rate", "temperature"):
        if name in multiples:
            values[name] = multiples[name] * getattr(settings, name)
    if "beta" in multiples:  # sigma goes with it: what a task may add, phi may too
        values |= {name: times(getattr(settings, name), multiples["beta"]) for name in ("beta", "sigma")}
        # Widths that are given have another default of the temperature than widths that are left open.
        values = {"temperature": settings.temperature, "n_inflate": settings.n_inflate, **values}
    values |= {name: multiples[name] for name in ("translation", "head") if name in multiples}
    if values.get("translation") == "none":
        values["translation_step_size"] = None  # which is of the translation
    return values


def _adapt(settings: LiFTSettings, adapt: AdaptSettings, rate: float, power: float, steps: float) -> dict[str, Any]:
    base = adapt.learning_rate if adapt.learning_rate is not None else settings.learning_rate
    assert base is not None
    values: dict[str, Any] = {"learning_rate": rate * base}
    if power != 1.0:
        values["n_inflate"] = power * (adapt.n_inflate or settings.n_inflate or 1.0)
    if steps != 1.0:
        values["steps"] = round(steps * adapt.steps)
    return values


def shortened(settings: LiFTSettings, share: float) -> LiFTSettings:
    """Return the settings of a chain of a fraction of the length, which is not stopped before it."""
    patience = LiFTSettings.stop_patience  # of no use without looks, which is warned of
    return replace(settings, stop_every=0, stop_patience=patience, **_lengths(settings, share))


def _lengths(settings: LiFTSettings, share: float) -> dict[str, Any]:
    return {
        "sgd_steps": max(round(share * settings.sgd_steps), min(settings.sgd_steps, 1)),
        "burn_in": max(round(share * settings.burn_in), min(settings.burn_in, 1)),
        # A mixture of K components needs some draws of each.
        "samples": max(round(share * settings.samples), min(settings.samples, 8 * settings.components)),
    }


def times(value: Any, factor: float) -> Any:
    """Multiply a width, or each of a list of them."""
    return [factor * one for one in value] if isinstance(value, (list, tuple)) else factor * value


class LiFTContender(NamedTuple):
    """LiFT with a candidate's settings, for the tuner (:class:`~pyro_lift.tuning.search.Contender`)."""

    lift: Any
    candidate: Candidate

    def meta_train(self, tasks: Sequence[Task]) -> Any:
        """Return the prior that the tasks give."""
        return self.lift.meta_train(tasks, progress=False, calibrate=False)

    def adapt(self, state: Any, tasks: Sequence[Task]) -> Sequence[Any]:
        """Return posteriors of new tasks under that prior."""
        posteriors: Sequence[Any] = state.adapt_many(tasks, **self.candidate.adapt)
        return posteriors
