"""A word tokenizer for tiny vocabularies, made in memory."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    *("red", "blue", "green", "one", "two", "three", "four", "cat", "dog", "bird"),
    *("good", "bad", "dull", "film", "yes", "no", "is", "a", "the"),
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def tokenizer(kind: str = "seq2seq", words: list[str] | None = None) -> Any:
    """Words by blanks; of an encoder(-decoder) with special tokens around a text, of a causal model without."""
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *(words or WORDS)])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if kind != "causal":
        around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        plain.post_processor = around  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    )
