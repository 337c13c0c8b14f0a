"""Grids of settings for each method of ``pyro-lift bench methods``, and the settings that tuning chose."""

from __future__ import annotations

from itertools import product

from pyro_lift.bench.tuner import Choice

__all__ = ["CHOSEN", "GRIDS", "LIKE", "choice_of"]

#: Rates of adaptation, the same for every group; a setting that differs in nothing else needs no other meta-training.
RATES = (1e-3, 3e-3, 8e-3, 1.6e-2)
_ONLY = [Choice(rate) for rate in (5e-4, 2e-3, 5e-3, *RATES, 3e-2)]
_META = [Choice(rate, meta) for rate, meta in product(RATES, (1e-3, 3e-3))]
#: What is left after joint training is for learning to adapt: how much that should be is the first question of both.
_SHARES = (0.55, 0.9)
_INNER = [
    Choice(rate, 1e-3, {"inner_learning_rate": 0.02, "tasks_per_step": 2}, warm_share=share)
    for rate, share in product(RATES, _SHARES)
]
_EPISODE = [c._replace(options={"tasks_per_step": 2}) for c in _META]
_LIFT = [
    Choice(rate, 3e-3, lift={"beta": 0.03, "n_inflate": 3.0}, warm_share=share)
    for rate, share in product(RATES, _SHARES)
]
#: Without a prior nothing holds the noise back, so Reg(X) needs smaller steps than LiFT.
_NO_PRIOR = [_LIFT[1]._replace(learning_rate=rate) for rate in (1e-5, 3e-5, 1e-4, 3e-4, *RATES)]
_FIXED = [Choice(rate, 3e-3, lift={"beta": beta, "n_inflate": 3.0}) for rate, beta in product(RATES, (0.03, 0.1))]
_LANGEVIN = [Choice(rate, 3e-3, {"n_inflate": power}) for rate, power in product(RATES, (1.0, 3.0))]
#: Eight settings for each group of methods that are tuned as one; No Meta Train, which has nothing else to tune, gets
#: eight rates of a wider range.
GRIDS: dict[str, list[Choice]] = {
    "no-meta-train": _ONLY,
    "union-train": _META,
    "maml": _INNER,
    "retriever-mixture-k5": _META,
    "retriever-fusion-k5": _META,
    "mbc-k5": _META,
    "protonet": _EPISODE,
    "protonet-lite": _EPISODE,
    "shared-peft": _LANGEVIN,
    "lift": _LIFT,
    "lift-reg-x": _NO_PRIOR,
    "fixed-theta": _FIXED,
}
#: Methods that take the choice of another of their family: gradient-based ones MAML's, samplers LiFT's or SharedPEFT's.
LIKE = {
    **dict.fromkeys(("fo-maml", "imaml", "boot-maml", "bmaml", "abml", "maml-mix-k5", "imaml-mix-k5"), "maml"),
    "reptile": "protonet",
    "linear-probe": "no-meta-train",  # it has no rate: its strength is chosen on each task's own rows
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
#: Chosen by mean NLL on two development tasks of one other family (``bench methods --tune``).
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
    """Return the settings that were tuned for a method; the middle of its grid where none were."""
    group = LIKE.get(name, name)
    return CHOSEN.get(group, GRIDS[group][len(GRIDS[group]) // 2])
