"""The problem of a cell: tasks that are loaded and encoded, and the network with its adapter's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.bench.comparison import hold_out
from pyro_lift.bench.paper.families import Setting, family_of, setting_of
from pyro_lift.bench.paper.sizes import Scale, Sizes
from pyro_lift.config import AdapterConfig, BackboneConfig, OutputConfig, RunConfig, TasksConfig
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.load import load_tasks
from pyro_lift.data.text import CHOICES, TextTask
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.wiring import adapter_of, encode_tasks

__all__ = ["DataAbsentError", "PaperProblem", "check_data", "load_collection", "problem_of", "spread"]


class DataAbsentError(ValueError):
    """The data of a family, or its backbone, are not here; the message says what is missing."""


class PaperProblem(NamedTuple):
    """What the contestants of a cell meet.

    Attributes:
        adapter: the network with its initial adapter.
        tasks: encoded for it.
        texts: the same tasks as strings, where they are text.
        setting: the family's.
        sizes: of the run.
    """

    adapter: RandomAdapter
    tasks: TaskCollection[Any]
    texts: TaskCollection[TextTask] | None
    setting: Setting
    sizes: Sizes


def check_data(scale: Scale, family: str, split: str, root: Path | None) -> None:
    """Refuse a split whose data or backbone are not here, without loading them.

    Raises:
        DataAbsentError: with what is missing.
    """
    setting, source = setting_of(scale, family, split), family_of(family)
    if setting.backbone.startswith("backbones/") and not Path(setting.backbone).is_dir():
        raise DataAbsentError(f"{setting.backbone} is not here: run from the repository's root.")
    if source.benchmark in ("digits", "regressions") or setting.options.get("hub"):
        return
    if root is None or not (root / source.folder).is_dir():
        raise DataAbsentError(f"its data are looked for in {root or 'no folder'}: give --root FOLDER (docs/tasks.md).")
    wanted = {"novels": "corpus.txt.gz", "shifts": f"{split}.npz"}.get(source.benchmark, "*")
    if not list((root / source.folder).glob(wanted)):
        raise DataAbsentError(f"no {wanted} in {root / source.folder}: give --root FOLDER (docs/tasks.md).")


def load_collection(setting: Setting, family: str, split: str, root: Path | None, seed: int) -> TaskCollection[Any]:
    """Load a split's tasks as strings, pictures or tensors, with tasks to choose on held out where there are none.

    Tasks whose answers are free text are left out, by name, where answers are matched with labels.

    Raises:
        DataAbsentError: no data there.
    """
    source = family_of(family)
    if source.benchmark == "digits":
        return _digits(split, seed)
    options = dict(setting.options)
    if source.benchmark in ("shifts", "regressions"):
        options["seed"] = seed  # a family by its seed, as the digits'
    try:
        tasks = load_tasks(source.benchmark, split, None if root is None else root / source.folder, **options)
    except (FileNotFoundError, ValueError) as error:
        raise DataAbsentError(f"{family} {split}: {error}") from error
    if setting.form == "matching":
        tasks = _with_labels(tasks)
    if source.judged_by == "dev":
        tasks = replace(tasks, dev=(), test=tasks.dev)
    if not tasks.dev:
        tasks = hold_out(tasks, [task.name for task in spread(tasks.train, setting.sizes.dev_tasks)])
    return tasks


def _digits(split: str, seed: int) -> TaskCollection[Any]:
    """Make the embedded family; the split says how many labelled images a task to learn from has."""
    from pyro_lift.data.digits import digit_family

    family = digit_family(seed, num_test=8, num_dev=4, train_rows=int(split.split()[0]))
    return TaskCollection(f"digits, {split}", tuple(family.train), tuple(family.dev), tuple(family.test))


def _with_labels(tasks: TaskCollection[Any]) -> TaskCollection[Any]:
    """Leave out tasks to learn from whose answers are free text: there is nothing to match them with."""
    free = [task.name for task in tasks.train if task.form not in CHOICES]
    if not free:
        return tasks
    kept = tuple(task for task in tasks.train if task.form in CHOICES)
    if not kept:
        raise DataAbsentError(f"{tasks.name}: every task to learn from has free text for its answer.")
    note = f"left out of train, free text for an answer: {', '.join(free)}."
    return replace(tasks, train=kept, notes=(*tasks.notes, note))


def spread(tasks: Sequence[Any], most: int) -> tuple[Any, ...]:
    """Pick at most so many, evenly over the list, and never all of it: neighbours are often relatives."""
    return tuple(spread_evenly(tasks, min(most, max(len(tasks) - 2, 0))))


def problem_of(
    scale: Scale, family: str, split: str, seed: int, root: Path | None, *, smoke: bool = False, rank: int | None = None
) -> PaperProblem:
    """Load and wire the problem of a cell.

    Args:
        scale: ``"paper"`` or ``"small"``.
        family: of :data:`~pyro_lift.bench.paper.families.FAMILIES`.
        split: of the family.
        seed: of the adapter's start; of the digits', shifts' and regressions' tasks too.
        root: where the data lie.
        smoke: as small as can be, in seconds.
        rank: of the adapter; None takes the sizes'.

    Raises:
        DataAbsentError: no data there.
    """
    setting = setting_of(scale, family, split)
    sizes = setting.sizes.smoke() if smoke else setting.sizes
    collection = load_collection(setting, family, split, root, seed)
    if smoke:
        collection = replace(collection, train=collection.train[:3])
    collection = replace(
        collection,
        dev=tuple(spread_evenly(collection.dev, sizes.dev_tasks)),
        test=tuple(spread_evenly(collection.test, sizes.test_tasks)),
    )
    config = RunConfig(
        backbone=BackboneConfig(name=setting.backbone, kind=setting.kind),
        adapter=AdapterConfig(rank=rank or sizes.rank, layers=None if setting.layers is None else list(setting.layers)),
        tasks=TasksConfig(max_length=sizes.max_length),
        output=OutputConfig(seed=seed),
    )
    adapter = _regression_adapter(collection, sizes, seed) if setting.backbone == "regression" else adapter_of(config)
    texts = collection if isinstance(collection.train[0], TextTask) else None
    return PaperProblem(adapter, encode_tasks(collection, config), texts, setting, sizes)


def _regression_adapter(tasks: TaskCollection[Any], sizes: Sizes, seed: int) -> RandomAdapter:
    import peft

    from pyro_lift.data.regressions import regression_network
    from pyro_lift.models.backbones import adapt_backbone

    network = regression_network(tasks.train, seed)
    return adapt_backbone(network, peft.LoraConfig(r=sizes.rank, target_modules=["0", "2", "4"]), seed=seed)
