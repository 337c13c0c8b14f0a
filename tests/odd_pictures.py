"""Folders of pictures and picture files, odd and damaged, and what is right."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from odd_arrays import classes, target
from odd_input import Odd, Refused
from PIL import Image

from pyro_lift.data.encode import Pictures
from pyro_lift.data.folder import read_task
from pyro_lift.data.pictures import read_pictures


def picture(size: int = 8, value: Any = 0, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size, size), value)


def folder_of(change: Callable[[Path], Any] = lambda f: None, home: str = "train") -> Callable[[Path], Path]:
    """Two classes with one black picture each, and what a change makes of it."""

    def lay(folder: Path) -> Path:
        for name in "ab":
            (folder / home / name).mkdir(parents=True)
            picture().save(folder / home / name / "0.png")
        change(folder)
        return folder

    return lay


def first_pixel(folder: Path) -> list[float]:
    """Red, green and blue of the upper left pixel of the first picture, in [0, 255]."""
    task = read_pictures(folder)
    x = Pictures(8, [0.0] * 3, [1.0] * 3)(task).train.inputs["pixel_values"]
    return [round(255 * value) for value in x[0, :, 0, 0].tolist()]


def saved(image: Image.Image, name: str = "0.png", **options: Any) -> Callable[[Path], Path]:
    def change(folder: Path) -> None:
        (folder / "train" / "a" / "0.png").unlink()
        image.save(folder / "train" / "a" / name, **options)

    return folder_of(change)


def written(content: bytes, name: str = "0.png") -> Callable[[Path], Path]:
    def change(folder: Path) -> None:
        (folder / "train" / "a" / "0.png").unlink()
        (folder / "train" / "a" / name).write_bytes(content)

    return folder_of(change)


def upside_down() -> tuple[Image.Image, Image.Exif]:
    half = picture()
    half.paste((255, 255, 255), (0, 4, 8, 8))
    tag = Image.Exif()
    tag[0x0112] = 3
    return half, tag


def jpeg_cut() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


HALF, TURNED = upside_down()
PALETTE = picture(mode="P")
PALETTE.putpalette([10, 20, 30] + [0] * 765)
FILES: dict[str, Odd] = {
    "a grey of 16 bits": Odd(saved(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))), first_pixel, [128] * 3),
    "a grey TIFF of 16 bits": Odd(
        saved(Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), "0.tif"), first_pixel, [128] * 3
    ),
    "a grey PGM of 16 bits": Odd(written(b"P5 8 8 65535\n" + b"\x80\x00" * 64, "0.pgm"), first_pixel, [128] * 3),
    "whole numbers of 32 bits": Odd(
        saved(Image.fromarray(np.full((8, 8), 70000, np.int32)), "0.tif"),
        first_pixel,
        Refused(r"a/0\.tif: .*32-bit pixels"),
    ),
    "floating-point pixels": Odd(
        saved(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "0.tif"),
        first_pixel,
        Refused(r"a/0\.tif: .*floating-point"),
    ),
    "an EXIF orientation": Odd(saved(HALF, exif=TURNED), first_pixel, [255] * 3),
    "a transparent pixel": Odd(saved(picture(value=(1, 2, 3, 0), mode="RGBA")), first_pixel, [255] * 3),
    "half a transparent pixel": Odd(saved(picture(value=(0, 0, 0, 128), mode="RGBA")), first_pixel, [127] * 3),
    "a grey with transparency": Odd(saved(picture(value=(9, 0), mode="LA")), first_pixel, [255] * 3),
    "a palette": Odd(saved(PALETTE), first_pixel, [10, 20, 30]),
    "a palette with transparency": Odd(saved(PALETTE, transparency=0), first_pixel, [255] * 3),
    "a palette with transparency in bytes": Odd(saved(PALETTE, transparency=bytes([0, 255])), first_pixel, [255] * 3),
    "four inks": Odd(saved(picture(value=(0, 0, 0, 255), mode="CMYK"), "0.tif"), first_pixel, [0] * 3),
    "one bit": Odd(saved(picture(value=1, mode="1")), first_pixel, [255] * 3),
    "an animation": Odd(
        saved(picture(value=(10, 20, 30)), "0.gif", save_all=True, append_images=[picture(value=(200, 0, 0))]),
        first_pixel,
        [10, 20, 30],
    ),
    "a WebP": Odd(saved(picture(value=(10, 20, 30)), "0.webp", lossless=True), first_pixel, [10, 20, 30]),
    "a BMP": Odd(saved(picture(value=(10, 20, 30)), "0.bmp"), first_pixel, [10, 20, 30]),
    "an ending in upper case": Odd(saved(picture(value=(10, 20, 30)), "0.PNG"), first_pixel, [10, 20, 30]),
    "a JPEG called PNG": Odd(saved(picture(value=(255, 255, 255)), "0.png", format="JPEG"), first_pixel, [255] * 3),
    "an empty picture file": Odd(written(b""), first_pixel, Refused(r"a/0\.png: not a picture that can be read")),
    "a picture cut short": Odd(
        written(jpeg_cut(), "0.jpg"), first_pixel, Refused(r"a/0\.jpg: not a picture.*truncated")
    ),
    "a text called a picture": Odd(written(b"no picture"), first_pixel, Refused(r"a/0\.png: not a picture")),
    "a picture that is too large": Odd(
        saved(picture(14_000, mode="1"), "scan.png"), first_pixel, Refused(r"a/scan\.png: not a picture.*exceeds limit")
    ),
    "a picture format that is not read": Odd(
        written(b"x", "0.heic"), first_pixel, Refused(r"a/0\.heic: cannot read this kind")
    ),
    "notes beside pictures": Odd(
        folder_of(lambda f: (f / "train" / "a" / "notes.txt").write_text("x")), classes, ("a", "b")
    ),
    ".DS_Store": Odd(folder_of(lambda f: (f / "train" / ".DS_Store").write_bytes(b"x")), classes, ("a", "b")),
    "Thumbs.db": Odd(folder_of(lambda f: (f / "train" / "a" / "Thumbs.db").write_bytes(b"x")), classes, ("a", "b")),
    "._0.png": Odd(folder_of(lambda f: (f / "train" / "a" / "._0.png").write_bytes(b"x")), first_pixel, [0] * 3),
    "a hidden folder": Odd(folder_of(lambda f: (f / "train" / ".ipynb_checkpoints").mkdir()), classes, ("a", "b")),
    "__MACOSX": Odd(folder_of(lambda f: (f / "train" / "__MACOSX").mkdir()), classes, ("a", "b")),
    "a class without a picture": Odd(
        folder_of(lambda f: (f / "train" / "c").mkdir()), classes, Refused("train/c: a class without a p")
    ),
    "a class of the test part alone": Odd(
        folder_of(lambda f: folder_of(lambda t: None, "test/x")(f)),
        classes,
        Refused("test/x: class 'x' is not one of train's a, b"),
    ),
    "a picture in no class": Odd(
        folder_of(lambda f: picture().save(f / "train" / "1.png")), classes, Refused("outside the folders")
    ),
    "pictures deeper in a class": Odd(
        folder_of(lambda f: ((f / "train/a/deep").mkdir(), picture().save(f / "train/a/deep/1.png"))), target, [0, 0, 1]
    ),
    "a link that goes round": Odd(
        folder_of(lambda f: os.symlink(f / "train" / "a", f / "train" / "a" / "loop")), target, [0, 1]
    ),
    "a class that is a link": Odd(
        folder_of(lambda f: os.symlink(f / "train" / "a", f / "train" / "c")), classes, ("a", "b", "c")
    ),
    "class names with dots": Odd(
        folder_of(lambda f: (f / "train" / "a").rename(f / "train" / "v1.0")), classes, ("b", "v1.0")
    ),
    "no folder of a part": Odd(folder_of(home="."), lambda f: (classes(f), target(f)), (("a", "b"), [0, 1])),
    "a part in upper case": Odd(folder_of(home="Train"), classes, ("a", "b")),
    "two folders of a part": Odd(
        folder_of(lambda f: (folder_of(home="val")(f), folder_of(home="dev")(f))),
        classes,
        Refused("the dev part is dev as well"),
    ),
    "pictures and records": Odd(
        folder_of(lambda f: (f / "train.jsonl").write_text('{"input": "a", "output": "b"}')),
        read_task,
        Refused("train.jsonl as well"),
    ),
    "a label of task.json twice": Odd(
        folder_of(lambda f: (f / "task.json").write_text('{"labels": ["a", "b", "a"]}')),
        classes,
        Refused("'a' stands twice"),
    ),
    "a class that task.json leaves out": Odd(
        folder_of(lambda f: (f / "task.json").write_text('{"labels": ["a"]}')),
        classes,
        Refused("class 'b' is not one of"),
    ),
}
