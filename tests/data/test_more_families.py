"""Novels, picture shifts and regressions as families of tasks: where their rows come from."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_lift.data import load_tasks
from pyro_lift.data.novels import HELD_OUT, lines_of
from pyro_lift.data.regressions import load_regressions, regression_network
from pyro_lift.data.shifts import Camera, load_shifts, photographed


def _corpus(folder: Path, books: int = 9, paragraphs: int = 300) -> list[str]:
    """Books of numbered paragraphs, and the text of each paragraph in the order of the file."""
    names, lines, counted = ["name,paragraphs"], [], []
    for book in range(books):
        name = f"Author{book % 5}_Book{book}_1900"
        names.append(f"{name},{paragraphs}")
        for k in range(paragraphs):
            words = " ".join(f"b{book}p{k}w{w}" for w in range(120))
            lines.append(words)
            counted.append(words)
        lines.append("")
    with gzip.open(folder / "corpus.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    (folder / "corpus_books.csv").write_text("\n".join(names) + "\n")
    return counted


def test_only_paragraphs_that_the_backbone_has_not_read_become_rows(tmp_path: Path) -> None:
    held_out = " ".join(_corpus(tmp_path)[::HELD_OUT]).split()
    tasks = load_tasks("novels", "authors", tmp_path, train_rows=8, least_rows=16)
    words = [w for task in tasks for rows in task.parts.values() for row in rows for w in row.outputs[0].split()]
    assert sorted(words) == sorted(held_out)
    names = [task.name for task in tasks]
    assert sorted(names) == [f"Author{k}" for k in range(5)] and len(set(names)) == len(names)


def test_a_line_reads_the_lines_before_it_and_no_further(tmp_path: Path) -> None:
    _corpus(tmp_path)
    task = load_tasks("novels", "books", tmp_path, train_rows=8, least_rows=16, context=2).test[0]
    first, second, third, fourth = task.train[:4]
    assert first.input == "" and second.input == first.outputs[0]
    assert fourth.input == f"{second.outputs[0]} {third.outputs[0]}"


def test_lines_are_cut_behind_punctuation_and_nothing_is_lost() -> None:
    text = "He came in at last, and sat down by the fire; nobody spoke. " + "word " * 40
    lines = lines_of(text)
    assert " ".join(lines).split() == text.split()
    assert max(len(line.split()) for line in lines) <= 14
    assert lines[0] == "He came in at last, and sat down by the fire;"


def test_a_table_that_does_not_fit_the_corpus_is_refused(tmp_path: Path) -> None:
    _corpus(tmp_path)
    (tmp_path / "corpus_books.csv").write_text("name,paragraphs\nA_B_1900,3\n")
    with pytest.raises(ValueError, match="9 books between blank lines"):
        load_tasks("novels", "authors", tmp_path)


def _pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, rows, high in (("train", 40, 100), ("test", 30, 200)):
        arrays[f"x_{part}"] = rng.integers(high - 100, high, (rows, 12, 12, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(rows) % 4
    np.savez(folder / "things.npz", **arrays)


def test_a_camera_that_does_nothing_changes_nothing_and_a_right_angle_turns() -> None:
    pictures = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    plain = photographed(pictures, Camera(), torch.Generator())
    assert int((plain.int() - pictures.int()).abs().max()) <= 1
    turned = photographed(pictures, Camera(angle=90.0), torch.Generator())
    assert int((turned.int() - torch.rot90(pictures, 1, (1, 2)).int()).abs().max()) <= 1
    halved = photographed(pictures, Camera(balance=(0.5, 1.0, 1.0)), torch.Generator())
    assert int((halved[..., 0].int() - pictures[..., 0].int() // 2).abs().max()) <= 1


def test_shifted_tasks_are_a_function_of_the_seed_and_judged_by_test_pictures(tmp_path: Path) -> None:
    _pictures(tmp_path)
    sizes = {"num_train": 3, "num_dev": 1, "num_test": 2, "rows": 10, "test_rows": 20}
    tasks, again = (load_shifts("things", tmp_path, **sizes) for _ in range(2))
    assert torch.equal(tasks.test[1].train.pictures, again.test[1].train.pictures)  # type: ignore[arg-type]
    assert not torch.equal(
        tasks.test[1].train.pictures,  # type: ignore[arg-type]
        load_shifts("things", tmp_path, seed=1, **sizes).test[1].train.pictures,  # type: ignore[arg-type]
    )
    assert all(task.test is None for task in tasks.train)
    for task in tasks.test:
        assert task.test is not None
        bright, dark = task.test.pictures.float().mean(), task.train.pictures.float().mean()  # type: ignore[union-attr]
        assert bright > dark + 20.0  # the made-up test pictures are brighter than those to learn from


def test_shifts_without_the_data_set_say_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no such data set"):
        load_shifts("nothing", tmp_path)


def test_every_patient_is_in_one_task_and_one_part_of_it() -> None:
    from sklearn.datasets import load_diabetes

    tasks = load_regressions()
    rows = torch.cat([part.positional[0] for task in tasks for part in (task.train, task.test) if part is not None])
    assert len(rows) == len(load_diabetes().target) == 442
    assert len(torch.unique(rows, dim=0)) == 442
    assert [len(part) for part in tasks.parts.values()] == [10, 2, 4]


def test_the_patients_of_a_task_are_of_one_sex_and_one_range_of_age() -> None:
    for task in load_regressions():
        x = torch.cat([task.train.positional[0], task.test.positional[0]])  # type: ignore[union-attr]
        assert len(x[:, 1].unique()) == 1
        assert float(x[:, 0].max() - x[:, 0].min()) < 1.6  # all ages span 4.6 standard deviations


def test_the_network_of_the_regressions_explains_some_of_unseen_tasks_and_leaves_the_streams_alone() -> None:
    tasks = load_regressions()
    before = torch.get_rng_state()
    network = regression_network(tasks.train, 0)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        pairs = [(network(t.test.positional[0]).squeeze(-1), t.test.target) for t in tasks.test]  # type: ignore[union-attr]
    guess, right = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert float((guess - right).square().mean()) < 0.8 * float(right.var())
    with pytest.raises(ValueError, match="fewer ages"):
        load_regressions(ages=40)
