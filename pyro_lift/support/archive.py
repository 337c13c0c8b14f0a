"""Checksummed JSON and safetensors files; a file that was altered is rejected. No pickle.

A safetensors file is described by a record, kept in the JSON: its size, its SHA-256, and shape and dtype of every
tensor. Reading compares all of it and names the file and the tensor that differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DamagedError",
    "check_format",
    "check_sealed",
    "new_files",
    "new_folder",
    "pack",
    "read_json",
    "read_tensors",
    "reason_of_failure",
    "sealed",
    "unfinished",
    "unpack",
    "versions",
    "write_file",
    "write_json",
    "write_tensors",
]


class DamagedError(ValueError):
    """A file that is missing, or is not what was written."""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a saved file depends on, those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {}
    for name in ("pyro-lift", "torch", "pyro-ppl", "peft", "transformers", "safetensors"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


# ------------------------------------------------------------------------------------------------------------ writing


def write_file(path: Path, content: bytes) -> None:
    """Write and flush to the disk, so that a rename that follows cannot overtake it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object that people can read; floats come back to the bit."""
    write_file(path, (json.dumps(data, indent=1) + "\n").encode())


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with a checksum of all of it under ``"sha256"``."""
    return {**data, "sha256": _digest(data)}


def check_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Raise if a sealed object was modified. Call it after the checks whose messages are more specific."""
    if data.get("sha256") != _digest(data):
        raise DamagedError(f"{path}: altered since it was written: its SHA-256 is another than recorded.")


def _digest(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its record."""
    from safetensors.torch import save

    ready = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # safetensors refuses tensors that share memory, as views of one vector do.
    seen: set[int] = set()
    for name, x in ready.items():
        pointer = x.untyped_storage().data_ptr()
        if x.numel() and pointer in seen:
            ready[name] = x.clone()
        seen.add(pointer)
    content = save(ready, {"format": "pt"})
    write_file(path, content)
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tensors": {name: [_dtype(x), list(x.shape)] for name, x in ready.items()},
    }


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Stage a folder that becomes ``path`` only when everything in it is on the disk.

    Whatever is interrupted, ``path`` is either complete or not there. A kill leaves at most a hidden folder
    ``.NAME.new`` behind, which the next attempt takes away.

    Raises:
        FileExistsError: ``path`` is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already.")
    with _partial_folder(path) as partial:
        yield partial
        _flush_folder(partial)
        partial.rename(path)
        _flush_folder(path.parent)


def unfinished(path: Path) -> Path:
    """Return the place where :func:`new_folder` has a folder before it is complete."""
    return path.absolute().with_name(f".{path.name}.new")


@contextmanager
def new_files(folder: Path, last: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files then go into ``folder``, over those of the same name and beside others.

    Args:
        folder: made if it is not there.
        last: the file that describes the others; a kill in the moment of moving leaves the old one, whose checksums
            tell.
        stale: names of files that go where they are not written anew: they would belong to something else.

    Raises:
        OSError: a full disk, a folder without the right to write; names the folder and the reason.
    """
    with _told(folder), _partial_folder(folder) as partial:
        yield partial
        folder.mkdir(exist_ok=True)
        paths = sorted(partial.iterdir(), key=lambda path: path.name == last)
        for path in paths:
            os.replace(path, folder / path.name)
        for name in set(stale) - {path.name for path in paths}:
            (folder / name).unlink(missing_ok=True)
        _flush_folder(folder)


def reason_of_failure(error: OSError) -> str:
    """Return what the system said, of an error that may have been told in our words since."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.strerror or str(error)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the system, which names none where a disk is full."""
    try:
        yield
    except Exception as error:
        failure = _of_system(error)
        if failure is None:
            raise
        raise OSError(
            failure.errno,
            f"{folder}: could not be written ({reason_of_failure(failure)}). What was to be saved is in memory still: "
            "save it again once there is room and the right to write, or in another folder",
        ) from failure


def _of_system(error: Exception) -> OSError | None:
    """Return an error of the system as what it is; safetensors and tokenizers tell it in errors of their own."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return None
    failure = OSError(int(found[1]), os.strerror(int(found[1])))
    failure.__cause__ = error
    return failure


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------ reading


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedError: no such file, not JSON, no object; names the file.
    """
    if not path.is_file():
        raise DamagedError(f"{path.parent}: no {path.name} here.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise DamagedError(f"{path}: not JSON ({error}); the file is damaged.") from error
    if not isinstance(data, dict):
        raise DamagedError(f"{path}: a JSON {type(data).__name__}; expected an object.")
    return data


def check_format(path: Path, data: Mapping[str, Any], kind: str, newest: int, keys: Mapping[str, type]) -> None:
    """Refuse another kind of file, a newer format, and a file without the keys that every such file has.

    Raises:
        ValueError: names the file and the key.
    """
    named = data.get("format")
    if named != kind:
        raise DamagedError(f"{path}: format {named!r}; expected {kind!r}. Is it the right folder?")
    version = data.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedError(f"{path}: format_version {version!r}; expected a whole number of at least 1.")
    if version > newest:
        by = (data.get("versions") or {}).get("pyro-lift", "")
        raise ValueError(
            f"{path}: format {version}, written by pyro-lift {by}; this version reads up to {newest}. "
            "Upgrade: pip install -U pyro-lift."
        )
    for key, hint in keys.items():
        if key not in data:
            raise DamagedError(f"{path}: key {key!r} is missing.")
        if not isinstance(data[key], hint):
            raise DamagedError(f"{path}: {key!r} is a {type(data[key]).__name__}; expected a {hint.__name__}.")


def read_tensors(
    path: Path,
    record: Any,
    device: torch.device | str = "cpu",
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of a file, after every check; each has memory of its own.

    Args:
        path: of the safetensors file.
        record: what :func:`write_tensors` returned.
        device: where to.
        expected: shapes that the reader needs, -1 for any size; other tensors may be there too.

    Raises:
        DamagedError: a file that is missing, truncated or altered; a tensor that is missing, extra, or of another
            shape or dtype. Names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open

    table = _table(path, record)
    if not path.is_file():
        raise DamagedError(f"{path.parent}: no {path.name} here.")
    size = path.stat().st_size
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        cut = (
            f"truncated: {size} of {record['bytes']} bytes" if size < record["bytes"] else f"not safetensors ({error})"
        )
        raise DamagedError(f"{path}: {cut}; the file is damaged.") from error
    _check_table(path, tensors, table)
    for name, shape in (expected or {}).items():
        if name not in tensors:
            raise DamagedError(f"{path}: tensor {name!r} is missing.")
        _check_shape(path, name, tensors[name], shape)
    if size != record["bytes"] or hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        raise DamagedError(f"{path}: altered since it was written: its SHA-256 is another than recorded.")
    return {name: x.to(device).clone() for name, x in tensors.items()}


def _table(path: Path, record: Any) -> dict[str, Any]:
    good = isinstance(record, dict) and isinstance(record.get("tensors"), dict)
    if not good or not isinstance(record.get("bytes"), int) or not isinstance(record.get("sha256"), str):
        raise DamagedError(f"{path}: nothing is recorded of this file; its JSON file is damaged.")
    table: dict[str, Any] = record["tensors"]
    return table


def _check_table(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any]) -> None:
    if missing := sorted(table.keys() - tensors.keys()):
        raise DamagedError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all).")
    if extra := sorted(tensors.keys() - table.keys()):
        raise DamagedError(f"{path}: tensor {extra[0]!r} does not belong here ({len(extra)} in all).")
    for name, x in tensors.items():
        dtype, shape = table[name]
        _check_shape(path, name, x, tuple(shape))
        if _dtype(x) != dtype:
            raise DamagedError(f"{path}: tensor {name!r} is {_dtype(x)}, not {dtype}.")


def _check_shape(path: Path, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != x.dim() or any(want not in (-1, have) for want, have in zip(shape, x.shape, strict=False)):
        raise DamagedError(f"{path}: tensor {name!r} has shape {tuple(x.shape)}, not {tuple(shape)}.")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------- trees of tensors and plain data


def pack(tree: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """Move the tensors of nested dicts and lists into ``tensors``; JSON is left."""
    if isinstance(tree, Tensor):
        while at in tensors:  # keys with dots of their own
            at += "'"
        tensors[at] = tree
        return {"$tensor": at}
    if isinstance(tree, Mapping):
        return {str(key): pack(value, tensors, f"{at}.{key}" if at else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{at}.{i}") for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{at}: a {type(tree).__name__} cannot be saved; expected tensors, numbers, strings, lists, dicts.")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors that :func:`pack` moved back; tuples come back as lists."""
    if isinstance(tree, dict):
        if tree.keys() == {"$tensor"}:
            return tensors[tree["$tensor"]]
        return {key: unpack(value, tensors) for key, value in tree.items()}
    return [unpack(value, tensors) for value in tree] if isinstance(tree, list) else tree
