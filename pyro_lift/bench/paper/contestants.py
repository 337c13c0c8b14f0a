"""The rows of the tables: each a method of the registry with its own settings, by a name of its own.

Contestants that differ only in what they do with one meta-training (LiFT's K, the retrievers' composition) are of one
*group*: a cell of the sweep meta-trains once and judges all of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALONE", "CONTESTANTS", "GROUPS", "Contestant", "title_of"]


@dataclass(frozen=True)
class Contestant:
    """One row of a table.

    Attributes:
        title: as tables show it.
        method: of :data:`~pyro_lift.methods.registry.BASELINES`.
        group: of contestants that share a meta-training.
        options: of the method's constructor.
        components: K of a mixture over phi; 0 for methods that have none.
        lift: fields of :class:`~pyro_lift.settings.LiFTSettings` that differ from the scale's.
    """

    title: str
    method: str
    group: str
    options: Mapping[str, Any] = field(default_factory=dict)
    components: int = 0
    lift: Mapping[str, Any] = field(default_factory=dict)


#: They learn nothing from other tasks: of splits with the same test tasks one is enough.
ALONE = ("linear-probe", "lora-tuned", "no-meta-train", "taskwise-peft")
#: Variances of Table 8.
VARIANCES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)

_PLAIN = {
    "linear-probe": "Linear Probe",
    "pooled-probe": "Pooled Probe",
    "lora-tuned": "Tuned LoRA",
    "no-meta-train": "No Meta Train",
    "union-train": "Union Train",
    "maml": "MAML",
    "maml-2": "MAML, 2 inner steps",
    "maml-3": "MAML, 3 inner steps",
    "maml-5": "MAML, 5 inner steps",
    "fo-maml": "FO-MAML",
    "imaml": "i-MAML",
    "reptile": "Reptile",
    "boot-maml": "Bootstrapped MAML",
    "bmaml-m1": "BMAML M=1",
    "bmaml-m3": "BMAML M=3",
    "bmaml": "BMAML M=5",
    "abml": "ABML",
    "protonet": "ProtoNet",
    "protonet-lite": "ProtoNet-LITE",
    "shared-peft": "Shared PEFT",
    "taskwise-peft": "Task-wise PEFT",
}


def _contestants() -> dict[str, Contestant]:
    found = {name: Contestant(title, name, name) for name, title in _PLAIN.items()}
    for base, title in (("maml", "MAML"), ("imaml", "i-MAML")):
        for k in (3, 5):
            name = f"{base}-mix-k{k}"
            found[name] = Contestant(f"{title}-Mix K={k}", f"{base}-mix-k5", name, {"components": k})
    for composition in ("mixture", "fusion"):
        for count in (1, 3, 5, None):
            name = f"retriever-{composition}-{'all' if count is None else f'k{count}'}"
            title = f"Retriever {composition.title()} K={'all' if count is None else count}"
            options = {"components": count, "composition": composition}
            found[name] = Contestant(title, "retriever-mixture-k5", "retriever", options)
    for k in (5, 10):
        found[f"mbc-k{k}"] = Contestant(f"MBC-mu K={k}", "mbc-k5", f"mbc-k{k}", {"components": k})
    for base, title in (
        ("lift", "LiFT"),
        ("lift-reg-x", "Reg (X)"),
        ("lift-noise-x", "Noise (X)"),
        ("fixed-theta", "Fixed theta_i"),
    ):
        for k in (1, 2, 3, 5) if base == "lift" else (1, 3, 5):
            name = base if k == 1 else f"{base}-k{k}"
            found[name] = Contestant(f"{title} K={k}", base, base, components=k)
    for name, title in (("lift-single", "LiFT K=5, one task's gradient"), ("lift-table", "LiFT K=5, the paper's J")):
        found[name] = Contestant(title, name, name, components=5)
    for variance in VARIANCES:
        name = f"variance {variance}"
        sd = variance**0.5
        found[name] = Contestant(
            f"LiFT K=5, variances {variance}", "lift", name, components=5, lift={"beta": sd, "sigma": sd}
        )
    return found


#: All rows of all tables, by name.
CONTESTANTS: dict[str, Contestant] = _contestants()
#: Names of the contestants of each group.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, c in CONTESTANTS.items() if c.group == group)
    for group in dict.fromkeys(c.group for c in CONTESTANTS.values())
}


def title_of(name: str) -> str:
    """Return a row's title; rows that are no contestants (Table 11's stages) have their name."""
    return CONTESTANTS[name].title if name in CONTESTANTS else name
