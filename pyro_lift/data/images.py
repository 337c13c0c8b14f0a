"""Tasks as pictures and labels, before they are encoded for one backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyro_lift.data.text import check_labels, check_text
from pyro_lift.models.targets import class_numbers

__all__ = ["ImageTask", "Images"]


@dataclass(frozen=True)
class Images:
    """Pictures and their classes.

    Attributes:
        pictures: ``uint8 [n, H, W, C]`` with 1 or 3 channels, or the paths of n picture files, read when encoded.
        target: class numbers ``[n]``.
    """

    pictures: Tensor | tuple[Path, ...]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class ImageTask:
    """A task of pictures, before the size and scale of any backbone; encoded as :class:`TextTask` is.

    Attributes:
        name: for messages, records and figures.
        train: what to learn from; at least one picture.
        labels: names of the classes, in the order of the targets.
        dev: what choices may be made on.
        test: what to be judged by.
        group: of a benchmark, such as VTAB's natural, specialized and structured.
        metric: ``"ACC"``, top-1 accuracy.

    Raises:
        ValueError: no training picture, arrays of another shape or type, targets of another shape or outside the
            classes, a class that stands twice.
    """

    name: str
    train: Images
    labels: tuple[str, ...]
    dev: Images | None = None
    test: Images | None = None
    group: str = ""
    metric: str = "ACC"

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        check_text(self.name, f"{where}: the name")
        object.__setattr__(self, "labels", check_labels(self.labels, where))
        for part, images in self.parts.items():
            object.__setattr__(self, part, _checked(images, len(self.labels), f"{where}, {part} data"))

    @property
    def parts(self) -> dict[str, Images]:
        """The pictures by the name of their part, absent parts left out."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {part: images for part, images in parts.items() if images is not None}


def _checked(images: Images, classes: int, where: str) -> Images:
    """Give the pictures int64 targets, or refuse them."""
    pictures = images.pictures if isinstance(images.pictures, Tensor) else tuple(map(Path, images.pictures))
    if len(pictures) == 0:
        raise ValueError(f"{where}: no picture.")
    if isinstance(pictures, Tensor):
        shape, dtype = tuple(pictures.shape), pictures.dtype
        if dtype != torch.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
            raise ValueError(f"{where}: pictures of shape {shape}, {dtype}; expected uint8 [n, height, width, 1 or 3].")
    target = class_numbers(torch.as_tensor(images.target), where, classes, what="target")
    if len(pictures) != len(target):
        raise ValueError(f"{where}: {len(pictures)} pictures and {len(target)} targets.")
    return Images(pictures, target)
