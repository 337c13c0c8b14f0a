"""Files of every kind under random content: what was written is read back, and damage is refused by the file's name.

``hypothesis`` makes the content up. Whatever it is, a reader returns what the file says, or raises ValueError,
TypeError or OSError with the name of the file or its folder; never another exception.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.config import read_config
from pyro_lift.data.encode import Pictures
from pyro_lift.data.folder import read_task
from pyro_lift.data.images import ImageTask
from pyro_lift.data.pictures import read_pictures
from pyro_lift.data.records import read_records
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.data.text import TextTask

Check = Callable[[Any, Path], None]


class Property(NamedTuple):
    """What is made up, and what must hold of it in an empty folder."""

    content: st.SearchStrategy[Any]
    check: Check


@contextmanager
def refusals_name(place: Path) -> Iterator[None]:
    """Let errors of a user's kind pass if they name the place; any other exception fails the test."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if place.name not in str(error):
            raise AssertionError(f"{type(error).__name__} does not name {place.name}: {error}") from error


# ------------------------------------------------------------------------------------------------- text: round trips

#: Strings that UTF-8 holds, with a letter so that they are not blank.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).map(
    lambda text: f"w{text}w"
)
rows = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5)


def jsonl_comes_back(content: list[tuple[str, list[str]]], folder: Path) -> None:
    lines = [
        json.dumps({"input": text, "output": outputs}, ensure_ascii=len(text) % 2 == 0) for text, outputs in content
    ]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = read_task(folder)
    assert isinstance(task, TextTask)
    assert [(row.input, list(row.outputs)) for row in task.train] == content


def gzip_and_parquet_say_the_same(content: list[tuple[str, list[str]]], folder: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    records = [{"input": text, "output": outputs} for text, outputs in content]
    write_table(Table.from_pylist(records), folder / "a.parquet")
    lines = "\n".join(map(json.dumps, records))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    read = [[dict(record.fields) for record in read_records(folder / name)] for name in ("a.parquet", "a.jsonl.gz")]
    assert read[0] == read[1] == records


cells = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters='"\ufeff'), max_size=10
).map(lambda text: f"w{text}w")
table_rows = st.lists(st.tuples(cells, st.lists(cells, min_size=1, max_size=3)), min_size=1, max_size=5)


def tsv_comes_back(content: list[tuple[str, list[str]]], folder: Path) -> None:
    ends = "\r\n" if len(content) % 2 else "\n"
    text = "".join(ends.join(["\t".join([text, *outputs]), ""]) for text, outputs in content)
    (folder / "train.tsv").write_bytes(text.encode())
    task = read_task(folder)
    assert isinstance(task, TextTask)
    assert [(row.input, list(row.outputs)) for row in task.train] == content


# ----------------------------------------------------------------------------------------------------- text: anything

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
fields = st.dictionaries(
    st.sampled_from(["input", "text", "output", "label", "options", "other"]), anything, max_size=5
)


def any_record_is_read_or_refused(content: list[Any], folder: Path) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, content)))
    with refusals_name(folder):
        task = read_task(folder)
        assert isinstance(task, TextTask) and len(task.train) == len(content)


def any_task_json_is_read_or_refused(content: Any, folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"input": "a", "label": "x"}\n{"input": "b", "label": "y"}\n')
    (folder / "task.json").write_text(json.dumps(content))
    with refusals_name(folder):
        task = read_task(folder)
        assert isinstance(task, TextTask) and (not task.labels or {"x", "y"} <= set(task.labels))


about = st.dictionaries(
    st.sampled_from(["form", "labels", "metric", "forms"]),
    st.sampled_from(["classification", "text_to_text", "ACC", "EM"])
    | st.lists(st.sampled_from(["x", "y", "x "]))
    | anything,
    max_size=3,
)


def any_bytes_are_read_or_refused(content: tuple[str, bytes], folder: Path) -> None:
    name, data = content
    (folder / name).write_bytes(data)
    with refusals_name(folder):
        read_task(folder)


good_lines = (
    b'{"input": "caf\xc3\xa9 \\ud83d\\ude00", "output": "b"}\n{"input": "c", "output": ["d", "e"], "options": null}\n'
)
names = ["train.jsonl", "train.tsv", "train.jsonl.gz", "train.tsv.gz", "train.parquet", "Train.JSONL"]


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut short, with some changed, doubled, or nothing at all."""

    def apply(change: tuple[str, int, bytes]) -> bytes:
        how, place, piece = change
        place %= len(data) + 1
        if how == "cut":
            return data[:place]
        if how == "change":
            return data[:place] + piece + data[place + len(piece) :]
        return data[:place] + piece + data[place:]

    return st.tuples(st.sampled_from(["cut", "change", "insert"]), st.integers(0, 2**20), st.binary(max_size=4)).map(
        apply
    )


# ----------------------------------------------------------------------------------------------------------- pictures

LABEL_TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def npz_comes_back(content: tuple[list[int], Any, bool, int], folder: Path) -> None:
    labels, kind, column, channels = content
    y = np.array(labels, kind)
    x = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 4, 5, channels), np.uint8)
    np.savez(folder / "t.npz", x_train=x if channels > 1 else x[..., 0], y_train=y[:, None] if column else y)
    task = read_pictures(folder / "t.npz")
    assert isinstance(task.train.pictures, torch.Tensor)
    assert task.train.target.tolist() == labels and task.train.target.dtype == torch.int64
    assert np.array_equal(task.train.pictures.numpy(), x) and len(task.labels) == max(labels) + 1


arrays = st.builds(
    lambda kind, shape: np.zeros(shape, kind),
    st.sampled_from(["u1", "i8", "u8", "f4", "c8", "b1", "U3", "S3", "M8[D]", "V4", [("a", "i4")]]),
    st.lists(st.integers(0, 5), max_size=4),
)
array_names = st.sampled_from(["x_train", "y_train", "x_val", "y_test", "classes", "meta", "other"])


def any_arrays_are_read_or_refused(content: dict[str, Any], folder: Path) -> None:
    given_arrays = {"x_train": np.zeros((2, 3, 3), np.uint8), "y_train": np.arange(2), **content}
    np.savez(folder / "t.npz", **given_arrays)
    with refusals_name(folder / "t.npz"):
        read_pictures(folder / "t.npz")


@cache
def good_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_train=np.zeros((2, 3, 3), np.uint8), y_train=np.arange(2), classes=["a", "b"])
    return buffer.getvalue()


@cache
def good_picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((9, 7), 60).convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    return buffer.getvalue()


def encoded(task: Any) -> None:
    assert isinstance(task, ImageTask)
    values = Pictures(4, [0.0] * 3, [1.0] * 3)(task).train.inputs["pixel_values"]
    assert values.shape[1:] == (3, 4, 4) and float(values.min()) >= 0.0 and float(values.max()) <= 1.0


def any_picture_is_read_or_refused(content: tuple[str, bytes], folder: Path) -> None:
    kind, data = content
    for name in "ab":
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / f"0.{kind.lower()}").write_bytes(data)
    with refusals_name(folder):
        encoded(read_pictures(folder))


NAMES = "a b v1.0 .hidden __MACOSX train test val Train deep 0.png 1.PNG x.gif Thumbs.db notes.txt task.json noend"
entry = st.sampled_from([*NAMES.split(), "a b", "\u00e9", ".DS_Store", "train.jsonl", "0.heic"])
trees = st.lists(st.lists(entry, min_size=1, max_size=4), max_size=8)


def any_tree_is_read_or_refused(content: list[list[str]], folder: Path) -> None:
    laid = 0
    for way in content:
        path = folder.joinpath(*way)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if "." in path.name[1:]:
            path.write_bytes(good_picture("PNG") if path.suffix.casefold() == ".png" else b"{}")
            laid += path.suffix.casefold() in (".png", ".gif")
        else:
            path.mkdir()
    with refusals_name(folder):
        task = read_task(folder)
        if isinstance(task, ImageTask):
            assert sum(len(images) for images in task.parts.values()) <= laid
            encoded(task)


# -------------------------------------------------------------------------------------------------- tensors, settings

TENSOR_TYPES = [torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.float64]
tensors = st.builds(
    lambda kind, shape: torch.zeros(shape, dtype=kind),
    st.sampled_from(TENSOR_TYPES),
    st.lists(st.integers(0, 4), max_size=3),
)


def any_tensors_are_read_or_refused(content: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(content, folder / "train.safetensors")
    with refusals_name(folder):
        task = read_tensor_task(folder)
        assert len(task.train) > 0


def damaged_tensors_are_read_or_refused(content: bytes, folder: Path) -> None:
    (folder / "train.safetensors").write_bytes(content)
    with refusals_name(folder):
        read_tensor_task(folder)


GOOD_TENSORS = save_tensors({"x": torch.zeros(4, 3), "labels": torch.arange(4) % 2})
GOOD_TOML = """
[backbone]
name = "digits"
kind = "timm"
[adapter]
rank = 2
alpha = 4.0
[sampler]
samples = 600
[output]
seed = 3
"""
toml_values = (
    st.integers() | st.floats() | st.booleans() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5)
)
toml_keys = st.sampled_from(
    ["name", "kind", "rank", "alpha", "samples", "beta", "seed", "device", "split", "max_length", "dtype", "x"]
)
toml_tables = st.sampled_from(["backbone", "adapter", "tasks", "sampler", "adapt", "output", "other"])


def any_settings_are_read_or_refused(content: dict[str, dict[str, Any]], folder: Path) -> None:
    lines = []
    for table, values in content.items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    path = folder / "run.toml"
    path.write_text("\n".join(lines), encoding="utf-8-sig" if len(lines) % 2 else "utf-8")
    said = tomllib.loads("\n".join(lines))
    with refusals_name(path):
        config = read_config(path)
        for table, values in said.items():
            for key, value in values.items():
                assert getattr(getattr(config, table), key) == value


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).replace("e+", "e") if np.isfinite(value) else str(value)
    return json.dumps(value, ensure_ascii=False)


def damaged_settings_are_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "run.toml"
    path.write_bytes(content)
    with refusals_name(path):
        read_config(path)


# ------------------------------------------------------------------------------------------------------ saved folders


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


@cache
def saved() -> dict[str, dict[str, bytes]]:
    """The files of a prior and of a posterior."""
    config = peft.LoraConfig(r=1, target_modules=["0"])
    tasks = [Task(f"t{i}", (torch.randn(6, 4), torch.arange(6) % 3)) for i in range(2)]
    lift = LiFT(network(), config, sgd_steps=2, burn_in=2, samples=12, seed=0)
    prior = lift.meta_train(tasks, progress=False)
    files: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as root:
        prior.save_pretrained(Path(root) / "prior")
        prior.adapt(tasks[0], steps=4, draws=2).save_pretrained(Path(root) / "posterior")
        for kind in ("prior", "posterior"):
            files[kind] = {path.name: path.read_bytes() for path in (Path(root) / kind).iterdir()}
    return files


@st.composite
def damaged_folders(draw: st.DrawFn) -> tuple[str, dict[str, bytes]]:
    kind = draw(st.sampled_from(["prior", "posterior"]))
    files = dict(saved()[kind])
    name = draw(st.sampled_from(sorted(name for name in files if name.endswith((".json", ".safetensors")))))
    if name == "config.json" and draw(st.booleans()):
        files[name] = json.dumps(_changed(json.loads(files[name]), draw)).encode()
    else:
        files[name] = draw(damaged(files[name]))
    return kind, files


def _changed(values: Any, draw: st.DrawFn) -> Any:
    """One value somewhere inside, replaced by any other."""
    if not isinstance(values, dict) or not values or draw(st.integers(0, 3)) == 0:
        return draw(anything)
    key = draw(st.sampled_from(sorted(values)))
    return {**values, key: _changed(values[key], draw)}


def a_damaged_folder_is_refused_or_means_the_same(content: tuple[str, dict[str, bytes]], folder: Path) -> None:
    kind, files = content
    home = folder / kind
    home.mkdir()
    for name, data in files.items():
        (home / name).write_bytes(data)
    kinds: dict[str, Any] = {"prior": LiFTPrior, "posterior": TaskPosterior}
    load = kinds[kind].from_pretrained
    with refusals_name(home):
        loaded = load(home, network())
        ours = loaded.adapter.initial if kind == "prior" else loaded.thetas
        shutil.rmtree(home)
        home.mkdir()
        for name, data in saved()[kind].items():
            (home / name).write_bytes(data)
        whole = load(home, network())
        assert torch.equal(ours, whole.adapter.initial if kind == "prior" else whole.thetas)


@cache
def good_parquet() -> bytes:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    buffer = io.BytesIO()
    write_table(Table.from_pylist([{"input": "a", "output": ["b"]}, {"input": "c", "output": ["d"]}]), buffer)
    return buffer.getvalue()


def damaged_npz_is_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "t.npz"
    path.write_bytes(content)
    with refusals_name(path):
        read_pictures(path)


def file_of(name: str, content: bytes) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.just(name), damaged(content))


pictures = st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]).flatmap(
    lambda kind: st.tuples(st.just(kind), damaged(good_picture(kind)))
)
label_lists = st.lists(st.integers(0, 9), min_size=1, max_size=6)
PROPERTIES = {
    "jsonl comes back": Property(rows, jsonl_comes_back),
    "gzip and parquet say the same": Property(rows, gzip_and_parquet_say_the_same),
    "tsv comes back": Property(table_rows, tsv_comes_back),
    "any record": Property(st.lists(fields, min_size=1, max_size=3), any_record_is_read_or_refused),
    "any task.json": Property(about | anything, any_task_json_is_read_or_refused),
    "any bytes": Property(st.tuples(st.sampled_from(names), st.binary(max_size=40)), any_bytes_are_read_or_refused),
    "damaged jsonl": Property(file_of("train.jsonl", good_lines), any_bytes_are_read_or_refused),
    "damaged gzip": Property(file_of("train.jsonl.gz", gzip.compress(good_lines)), any_bytes_are_read_or_refused),
    "damaged parquet": Property(file_of("train.parquet", good_parquet()), any_bytes_are_read_or_refused),
    "npz comes back": Property(
        st.tuples(label_lists, st.sampled_from(LABEL_TYPES), st.booleans(), st.sampled_from([1, 3])), npz_comes_back
    ),
    "any arrays": Property(st.dictionaries(array_names, arrays, max_size=3), any_arrays_are_read_or_refused),
    "damaged npz": Property(damaged(good_npz()), damaged_npz_is_read_or_refused),
    "damaged pictures": Property(pictures, any_picture_is_read_or_refused),
    "any tree": Property(trees, any_tree_is_read_or_refused),
    "any tensors": Property(
        st.dictionaries(st.sampled_from(["labels", "x", "label", "label_input_ids"]), tensors, max_size=3),
        any_tensors_are_read_or_refused,
    ),
    "damaged tensors": Property(damaged(GOOD_TENSORS), damaged_tensors_are_read_or_refused),
    "any settings": Property(
        st.dictionaries(toml_tables, st.dictionaries(toml_keys, toml_values, max_size=3), max_size=4),
        any_settings_are_read_or_refused,
    ),
    "damaged settings": Property(damaged(GOOD_TOML.encode()), damaged_settings_are_read_or_refused),
    "damaged folders": Property(damaged_folders(), a_damaged_folder_is_refused_or_means_the_same),
}
FAST = settings(
    derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FAST, max_examples=2000)
#: Loading a folder twice takes a tenth of a second.
COSTLY = {"damaged folders": 4}


def hold(name: str, how: settings) -> None:
    content, check = PROPERTIES[name]

    @settings(how, max_examples=how.max_examples // COSTLY.get(name, 1))
    @given(content)
    def holds(value: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="door-") as folder:
            check(value, Path(folder))

    holds()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_file_is_read_right_or_refused_by_its_name(name: str) -> None:
    hold(name, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_thousands_of_files_are_read_right_or_refused_by_their_names(name: str) -> None:
    hold(name, MANY)
