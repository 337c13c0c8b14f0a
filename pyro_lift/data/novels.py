"""Novels: one task an author (or a book), next-token prediction of passages that a backbone has not read.

The corpus is one text file with a paragraph a line, and a table that says how many paragraphs each book has.
``backbones/bart-novels`` was trained on the same books, but for every hundredth paragraph
(``examples/pretrain_bart.py``): only these become rows, so that no network is judged, or adapted, by text that it has
seen. It knows the authors' other pages all the same: the family asks what an author's own adapter adds to that.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.support.options import check_choice, check_number

__all__ = ["NOVEL_SPLITS", "load_novels"]

NOVEL_SPLITS = ("authors", "books")
#: Every so-many-th paragraph was held out when the backbone was trained.
HELD_OUT = 100
#: Of the choice of authors for each part.
SPLIT_SEED = 0
CORPUS, BOOKS = "corpus.txt.gz", "corpus_books.csv"


def load_novels(
    split: str = "authors",
    root: str | Path | None = None,
    *,
    train_rows: int = 32,
    least_rows: int = 64,
    context: int = 3,
) -> TaskCollection[TextTask]:
    """Load the held-out passages of a corpus of novels as tasks.

    A row is a line of some ten words; what is read is the lines before it in the same paragraph.

    Args:
        split: ``"authors"`` or ``"books"``: what a task is.
        root: the folder with ``corpus.txt.gz`` and ``corpus_books.csv`` (columns ``name``, ``paragraphs``; an author is
            the name's first word).
        train_rows: rows of a task to learn from; the rest are to be judged by.
        least_rows: tasks with fewer rows are left out, by name.
        context: lines before that are read, at most.

    Raises:
        ValueError: an unknown split, no root, a table that does not fit the corpus, fewer than three tasks.
        FileNotFoundError: no such files.
    """
    check_choice("split", split, NOVEL_SPLITS)
    for name, value in (("train_rows", train_rows), ("least_rows", least_rows), ("context", context)):
        check_number(name, value, least=1, open_below=False, whole=True)
    if root is None:
        raise ValueError(f"root=None: pass the folder with {CORPUS} and {BOOKS}.")
    rows: dict[str, list[TextRow]] = defaultdict(list)
    for book, paragraph in _held_out(Path(root)):
        name = book if split == "books" else book.split("_")[0]
        rows[name] += _rows(paragraph, context)
    kept = {name: lines for name, lines in rows.items() if len(lines) >= max(least_rows, train_rows + 1)}
    if len(kept) < 3:
        raise ValueError(f"{root}: {len(kept)} {split} with {least_rows} held-out rows; at least three are needed.")
    tasks = [
        TextTask(
            name, tuple(lines[:train_rows]), test=tuple(lines[train_rows:]), form="next_token", metric="Perplexity"
        )
        for name, lines in sorted(kept.items())
    ]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(tasks))
    # A fifth to be judged by, a tenth to choose on, at least one of each.
    judged, dev = max(len(tasks) // 5, 1), max(len(tasks) // 10, 1)
    parts = {"test": order[:judged], "dev": order[judged : judged + dev], "train": order[judged + dev :]}
    left_out = sorted(set(rows) - set(kept))
    notes = [f"only every {HELD_OUT}th paragraph: backbones/bart-novels was trained on the others."]
    if left_out:
        notes.append(f"left out, with fewer than {least_rows} rows: {', '.join(left_out)}.")
    train, dev_tasks, test = (tuple(tasks[k] for k in parts[part]) for part in ("train", "dev", "test"))
    return TaskCollection(f"novels, {split}", train, dev_tasks, test, notes=tuple(notes))


def _held_out(root: Path) -> list[tuple[str, str]]:
    """Return the paragraphs that were held out of training, each with its book.

    They are counted as ``examples/pretrain_bart.py`` does: lines of more than one character.
    """
    with gzip.open(root / CORPUS, "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")
    with (root / BOOKS).open(encoding="utf-8") as file:
        table = [(entry["name"], int(entry["paragraphs"])) for entry in csv.DictReader(file)]
    chunks = _books(lines)
    if len(chunks) != len(table):
        raise ValueError(f"{root / CORPUS}: {len(chunks)} books between blank lines; {BOOKS} lists {len(table)}.")
    found, number = [], 0
    for (book, _), paragraphs in zip(table, chunks, strict=True):
        for paragraph in paragraphs:
            if len(paragraph) > 1:
                if number % HELD_OUT == 0:
                    found.append((book, paragraph))
                number += 1
    return found


def _books(lines: Sequence[str]) -> list[list[str]]:
    """Cut lines into books at blank ones."""
    books: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            books[-1].append(line.strip())
        elif books[-1]:
            books.append([])
    return books if books[-1] else books[:-1]


def _rows(paragraph: str, context: int) -> list[TextRow]:
    """Make a row of each line of a paragraph, with the lines before it as its input."""
    lines = lines_of(paragraph)
    return [TextRow(" ".join(lines[max(k - context, 0) : k]), (line,)) for k, line in enumerate(lines)]


def lines_of(paragraph: str, least: int = 6, most: int = 14) -> list[str]:
    """Cut a paragraph into lines of ``least`` to ``most`` words, behind punctuation where there is any near.

    Example:
        >>> lines_of("He came in at last, and sat down by the fire. Nobody spoke.")
        ['He came in at last, and sat down by the fire.', 'Nobody spoke.']
    """
    lines, current = [], []
    for piece in re.findall(r"[^,;:.!?]+[,;:.!?'\")\-]*\s*|\S+\s*", paragraph):
        current += piece.split()
        while len(current) > most:
            lines.append(" ".join(current[:most]))
            current = current[most:]
        if len(current) >= least:
            lines.append(" ".join(current))
            current = []
    return [*lines, " ".join(current)] if current else lines
