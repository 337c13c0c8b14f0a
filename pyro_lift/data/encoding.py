"""How the texts of one task were encoded: what new inputs are read by, and what is written is turned into text by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_lift.data.chats import Conversation, Message, as_messages, chat_prompt, with_system
from pyro_lift.models.likelihoods import IGNORED

__all__ = ["Given", "TextEncoder", "TextEncoding"]

log = logging.getLogger("pyro_lift")

#: An input: a string, or the messages of a conversation.
Given = str | Sequence[Any]


class TextEncoder(Protocol):
    """An encoder of text, as :mod:`pyro_lift.data.encode` has them."""

    tokenizer: Any
    max_length: int
    #: Texts that were cut, by task.
    cut: dict[str, int]

    def prompts(self, texts: Sequence[Given], encoding: TextEncoding) -> dict[str, Tensor]:
        """Encode inputs without their answers."""
        ...

    def answers(self, texts: Sequence[str], encoding: TextEncoding) -> list[list[int]]:
        """Encode answers as the network was taught to write them."""
        ...


@dataclass(frozen=True)
class TextEncoding:
    """One task's way with strings; it travels with the task, and with what is learned from it.

    Attributes:
        encoder: of the backbone, with its tokenizer and limit.
        task: name of the task, which some encoders put before an input; empty for none.
        form: of the task, as :class:`~pyro_lift.data.text.TextTask` has it.
        system: what every input begins with, as there.
        labels: of a classification, its labels.
    """

    encoder: TextEncoder
    task: str = ""
    form: str = "text_to_text"
    system: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))  # JSON has lists

    def about(self) -> dict[str, Any]:
        """Return all but the encoder, as JSON takes it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "encoder"}
        return {**values, "labels": list(self.labels)}

    def prompts(self, texts: Sequence[Given]) -> dict[str, Tensor]:
        """Encode inputs ``[n, L]`` by name of the backbone's keyword, for a causal model with padding on the left.

        Args:
            texts: strings; of a chat also lists of messages, each with ``"role"`` and ``"content"``.

        Raises:
            ValueError: messages for a task that is no chat, or that are no conversation.
        """
        return self.encoder.prompts(texts, self)

    def new_prompts(self, texts: Sequence[Given]) -> dict[str, Tensor]:
        """Encode inputs that are not the task's own, as :meth:`prompts`; the log says how many were cut."""
        with self.telling_of_cut("inputs", len(texts)):
            return self.prompts(texts)

    def new_answers(self, texts: Sequence[str]) -> Tensor:
        """Encode answers that are not the task's own, as :meth:`answers`; the log says how many were cut."""
        with self.telling_of_cut("outputs", len(texts)):
            return self.answers(texts)

    @contextmanager
    def telling_of_cut(self, what: str, number: int) -> Iterator[None]:
        """Tell the log how many texts were cut inside the context, and leave the count of the task's own as it was."""
        encoder, known = self.encoder, dict(self.encoder.cut)
        try:
            yield
        finally:
            cut = sum(encoder.cut.values()) - sum(known.values())
            encoder.cut.clear()
            encoder.cut.update(known)
        if cut:
            log.warning(
                "%d of %d %s are longer than %d tokens, the limit of the encoder, and were cut: what is beyond it is "
                "not read. Give shorter texts, or encode the task with a larger max_length.",
                cut, number, what, encoder.max_length,
            )  # fmt: skip

    def text(self, given: Given, tokenizer: Any) -> str:
        """Write an input as the task's own were: the system prompt, then the text; a chat by the template.

        Raises:
            ValueError: messages for a task that is no chat, or that are no conversation.
        """
        if self.form == "chat":
            if isinstance(given, Conversation):
                turns = given.turns
            else:
                turns = (Message("user", given),) if isinstance(given, str) else as_messages(given, "messages")
            return chat_prompt(tokenizer, with_system(turns, self.system))
        if not isinstance(given, str):
            raise ValueError(f"messages for the task {self.task!r}, which is {self.form}; give strings.")
        return f"{self.system}\n{given}" if self.system else given

    def answers(self, texts: Sequence[str]) -> Tensor:
        """Encode answers ``[n, L]``, an end token included where the backbone was taught one; padded with -100."""
        encoded = self.encoder.answers(texts, self)
        ids = torch.full((len(encoded), max(1, *map(len, encoded))), IGNORED, dtype=torch.long)
        for row, numbers in enumerate(encoded):
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return ids

    def decode(self, tokens: Tensor) -> list[str]:
        """Turn tokens ``[n, L]`` into strings, without special tokens and without blanks at their ends."""
        texts = self.encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]
