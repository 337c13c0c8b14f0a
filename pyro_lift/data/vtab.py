"""VTAB-1K: 19 picture tasks in three groups, 800 labelled pictures each; others that declare a group may join in.

References:
    A large-scale study of representation learning with the visual task adaptation benchmark, Zhai et al., 2019,
    arXiv:1910.04867.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.images import ImageTask
from pyro_lift.data.layout import task_places
from pyro_lift.data.pictures import is_picture_task, read_pictures
from pyro_lift.data.vtab_hub import vtab_from_hub
from pyro_lift.support.options import check_choice

__all__ = ["VTAB", "VtabTask", "dsprites_location", "dsprites_orientation", "load_vtab", "threshold_label"]


class VtabTask(NamedTuple):
    """Group, number of classes, and what is asked of a data set that has several labels."""

    group: str
    classes: int
    question: str = ""


#: The 19 tasks, by name.
VTAB: dict[str, VtabTask] = {
    "cifar100": VtabTask("natural", 100),
    "caltech101": VtabTask("natural", 102),
    "dtd": VtabTask("natural", 47),
    "oxford_flowers102": VtabTask("natural", 102),
    "oxford_iiit_pet": VtabTask("natural", 37),
    "svhn": VtabTask("natural", 10),
    "sun397": VtabTask("natural", 397),
    "patch_camelyon": VtabTask("specialized", 2),
    "eurosat": VtabTask("specialized", 10),
    "resisc45": VtabTask("specialized", 45),
    "diabetic_retinopathy": VtabTask("specialized", 5),
    "clevr_count": VtabTask("structured", 8, "number of objects less 3"),
    "clevr_dist": VtabTask("structured", 6, "distance of the nearest object: 0, 8, 8.5, 9, 9.5, 10, 100"),
    "dmlab": VtabTask("structured", 6),
    "kitti": VtabTask("structured", 4, "distance of the nearest vehicle in metres: -100, 8, 20, 999; none is the last"),
    "dsprites_loc": VtabTask("structured", 16, "x position, 32 values in pairs"),
    "dsprites_ori": VtabTask("structured", 16, "orientation, 40 values in 16 bins"),
    "smallnorb_azim": VtabTask("structured", 18, "azimuth"),
    "smallnorb_ele": VtabTask("structured", 9, "elevation"),
}
GROUPS = ("natural", "specialized", "structured")


def dsprites_location(x_position: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the factor 0 .. 31, the class 0 .. 15."""
    return np.floor(np.asarray(x_position) * 16 / 32).astype(np.int64)


def dsprites_orientation(orientation: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the factor 0 .. 39, the class 0 .. 15."""
    return np.floor(np.asarray(orientation) * 16 / 40).astype(np.int64)


def threshold_label(value: float, thresholds: tuple[float, ...]) -> int:
    """The class of a distance: k where ``thresholds[k] <= value < thresholds[k + 1]``.

    Raises:
        ValueError: a value outside the thresholds.
    """
    k = int(np.searchsorted(thresholds, value, side="right")) - 1
    if not 0 <= k < len(thresholds) - 1:
        raise ValueError(f"distance {value} is outside the thresholds {thresholds[0]} .. {thresholds[-1]}.")
    return k


def load_vtab(
    split: str = "structured", root: str | Path | None = None, *, others: bool = False, hub: bool = False
) -> TaskCollection[ImageTask]:
    """Load the tasks of two groups to meta-train on, and of the third to be judged by.

    Args:
        split: the group that is tested.
        root: a folder with ``NAME.npz`` for each task, or a folder of pictures ``NAME/train/CLASS/*.png`` (see
            :func:`~pyro_lift.data.pictures.read_pictures`).
        others: take tasks of other names too, into the group that they declare: an NPZ file in ``meta``, a folder in
            ``task.json``.
        hub: fetch tasks that are not in ``root`` from the Hugging Face hub, where
            :data:`~pyro_lift.data.vtab_hub.HUB` knows a copy.

    Raises:
        ValueError: an unknown group, neither root nor hub, no task at all, a bad file (named).
        FileNotFoundError: no such root.
    """
    check_choice("split", split, GROUPS)
    if root is None and not hub:
        raise ValueError(
            "root=None: pass the folder with an NPZ file, or a folder of pictures, for each task; or hub=True."
        )
    folder = None if root is None else Path(root)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    places = {} if folder is None else task_places(folder)
    local = {name: path for name, path in places.items() if is_picture_task(path)}
    extra = [name for name in local if name not in VTAB]
    tasks = [read_pictures(path) for name, path in local.items() if others or name in VTAB]
    if hub:
        absent = [(name, task) for name, task in VTAB.items() if name not in local]
        fetched = [vtab_from_hub(name, task.group, task.classes) for name, task in absent]
        tasks += [task for task in fetched if task is not None]
    if not tasks:
        hint = f" It holds {len(extra)} other tasks: pass others=True for these." if extra else ""
        raise ValueError(f"{folder}: none of VTAB's 19 tasks is there.{hint}")
    present = {task.name for task in tasks}
    train: list[ImageTask] = []
    test: list[ImageTask] = []
    for task in tasks:
        group = VTAB[task.name].group if task.name in VTAB else task.group
        if group not in GROUPS:
            raise ValueError(
                f"{local.get(task.name)}: it declares group {group!r}; expected one of {', '.join(GROUPS)}."
            )
        (test if group == split else train).append(task)
    missing = {
        "train": tuple(n for n, t in VTAB.items() if t.group != split and n not in present),
        "test": tuple(n for n, t in VTAB.items() if t.group == split and n not in present),
    }
    notes = (f"not of VTAB, group as declared in the file: {', '.join(extra)}.",) if others and extra else ()
    return TaskCollection(f"VTAB-1K {split}", tuple(train), (), tuple(test), missing=missing, notes=notes)
