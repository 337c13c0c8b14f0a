"""What was tuned of each method of ``pyro-lift bench methods``, on which grid, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

__all__ = ["CHOSEN", "GRIDS", "LIKE", "Choice", "choice_of"]


class Choice(NamedTuple):
    """What was tuned of a method.

    Attributes:
        learning_rate: of adaptation.
        meta_learning_rate: of meta-training.
        options: the method's own settings.
        lift: of :class:`LiFTSettings`, for the methods that have them.
    """

    learning_rate: float = 5e-3
    meta_learning_rate: float = 1e-3
    options: Mapping[str, Any] = {}
    lift: Mapping[str, Any] = {}


RATES = (3e-3, 8e-3)
_ONLY = [Choice(rate) for rate in (1.5e-3, 3e-3, 8e-3, 1.6e-2)]
_META = [Choice(rate, meta) for rate, meta in product(RATES, (1e-3, 3e-3))]
_INNER = [
    Choice(rate, 1e-3, {"inner_learning_rate": inner, "tasks_per_step": 2})
    for rate, inner in product(RATES, (0.02, 0.1))
]
_EPISODE = [c._replace(options={"tasks_per_step": 2}) for c in _META]
_LIFT = [Choice(rate, rate, lift={"beta": 0.03, "n_inflate": power}) for rate, power in product(RATES, (1.0, 3.0))]
_LANGEVIN = [Choice(rate, rate, {"n_inflate": power}) for rate, power in product(RATES, (1.0, 3.0))]
#: Four settings for each group of methods that are tuned as one; the adaptation rates are the same for all.
GRIDS: dict[str, list[Choice]] = {
    "no-meta-train": _ONLY,
    "union-train": _META,
    "maml": _INNER,
    "fo-maml": _INNER,
    "imaml": _INNER,
    "reptile": _EPISODE,
    "boot-maml": _INNER,
    "bmaml": _INNER,
    "abml": _INNER,
    "maml-mix-k5": _INNER,
    "imaml-mix-k5": _INNER,
    "retriever-mixture-k5": _META,
    "retriever-fusion-k5": _META,
    "mbc-k5": _META,
    "fixed-theta": [c._replace(lift={"beta": 0.03, "n_inflate": 3.0}) for c in _META],
    "protonet": _EPISODE,
    "protonet-lite": _EPISODE,
    "shared-peft": _LANGEVIN,
    "taskwise-peft": _LANGEVIN,
    "lift": _LIFT,
}
#: Methods that take another's choice.
LIKE = {
    "maml-2": "maml",
    "maml-3": "maml",
    "maml-5": "maml",
    "imaml-neumann": "imaml",
    "bmaml-m1": "bmaml",
    "bmaml-m3": "bmaml",
    "retriever-mixture-all": "retriever-mixture-k5",
    "retriever-fusion-all": "retriever-fusion-k5",
    "mbc-k10": "mbc-k5",
    "fixed-theta-k5": "fixed-theta",
    **{f"lift-{name}": "lift" for name in ("k3", "k5", "single", "table", "reg-x", "noise-x")},
}
#: What ``tune`` chose, by mean NLL on the development tasks of one other family.
CHOSEN: dict[str, Choice] = {}


def choice_of(name: str) -> Choice:
    """What was tuned for a method; its own default where it was not."""
    group = LIKE.get(name, name)
    return CHOSEN.get(group, GRIDS[group][len(GRIDS[group]) // 2])
