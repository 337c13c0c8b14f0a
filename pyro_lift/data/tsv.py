"""Lines of tab-separated text as CrossFit writes them, without header, quotes or index; files with these are refused.

CrossFit's line is the input, a tab, and one or more answers with tabs between. Spreadsheets and pandas write other
files under the same ending, in which the first line is no example and quotes are not part of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["tsv_rows"]

_INPUTS = """
input inputs text texts txt sentence sentences question questions query context document documents doc article passage
paragraph premise hypothesis review reviews tweet tweets title body content prompt source src utterance dialogue story
post posts comment comments message messages abstract instruction phrase headline example email sms claim evidence
statement word term token line lines report note caption
"""
_ANSWERS = """
output outputs label labels answer answers target targets tgt class classes category categories sentiment response
summary translation intent topic emotion score rating gold completion reference stance polarity tag tags annotation
type value values stars verdict veracity truth toxicity toxic spam gender language lang grade correct relation
entailment similarity domain subject solution reply
"""
_OTHERS = "id idx index guid uid name a b c s no nr number row split options is has of raw"
#: Column names for the input and for the answer, as data sets on the hub have them.
INPUT_NAMES, ANSWER_NAMES = frozenset(_INPUTS.split()), frozenset(_ANSWERS.split())
COLUMN_NAMES = INPUT_NAMES | ANSWER_NAMES | frozenset(_OTHERS.split())
#: The header that is read as one, and left out: the fields of a record, by their own names.
PLAIN_HEADERS = tuple((a, b) for a in ("input", "text") for b in ("output", "label"))
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def tsv_rows(lines: Sequence[tuple[str, str]], *, answered: bool = True) -> list[tuple[str, list[str]]]:
    """Split the lines into cells, the answers without blanks at their ends and blank ones left out.

    A header with the fields' own names (``input`` or ``text``, ``output`` or ``label``) is left out.

    Args:
        lines: place and text of each line that is not blank.
        answered: whether there must be answers; else lines without any tab are inputs alone.

    Raises:
        ValueError: another header, or what looks like one; cells quoted as CSV has them, a first column that counts the
            lines, a line without a tab, or a carriage return inside a line; the message begins with the line's place.
    """
    alone = not answered and not any("\t" in line for _, line in lines)
    if alone and lines and lines[0][1].strip().casefold() in {names[0] for names in PLAIN_HEADERS}:
        lines = lines[1:]
    rows = [(place, [line] if alone else _cells(place, line)) for place, line in lines]
    for place, cells in rows:
        _check_quotes(place, cells)
    if rows and all(_QUOTED.fullmatch(cell) for _, cells in rows for cell in cells):
        raise ValueError(f"{rows[0][0]}: every cell is quoted. {_UNQUOTED}")
    if alone:
        return rows
    if rows and tuple(cell.strip().casefold() for cell in rows[0][1]) in PLAIN_HEADERS:
        rows = rows[1:]
    elif rows and (_is_header(rows[0][1]) or _stands_out([cells for _, cells in rows])):
        raise ValueError(
            f"{rows[0][0]}: {', '.join(map(repr, rows[0][1]))} looks like a header. Take it out, or call the two "
            "columns 'input' and 'output'."
        )
    _check_index(rows)
    return [(place, [cells[0], *_answers(cells[1:])]) for place, cells in rows]


_UNQUOTED = "Write it without quotes (pandas: quoting=csv.QUOTE_NONE), or as JSONL."


def _cells(place: str, line: str) -> list[str]:
    if "\r" in line:
        raise ValueError(f"{place}: a carriage return inside the line; end lines with \\n (or \\r\\n), not with \\r.")
    cells = line.split("\t")
    if len(cells) < 2:
        hint = " Is a quoted cell spread over two lines?" if line.count('"') % 2 else ""
        raise ValueError(f"{place}: no tab; expected the input, a tab, and the output.{hint}")
    return cells


def _answers(cells: Sequence[str]) -> list[str]:
    """Strip the answers, as CrossFit its lines, and leave out blank ones; keep one blank if all are."""
    answers = [cell.strip() for cell in cells]
    return [answer for answer in answers if answer] or answers[:1]


def _check_quotes(place: str, cells: Sequence[str]) -> None:
    """Refuse a cell that only CSV writes: doubled quotes inside quotes, or quotes around a tab."""
    opened = False
    for cell in cells:
        if _QUOTED.fullmatch(cell) and '""' in cell[1:-1]:
            raise ValueError(f"{place}: the cell {cell!r} is quoted as CSV writes it. {_UNQUOTED}")
        unpaired = cell.count('"') % 2 == 1
        if opened and unpaired and cell.endswith('"'):
            raise ValueError(f"{place}: a tab inside quotes, as CSV writes it. {_UNQUOTED}")
        opened = opened or (unpaired and cell.startswith('"'))


def _is_header(cells: Sequence[str]) -> bool:
    """Tell whether all words (``text_a`` has two) are columns' names, one of an input and one of an answer."""
    words = [re.findall(r"[^\W\d_]+", cell.casefold()) for cell in cells]
    if not all(of and len(of) <= 3 and COLUMN_NAMES.issuperset(of) for of in words):
        return False
    flat = {word for of in words for word in of}
    return bool(flat & INPUT_NAMES) and bool(flat & ANSWER_NAMES)


def _stands_out(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first line is single words in a table of sentences, whose answers repeat but not its own."""
    (first, *answers), *others = rows
    given = [tuple(cells[1:]) for cells in others]
    if len(others) < 4 or tuple(answers) in given or any(given.count(answer) < 2 for answer in given):
        return False
    return all(re.fullmatch(r"[^\W\d]\w*", cell.strip()) for cell in (first, *answers)) and all(
        len(cells[0].split()) > 1 for cells in others
    )


def _check_index(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Refuse a first column 0, 1, 2, ... (or from 1) beside two more: the index of a table, not the inputs."""
    if len(rows) < 2 or any(len(cells) < 3 for _, cells in rows):
        return
    first = [cells[0].strip() for _, cells in rows]
    if any(first == [str(start + k) for k in range(len(rows))] for start in (0, 1)):
        raise ValueError(f"{rows[0][0]}: the first column counts the lines. Write the table without its index.")
