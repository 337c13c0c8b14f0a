"""Tasks from files: the published counts, the rules of each benchmark, and clear words about bad data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyro_lift.data import load_tasks
from pyro_lift.data.crossfit import CROSSFIT_SPLITS, crossfit_facts, few_shot
from pyro_lift.data.encode import Pictures
from pyro_lift.data.folder import read_task
from pyro_lift.data.new_rows import new_pictures
from pyro_lift.data.pictures import read_npz
from pyro_lift.data.shakespeare import read_gutenberg
from pyro_lift.data.text import TextRow
from pyro_lift.data.vtab import GROUPS, VTAB, dsprites_location, dsprites_orientation, threshold_label
from pyro_lift.models.task import Task

COUNTS = {
    "CLS-45": (45, 10, 10),
    "CLS-23": (45, 10, 10),
    "CLS-0": (45, 10, 10),
    "MCQA": (29, 0, 22),
    "MRC": (42, 0, 9),
    "NLI": (57, 0, 8),
    "Paraphrase": (61, 0, 4),
}


def test_the_splits_have_the_published_counts_and_160_tasks_a_metric() -> None:
    facts = crossfit_facts()
    assert set(COUNTS) == set(CROSSFIT_SPLITS)
    for name, counts in COUNTS.items():
        assert tuple(len(facts["splits"][name][part]) for part in ("train", "dev", "test")) == counts
    assert len(facts["tasks"]) == 160
    assert set(facts["splits"]["NLI"]["train"]) & set(facts["splits"]["NLI"]["test"]) == {"sick"}


def test_what_is_not_in_the_data_is_listed(data_root: Path) -> None:
    found = load_tasks("crossfit", "CLS-45", data_root)
    assert [len(part) for part in found.parts.values()] == [41, 9, 8]
    assert found.missing["train"] == ("discovery", "scicite", "yahoo_answers_topics", "wiki_auto")
    assert found.missing["dev"] == ("amazon_polarity",)
    assert found.missing["test"] == ("dbpedia_14", "financial_phrasebank")
    assert all(name in found.summary() for part in found.missing.values() for name in part)
    for name, counts in COUNTS.items():
        found = load_tasks("crossfit", name, data_root)
        for part, count in zip(("train", "dev", "test"), counts, strict=True):
            assert len(found.parts[part]) + len(found.missing[part]) == count


def test_dedupe_takes_the_leak_out_of_nli(data_root: Path) -> None:
    as_published = load_tasks("crossfit", "NLI", data_root)
    clean = load_tasks("crossfit", "NLI", data_root, dedupe=True)
    assert "sick" in {task.name for task in as_published.train} & {task.name for task in as_published.test}
    assert "sick" not in {task.name for task in clean.train}
    assert "sick" in as_published.notes[0] and "sick" in clean.notes[0]


def test_five_samples_differ_and_leave_the_test_rows_alone(data_root: Path) -> None:
    samples = [load_tasks("crossfit", {"train": ["ag_news"]}, data_root, sample=s)["ag_news"] for s in (100, 13, 21)]
    assert len({task.train for task in samples}) == 3
    assert len({task.test for task in samples}) == 1
    for task in samples:
        assert len(task.train) == 64 and not set(task.train) & set(task.dev)


def test_a_draw_takes_as_many_of_each_class() -> None:
    rows = [TextRow(f"{label}{i}", (label,)) for label, n in (("a", 50), ("b", 40), ("c", 7)) for i in range(n)]
    train, dev = few_shot(rows, 16, 13, by_class=True)
    assert {label: sum(r.outputs[0] == label for r in train) for label in "abc"} == {"a": 16, "b": 16, "c": 4}
    assert {label: sum(r.outputs[0] == label for r in dev) for label in "abc"} == {"a": 16, "b": 16, "c": 3}
    assert not set(train) & set(dev)


def test_152_roles_of_36_plays(data_root: Path) -> None:
    for split, counts in (("random-80/10/10", (122, 15, 15)), ("random-60/10/30", (91, 15, 46))):
        found = load_tasks("shakespeare", split, data_root)
        assert tuple(map(len, found.parts.values())) == counts
        assert "152 roles of 36 plays" in found.notes[0] and "211 lines" in found.notes[0]
    by_play = load_tasks("shakespeare", "play-80/10/10", data_root)
    plays = [{task.name[:2] for task in part} for part in by_play.parts.values()]
    assert len(set.union(*plays)) == 36 == sum(map(len, plays))
    for task in by_play:
        row = task.train[5]
        assert row.outputs[0] == task.train[6].input.split("\n")[-1]
        assert row.outputs[0] not in row.input.split("\n") or row.outputs[0] in {r.outputs[0] for r in task.train[:5]}


GUTENBERG = """header
by William Shakespeare
  ALL. This stands before the second author and is skipped.

1605

THE FIRST PLAY

by William Shakespeare
  Hamlet. To be, or not to be,
    That is the question:
  HAMLET. Again.
stage direction
    goes on all the same
  OPHELIA. One.
    Two.

    Three.
  EXTRA. Only
    two lines.

THE COMEDY OF ERRORS


by William Shakespeare
DROMIO. Not indented,
and it goes on.
ACT I. SCENE 1.
not said by anybody
EGEON. a
b
c
<<copyright>>
not said
DROMIO. Third.
"""


def test_gutenberg_is_read_by_leafs_rules(tmp_path: Path) -> None:
    path = tmp_path / "100.txt"
    path.write_text(GUTENBERG)
    roles = {(role.play, role.character): role for role in read_gutenberg(path)}
    assert set(roles) == {(0, "HAMLET"), (0, "OPHELIA"), (1, "DROMIO"), (1, "EGEON")}
    assert roles[0, "HAMLET"].title == "THE FIRST PLAY"
    assert roles[0, "HAMLET"].lines == (
        "To be, or not to be,",
        "That is the question:",
        "Again.",
        "goes on all the same",
    )
    assert roles[0, "OPHELIA"].lines == ("One.", "Two.", "Three.")
    assert roles[1, "DROMIO"].lines == ("Not indented,", "and it goes on.", "Third.")
    assert roles[1, "EGEON"].lines == ("a", "b", "c")


def test_vtab_trains_on_the_other_two_groups() -> None:
    counts = {group: sum(task.group != group for task in VTAB.values()) for group in GROUPS}
    assert counts == {"natural": 12, "specialized": 15, "structured": 11}
    assert len(VTAB) == 19


def test_structured_labels_follow_from_the_factors() -> None:
    assert np.bincount(dsprites_location(np.arange(32))).tolist() == [2] * 16
    assert dsprites_orientation(np.arange(40)).max() == 15
    bounds = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
    assert [threshold_label(x, bounds) for x in (0.0, 7.9, 8.0, 9.7, 99.0)] == [0, 0, 1, 4, 5]
    with pytest.raises(ValueError, match="outside the thresholds"):
        threshold_label(100.0, bounds)


def test_other_tasks_join_the_group_they_declare(data_root: Path) -> None:
    with pytest.raises(ValueError, match="others=True"):
        load_tasks("vtab", "structured", data_root / "vision")
    found = load_tasks("vtab", "structured", data_root / "vision", others=True)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert len(found.missing["train"]) == 11 and len(found.missing["test"]) == 8


def _folder(tmp_path: Path, lines: list[str], **about: object) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(lines))
    if about:
        (folder / "task.json").write_text(json.dumps(about))
    return folder


GOOD = '{"input": "x", "output": "yes"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"input": "x"'], r"train.jsonl:2: not JSON"),
        ([GOOD, "[1]"], r"train.jsonl:2: a JSON list"),
        ([GOOD, '{"output": "yes"}'], r"train.jsonl:2: no field 'input'"),
        ([GOOD, "", '{"input": " ", "output": "yes"}'], r"train.jsonl:3: the input is ' '"),
        ([GOOD, '{"input": "x", "output": "maybe"}'], r"train.jsonl:2: label 'maybe' is not one of 'no', 'yes'"),
        ([GOOD, '{"input": "x", "output": []}'], r"train.jsonl:2: no output"),
        ([], "the train split is empty"),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(_folder(tmp_path, lines, form="classification", labels=["no", "yes"]))


def test_bad_bytes_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [GOOD])
    (folder / "train.jsonl").write_bytes(GOOD.encode() + b'\n{"input": "\xff"}')
    with pytest.raises(ValueError, match=r"train.jsonl:2: not UTF-8"):
        read_task(folder)
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-6])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_task(folder)
    (folder / "train.jsonl.gz").unlink()
    (folder / "train.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"train.parquet: not a Parquet file"):
        read_task(folder)


def test_jsonl_parquet_and_tsv_give_the_same_task(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [{"input": f"x{i}", "output": f"y{i}"} for i in range(3)]
    tasks = []
    for end in ("jsonl", "parquet", "tsv"):
        folder = tmp_path / end / "mine"
        folder.mkdir(parents=True)
        path = folder / f"train.{end}"
        if end == "parquet":
            write_table(Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(json.dumps(r) if end == "jsonl" else "\t".join(r.values()) for r in rows))
        tasks.append(read_task(folder))
    assert tasks[0] == tasks[1] == tasks[2]


def test_pictures_of_two_sizes_and_classes_unknown_are_refused(tmp_path: Path) -> None:
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    path = tmp_path / "t.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:, :7], y_test=y)
    with pytest.raises(ValueError, match=r"t.npz: x_test has pictures of \[7, 8, 3\], x_train of \[8, 8, 3\]"):
        read_npz(path)
    np.savez(path, x_train=x, y_train=y, classes=["a"])
    with pytest.raises(ValueError, match=r"t.npz: .*target 1 is outside the 1 classes"):
        read_npz(path)
    np.savez(path, x_train=x.astype(float), y_train=y)
    with pytest.raises(ValueError, match=r"t.npz: x_train is float64"):
        read_npz(path)


def test_a_folder_of_tasks_with_its_split(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _folder(tmp_path / "x", [GOOD]).rename(tmp_path / name)
        (tmp_path / "x").rmdir()
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["b", "gone"]}))
    found = load_tasks("folder", root=tmp_path)
    assert [task.name for task in found] == ["a", "b"]
    assert found.missing["test"] == ("gone",)
    assert "no part of the split: c" in found.notes[0]


def test_only_some_tasks_of_a_folder_in_their_parts_of_the_split(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _folder(tmp_path / "x", [GOOD]).rename(tmp_path / name)
        (tmp_path / "x").rmdir()
    collection = load_tasks("folder", root=tmp_path, names=["c", "a"])
    assert [task.name for task in collection.train] == ["c", "a"]
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["b", "c"]}))
    collection = load_tasks("folder", root=tmp_path, names=["c", "a"])
    assert [[task.name for task in tasks] for tasks in collection.parts.values()] == [["a"], [], ["c"]]
    assert not any(collection.missing.values()) and not collection.notes
    with pytest.raises(ValueError, match=r"task='bb' is not known; did you mean 'b'"):
        load_tasks("folder", root=tmp_path, names=["bb"])


def test_tasks_of_tensors_stand_beside_others_and_are_not_encoded(tmp_path: Path) -> None:
    _folder(tmp_path, [GOOD])
    (tmp_path / "encoded").mkdir()
    save_file({"x": torch.zeros(4, 3), "labels": torch.tensor([0, 1, 0, 1])}, tmp_path / "encoded/train.safetensors")
    collection = load_tasks("folder", root=tmp_path)
    assert [task.name for task in collection.train] == ["encoded", "mine"]
    tensors = collection.train[0]
    assert isinstance(tensors, Task) and tensors.num_classes == 2
    encoded = collection.encode(lambda task: task.name)
    assert encoded.train[0] is tensors and encoded.train[1] == "mine"


def test_unknown_names_get_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'crossfit'"):
        load_tasks("crosfit")
    with pytest.raises(ValueError, match="did you mean 'CLS-45'"):
        load_tasks("crossfit", "CLS45", tmp_path)
    with pytest.raises(TypeError, match="did you mean 'dedupe'"):
        load_tasks("crossfit", "NLI", tmp_path, dedup=True)


def _pictures(folder: Path, classes: list[str], **about: object) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / part / name / f"{n}.png")
    if about:
        (folder / "task.json").write_text(json.dumps(about))
    return folder


def test_vtab_reads_folders_of_pictures_beside_npz_files(tmp_path: Path) -> None:
    _pictures(tmp_path / "eurosat", ["forest", "river"])
    _pictures(tmp_path / "mine", ["10", "9"], labels=["9", "10"], group="structured")
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "svhn.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    found = load_tasks("vtab", "structured", tmp_path, others=True)
    assert [task.name for task in found.train] == ["eurosat", "svhn"]
    assert [task.name for task in found.test] == ["mine"]
    task = found["mine"]
    assert task.labels == ("9", "10") and task.dev is not None and task.test is not None
    assert task.train.target.tolist() == [0, 0, 0, 1, 1, 1]
    rows = Pictures(6, [0.5] * 3, [0.5] * 3)(task).train
    assert rows.inputs["pixel_values"].shape == (6, 3, 6, 6)


def test_task_json_may_name_classes_that_other_tasks_have_pictures_of(tmp_path: Path) -> None:
    task = read_task(_pictures(tmp_path / "a", ["x", "z"], labels=["x", "y", "z"]))
    assert task.labels == ("x", "y", "z") and sorted(set(task.train.target.tolist())) == [0, 2]  # type: ignore[union-attr]


def test_bad_folders_of_pictures_are_named(tmp_path: Path) -> None:
    folder = _pictures(tmp_path / "a", ["x", "y"])
    (folder / "test" / "z").mkdir()
    with pytest.raises(ValueError, match=r"test/z: class 'z' is not one of train's x, y"):
        read_task(folder)
    with pytest.raises(ValueError, match=r"class 'x' is not one of train's y, w"):
        read_task(_pictures(tmp_path / "b", ["x", "y"], labels=["y", "w"]))
    with pytest.raises(ValueError, match=r"key='grp' is not known; did you mean 'group'"):
        read_task(_pictures(tmp_path / "c", ["x"], grp="natural"))
    _pictures(tmp_path / "root" / "mine", ["x"])
    with pytest.raises(ValueError, match=r"mine: it declares group ''"):
        load_tasks("vtab", "natural", tmp_path / "root", others=True)
    path = _pictures(tmp_path / "d", ["x"]) / "train" / "x" / "0.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0.png: not a picture that can be read"):
        Pictures(6, [0.5] * 3, [0.5] * 3)(read_task(tmp_path / "d"))  # type: ignore[arg-type]


def test_vtab_fetches_from_the_hub_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from PIL import Image

    asked = []

    def fetch(path: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        image, label = ("img", "fine_label") if "cifar" in path else ("image", "label")
        n = 15 if split == "train" else 12
        pictures = [Image.new("L" if k % 2 else "RGB", (3 + k % 3, 4)) for k in range(n)]
        return datasets.Dataset.from_dict({image: pictures, label: [k % 2 for k in range(n)]})

    monkeypatch.setattr("pyro_lift.data.vtab_hub.NUM_TRAIN", 8)
    monkeypatch.setattr("pyro_lift.data.vtab_hub.NUM_DEV", 2)
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "svhn.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr("pyro_lift.data.vtab.VTAB", {n: VTAB[n] for n in ("svhn", "cifar100", "eurosat", "dmlab")})
    found = load_tasks("vtab", "specialized", tmp_path, hub=True)
    assert [task.name for task in found.train] == ["svhn", "cifar100"]
    assert [task.name for task in found.test] == ["eurosat"]
    assert found.missing == {"train": ("dmlab",), "test": ()}
    task = found["cifar100"]
    assert task.dev is not None and task.test is not None and len(task.labels) == 100
    assert (len(task.train), len(task.dev), len(task.test)) == (8, 2, 12)
    assert isinstance(task.train.pictures, torch.Tensor) and task.train.pictures.shape == (8, 224, 224, 3)
    assert ("uoft-cs/cifar100", None, "train") in asked and not any("svhn" in path for path, _, _ in asked)


def test_a_folder_with_one_npz_file_alone_is_its_task(tmp_path: Path) -> None:
    arrays = {"x_train": np.zeros((4, 8, 8, 3), np.uint8), "y_train": np.arange(4) % 2}
    (tmp_path / "arr").mkdir()
    np.savez(tmp_path / "arr" / "data.npz", **arrays)  # type: ignore[arg-type]
    (task,) = load_tasks("folder", root=tmp_path).train
    assert task.name == "arr" and len(task.train) == 4
    assert len(new_pictures(tmp_path / "arr")) == 4
    np.savez(tmp_path / "arr" / "more.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task"):
        load_tasks("folder", root=tmp_path)
