"""Layouts of pictures: folders of classes, ImageFolder with parts, lists; and pictures that are only predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_files import prepare
from PIL import Image

from pyro_lift import commands
from pyro_lift.data import load_tasks
from pyro_lift.data.folder import read_task
from pyro_lift.data.images import ImageTask
from pyro_lift.data.new_rows import new_pictures


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


def names(task: ImageTask, part: str) -> list[tuple[str, int]]:
    images = task.parts[part]
    assert isinstance(images.pictures, tuple)
    return [(path.name, k) for path, k in zip(images.pictures, images.target.tolist(), strict=True)]


def test_tasks_of_every_layout_stand_in_one_folder(tmp_path: Path) -> None:
    for k, name in enumerate(("rose", "tulip", "lily")):
        draw(tmp_path / "flowers" / name / f"{k}.jpg")  # TASK/CLASS: all for training
    for part in ("train", "validation", "test"):
        for name in ("cat", "dog"):
            draw(tmp_path / "pets" / part / name / f"{part}.JPEG")
    listed = tmp_path / "listed" / "train"
    for k in range(3):
        draw(listed / "images" / f"{k}.png")
    rows = ["file_name,label,note", *(f"images/{k}.png,{'odd' if k % 2 else 'even'},x" for k in range(3))]
    (listed / "metadata.csv").write_text("\n".join(rows) + "\n")
    draw(tmp_path / "flat" / "a.png")
    draw(tmp_path / "flat" / "b.png")
    lines = [json.dumps({"file_name": f"{k}.png", "label": n}) for k, n in (("a", 1), ("b", 0))]
    (tmp_path / "flat" / "metadata.jsonl").write_text("\n".join(lines))
    tasks: Any = load_tasks("folder", root=tmp_path)
    by_name = {task.name: task for task in tasks.train}
    assert {name: task.labels for name, task in by_name.items()} == {
        "flat": ("0", "1"),
        "flowers": ("lily", "rose", "tulip"),
        "listed": ("even", "odd"),
        "pets": ("cat", "dog"),
    }
    assert names(by_name["flowers"], "train") == [("2.jpg", 0), ("0.jpg", 1), ("1.jpg", 2)]
    assert sorted(by_name["pets"].parts) == ["dev", "test", "train"]
    assert names(by_name["pets"], "dev") == [("validation.JPEG", 0), ("validation.JPEG", 1)]
    assert names(by_name["listed"], "train") == [("0.png", 0), ("2.png", 0), ("1.png", 1)]
    assert names(by_name["flat"], "train") == [("b.png", 0), ("a.png", 1)]


def test_a_list_without_classes_stands_beside_folders_of_classes(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\na/0.png,a picture\n")
    task = read_task(tmp_path)
    assert isinstance(task, ImageTask) and task.labels == ("a",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,label\n0.png,a\n", r"metadata\.csv:2: no column 'file_name'; there are name, label"),
        ("file_name,label\n0.png,a\n1.png,b\n", r"metadata\.csv:3: .*1\.png: no such picture"),
        ("file_name,label\n0.png,a\n0.png,b\n", r"metadata\.csv:3: the picture 0\.png is listed twice"),
        ("file_name,label\n0.png,\n", r"metadata\.csv:2: 'label' is ''; expected a name"),
        ("file_name,label\n", r"metadata\.csv: no picture is listed"),
        ('file_name,label\n"0.png,a\n', r"metadata\.csv: not a CSV file"),
    ],
)
def test_bad_lists_are_refused_with_file_and_line(rows: str, message: str, tmp_path: Path) -> None:
    draw(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "metadata.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path)


def test_layouts_that_would_be_misread_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"one: it has a train part, so it is one task.*names=\['one'\]"):
        load_tasks("folder", root=tmp_path / "one")
    draw(tmp_path / "inside" / "a" / "train" / "0.png")
    draw(tmp_path / "inside" / "a" / "test" / "1.png")
    draw(tmp_path / "inside" / "b" / "2.png")
    with pytest.raises(ValueError, match=r"a/test: a part inside a class.*test/a/\*\.png"):
        read_task(tmp_path / "inside")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / "one" / "train" / name).write_text("")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: the pictures are listed in metadata\.csv as well"):
        read_task(tmp_path / "one")


def test_pictures_without_classes_are_found(tmp_path: Path) -> None:
    alone = draw(tmp_path / "new" / "b.png")
    draw(tmp_path / "new" / "a.png")
    (tmp_path / "new" / "notes.txt").write_text("x")
    assert [path.name for path in new_pictures(tmp_path / "new").pictures] == ["a.png", "b.png"]
    assert new_pictures(alone).pictures == (alone,)
    draw(tmp_path / "new" / "test" / "unknown" / "c.png")  # of a folder with parts, test's
    assert [path.name for path in new_pictures(tmp_path / "new").pictures] == ["c.png"]
    np.savez(tmp_path / "x.npz", x_test=np.zeros((2, 8, 8), np.uint8))
    assert new_pictures(tmp_path / "x.npz").pictures.shape == (2, 8, 8, 1)  # type: ignore[union-attr]
    np.savez(tmp_path / "y.npz", y_test=np.zeros(2))
    with pytest.raises(ValueError, match=r"y\.npz: no array 'x_test' to predict; it holds y_test"):
        new_pictures(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"notes\.txt: no pictures to predict"):
        new_pictures(tmp_path / "new" / "notes.txt")


def test_the_command_line_learns_image_folders_and_predicts_pictures_of_no_class(tmp_path: Path) -> None:
    config = prepare("vit", tmp_path)
    for name, classes in (("a", "xyz"), ("b", "xy"), ("new", "pqr")):  # class sets that differ among tasks
        for k, label in enumerate(classes):
            for n in range(3):
                draw(tmp_path / "pictures" / name / "train" / label / f"{n}.png", 80 * k + n)
            draw(tmp_path / "pictures" / name / "test" / label / "0.png", 80 * k)
    (tmp_path / "pictures" / "split.json").write_text('{"train": ["a", "b"], "test": ["new"]}')
    text = config.read_text().replace(str(tmp_path / "tasks"), str(tmp_path / "pictures"))
    config.write_text(text)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    commands.train(config, progress=False)
    new = tmp_path / "pictures" / "new"
    commands.adapt(tmp_path / "prior", new, tmp_path / "adapted", progress=False)

    def predicted(*where: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in commands.predict(*where).read_text().splitlines()]

    known = predicted(tmp_path / "adapted")
    assert [line["file"] for line in known] == ["test/p/0.png", "test/q/0.png", "test/r/0.png"]
    # Two of the three pictures, of a class that nobody knows: the labels are the adapted task's all the same.
    draw(tmp_path / "later" / "1.png", 80)
    draw(tmp_path / "later" / "2.png", 160)
    later = predicted(tmp_path / "adapted", tmp_path / "later", tmp_path / "out.jsonl")
    for line, before in zip(later, known[1:], strict=True):
        assert line["label"] == before["label"] in "pqr"
        assert line["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)  # float32, another batch
    (only,) = predicted(tmp_path / "adapted", tmp_path / "later" / "2.png", tmp_path / "out.jsonl")
    assert only["file"] == "2.png" and only["probabilities"] == later[1]["probabilities"]
