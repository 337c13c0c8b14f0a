"""Pictures of every kind that Pillow reads, as 8-bit RGB: the one place where their oddities are known.

Pillow's own ``convert("RGB")`` clips 16-bit greys at 255, drops transparency and shows what was hidden under it, and
leaves a photograph on its side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PICTURE_FILES", "Pixels", "as_rgb", "read_pixels"]

#: Names of picture files end so, in any letter case: the formats of Pillow that hold photographs or scans.
PICTURE_FILES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".tga", ".jp2", ".j2k", ".jpx", ".avif", ".ico", ".sgi", ".ras", ".qoi"),
)
#: What lies under a transparent picture: paper.
PAPER = (255, 255, 255, 255)


class Pixels(NamedTuple):
    """Pictures ``uint8 [n, size, size, 3]``, and how many of the files held further frames, which were not read."""

    pictures: Tensor
    animated: int


def as_rgb(picture: Image) -> Image:
    """Convert to 8-bit RGB: upright by the EXIF tag, transparency laid on white, the high byte of 16-bit greys.

    Raises:
        ValueError: 32-bit or floating-point pixels, of which nothing says what is white.
    """
    from PIL import Image

    picture = _upright(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        values = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) >> 8
        picture = Image.fromarray(values.astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"mode {picture.mode!r}, {'32-bit' if picture.mode == 'I' else 'floating-point'} pixels: nothing says "
            "which value is white; save it with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, PAPER)
        return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _upright(picture: Image) -> Image:
    """Turn the picture as its EXIF orientation says; a tag that cannot be read says nothing, as viewers have it."""
    from PIL import ImageOps

    format_of_file = picture.format
    picture.load()
    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception:  # the tag alone is damaged: Pillow's parser raises what it likes, the pixels are whole
        return picture
    upright.format = format_of_file
    return upright


def read_pixels(paths: Sequence[Path], size: int) -> Pixels:
    """Read picture files, each resized to a square without cropping.

    Of an animation, or a file with several pages, the first frame is read.

    Raises:
        ValueError: a file that is no picture, cut short, larger than Pillow's own limit (``Image.MAX_IMAGE_PIXELS``)
            or of unknown scale; names the file.
    """
    from PIL import Image

    pictures, animated = [], 0
    for path in paths:
        try:
            with warnings.catch_warnings(), Image.open(path) as picture:
                warnings.simplefilter("ignore", UserWarning)  # notes on metadata; what matters is raised
                animated += int(getattr(picture, "is_animated", False) and picture.format != "MPO")
                small = as_rgb(picture).resize((size, size), Image.Resampling.BILINEAR)
                pictures.append(torch.from_numpy(np.array(small)))
        except Exception as error:  # whatever a decoder met, the file is the reason
            raise ValueError(f"{path}: not a picture that can be read ({_short(error)}).") from error
    return Pixels(torch.stack(pictures), animated)


def _short(error: Any) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) < 200 else text[:200] + " ..."
