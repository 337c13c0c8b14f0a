"""Tasks of pictures from files: NPZ arrays, or a folder of pictures for each class."""

from __future__ import annotations

import ast
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.layout import (
    PARTS,
    RECORD_FILES,
    TENSOR_FILES,
    npz_inside,
    part_files,
    part_folders,
    part_of,
    task_name,
    visible,
    walk_files,
)
from pyro_lift.data.picture_lists import list_file, listed_pictures
from pyro_lift.data.pixels import PICTURE_FILES
from pyro_lift.data.records import as_text, read_json
from pyro_lift.data.text import check_labels
from pyro_lift.models.targets import class_numbers, count_classes
from pyro_lift.support.options import check_choice, check_distinct

__all__ = ["PARTS", "is_picture_task", "npz_pictures", "read_npz", "read_pictures"]

log = logging.getLogger("pyro_lift")

#: What may lie beside pictures and is no example: notes, lists, annotations.
_BESIDE = (
    *("", ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log", ".ini", ".lnk"),
    *(".url", ".db", ".mat", ".sha256", ".md5", ".bak", ".tmp"),
)
#: Arrays by part and letter: ``x_val`` and, as MedMNIST has it, ``val_images`` are pictures of the dev part.
_ARRAYS = {
    name: (letter, part)
    for part, names in PARTS.items()
    for of in names
    for letter, name in (("x", f"x_{of}"), ("y", f"y_{of}"), ("x", f"{of}_images"), ("y", f"{of}_labels"))
}


def is_picture_task(path: Path) -> bool:
    """Tell whether this is an NPZ file, or a folder with one, with ``train/CLASS``, folders of pictures, or a list.

    Raises:
        ValueError: a folder with both ``train/`` and ``train.jsonl``.
    """
    if not path.is_dir():
        return path.suffix.casefold() == ".npz"
    files = part_files(path, (*RECORD_FILES, *TENSOR_FILES))
    folders = part_folders(path)
    if "train" in files and "train" in folders:
        raise ValueError(f"{folders['train']}: the train part is {files['train'].name} as well; keep one of them.")
    if files or folders:
        return "train" in folders
    if list_file(path) is not None or npz_inside(path) is not None:
        return True
    return any(_is_picture(file) for sub in visible(path) if sub.is_dir() for file in visible(sub))


def _is_picture(path: Path) -> bool:
    return path.suffix.casefold() in PICTURE_FILES


def read_pictures(path: Path) -> ImageTask:
    """Read a task from an NPZ file, or from pictures ``train/CLASS/*.png`` with ``dev`` and ``test`` beside it.

    A folder that holds an NPZ file alone is that task, under the folder's name.
    A folder without parts, ``CLASS/*.png``, is all for training. A part may list its pictures in ``metadata.csv`` or
    ``.jsonl`` with ``file_name`` and ``label``, as ``datasets`` has them, in place of folders
    (:mod:`~pyro_lift.data.picture_lists`). The pictures of a folder are read when they are encoded, in every format of
    :data:`~pyro_lift.data.pixels.PICTURE_FILES`, those of folders inside a class too; hidden folders are passed over.
    ``task.json`` may say ``group``, and ``labels``, the folders' names in the order of their numbers, classes of other
    tasks without a folder here among them; without it they are in alphabetical order.

    Raises:
        ValueError: no picture, a class that train does not have, or has no picture of, a file that cannot be read, a
            bad ``task.json`` or NPZ file; names the file.
    """
    if (inside := npz_inside(path)) is not None:
        return replace(read_npz(inside), name=task_name(path))
    return _read_folder(path) if path.is_dir() else read_npz(path)


def _read_folder(folder: Path) -> ImageTask:
    homes = part_folders(folder)
    if not homes:
        homes = {"train": folder}
    if "train" not in homes:
        raise ValueError(f"{folder}: no folder train; expected train/CLASS/*.png.")
    about = _about(folder / "task.json")
    pictures = {part: _by_class(home) for part, home in homes.items()}
    for name, files in pictures["train"].items():
        _check_no_parts_inside(homes["train"] / name)
        if not files:
            raise ValueError(f"{homes['train'] / name}: a class without a picture; expected {name}/*.png.")
    labels = tuple(about.get("labels") or sorted(pictures["train"]))
    if lacking := sorted(set(labels) - set(pictures["train"])):
        # Tasks that share a head number all its classes, whether they have pictures of each or not.
        log.info("%s: no picture of %s in train, which task.json names.", folder, ", ".join(lacking))
    parts: dict[str, Images] = {}
    for part, by_class in pictures.items():
        strange = sorted(name for name in by_class if name not in labels)
        if strange:
            place = homes[part] / strange[0]
            raise ValueError(f"{place}: class {strange[0]!r} is not one of train's {', '.join(labels)}.")
        chosen = [(path, k) for k, name in enumerate(labels) for path in by_class.get(name, ())]
        if not chosen:
            raise ValueError(f"{homes[part]}: no picture; expected CLASS/*.png (or {', '.join(PICTURE_FILES[1:])}).")
        parts[part] = Images(tuple(path for path, _ in chosen), torch.tensor([k for _, k in chosen]))
    try:
        return ImageTask(
            task_name(folder), parts["train"], labels, parts.get("dev"), parts.get("test"), about.get("group", "")
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _by_class(home: Path) -> dict[str, list[Path]]:
    """List the pictures of each class; refuse files that are neither pictures nor notes beside them."""
    listed = list_file(home)
    by_list = None if listed is None else listed_pictures(listed)
    if by_list is not None:
        return by_list
    classes: dict[str, list[Path]] = {}
    for path in visible(home):
        if path.is_dir():
            classes[path.name] = [file for file in walk_files(path) if _wanted(file)]
        elif _is_picture(path):
            raise ValueError(f"{path}: a picture outside the folders of the classes; expected CLASS/{path.name}.")
    return classes


def _check_no_parts_inside(place: Path) -> None:
    """Refuse ``CLASS/train`` and ``CLASS/test``: all would be taken for training."""
    inside = [path.name for path in visible(place) if path.is_dir() and part_of(path.name)] if place.is_dir() else []
    if inside:
        raise ValueError(
            f"{place / inside[0]}: a part inside a class. Parts are above the classes: {inside[0]}/{place.name}/*.png."
        )


def _wanted(file: Path) -> bool:
    if _is_picture(file):
        return True
    if file.suffix.casefold() in _BESIDE or file.name.endswith("~"):
        return False
    raise ValueError(f"{file}: cannot read this kind of file as a picture; expected one of {', '.join(PICTURE_FILES)}.")


def _about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    about = read_json(path)
    for key in about:
        check_choice(f"{path}: key", key, ["labels", "group"])
    if "labels" in about:
        about["labels"] = json_labels(about["labels"], path)
    if not isinstance(about.get("group", ""), str):
        raise ValueError(f"{path}: 'group' is {about['group']!r}; expected a string.")
    return about


def json_labels(labels: object, path: Path) -> tuple[str, ...]:
    """Read the labels of a ``task.json``: a list of strings or numbers, each once."""
    if not isinstance(labels, list):
        raise ValueError(f"{path}: 'labels' is {labels!r}; expected a list.")
    try:
        return check_labels([as_text(label) for label in labels], str(path))
    except TypeError as error:
        raise ValueError(f"{path}: labels: {error}") from error


# ---------------------------------------------------------------------------------------------------------------- NPZ


def read_npz(path: Path) -> ImageTask:
    """Read a task from ``x_train`` and ``y_train``, perhaps ``_val`` and ``_test``, ``classes`` and ``meta``.

    MedMNIST's names are read too: ``train_images`` and ``train_labels``.

    Pictures are ``uint8 [n, H, W, C]`` or ``[n, H, W]``; all parts must have pictures of one size. Labels are whole
    numbers ``[n]`` (or a column, ``[n, 1]``) or names; without ``classes`` the names are train's in order.

    Raises:
        ValueError: not an NPZ file, an array missing or of another shape or type, a label that train does not have; the
            message names file and array.
    """
    arrays = _arrays(path)
    pictures, labels = _named_parts(path, arrays)
    parts: dict[str, Images] = {}
    size: tuple[int, ...] | None = None
    names = _classes(path, arrays, labels)
    for part, key in pictures.items():
        x, y = _checked(path, key, arrays[key]), arrays[labels[part]]
        if y.ndim == 0 or len(x) != len(y):
            raise ValueError(f"{path}: {key} has {len(x)} rows, {labels[part]} {len(y) if y.ndim else 'none'}.")
        if size is not None and x.shape[1:] != size:
            raise ValueError(f"{path}: {key} has pictures of {list(x.shape[1:])}, {pictures['train']} of {list(size)}.")
        size = x.shape[1:]
        parts[part] = Images(torch.from_numpy(np.ascontiguousarray(x)), _numbers(path, labels[part], y, names))
    group = _meta(arrays.get("meta")).get("group", "")
    try:
        return ImageTask(task_name(path), parts["train"], names, parts.get("dev"), parts.get("test"), str(group))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def npz_pictures(path: Path) -> torch.Tensor:
    """Read the pictures that are to be predicted from an NPZ file ``uint8 [n, H, W, C]``: test's, else dev's, train's.

    Labels need not be there; ``x`` and ``images`` are of no part.

    Raises:
        ValueError: not an NPZ file, or no pictures in it; names file and array.
    """
    arrays = _arrays(path)
    by_part = {part: key for key, (letter, part) in _ARRAYS.items() if letter == "x" and key in arrays}
    key = next((by_part[part] for part in ("test", "dev", "train") if part in by_part), None)
    key = key or next((name for name in ("x", "images") if name in arrays), None)
    if key is None:
        raise ValueError(f"{path}: no array 'x_test' to predict; it holds {', '.join(arrays) or 'nothing'}.")
    return torch.from_numpy(np.ascontiguousarray(_checked(path, key, arrays[key])))


def _checked(path: Path, key: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Give pictures their channels, or refuse what are none."""
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"{path}: {key} is {x.dtype} {list(x.shape)}; expected uint8 [n, height, width, 1 or 3].")
    if x.size == 0:
        raise ValueError(f"{path}: {key} is empty: {list(x.shape)}.")
    return x


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the parsers of zip and NPY met, the file is the reason
        raise ValueError(f"{path}: not an NPZ file of plain arrays ({error or type(error).__name__}).") from error
    check_distinct(f"{path}: arrays", members, "Write each array once.")
    other = next((key for key, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if other is not None:
        raise ValueError(f"{path}: not an NPZ file of plain arrays ({other!r} is none).")
    return arrays


def _named_parts(path: Path, arrays: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Find the names of the arrays of pictures and of labels, by part."""
    homes: dict[str, dict[str, str]] = {"x": {}, "y": {}}
    for key in arrays:
        if key not in _ARRAYS:
            if key.startswith(("x_", "y_")):
                raise ValueError(f"{path}: array {key!r} belongs to no part; expected {key[:2]}train, _val or _test.")
            continue
        letter, part = _ARRAYS[key]
        if part in homes[letter]:
            raise ValueError(f"{path}: arrays {homes[letter][part]!r} and {key!r} are one part; keep one of them.")
        homes[letter][part] = key
    for part in {"train": 0} | homes["x"] | homes["y"]:
        for letter, keys in homes.items():
            if part not in keys:
                partner = homes["y" if letter == "x" else "x"].get(part)
                name = f"{letter}_{part}" if partner is None else _partner(partner)
                raise ValueError(f"{path}: no array {name!r}; it holds {', '.join(arrays)}.")
    order = [part for part in PARTS if part in homes["x"]]
    return {part: homes["x"][part] for part in order}, {part: homes["y"][part] for part in order}


def _partner(key: str) -> str:
    """Name the labels of an array of pictures, and the other way round."""
    for one_end, other_end in (("_images", "_labels"), ("_labels", "_images")):
        if key.endswith(one_end):
            return key.removesuffix(one_end) + other_end
    return ("y" if key.startswith("x") else "x") + key[1:]


def _classes(path: Path, arrays: dict[str, Any], labels: dict[str, str]) -> tuple[str, ...]:
    """Name the classes: by the array ``classes``, else train's own labels, else its numbers."""
    if "classes" in arrays:
        named = arrays["classes"]
        if named.ndim != 1:
            raise ValueError(f"{path}: classes has shape {list(named.shape)}; expected a list of names.")
        try:
            return check_labels(_strings(named), f"{path}: classes")
        except (TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: classes is {named.dtype}: {error}") from error
    key = labels["train"]
    y = _flat(arrays[key])
    if y.dtype.kind in "US":
        return check_labels(sorted(set(_names(path, key, y))), f"{path}: {key}")
    numbers = class_numbers(_tensor(path, key, y), f"{path}: {key}", whole_floats=True)
    if len(numbers) == 0:
        raise ValueError(f"{path}: {key} is empty.")
    return tuple(map(str, range(count_classes(numbers, f"{path}: {key}"))))


def _numbers(path: Path, key: str, y: np.ndarray[Any, Any], names: tuple[str, ...]) -> torch.Tensor:
    """Convert labels that are names or numbers to class numbers."""
    y = _flat(y)
    if y.dtype.kind not in "US":
        return class_numbers(_tensor(path, key, y), f"{path}: {key}", len(names), whole_floats=True, what="target")
    if y.ndim != 1:
        raise ValueError(f"{path}: {key} has shape {list(y.shape)}; expected one name a row, [n].")
    given = _names(path, key, y)
    strange = next((name for name in given if name not in names), None)
    if strange is not None:
        raise ValueError(f"{path}: {key}: label {strange!r} is not one of {', '.join(names[:8])}.")
    return torch.tensor([names.index(name) for name in given], dtype=torch.long)


def _flat(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Flatten a column ``[n, 1]``, as keras has its labels."""
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _names(path: Path, key: str, y: np.ndarray[Any, Any]) -> list[str]:
    try:
        return [name.strip() for name in _strings(y.reshape(-1))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {key}: a name is not UTF-8 ({error.reason}).") from error


def _strings(values: np.ndarray[Any, Any]) -> list[str]:
    listed: Sequence[Any] = values.tolist()
    return [value.decode() if isinstance(value, bytes) else as_text(value) for value in listed]


def _tensor(path: Path, key: str, y: np.ndarray[Any, Any]) -> torch.Tensor:
    if y.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key} is {y.dtype} {list(y.shape)}; expected whole numbers or names, [n].")
    wide = np.float64 if y.dtype.kind == "f" else np.uint64 if y.dtype.kind == "u" else np.int64
    return torch.from_numpy(np.ascontiguousarray(y.astype(wide)).reshape(y.shape))


def _meta(array: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """Read what an NPZ says of itself, as JSON or as Python prints a dictionary; nothing where it is neither."""
    if array is None or array.size == 0:
        return {}
    text = str(array.flat[0])
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        try:
            meta = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return {}
    return meta if isinstance(meta, dict) else {}
