"""A task's way with strings as files: the tokenizer as transformers writes it, the rest as keys of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.data.encode import LabelMatching, NextToken, TextToText
from pyro_lift.data.encoding import TextEncoding
from pyro_lift.support.archive import DamagedError

__all__ = ["TOKENIZER_FILES", "load_encoding", "save_encoding"]

#: What tokenizers write; in a folder that is written anew without one they would belong to something else.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
ENCODERS = {cls.__name__: cls for cls in (LabelMatching, NextToken, TextToText)}


def save_encoding(encoding: TextEncoding | None, folder: Path) -> dict[str, Any] | None:
    """Write the tokenizer's files, and return what config.json says of the rest; None where there is nothing to save.

    A tokenizer that cannot save itself, or an encoder that is not ours, is left out: such a posterior reads tensors.
    """
    encoder = None if encoding is None else encoding.encoder
    name = type(encoder).__name__
    if encoding is None or encoder is None or type(encoder) is not ENCODERS.get(name):
        return None
    if not hasattr(encoder.tokenizer, "save_pretrained"):
        return None
    encoder.tokenizer.save_pretrained(folder)
    about = {"encoder": name, "max_length": encoder.max_length, **encoding.about()}
    if isinstance(encoder, TextToText):
        about["start_token"] = encoder.start_token
    return about


def load_encoding(about: Mapping[str, Any] | None, path: Path) -> TextEncoding | None:
    """Read what :func:`save_encoding` wrote.

    Args:
        about: of config.json.
        path: of config.json, beside the tokenizer's files.

    Raises:
        DamagedError: a key that is missing or unknown, or a tokenizer that cannot be read.
    """
    if about is None:
        return None
    from transformers import AutoTokenizer

    values = dict(about)
    try:
        cls = ENCODERS[values.pop("encoder")]
        options = {name: values.pop(name) for name in ("max_length", "start_token") if name in values}
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path}: encoding: no encoder is called {error}.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
    except Exception as error:  # whatever the library met, the files are the reason
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DamagedError(f"{path.parent}: the tokenizer cannot be read ({reason}).") from error
    try:
        return TextEncoding(cls(tokenizer, **options), **values)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: encoding: {error}") from error
