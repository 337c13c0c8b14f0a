"""Tasks as pictures and labels, before they are encoded for one backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
        ValueError: no training picture, arrays of another shape or type, targets outside the classes.
    """

    name: str
    train: Images
    labels: tuple[str, ...]
    dev: Images | None = None
    test: Images | None = None
    group: str = ""
    metric: str = "ACC"

    def __post_init__(self) -> None:
        for part, images in self.parts.items():
            _check_images(images, len(self.labels), f"task {self.name!r}, {part} data")

    @property
    def parts(self) -> dict[str, Images]:
        """The pictures by the name of their part, absent parts left out."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {part: images for part, images in parts.items() if images is not None}


def _check_images(images: Images, classes: int, where: str) -> None:
    if len(images) == 0:
        raise ValueError(f"{where}: no picture.")
    if len(images.pictures) != len(images):
        raise ValueError(f"{where}: {len(images.pictures)} pictures and {len(images)} targets.")
    if isinstance(images.pictures, Tensor):
        shape, dtype = tuple(images.pictures.shape), images.pictures.dtype
        if dtype != torch.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
            raise ValueError(f"{where}: pictures of shape {shape}, {dtype}; expected uint8 [n, height, width, 1 or 3].")
    low, high = int(images.target.min()), int(images.target.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{where}: target {wrong} is outside the {classes} classes.")
