"""The registry of the paper's tables and figures: for each its rows, its columns, and the cells that it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pyro_lift.bench.paper.cells import PaperCell
from pyro_lift.bench.paper.contestants import ALONE, CONTESTANTS, VARIANCES
from pyro_lift.bench.paper.families import FAMILIES, family_of, setting_of
from pyro_lift.bench.paper.sizes import Scale
from pyro_lift.support.options import check_choice

__all__ = ["FIGURES", "OURS", "TABLES", "Column", "Table", "cells_of", "family_table", "source_split", "table_named"]


class Column(NamedTuple):
    """One column: the tasks to be judged by of a split, or one task of it.

    Attributes:
        key: as :mod:`~pyro_lift.bench.paper.published` names it.
        family: of :data:`~pyro_lift.bench.paper.families.FAMILIES`.
        split: of the family.
        task: of the split; None takes the mean over all.
        measure: key of the scores; None takes the family's.
    """

    key: str
    family: str
    split: str
    task: str | None = None
    measure: str | None = None


@dataclass(frozen=True)
class Table:
    """One table or figure.

    Attributes:
        name: ``"table 1"``, ``"figure 2"``, or the name of a family of ours.
        title: what it shows.
        rows: names of contestants, in order; stages and curves for those that have none.
        columns: in order.
        number: of the paper's numbers beside ours; None where there are none.
        added: rows that the paper does not have.
        ablation: whether what it adds to other tables is run with as many seeds as ablations get.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    number: int | None = None
    added: tuple[str, ...] = ()
    ablation: bool = False


_CLS = (Column("CLS-45", "crossfit", "CLS-45"),)
_CROSSFIT = tuple(Column(split, "crossfit", split) for split in FAMILIES["crossfit"].splits)
#: What the paper leaves out, and everyone should be compared with.
BARS = ("linear-probe", "lora-tuned")
_META = ("no-meta-train", "union-train", "maml", "fo-maml", "imaml", "reptile")
_BAYES = ("bmaml", "abml")
_MIXTURES = ("maml-mix-k5", "imaml-mix-k5")
_LIBRARY = (
    *("retriever-mixture-k5", "retriever-mixture-all", "retriever-fusion-k5", "retriever-fusion-all"),
    *("mbc-k5", "mbc-k10"),
)
_LIFT = ("lift", "lift-k3", "lift-k5")
_ABLATED = tuple(
    name for base in ("lift-reg-x", "lift-noise-x", "fixed-theta") for name in (base, f"{base}-k3", f"{base}-k5")
)
#: Tables that ask what a part of LiFT or of another method is worth.
ABLATIONS = (5, 7, 8, 9, 12, 13)
_ALL_TABLE_1 = (*_META, *_BAYES, *_MIXTURES, *_LIBRARY)


def _table(
    number: int, title: str, rows: Sequence[str], columns: Sequence[Column], added: Sequence[str] = ()
) -> tuple[int, Table]:
    name = f"table {number}"
    return number, Table(name, title, (*added, *rows), tuple(columns), number, tuple(added), number in ABLATIONS)


TABLES: dict[int, Table] = dict(
    [
        _table(
            1,
            "Cross-Fit, seven splits: the task's metric, mean over tasks",
            (*_ALL_TABLE_1, *_LIFT),
            _CROSSFIT,
            BARS,
        ),
        _table(
            2,
            "VTAB-1K, three groups: accuracy",
            (*_META, "protonet", "protonet-lite", "lift", "lift-k2", "lift-k3"),
            [Column(split, "vtab", split) for split in FAMILIES["vtab"].splits],
            BARS,
        ),
        _table(
            3,
            "Shakespeare: next-token perplexity",
            (*_META, "lift", "lift-k2", "lift-k3"),
            [Column(split, "shakespeare", split) for split in FAMILIES["shakespeare"].splits],
            ("lora-tuned",),
        ),
        _table(
            4,
            "Uncertainty on two tasks of CLS-45",
            ("maml", "bmaml-m1", "bmaml-m3", "bmaml", "abml", *_LIFT),
            [
                Column(f"{task} {measure}", "crossfit", "CLS-45", task, {"ece": "ece_pooled"}.get(measure, measure))
                for task in ("ethos-race", "superglue-cb")
                for measure in ("ece", "nll")
            ],
            ("linear-probe", "lora-tuned", "union-train"),
        ),
        _table(5, "Ablation: without the mixture, without noise, with fixed LoRAs", (*_ABLATED, *_LIFT), _CROSSFIT),
        _table(
            6,
            "A larger network: FLAN-T5-XL and BART-base on CLS-45",
            ("no-meta-train", "union-train", "maml", "fo-maml", "reptile", *_LIFT),
            [Column("flan-t5-xl", "flan-t5-xl", "CLS-45"), Column("bart-base", "crossfit", "CLS-45")],
        ),
        _table(7, "Bayesian models that are not hierarchical", ("shared-peft", "taskwise-peft", *_LIFT), _CLS),
        _table(8, "Ablation: the prior's variances (sigma^2 = beta^2)", [f"variance {v}" for v in VARIANCES], _CLS),
        _table(9, "Ablation: one task's gradient in place of the asynchronous J", ("lift-single", "lift-table"), _CLS),
        _table(
            10,
            "Seconds of an iteration",
            ("lift-k5", "union-train", "maml"),
            [Column(f"rank {rank}", "cost", f"rank-{rank}", measure="seconds") for rank in (4, 64)],
        ),
        _table(
            11,
            "Seconds of warm-up and burn-in",
            ("warm-up", "burn-in"),
            [Column(f"rank {rank}", "cost", f"rank-{rank}", measure="seconds") for rank in (4, 64)],
        ),
        _table(12, "Bootstrapped MAML", ("maml", "boot-maml", *_LIFT), _CLS),
        _table(13, "MAML with several inner steps", ("maml", "maml-2", "maml-3", "maml-5", "lift-k5"), _CLS),
        _table(14, "Standard deviations and p-values on CLS-45", (*_ALL_TABLE_1, "lift-k5"), _CLS, BARS),
    ]
)

FIGURES: dict[int, Table] = {
    2: Table(
        "figure 2", "Online EM in the plane", ("toy",), (Column("log likelihood", "toy", "online-em", measure="curve"),)
    ),
    3: Table(
        "figure 3",
        "Orders of the model: K or M of 1, 3 and 5",
        (
            *("maml", "maml-mix-k3", "maml-mix-k5", "imaml", "imaml-mix-k3", "imaml-mix-k5"),
            *("bmaml-m1", "bmaml-m3", "bmaml"),
            *("retriever-mixture-k1", "retriever-mixture-k3", "retriever-mixture-k5"),
            *("retriever-fusion-k1", "retriever-fusion-k3", "retriever-fusion-k5"),
            *_LIFT,
        ),
        _CROSSFIT,
        ablation=True,
    ),
    4: Table("figure 4", "Convergence of SGLD-Gibbs", ("toy",), (Column("KL", "toy", "sgld-gibbs", measure="curve"),)),
    7: Table(
        "figure 7",
        "The prior's variances beside the best baseline",
        (*(f"variance {v}" for v in VARIANCES), "imaml-mix-k5"),
        _CLS,
        8,
        ablation=True,
    ),
}

#: Families of ours whose tasks have the same classes, or predict one quantity: one regression can be over all rows.
POOLED = ("digits", "scanners", "shifts", "regressions")
#: Families of ours: where tasks share something, and where they do not.
OURS = ("development", "digits", "scanners", "shifts", "novels", "roles", "regressions")


def family_table(name: str) -> Table:
    """Return the table of a family of ours: probe, tuned LoRA, joint training, two meta-learners, LiFT.

    *roles* and *scanners* ask one question, LiFT beside methods of as many gradients as it has by default, and have the
    rows that answer it; *roles*, whose cells are the dearest, the two nearest.
    """
    check_choice("family", name, OURS)
    family = family_of(name)
    probe = () if name == "novels" else ("linear-probe",)
    if name in POOLED:
        probe = (*probe, "pooled-probe")
    rows = (*probe, "lora-tuned", "no-meta-train", "union-train", "maml", "reptile", *family.orders)
    if name == "roles":
        rows = ("union-train", "reptile", *family.orders)
    if name == "scanners":
        rows = (*probe, "union-train", "maml", "reptile", *family.orders)
    return Table(name, "a family of ours", rows, tuple(Column(split, name, split) for split in family.splits))


def table_named(name: str) -> Table:
    """Return a table by its name: ``"table 3"``, ``"figure 4"``, ``"digits"``.

    Raises:
        ValueError: none of that name.
    """
    known = {table.name: table for table in (*TABLES.values(), *FIGURES.values(), *map(family_table, OURS))}
    check_choice("table", name, known)
    return known[name]


def source_split(family: str, split: str, contestant: str) -> str:
    """Return the split whose cell a contestant's numbers come from.

    Who learns nothing from other tasks does the same on every split with the same tasks to be judged by.
    """
    alone = contestant in CONTESTANTS and CONTESTANTS[contestant].method in ALONE
    return family_of(family).same_tests.get(split, split) if alone else split


def cells_of(
    table: Table, scale: Scale, root: str | None, *, seeds: Iterable[int] | None = None, smoke: bool = False
) -> list[PaperCell]:
    """List the cells that a table is made of, the first seed of all before the second of any.

    Args:
        table: of the registry.
        scale: ``"paper"`` or ``"small"``.
        root: where the data lie.
        seeds: None takes the family's.
        smoke: sizes of seconds, one seed.
    """
    cells: dict[PaperCell, None] = {}
    for column in table.columns:
        if table.ablation and scale == "small" and column.family == "crossfit" and column.split != _CLS[0].split:
            continue  # what ablations add is run on the first split alone: hours of the suite
        plain = PaperCell(scale, column.family, column.split, "", 0, root, smoke)
        if column.family in ("toy", "cost"):
            cells[replace(plain, group=column.family)] = None
            continue
        sizes = setting_of(scale, column.family, column.split).sizes
        count = 1 if smoke else sizes.ablation_seeds or sizes.seeds if table.ablation else sizes.seeds
        for seed in range(count) if seeds is None else seeds:
            for row in table.rows:
                split = source_split(column.family, column.split, row)
                cells[replace(plain, split=split, group=CONTESTANTS[row].group, seed=seed)] = None
    return sorted(cells, key=lambda cell: cell.seed)
