"""NPZ files of pictures, odd and damaged, and what is right."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from odd_input import Odd, Refused

from pyro_lift.data.pictures import read_pictures


def npz(**arrays: Any) -> Callable[[Path], Path]:
    """Four pictures with the labels 0, 1, 0, 1, and whatever else is given."""

    def lay(folder: Path) -> Path:
        path = folder / "task.npz"
        given = {"x_train": np.zeros((4, 8, 8, 3), np.uint8), "y_train": np.arange(4) % 2, **arrays}
        np.savez(path, **{name: array for name, array in given.items() if array is not None})
        return path

    return lay


def npz_bytes(content: bytes) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        (folder / "task.npz").write_bytes(content)
        return folder / "task.npz"

    return lay


def npz_members(*names: str) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        path = npz()(folder)
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                archive.writestr(name, archive.read("y_train.npy") if name.endswith(".npy") else b"text")
        return path

    return lay


def target(path: Path) -> list[int]:
    return read_pictures(path).train.target.tolist()


def classes(path: Path) -> tuple[str, ...]:
    return read_pictures(path).labels


X, Y, WORDS = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, np.array(["dog", "cat", "dog", "cat"])
ARRAYS: dict[str, Odd] = {
    "a column of labels": Odd(npz(y_train=Y[:, None].astype(np.uint8)), target, [0, 1, 0, 1]),
    "labels in one-hot rows": Odd(
        npz(y_train=np.eye(2)[Y]), target, Refused(r"task\.npz: y_train: .*\[4, 2\].*argmax")
    ),
    "labels of fractions": Odd(npz(y_train=Y + 0.7), target, Refused(r"y_train: label 0\.7 is not a whole number")),
    "labels as whole floats": Odd(npz(y_train=Y.astype(float)), target, [0, 1, 0, 1]),
    "labels as booleans": Odd(npz(y_train=Y.astype(bool)), target, [0, 1, 0, 1]),
    "labels of another byte order": Odd(npz(y_train=Y.astype(">i4")), target, [0, 1, 0, 1]),
    "a label that is not a number": Odd(
        npz(y_train=np.array([0, 1, np.nan, 1])), target, Refused("y_train: label nan")
    ),
    "an infinite label": Odd(
        npz(y_train=np.array([0, 1, np.inf, 1])), target, Refused("y_train: label inf is not a whole")
    ),
    "a label of -1": Odd(npz(y_train=Y - 1), target, Refused(r"y_train: label -1 is outside")),
    "an identifier for a label": Odd(
        npz(y_train=np.array([0, 1, 2, 2**40])), target, Refused("y_train: label 1099511627776 would make")
    ),
    "an unsigned label past int64": Odd(
        npz(y_train=np.array([0, 1, 2, 2**63], np.uint64)), target, Refused("2\\*\\*63 or more")
    ),
    "labels as words": Odd(npz(y_train=WORDS), lambda p: (classes(p), target(p)), (("cat", "dog"), [1, 0, 1, 0])),
    "labels as bytes": Odd(
        npz(y_train=WORDS.astype("S")), lambda p: (classes(p), target(p)), (("cat", "dog"), [1, 0, 1, 0])
    ),
    "words with their classes": Odd(npz(y_train=WORDS, classes=["dog", "cat"]), target, [0, 1, 0, 1]),
    "words that are no class": Odd(
        npz(y_train=WORDS, classes=["dog", "emu"]), target, Refused("y_train: label 'cat' is not one of dog, emu")
    ),
    "words of the test part alone": Odd(
        npz(y_train=WORDS, x_test=X, y_test=np.array(["emu"] * 4)), target, Refused("y_test: label 'emu'")
    ),
    "a class of the test part alone": Odd(
        npz(x_test=X, y_test=Y + 1), target, Refused(r"y_test: target 2 is outside the 2 classes")
    ),
    "classes as bytes": Odd(npz(classes=np.array([b"cat", b"dog"])), classes, ("cat", "dog")),
    "classes as numbers": Odd(npz(classes=np.array([3, 5])), classes, ("3", "5")),
    "a class twice": Odd(
        npz(classes=["cat", "cat"]), classes, Refused(r"task\.npz: classes, labels: 'cat' stands twice")
    ),
    "classes in a square": Odd(npz(classes=np.array([["a"], ["b"]])), classes, Refused(r"classes has shape \[2, 1\]")),
    "classes without a dimension": Odd(npz(classes=np.array("ab")), classes, Refused(r"classes has shape \[\]")),
    "labels without a dimension": Odd(npz(y_train=np.array(1)), target, Refused(r"y_train: labels have shape \[\]")),
    "labels in a structure": Odd(
        npz(y_train=np.zeros(4, [("a", "i4")])), target, Refused("y_train is .*expected whole numbers or names")
    ),
    "dates for labels": Odd(npz(y_train=np.zeros(4, "M8[D]")), target, Refused("y_train is datetime64")),
    "objects for labels": Odd(
        npz(y_train=np.array([0, None, 1, 0], object)), target, Refused("not an NPZ file of plain arrays")
    ),
    "more labels than pictures": Odd(npz(y_train=np.zeros(5, int)), target, Refused("x_train has 4 rows, y_train 5")),
    "labels without pictures": Odd(npz(y_test=Y), target, Refused("no array 'x_test'")),
    "pictures without labels": Odd(npz(x_val=X), target, Refused("no array 'y_val'")),
    "an array of no part": Odd(npz(x_tset=X), target, Refused("array 'x_tset' belongs to no part")),
    "a part under two names": Odd(npz(x_val=X, y_val=Y, x_dev=X, y_dev=Y), target, Refused("are one part")),
    "a dev part called dev": Odd(npz(x_dev=X, y_dev=Y), lambda p: len(read_pictures(p).parts["dev"]), 4),
    "pictures of floats": Odd(npz(x_train=X / 255.0), target, Refused(r"x_train is float64 \[4, 8, 8, 3\]")),
    "channels first": Odd(npz(x_train=X.transpose(0, 3, 1, 2)), target, Refused(r"x_train is uint8 \[4, 3, 8, 8\]")),
    "no height": Odd(npz(x_train=X[:, :0]), target, Refused(r"x_train is empty: \[4, 0, 8, 3\]")),
    "columns first in memory": Odd(npz(x_train=np.asfortranarray(X)), target, [0, 1, 0, 1]),
    "MedMNIST's names": Odd(
        npz(x_train=None, y_train=None, train_images=X, train_labels=Y[:, None], val_images=X, val_labels=Y),
        lambda p: (target(p), sorted(read_pictures(p).parts)),
        ([0, 1, 0, 1], ["dev", "train"]),
    ),
    "MedMNIST's pictures alone": Odd(
        npz(x_train=None, y_train=None, train_images=X), target, Refused("no array 'train_labels'")
    ),
    "an empty NPZ file": Odd(npz_bytes(b""), target, Refused(r"task\.npz: not an NPZ file")),
    "an NPY file called NPZ": Odd(
        lambda f: (np.save(f / "x.npy", X), (f / "x.npy").rename(f / "x.npz"))[1],
        target,
        Refused(r"x\.npz: not an NPZ file"),
    ),
    "a zip of no arrays": Odd(npz_members("note.txt"), target, Refused("not an NPZ file of plain arrays")),
    "an array twice": Odd(npz_members("y_train.npy"), target, Refused("'y_train.npy' stands twice")),
    "an NPZ file cut short": Odd(lambda f: _cut(npz()(f)), target, Refused("not an NPZ file")),
    "a meta that is nothing": Odd(npz(meta=np.array([])), lambda p: read_pictures(p).group, ""),
    "a name in upper case": Odd(lambda f: npz()(f).rename(f / "V1.5.NPZ"), lambda p: read_pictures(p).name, "V1.5"),
}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path
