"""Shakespeare: one task a role of a play, next-token prediction of its lines.

The roles are read from Project Gutenberg's one-file edition of 1994 by LEAF's rules, or from JSONL with one record a
line. The paper keeps 152 roles of 36 plays with "considerably large" text and gives no rule; here roles are ranked by
number of lines (ties by number of words), the first 152 kept, and the number of lines this implies is reported.

References:
    LEAF: a benchmark for federated settings, Caldas et al., 2018, arXiv:1812.01097.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.records import read_records
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.support.options import check_choice, check_number

__all__ = ["SHAKESPEARE_SPLITS", "Role", "load_shakespeare", "read_gutenberg", "read_lines", "select_roles"]

SHAKESPEARE_SPLITS = ("random-80/10/10", "random-60/10/30", "play-80/10/10", "play-60/10/30")
#: Roles that the paper keeps.
NUM_ROLES = 152
#: LEAF drops it: in the 1994 file it stands before the second "by William Shakespeare".
LEFT_OUT = "allswell"

# LEAF's rules: two blanks before a speaker, four before a continuation; The Comedy of Errors is not indented.
_SPEAKER = re.compile(r"  ([a-zA-Z][a-zA-Z ]*)\. (.*)")
_CONTINUED = re.compile(r"    (.*)")
_FLAT_SPEAKER = re.compile(r"([a-zA-Z][a-zA-Z ]*)\. (.*)")
_FLAT_PLAY = "THE COMEDY OF ERRORS"
_AUTHOR = "by William Shakespeare"
#: Line of the 1994 file behind which no play follows.
_END_LINE = 124195


class Role(NamedTuple):
    """A character of one play, and what it says, in the order of the play.

    Attributes:
        play: number of the play in the file; titles are not to be relied on (see :func:`read_gutenberg`).
        title: of the play, as the file has it.
        character: upper case.
        lines: of its speeches.
    """

    play: int
    title: str
    character: str
    lines: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique within a file: two plays may have a character, and in the 1994 file a title, in common."""
        return f"{self.play:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', f'{self.title} {self.character}').strip('-')}"

    @property
    def words(self) -> int:
        """Number of words."""
        return sum(len(line.split()) for line in self.lines)


def read_gutenberg(path: Path, *, end_line: int = _END_LINE) -> list[Role]:
    """Read the roles of Gutenberg's etext 100 (1994) by LEAF's rules.

    Reading starts at the second line with "by William Shakespeare" (contents, sonnets and All's Well stand before it)
    and ends at ``end_line``. Each further such line begins a play, whose title is the nearest line above it that is
    not blank, two to seven lines up. A speaker is two blanks, a name, a full stop and a blank; its speech goes on in
    lines with four blanks. The Comedy of Errors has no indentation: there every line goes on, up to one with ``<``,
    and a "speaker" that begins with ACT is none. Plays with one character or none and characters with two lines or
    fewer are dropped. (Blank lines count for this, as in LEAF, but are not kept: there is nothing to predict in them.)

    LEAF's rules take some titles from the wrong place, so plays are told apart by their number, not by their title.

    Raises:
        ValueError: the file does not have two lines with the author's name.
    """
    text = _decoded(path.read_bytes()).split("\n")[1 : end_line + 2]
    authors = [number for number, line in enumerate(text) if _AUTHOR in line]
    if len(authors) < 2:
        raise ValueError(
            f"{path}: {len(authors)} lines with {_AUTHOR!r}; Gutenberg's etext 100 of 1994 has one for every play."
        )
    plays: list[tuple[str, dict[str, list[str]]]] = []
    speaker = ""
    for number in range(authors[1], len(text)):
        line = text[number].rstrip("\r")
        if _AUTHOR in line:
            plays.append((_title(text, number), defaultdict(list)))
            speaker = ""
            continue
        title, characters = plays[-1]
        flat = title == _FLAT_PLAY
        if match := (_FLAT_SPEAKER if flat else _SPEAKER).match(line):
            speaker = match[1].upper()
            if flat and speaker.startswith("ACT "):
                speaker = ""
                continue
            characters[speaker].append(match[2])
        elif speaker and (flat or _CONTINUED.match(line)):
            if flat and line.startswith("<"):
                speaker = ""
                continue
            characters[speaker].append(line if flat else line[4:])
    return [
        Role(number, title, character, tuple(line for line in lines if line.strip()))
        for number, (title, characters) in enumerate(play for play in plays if len(play[1]) > 1)
        for character, lines in characters.items()
        if len(lines) > 2
    ]


def _decoded(content: bytes) -> str:
    """Decode UTF-8, or Latin-1 as Gutenberg's older files are."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _title(text: Sequence[str], author: int) -> str:
    above = [text[author - k].strip() for k in range(2, 8) if author >= k]
    return next((line for line in above if line), "")


def read_lines(path: Path) -> list[Role]:
    """Read the roles of a file with one record a line: ``play``, ``character``, ``text``, perhaps ``title``.

    As in LEAF, All's Well (``play == "allswell"``), plays with one character and characters with two lines or fewer
    are left out. Blank lines count for this and are not kept, as in :func:`read_gutenberg`.

    Raises:
        ValueError: a record without these fields; names file and line.
    """
    plays: dict[str, int] = {}
    titles: dict[str, str] = {}
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in read_records(path):
        for key in ("play", "character", "text"):
            if not isinstance(record.fields.get(key), str):
                raise ValueError(f"{record.place}: {key!r} is {record.fields.get(key)!r}; expected a string.")
        play = record.fields["play"]
        if play == LEFT_OUT:
            continue
        plays.setdefault(play, len(plays))
        titles.setdefault(play, str(record.fields.get("title", play)))
        lines[play, record.fields["character"].upper()].append(record.fields["text"])
    cast: dict[str, int] = defaultdict(int)
    for play, _ in lines:
        cast[play] += 1
    return [
        Role(plays[play], titles[play], character, tuple(line for line in of if line.strip()))
        for (play, character), of in lines.items()
        if len(of) > 2 and cast[play] > 1
    ]


def select_roles(roles: Iterable[Role], count: int = NUM_ROLES) -> tuple[list[Role], int]:
    """The ``count`` roles with the most lines (ties by words, then by name), in the order of the file; and how many
    lines the smallest of them has.

    Raises:
        ValueError: fewer roles than that.
    """
    listed = list(roles)
    if len(listed) < count:
        raise ValueError(f"{len(listed)} roles, {count} wanted; pass num_roles={len(listed)} or fewer.")
    ranked = sorted(listed, key=lambda role: (-len(role.lines), -role.words, role.name))[:count]
    kept = set(ranked)
    return [role for role in listed if role in kept], len(ranked[-1].lines)


def load_shakespeare(
    split: str = SHAKESPEARE_SPLITS[0],
    root: str | Path | None = None,
    *,
    num_roles: int = NUM_ROLES,
    min_lines: int | None = None,
    context: int = 3,
    seed: int = 0,
) -> TaskCollection[TextTask]:
    """Load the roles as next-token tasks.

    A row is one line: its input the ``context`` lines that the role said before it (never the line itself), its output
    the line. Within a role the lines are split in the order of the play: the first 80 % to learn from, 10 % to choose
    on, the last 10 % to be judged by.

    Args:
        split: ``"random-80/10/10"`` or ``60/10/30``: shares of the *roles* to meta-train on, tune on and be judged by;
            ``"play-..."`` gives whole plays to one of the three, so no play is seen in two.
        root: the file, or a folder with ``shakespeare*.jsonl(.gz)`` or ``100.txt``.
        num_roles: how many roles to keep.
        min_lines: keep the roles with at least so many lines instead.
        context: previous lines of the role that are read; 0 gives an empty input.
        seed: of the split.

    Raises:
        ValueError: an unknown split, no root, too few roles, a bad record (with file and line).
        FileNotFoundError: nothing to read in root.
    """
    check_choice("split", split, SHAKESPEARE_SPLITS)
    check_number("context", context, open_below=False, whole=True)
    path = _find(root)
    roles = read_lines(path) if path.name.endswith((".jsonl", ".jsonl.gz")) else read_gutenberg(path)
    if min_lines is not None:
        num_roles = sum(len(role.lines) >= min_lines for role in roles)
    kept, threshold = select_roles(roles, num_roles)
    by, shares = split.split("-")
    train, dev, _ = (int(share) / 100 for share in shares.split("/"))
    parts = _split(kept, train, dev, seed, by_play=by == "play")
    plays = len({role.play for role in kept})
    notes = (
        f"{len(kept)} roles of {plays} plays ({len({role.play for role in roles})} in the file), out of {len(roles)} "
        f"with more than two lines; the smallest kept has {threshold} lines.",
    )
    made = {part: tuple(_role_task(role, context) for role in of) for part, of in parts.items()}
    return TaskCollection(f"Shakespeare {split}", made["train"], made["dev"], made["test"], notes=notes)


def _find(root: str | Path | None) -> Path:
    if root is None:
        raise ValueError("root=None: pass the file with the plays, or the folder that holds it.")
    path = Path(root)
    if path.is_file():
        return path
    files = [*sorted(path.glob("shakespeare*.jsonl")), *sorted(path.glob("shakespeare*.jsonl.gz"))]
    files += sorted(path.glob("100.txt"))
    if not files:
        raise FileNotFoundError(f"{path}: neither shakespeare*.jsonl(.gz) nor Gutenberg's 100.txt is there.")
    if len(files) > 1:
        raise ValueError(f"{path}: both {files[0].name} and {files[1].name} are there; name the file to read.")
    return files[0]


def _split(roles: Sequence[Role], train: float, dev: float, seed: int, *, by_play: bool) -> dict[str, list[Role]]:
    """Deal the roles by shares; by plays, whole plays in random order until a part has its share."""
    generator = np.random.default_rng(seed)
    units: dict[int, list[Role]] = defaultdict(list)
    for number, role in enumerate(roles):
        units[role.play if by_play else number].append(role)
    order = generator.permutation(sorted(units))
    parts: dict[str, list[Role]] = {"train": [], "dev": [], "test": []}
    edges = {"train": round(train * len(roles)), "dev": round((train + dev) * len(roles)), "test": len(roles)}
    dealt = 0
    for key in order:
        unit = units[int(key)]
        # The middle of a play decides, so that a long play does not always fall on the near side of an edge.
        part = next(part for part, edge in edges.items() if dealt + len(unit) / 2 <= edge or part == "test")
        parts[part] += unit
        dealt += len(unit)
    return parts


def _role_task(role: Role, context: int) -> TextTask:
    rows = [
        TextRow("\n".join(role.lines[max(number - context, 0) : number]), (line,))
        for number, line in enumerate(role.lines)
    ]
    first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
    train, dev, test = tuple(rows[:first]), tuple(rows[first:second]), tuple(rows[second:])
    return TextTask(role.name, train, dev, test, form="next_token", metric="Perplexity")
