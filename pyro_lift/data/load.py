"""The front door to tasks by name of their benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_lift.data.collection import TaskCollection
from pyro_lift.support.options import check_choice, named_options

__all__ = ["load_tasks"]


def load_tasks(
    benchmark: str,
    split: str | Mapping[str, Sequence[str]] | None = None,
    root: str | Path | None = None,
    **options: Any,
) -> TaskCollection[Any]:
    """The tasks of a benchmark as strings or pictures; see the benchmark's own function for its options.

    =========== ====================================== ===========================================================
    benchmark   ``split``                              function
    =========== ====================================== ===========================================================
    crossfit    CLS-45, CLS-23, CLS-0, MCQA, MRC, NLI, :func:`~pyro_lift.data.crossfit.load_crossfit`
                Paraphrase, Random
    vtab        natural, specialized, structured: the  :func:`~pyro_lift.data.vtab.load_vtab`
                group that is tested
    shakespeare random-80/10/10, random-60/10/30,      :func:`~pyro_lift.data.shakespeare.load_shakespeare`
                play-80/10/10, play-60/10/30
    folder      names by part; None: ``split.json``    :func:`~pyro_lift.data.folder.load_folder`
    novels      authors, books: what a task is         :func:`~pyro_lift.data.novels.load_novels`
    shifts      the data set of pictures               :func:`~pyro_lift.data.shifts.load_shifts`
    regressions diabetes                               :func:`~pyro_lift.data.regressions.load_regressions`
    =========== ====================================== ===========================================================

    Args:
        benchmark: of the table.
        split: of the table; None takes the benchmark's first.
        root: where the data lies.
        options: of the benchmark's function.

    Raises:
        ValueError: an unknown benchmark or split, bad data (with file and line), no task at all.
        TypeError: an unknown option, with the nearest known one.
    """
    from pyro_lift.data.crossfit import load_crossfit
    from pyro_lift.data.folder import load_folder
    from pyro_lift.data.novels import load_novels
    from pyro_lift.data.regressions import load_regressions
    from pyro_lift.data.shakespeare import load_shakespeare
    from pyro_lift.data.shifts import load_shifts
    from pyro_lift.data.vtab import load_vtab

    loaders: dict[str, Any] = {
        "crossfit": load_crossfit,
        "vtab": load_vtab,
        "shakespeare": load_shakespeare,
        "folder": load_folder,
        "novels": load_novels,
        "shifts": load_shifts,
        "regressions": load_regressions,
    }
    check_choice("benchmark", benchmark, loaders)
    given = {} if split is None else {"split": split}
    collection: TaskCollection[Any] = named_options(loaders[benchmark])(**given, root=root, **options)
    return collection
