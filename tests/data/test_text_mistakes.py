"""Kinds of bad text input, each with its message: prompts and completions, messages, text to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyro_lift.data.folder import read_task
from pyro_lift.data.text import TextTask

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
FINE = {"prompt": "a =", "completion": " b"}


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def chat(*messages: Any, **more: Any) -> str:
    return lines({"messages": list(messages), **more})


MISTAKES: dict[str, tuple[str, str]] = {
    "a prompt without a completion": (
        lines(FINE, {"prompt": "x"}),
        r":2: no 'prompt' and 'completion', but other rows",
    ),
    "prompts alone": (lines({"prompt": "x"}), r":1: no field 'completion'; the record has 'prompt'"),
    "a completion of nothing": (lines({"prompt": "x", "completion": None}), r":1: 'completion' is None"),
    "a blank completion": (lines({"prompt": "x", "completion": "  "}), r":1: the output is '  '"),
    "no completion in a list": (lines({"prompt": "x", "completion": []}), r":1: no output"),
    "a completion with fields": (lines({"prompt": "x", "completion": {"text": "a"}}), r":1: 'completion' is \{'text'"),
    "an empty prompt": (lines({"prompt": "", "completion": "a"}), r":1: the input is ''"),
    "a prompt that is a number": (lines({"prompt": 3, "completion": "a"}), r":1: the input is 3"),
    "prompts of strings in a list": (lines({"prompt": ["a"], "completion": "b"}), r"\[0\] is 'a'; expected an object"),
    "two forms in one file": (lines(FINE, {"input": "a", "output": "b"}), r":2: .* rows of both kinds are no task"),
    "messages and completions": (lines({"messages": [USER, SAID]}, FINE), r":2: no messages, but other rows have some"),
    "two older columns for one": (lines({"text": "x", "label": "a", "input": "y"}), r":1: both 'text' and 'input'"),
    "two older answers": (lines({"text": "x", "label": "a", "output": "b"}), r":1: both 'label' and 'output'"),
    "a column of another name": (lines({"sentence": "x", "label": "a"}), r"It is called 'input', 'text' or 'prompt'"),
    "two columns for one": (lines({**FINE, "input": "x"}), r":1: both 'prompt' and 'input'"),
    "preferences": (lines({"prompt": "x", "chosen": "a", "rejected": "b"}), r"'completion'.*Pairs of preferences"),
    "questions and answers": (lines({"question": "x", "answer": "a"}), r"Call the question 'prompt'"),
    "columns in capitals": (lines({"Prompt": "x", "Completion": "a"}), r"'Prompt' is 'prompt' in small letters"),
    "text without an answer": (lines({"text": "a b c"}), r"no field 'output'.*the form 'next_token'"),
    "no messages": (chat(), r":1: 'messages' is an empty list"),
    "messages as a string": (lines({"messages": json.dumps([USER])}), r":1: 'messages' is '\[\{.*expected a list"),
    "a role of another layout": (
        chat({"role": "human", "content": "x"}, SAID),
        r"'human' is not known; did you mean 'us",
    ),
    "a model's role": (chat(USER, {"role": "gpt", "content": "x"}), r"\[1\]: role 'gpt' .* did you mean 'assistant'"),
    "a role in capitals": (chat({"role": "User", "content": "x"}, SAID), r"did you mean 'user'"),
    "a tool's message": (
        chat(USER, {"role": "tool", "content": "x"}, SAID),
        r"\[1\]: role 'tool' is not known; .* Calls of tools",
    ),
    "a call of a tool": (chat(USER, {**SAID, "tool_calls": [1]}), r"\[1\] has 'tool_calls'"),
    "tools beside messages": (chat(USER, SAID, tools=[{"name": "f"}]), r":1: the column 'tools': calls of tools"),
    "a message without content": (chat({"role": "user"}, SAID), r"\[0\] has no 'content'"),
    "a content of nothing": (chat({"role": "user", "content": None}, SAID), r"\[0\]: the content is None"),
    "a content of parts": (
        chat({"role": "user", "content": [{"type": "text"}]}, SAID),
        r"the content is a list of parts",
    ),
    "two users in a row": (chat(USER, USER, SAID), r"\[1\]: two 'user' messages in a row"),
    "a user at the end": (chat(USER), r"the last message is the user's"),
    "an answer alone": (chat(SAID), r"an answer alone"),
    "a system prompt alone": (chat({"role": "system", "content": "x"}), r"a system message alone"),
    "a system prompt in between": (
        chat(USER, {"role": "system", "content": "x"}, SAID),
        r"\[1\]: a system message after",
    ),
    "a system prompt in a column": (
        lines({**FINE, "system": "be short"}),
        r":1: the column 'system' would not be read",
    ),
    "a system prompt beside messages": (
        chat(USER, SAID, system_prompt="x"),
        r":1: the column 'system_prompt' would not",
    ),
    "ShareGPT's conversations": (lines({"conversations": []}), r"'conversations' is ShareGPT's"),
    "Alpaca's instructions": (lines({"instruction": "x", "output": "a"}), r"'instruction' is Alpaca's"),
    "accepted answers in a table": (lines({**FINE, "answers": {"text": ["c"]}}), r":1: 'answers' is \{'text'"),
    "a JSON list": (json.dumps([FINE]), r":1: a JSON list; expected an object"),
    "JSON over several lines": (json.dumps(FINE, indent=1), r":1: a JSON text over several lines; JSONL has one obj"),
    "a line cut short": (lines(FINE) + '{"prompt": "a", "compl', r":2: not JSON: Unterminated string"),
    "two objects a line": (json.dumps(FINE) * 2, r":1: not JSON: Extra data"),
    "a table of commas": ("prompt,completion\na,b\n", r":1: not JSON"),
    "NaN": ('{"input": "a", "output": NaN}\n', r":1: NaN is no value of JSON"),
    "half a character": ('{"prompt": "\\ud83d", "completion": "c"}\n', r":1: the input holds half a character"),
}


def read(text: str, root: Path, about: str = "") -> Any:
    (root / "train.jsonl").write_text(text)
    if about:
        (root / "task.json").write_text(about)
    return read_task(root)


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_has_its_file_its_line_and_its_reason(kind: str, tmp_path: Path) -> None:
    text, message = MISTAKES[kind]
    with pytest.raises(ValueError, match=message) as caught:
        read(text, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}:")


@pytest.mark.parametrize(
    ("about", "text", "message"),
    [
        ('{"form": "prompt"}', lines(FINE), r"task\.json: form='prompt' is not known"),
        ('{"form": "completion"}', chat(USER, SAID), r"train\.jsonl:1: no field 'input'.*are of the form 'chat'"),
        ('{"form": "chat"}', lines(FINE), r"train\.jsonl:1: 'prompt' is 'a ='; in a chat it is a list of messages"),
        ('{"sytem": "x"}', lines(FINE), r"task\.json: key='sytem' is not known; did you mean 'system'"),
        ('{"labels": ["a"]}', lines(FINE), r"train\.jsonl:1: label 'b' is not one of 'a'"),
    ],
)
def test_a_task_json_that_does_not_fit_is_told(about: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, tmp_path, about)


def test_further_answers_count_beside_a_completion_as_beside_messages(tmp_path: Path) -> None:
    task = read(lines({**FINE, "answers": ["c", "d"]}), tmp_path)
    assert isinstance(task, TextTask) and task.form == "completion"
    assert task.train[0].outputs == (" b", "c", "d")
    assert read(chat(USER, SAID, answers="so"), tmp_path).train[0].outputs == ("yes", "so")
