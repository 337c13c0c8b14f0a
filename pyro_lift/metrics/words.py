"""Words of a text in any script, for scores whose published rules know ASCII alone.

rouge-score keeps ``[a-z0-9]`` and drops every other letter, so that a Russian, Chinese or Thai text shares nothing with
itself; SQuAD's F1 splits at blanks, of which Chinese, Japanese, Thai, Lao, Khmer and Burmese have none. Text in the
Latin script is scored exactly as the published rules have it.
"""

from __future__ import annotations

import string
import unicodedata

__all__ = ["bare", "composed", "rouge_words", "words"]

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
#: Blocks of scripts that put no blanks between words; there a character, with its marks, is a word.
_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF)),
    *((0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x323AF)),
)
#: Before it lie ASCII and the letters of Latin-1 and Latin Extended-A and B.
_BEYOND_LATIN = 0x250


def composed(text: str) -> str:
    """Make each accented letter one character (NFC), however it was typed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def bare(text: str) -> str:
    """Take off ASCII punctuation, and where there are letters of another script than Latin all punctuation."""
    text = text.translate(NO_PUNCTUATION)
    if text.isascii() or not any(_is_letter_beyond_latin(character) for character in text):
        return text
    return "".join(character for character in text if not unicodedata.category(character).startswith("P"))


def words(text: str) -> list[str]:
    """Split at blanks; in scripts without blanks into characters."""
    if text.isascii():
        return text.split()
    spaced: list[str] = []
    alone = False  # whether the last character that is no mark is a word by itself
    for character in text:
        if not _is_mark(character):
            if alone or _is_unspaced(character):
                spaced.append(" ")
            alone = _is_unspaced(character)
        spaced.append(character)
    return "".join(spaced).split()


def rouge_words(text: str) -> list[str]:
    """Split into rouge-score's words, runs of ``[a-z0-9]``, and those of other scripts than Latin.

    A text that has none of these, such as an emoji or "à", is split at its blanks.
    """
    text = composed(text.lower())
    tokens: list[str] = []
    kind = ""
    for character in text:
        before, kind = kind, _kind(character, kind)
        if kind in ("ascii", "other") and kind == before:
            tokens[-1] += character
        elif kind == "mark":
            tokens[-1] += character
            kind = before
        elif kind:
            tokens.append(character)
    return tokens or text.translate(NO_PUNCTUATION).split()


def _kind(character: str, before: str) -> str:
    """Tell a character of an ASCII word, of another script's, a word alone, a mark on one, or none of these."""
    if character.isascii():
        return "ascii" if character.isalnum() else ""
    if _is_mark(character):
        return "mark" if before in ("other", "alone") else ""
    if not _is_letter_beyond_latin(character):
        return ""
    return "alone" if _is_unspaced(character) else "other"


def _is_letter_beyond_latin(character: str) -> bool:
    if ord(character) < _BEYOND_LATIN or not (character.isalpha() or character.isdecimal()):
        return False
    return not unicodedata.name(character, "").startswith("LATIN")


def _is_unspaced(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _UNSPACED)


def _is_mark(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character).startswith("M")
