"""Odd and damaged input at every door: read right, or refused with file, place and value; nothing is written.

Each kind is one line of a table (``odd_texts``, ``odd_arrays``, ``odd_pictures``, ``odd_tensors``). A refusal is known
by its message, a reading by its value. What people's files are like was taken from the documentation of pandas, NumPy,
Pillow, torchvision, datasets and keras.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from odd_arrays import ARRAYS
from odd_input import Refused
from odd_pictures import FILES
from odd_tensors import TENSORS
from odd_texts import TEXTS

from pyro_lift.data.records import parse_json

TABLE = {
    f"{door}: {kind}": odd
    for door, table in {"text": TEXTS, "npz": ARRAYS, "pictures": FILES, "tensors": TENSORS}.items()
    for kind, odd in table.items()
}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", TABLE)
def test_odd_input_is_read_right_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    odd = TABLE[kind]
    laid = odd.lay(tmp_path)
    before = everything_in(tmp_path)
    if isinstance(odd.right, Refused):
        with pytest.raises((ValueError, TypeError), match=f"(?s){odd.right.message}") as refusal:
            odd.read(laid)
        if before:
            assert str(tmp_path) in str(refusal.value) or "task.npz" in str(refusal.value), "the file is not named"
    else:
        assert odd.read(laid) == odd.right
    assert everything_in(tmp_path) == before, "reading wrote a file"


def test_the_table_holds_more_than_sixty_kinds() -> None:
    assert len(TABLE) > 60 and sum(isinstance(odd.right, Refused) for odd in TABLE.values()) > 60


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": [true, null, 1.5e3]}', '{"\\u00e9": {"b": {}}}'])
def test_json_without_oddities_is_jsons(content: str) -> None:
    assert parse_json(content, "here") == json.loads(content)
