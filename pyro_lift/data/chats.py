"""Conversations: messages of a system, a user and an assistant, from records and through a tokenizer's template."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["ROLES", "Conversation", "Message", "Segment", "as_messages", "chat_prompt", "chat_segments", "with_system"]

ROLES = ("system", "user", "assistant")
#: What other layouts call them.
_MEANT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


class Message(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


class Conversation(str):
    """Messages as the input of a row: a string that shows them, and remembers each.

    Attributes:
        turns: the messages before the answer, a system's first if there is one.
    """

    turns: tuple[Message, ...]

    def __new__(cls, turns: Sequence[Message]) -> Conversation:
        """Show the messages one a line."""
        self = super().__new__(cls, "\n".join(f"{message.role}: {message.content}" for message in turns))
        self.turns = tuple(turns)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        """Return what a copy is made from."""
        return (self.turns,)


class Segment(NamedTuple):
    """A piece of a conversation as a template writes it, and whether an assistant said it."""

    text: str
    learnt: bool


def as_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Read messages, each an object with a role and a content.

    Args:
        value: of JSON, Parquet or a caller.
        where: begins the error messages.

    Raises:
        ValueError: no list of such objects, an unknown role, a content that is blank or no text, a system message that
            is not the first, two messages of one role in a row.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        shown = repr(value)[:60]
        raise ValueError(f"{where} is {shown}; expected a list of messages with 'role' and 'content'.")
    if not value:
        raise ValueError(f"{where} is an empty list; expected at least one message.")
    messages: list[Message] = []
    for number, entry in enumerate(value):
        message = _message(entry, f"{where}[{number}]")
        if message.role == "system" and number:
            raise ValueError(f"{where}[{number}]: a system message after others; it is the first, or not there.")
        if messages and messages[-1].role == message.role:
            raise ValueError(f"{where}[{number}]: two {message.role!r} messages in a row; join them to one.")
        messages.append(message)
    if messages[-1].role == "system":
        raise ValueError(f"{where}: a system message alone; expected a user's after it.")
    return tuple(messages)


def _message(entry: Any, where: str) -> Message:
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {str(entry)[:40]!r}; expected an object with 'role' and 'content'.")
    if "from" in entry and "value" in entry:
        raise ValueError(f"{where} has 'from' and 'value' (ShareGPT's); write 'role' and 'content' in their place.")
    for key in ("role", "content"):
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, entry))}.")
    if entry.get("tool_calls"):
        raise ValueError(f"{where} has 'tool_calls'; calls of tools are not read.")
    role, content = entry["role"], entry["content"]
    if role not in ROLES:
        if str(role).casefold() in ("tool", "function", "ipython"):
            roles = ", ".join(ROLES)
            raise ValueError(f"{where}: role {role!r} is not known; roles are: {roles}. Calls of tools are not read.")
        if str(role).casefold() in _MEANT:
            raise ValueError(f"{where}: role {role!r} is not known; did you mean {_MEANT[str(role).casefold()]!r}?")
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"roles are: {', '.join(ROLES)}."
        raise ValueError(f"{where}: role {role!r} is not known; {hint}")
    if not isinstance(content, str):
        kind = "a list of parts" if isinstance(content, list) else repr(content)
        raise ValueError(f"{where}: the content is {kind}; expected a string: pictures and parts are not read.")
    if not content.strip():
        raise ValueError(f"{where}: the content is {content!r}; expected a string that is not blank.")
    return Message(role, content)


def with_system(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """Put a task's system prompt first, where the conversation has none of its own."""
    if not system or (messages and messages[0].role == "system"):
        return tuple(messages)
    return (Message("system", system), *messages)


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Write a conversation by the tokenizer's template, up to where the assistant goes on.

    Raises:
        ValueError: a tokenizer without a template, or a template that refuses these messages.
    """
    return _templated(tokenizer, messages, add_generation_prompt=True)


def chat_segments(tokenizer: Any, messages: Sequence[Message]) -> list[Segment]:
    """Cut a conversation, as the template writes it, into what an assistant said and what was given.

    Where the template writes earlier turns differently once others follow, the last answer alone is learnt.

    Raises:
        ValueError: no template, or one whose text of a conversation does not begin with that of its first part.
    """
    whole = _templated(tokenizer, messages)
    segments: list[Segment] = []
    done = 0
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = chat_prompt(tokenizer, messages[:number])
        after = _templated(tokenizer, messages[: number + 1])
        last = number == len(messages) - 1
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= done):
            if not last:
                continue
            if not whole.startswith(before):
                raise ValueError(
                    "the tokenizer's chat template does not write a conversation as its beginning and an answer, so "
                    "the answer cannot be told apart. Write prompt and completion in place of messages."
                )
        segments += [Segment(before[done:], learnt=False), Segment(after[len(before) :], learnt=True)]
        done = len(after)
    return [segment for segment in segments if segment.text]


def _templated(tokenizer: Any, messages: Sequence[Message], **options: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so there is no way to write messages. Set tokenizer.chat_template "
            "(and save it with the backbone), or write prompt and completion in place of messages."
        )
    turns = [message._asdict() for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template may raise anything, by its own raise_exception too
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"the tokenizer's chat template refuses messages of {roles}: {error}") from error
