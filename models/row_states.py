"""States that a network has computed for rows, kept by their fingerprints: in memory, and past that in a file."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.row_keys import Key
from pyro_lift.support.memory import free_bytes

__all__ = ["RowStates"]

log = logging.getLogger("pyro_lift")

#: Bytes of the first and of the largest piece of memory; pieces are taken as they fill, each as large as all before.
FIRST, LARGEST = 2**20, 2**25
#: Share of what is free, in memory and on disk, that may be taken.
SHARE = 0.25


class _Place(NamedTuple):
    """Where a row's states lie: the piece of memory and its first line there, or -1 and the offset in the file."""

    piece: int
    start: int
    lines: int


class RowStates:
    """States ``[L, ...]`` of rows, by fingerprint; L may differ from row to row, the rest of the shape may not.

    They are kept where they were computed, up to a quarter of the memory that is free there when the first one comes,
    or ``memory_bytes``. What is over goes to a file without a name, which is gone with the process, when it comes for
    the second time; what no longer fits there is not kept. Nothing is thrown out.

    Args:
        memory_bytes: most bytes in memory; None is a quarter of what is free.
        folder: of the file; None takes the system's folder for temporary files.

    Attributes:
        found: rows that were asked for and there.
        missed: rows that were asked for and not there.
    """

    def __init__(self, memory_bytes: int | None = None, folder: str | Path | None = None) -> None:
        self.memory_bytes, self.folder = memory_bytes, Path(folder or tempfile.gettempdir())
        self.found = self.missed = 0
        self._places: dict[Key, _Place] = {}
        self._pieces: list[Tensor] = []
        self._filled = 0  # lines of the last piece
        self._tail: torch.Size | None = None
        self._file: _File | None = None
        self._full = False
        self._once: set[Key] = set()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __repr__(self) -> str:
        return f"RowStates(rows={len(self)}, nbytes={self.nbytes}, file_bytes={self.file_bytes})"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are taken."""
        return sum(piece.numel() * piece.element_size() for piece in self._pieces)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return 0 if self._file is None else self._file.end

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Return the places in a list of fingerprints whose rows have no states, the first of each only."""
        first: dict[Key, int] = {}
        for k, key in enumerate(keys):
            if key not in self._places:
                first.setdefault(key, k)
        self.missed += len(first)
        self.found += len(keys) - len(first)
        return list(first.values())

    def add(self, key: Key, states: Tensor) -> bool:
        """Keep the states ``[L, ...]`` of a row, by copy; return whether there was room."""
        if self._full or states.shape[0] == 0:
            return False
        if self._tail is None:
            self._tail = states.shape[1:]
            if self.memory_bytes is None:
                self.memory_bytes = int(SHARE * free_bytes(states.device))
        if states.shape[1:] != self._tail:
            return False
        lines = states.reshape(len(states), -1)
        place = self._in_memory(lines)
        if place is None and key not in self._once:  # rows that never come again are not worth a file
            self._once.add(key)
            return False
        if place is None:
            place = self._in_file(lines)
        if place is None:
            return False
        self._once.discard(key)
        self._places[key] = place
        return True

    def gather(self, keys: Sequence[Key], length: int | None, like: Tensor, fresh: dict[Key, Tensor]) -> Tensor:
        """Collect the states of rows ``[n, length, ...]``; behind a row's own end stand numbers that mean nothing.

        Args:
            keys: fingerprints of n rows.
            length: of the result; None takes the rows' own, which is then the same for all.
            like: whose device and type the result has.
            fresh: states of the rows that are not kept.
        """
        first = fresh.get(keys[0])
        tail = self._tail if first is None else first.shape[1:]
        assert tail is not None
        if length is None:
            length = self._places[keys[0]].lines if first is None else len(first)
        width = max(int(torch.Size(tail).numel()), 1)
        rows = [None if key in fresh else self._places[key] for key in keys]
        pieces = {-1 if place is None else place.piece for place in rows}
        if len(pieces) == 1 and -1 not in pieces:
            piece = self._pieces[pieces.pop()]
            flat = piece.index_select(0, _lines(rows, length, piece.device))
            return flat.to(like.device, like.dtype).view(len(keys), length, *tail)
        out = like.new_zeros(len(keys), length, width)
        for k, (key, place) in enumerate(zip(keys, rows, strict=True)):
            if place is None:
                part = fresh[key].reshape(-1, width)
            elif place.piece >= 0:
                part = self._pieces[place.piece][place.start : place.start + place.lines]
            else:
                assert self._file is not None
                part = self._file.read(place.start, place.lines * width, like.dtype).view(-1, width)
            out[k, : len(part)] = part[:length]
        return out.view(len(keys), length, *tail)

    def _in_memory(self, lines: Tensor) -> _Place | None:
        count, width = lines.shape
        assert self.memory_bytes is not None
        if not self._pieces or self._filled + count > len(self._pieces[-1]):
            line_bytes = max(width * lines.element_size(), 1)
            room = (self.memory_bytes - self.nbytes) // line_bytes
            if count > room:
                return None
            size = min(max(min(max(FIRST, self.nbytes), LARGEST) // line_bytes, count), room)
            self._pieces.append(lines.new_zeros(size, width))
            self._filled = 0
        place = _Place(len(self._pieces) - 1, self._filled, count)
        self._pieces[-1][self._filled : self._filled + count] = lines
        self._filled += count
        return place

    def _in_file(self, lines: Tensor) -> _Place | None:
        try:
            if self._file is None:
                self._file = _File(self.folder)
                log.info("states below the adapter: memory is full, further rows go to a file in %s.", self.folder)
            return _Place(-1, self._file.append(lines), len(lines))
        except OSError as error:
            log.warning("states below the adapter: no more room in %s (%s), no more are kept.", self.folder, error)
            self._full = True
            return None


def _lines(rows: Sequence[_Place | None], length: int, device: torch.device) -> Tensor:
    """Numbers of the lines of a piece ``[n length]``; places behind a row's end point to its last line."""
    starts = torch.tensor([place.start for place in rows if place is not None])
    counts = torch.tensor([place.lines for place in rows if place is not None])
    column = torch.minimum(torch.arange(length), counts.unsqueeze(1) - 1)
    return (starts.unsqueeze(1) + column).flatten().to(device)


class _File:
    """Numbers in a file without a name, read and written at their offsets through the system's page cache."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.end, self.limit = 0, int(SHARE * shutil.disk_usage(folder).free)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="pyro-lift-states-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def append(self, x: Tensor) -> int:
        """Write some numbers at the end; return their offset."""
        data: Any = x.detach().cpu().contiguous().view(torch.uint8).numpy()
        buffer, start, done = memoryview(data).cast("B"), self.end, 0
        if start + len(buffer) > self.limit:
            raise OSError(f"{self.limit} bytes are a quarter of what was free")
        while done < len(buffer):
            done += os.pwrite(self._file.fileno(), buffer[done:], start + done)
        self.end += len(buffer)
        return start

    def read(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Read that many numbers of a type from an offset."""
        size, parts = count * dtype.itemsize, bytearray()
        while len(parts) < size:
            part = os.pread(self._file.fileno(), size - len(parts), start + len(parts))
            if not part:
                raise OSError(f"the file of states ends after {start + len(parts)} bytes")
            parts += part
        return torch.frombuffer(parts, dtype=dtype)
