"""Tasks of pictures from files: NPZ arrays, or a folder of pictures for each class."""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.records import read_json
from pyro_lift.support.options import check_choice

__all__ = ["PARTS", "is_picture_task", "read_npz", "read_pictures"]

#: Names of the parts in folders and files.
PARTS = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def is_picture_task(path: Path) -> bool:
    """Whether this is an NPZ file, or a folder with ``train/CLASS``."""
    return path.suffix == ".npz" if path.is_file() else (path / "train").is_dir()


def read_pictures(path: Path) -> ImageTask:
    """A task from an NPZ file, or from pictures ``train/CLASS/*.png`` with ``dev`` (or ``val``) and ``test`` beside it.

    The pictures of a folder are read when they are encoded. ``task.json`` may say ``group``, and ``labels``, the
    folders' names in the order of their numbers; without it they are in alphabetical order.

    Raises:
        ValueError: no picture, a class that train does not have, a bad ``task.json`` or NPZ file; names the file.
    """
    return read_npz(path) if path.suffix == ".npz" else _read_folder(path)


def _read_folder(folder: Path) -> ImageTask:
    there = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    about = _about(folder / "task.json")
    labels = tuple(map(str, about.get("labels", there)))
    lacking = sorted(set(labels) - set(there))
    if lacking:
        raise ValueError(f"{folder / 'task.json'}: labels names {lacking[0]!r}, which is no folder of train.")
    parts: dict[str, Images] = {}
    for part, names in PARTS.items():
        home = next((folder / name for name in names if (folder / name).is_dir()), None)
        if home is None:
            continue
        strange = sorted(p.name for p in home.iterdir() if p.is_dir() and p.name not in labels)
        if strange:
            raise ValueError(f"{home / strange[0]}: class {strange[0]!r} is not one of train's {', '.join(labels)}.")
        by_class = [sorted(p for p in (home / c).glob("*") if p.suffix.lower() in _ENDINGS) for c in labels]
        files = [(path, k) for k, paths in enumerate(by_class) for path in paths]
        if not files:
            raise ValueError(f"{home}: no picture; expected CLASS/*.png (or {', '.join(_ENDINGS[1:])}).")
        parts[part] = Images(tuple(p for p, _ in files), torch.tensor([k for _, k in files]))
    group = str(about.get("group", ""))
    return ImageTask(folder.name, parts["train"], labels, parts.get("dev"), parts.get("test"), group)


def _about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    about = read_json(path)
    for key in about:
        check_choice(f"{path}: key", key, ["labels", "group"])
    return about


def read_npz(path: Path) -> ImageTask:
    """A task from ``x_train`` and ``y_train``, perhaps ``_val`` and ``_test``, ``classes`` and ``meta``.

    Pictures are ``uint8 [n, H, W, C]`` or ``[n, H, W]``; all parts must have pictures of one size.

    Raises:
        ValueError: not an NPZ file, an array missing or of another shape; the message names file and array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an NPZ file of plain arrays ({error}).") from error
    parts: dict[str, Images] = {}
    size: tuple[int, ...] | None = None
    for part, suffix in (("train", "train"), ("dev", "val"), ("test", "test")):
        if f"x_{suffix}" not in arrays and part != "train":
            continue
        for key in (f"x_{suffix}", f"y_{suffix}"):
            if key not in arrays:
                raise ValueError(f"{path}: no array {key!r}; it holds {', '.join(arrays)}.")
        x, y = arrays[f"x_{suffix}"], arrays[f"y_{suffix}"]
        x = x[..., None] if x.ndim == 3 else x
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise ValueError(
                f"{path}: x_{suffix} is {x.dtype} {list(x.shape)}; expected uint8 [n, height, width, 1 or 3]."
            )
        if len(x) == 0:
            raise ValueError(f"{path}: x_{suffix} is empty.")
        if len(x) != len(y):
            raise ValueError(f"{path}: x_{suffix} has {len(x)} rows, y_{suffix} {len(y)}.")
        if size is not None and x.shape[1:] != size:
            raise ValueError(f"{path}: x_{suffix} has pictures of {list(x.shape[1:])}, x_train of {list(size)}.")
        size = x.shape[1:]
        parts[part] = Images(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
    count = max(int(images.target.max()) for images in parts.values()) + 1
    labels = [str(c) for c in arrays["classes"]] if "classes" in arrays else [str(c) for c in range(count)]
    group = str(_meta(arrays.get("meta")).get("group", ""))
    try:
        return ImageTask(path.stem, parts["train"], tuple(labels), parts.get("dev"), parts.get("test"), group)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _meta(array: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    if array is None:
        return {}
    text = str(array.item() if array.ndim == 0 else array.flat[0])
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return {}
    return found if isinstance(found, dict) else {}
