"""Where tasks lie in a folder: names of the parts, entries that belong to the system, and names that stand twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyro_lift.support.options import check_distinct

__all__ = [
    "PARTS",
    "RECORD_FILES",
    "TENSOR_FILES",
    "is_hidden",
    "npz_inside",
    "part_files",
    "part_folders",
    "part_of",
    "task_name",
    "task_places",
    "visible",
    "walk_files",
]

#: Names of the parts in folders and files, in any letter case: those that ``datasets`` knows.
PARTS = {
    "train": ("train", "training"),
    "dev": ("dev", "val", "valid", "validation"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: What records can be read from, by the end of a file's name.
RECORD_FILES = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz", ".parquet")
TENSOR_FILES = (".safetensors",)
#: Data that nobody reads here: beside a part's name it is refused, not passed over.
_OTHER_FILES = (
    *(".csv", ".csv.gz", ".json", ".json.gz", ".ndjson", ".txt", ".xlsx", ".xls", ".arrow", ".feather", ".npy", ".npz"),
    *(".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".jsonl.zip", ".tsv.bz2", ".tsv.xz", ".zip", ".tar", ".tar.gz", ".pkl"),
    *(".pt", ".pth", ".bin", ".h5", ".hdf5"),
)
#: Folders and files that a system or a tool leaves behind.
_SYSTEM = {
    *("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}


def is_hidden(path: Path) -> bool:
    """Tell whether an entry is hidden or a system's own, as ``.ipynb_checkpoints``, ``__MACOSX``, ``Thumbs.db``."""
    return path.name.startswith(".") or path.name.casefold() in _SYSTEM


def visible(folder: Path) -> list[Path]:
    """List the entries of a folder that are a user's, in order of name."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path))


def walk_files(folder: Path) -> Iterator[Path]:
    """Walk all files below a folder, links followed, each folder once, so that a link to above ends."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        yield from (Path(root) / name for name in sorted(files) if not is_hidden(Path(name)))


def part_of(name: str) -> str | None:
    """Return the part that a folder's or a file's name stands for, None for none."""
    return next((part for part, names in PARTS.items() if name.casefold() in names), None)


def part_folders(folder: Path) -> dict[str, Path]:
    """Find the folders ``train``, ``dev``, ``test`` (or what else they may be called) by part.

    Raises:
        ValueError: two of them for one part.
    """
    folders = [path for path in visible(folder) if path.is_dir() and part_of(path.name)]
    return _by_part(folders, [path.name for path in folders])


def part_files(folder: Path, endings: Sequence[str] = RECORD_FILES) -> dict[str, Path]:
    """Find the files ``train.jsonl``, ``dev.tsv`` ... by part.

    Raises:
        ValueError: two files for one part, or a file of a kind that is not read under a part's name.
    """
    files = []
    for path in visible(folder):
        stem, dot, ending = path.name.partition(".")
        if not path.is_file() or part_of(stem) is None:
            continue
        ending = (dot + ending).casefold()
        if ending in endings:
            files.append(path)
        elif ending in _OTHER_FILES:
            raise ValueError(f"{path}: cannot read this kind of file; expected one of {', '.join(endings)}.")
    return _by_part(files, [path.name.partition(".")[0] for path in files])


def _by_part(paths: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for path, name in zip(paths, names, strict=True):
        part = part_of(name)
        assert part is not None
        if part in parts:
            raise ValueError(f"{path}: the {part} part is {parts[part].name} as well; keep one of them.")
        parts[part] = path
    return parts


def npz_inside(folder: Path) -> Path | None:
    """Find the NPZ file that a folder holds in place of a task's parts: one alone, and no folder beside it."""
    if not folder.is_dir():
        return None
    inside = visible(folder)
    found = [path for path in inside if path.name.casefold().endswith(".npz") and path.is_file()]
    return found[0] if len(found) == 1 and not any(path.is_dir() for path in inside) else None


def task_name(path: Path) -> str:
    """Name the task in a folder, or in an NPZ file: without ``.npz``, with every other dot."""
    name = Path(os.path.abspath(path)).name
    return name[: -len(".npz")] if name.casefold().endswith(".npz") and not path.is_dir() else name


def task_places(root: Path) -> dict[str, Path]:
    """List the tasks that may lie in a folder, by name: NPZ files, and folders that are not hidden.

    Raises:
        ValueError: two of one name, such as ``a.npz`` and ``a/``.
    """
    paths = [path for path in visible(root) if path.is_dir() or path.name.casefold().endswith(".npz")]
    check_distinct(str(root), [task_name(path) for path in paths], "Two places have the same task; keep one of them.")
    return {task_name(path): path for path in paths}
