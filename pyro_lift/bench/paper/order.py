"""The order in which cells are run: any prefix of it is worth reporting."""

from __future__ import annotations

from collections.abc import Iterable

from pyro_lift.bench.paper.cells import PaperCell
from pyro_lift.bench.paper.families import FAMILIES

__all__ = ["FIRST", "in_order"]

#: Groups that every table is read by, the bars first.
FIRST = (
    *("linear-probe", "pooled-probe", "union-train", "lift", "lora-tuned", "no-meta-train", "maml", "reptile"),
    *("abml", "bmaml"),
)
#: Splits that are much like one that comes before them.
LATER = ("CLS-23", "CLS-0", "MCQA", "MRC", "NLI", "Paraphrase", "random-60/10/30", "play-60/10/30")


def in_order(cells: Iterable[PaperCell], ablations: Iterable[PaperCell] = ()) -> list[PaperCell]:
    """Sort cells: what every table is read by, then the tables' other rows, then what ablations alone show.

    Within each the first seed of all comes before the second of any, and cells of one split and seed are neighbours,
    since they share what was loaded.

    Args:
        cells: each once.
        ablations: those of them that no other table shows.
    """
    late = set(ablations)
    families = list(FAMILIES)

    def key(cell: PaperCell) -> tuple[int, ...]:
        known = cell.family in FAMILIES
        main = cell.group in FIRST
        return (
            2 if cell in late else 0 if main else 1,
            cell.seed,
            cell.split in LATER or cell.family == "flan-t5-xl",
            families.index(cell.family) if known else len(families),
            FAMILIES[cell.family].splits.index(cell.split) if known else 0,
            FIRST.index(cell.group) if main else len(FIRST),
        )

    return sorted(cells, key=key)
