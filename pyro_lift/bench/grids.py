"""Settings that tuning chose for the methods of ``pyro-lift bench methods``, around which it is done again.

What is tried is told beside each method's code (:mod:`pyro_lift.inference.baselines.search_space`); the tuner is
:mod:`pyro_lift.tuning.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyro_lift.methods.registry import CHOOSING

__all__ = ["CHOOSING", "CHOSEN", "GROUPS", "LIKE", "Choice", "choice_of", "group_of"]


class Choice(NamedTuple):
    """Settings of a method that were chosen for a benchmark; a method ignores those it has no use for.

    Attributes:
        learning_rate: of adaptation.
        meta_learning_rate: of meta-training.
        options: the method's own settings.
        lift: fields of :class:`~pyro_lift.settings.LiFTSettings`, for the methods that have them.
        warm_share: fraction of meta-training's minibatches that go into joint training first; None takes what the
            benchmark's settings say.
    """

    learning_rate: float = 5e-3
    meta_learning_rate: float = 1e-3
    options: Mapping[str, Any] = {}
    lift: Mapping[str, Any] = {}
    warm_share: float | None = None


#: Methods that ``bench methods --tune`` tunes; the others take the choice of one of these.
GROUPS = (
    "no-meta-train",
    "union-train",
    "maml",
    "reptile",
    "retriever-mixture-k5",
    "retriever-fusion-k5",
    "mbc-k5",
    "protonet",
    "protonet-lite",
    "shared-peft",
    "lift",
    "lift-reg-x",
    "fixed-theta",
)
#: Methods that take the choice of another of their family: gradient-based ones MAML's, samplers LiFT's or SharedPEFT's.
LIKE = {
    **dict.fromkeys(("fo-maml", "imaml", "boot-maml", "bmaml", "abml", "maml-mix-k5", "imaml-mix-k5"), "maml"),
    "reptile": "protonet",
    "linear-probe": "no-meta-train",  # it has no rate: its strength is chosen on each task's own rows
    "pooled-probe": "no-meta-train",  # likewise, on tasks that it leaves out
    "lora-tuned": "no-meta-train",  # it chooses its own, likewise
    "taskwise-peft": "shared-peft",
    "maml-2": "maml",
    "maml-3": "maml",
    "maml-5": "maml",
    "imaml-neumann": "maml",
    "bmaml-m1": "maml",
    "bmaml-m3": "maml",
    "retriever-mixture-all": "retriever-mixture-k5",
    "retriever-fusion-all": "retriever-fusion-k5",
    "mbc-k10": "mbc-k5",
    "fixed-theta-k5": "fixed-theta",
    **{f"lift-{name}": "lift" for name in ("k3", "k5", "single", "table", "noise-x")},
}
#: Chosen by mean NLL on two development tasks of one other family, among eight settings each (docs/results/methods.md).
CHOSEN: dict[str, Choice] = {
    "no-meta-train": Choice(3e-2),
    "union-train": Choice(1e-3, 3e-3),
    "maml": Choice(1e-3, 1e-3, {"inner_learning_rate": 0.02, "tasks_per_step": 2}, warm_share=0.9),
    "retriever-mixture-k5": Choice(1.6e-2, 3e-3),
    "retriever-fusion-k5": Choice(1.6e-2, 3e-3),
    "mbc-k5": Choice(1.6e-2, 3e-3),
    "protonet": Choice(1e-3, 1e-3, {"tasks_per_step": 2}),
    "protonet-lite": Choice(1.6e-2, 1e-3, {"tasks_per_step": 2}),
    "shared-peft": Choice(1e-3, 3e-3, {"n_inflate": 3.0}),
    "lift": Choice(8e-3, 3e-3, lift={"beta": 0.03, "n_inflate": 3.0}, warm_share=0.9),
    "lift-reg-x": Choice(3e-5, 3e-3, lift={"beta": 0.03, "n_inflate": 3.0}, warm_share=0.9),
    "fixed-theta": Choice(8e-3, 3e-3, lift={"beta": 0.1, "n_inflate": 3.0}),
}


def choice_of(name: str) -> Choice:
    """Return the settings that were chosen for a method, its own or those of one like it."""
    return CHOSEN.get(name) or CHOSEN[LIKE[name]]


def group_of(name: str) -> str:
    """Return the method that is tuned in a method's place: itself, or one of its family."""
    return name if name in GROUPS or name in CHOOSING else LIKE[name]
