"""Prompts and completions, and conversations: how they are read, what of them is learnt, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from text_tokenizers import tokenizer

from pyro_lift.data import load_tasks
from pyro_lift.data.chats import Conversation, Message
from pyro_lift.data.encode import LabelMatching, NextToken, TextToText
from pyro_lift.data.folder import read_task
from pyro_lift.data.text import TextTask
from pyro_lift.models.likelihoods import IGNORED

WORDS = ["red", "cat", "blue", "dog", "one", "two", "three", "be", "brief", "system", "user", "assistant", "<end>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def chatting(kind: str = "causal", template: str = TEMPLATE) -> Any:
    made = tokenizer(kind, WORDS)
    made.chat_template = template
    return made


def write(folder: Path, rows: list[Any], about: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    if about is not None:
        (folder / "task.json").write_text(json.dumps(about))
    return folder


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


TURNS = [said("user", "red cat"), said("assistant", "one"), said("user", "blue dog"), said("assistant", "two three")]


def learnt(task: Any, words: Any, row: int = 0) -> str:
    """What the loss counts, and the words that are read."""
    target = task.train.target[row]
    return str(words.decode(target[target != IGNORED]))


def test_a_completion_is_read_as_it_stands(tmp_path: Path) -> None:
    rows = [{"prompt": "red cat", "completion": "one"}, {"prompt": "blue", "completion": ["two three", "two"]}]
    task = read_task(write(tmp_path / "t", rows))
    assert isinstance(task, TextTask) and task.form == "completion" and task.metric == "EM"
    assert task.train[1].outputs == ("two three", "two")
    words = tokenizer("causal", WORDS)
    causal = NextToken(words)(task)
    assert words.decode(causal.train.inputs["input_ids"][0], skip_special_tokens=True) == "red cat one"
    assert learnt(causal, words) == "one </s>" and learnt(causal, words, 1) == "two three </s>"
    both = tokenizer("seq2seq", WORDS)
    seq2seq = TextToText(both, 2)(task)
    assert both.decode(seq2seq.train.inputs["input_ids"][0], skip_special_tokens=True) == "red cat"
    assert learnt(seq2seq, both) == "<s> one </s>"


def test_a_completion_begins_as_the_tokenizer_lets_texts_begin() -> None:
    row = TextTask("t", (read_row({"prompt": "red", "completion": "one"}),), form="completion")
    for kind, begin in (("causal", []), ("seq2seq", [1])):
        encoded = NextToken(tokenizer(kind, WORDS))(row)
        assert encoded.train.inputs["input_ids"][0, : len(begin) + 1].tolist() == [*begin, 5]
        assert encoded.encoding.prompts(["red"])["input_ids"].tolist() == [[*begin, 5]]


def read_row(fields: dict[str, Any], form: Any = "completion") -> Any:
    from pyro_lift.data.records import Record, text_row

    return text_row(Record("here:1", fields), form)


def test_of_a_chat_the_assistants_turns_alone_are_learnt(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "t", [{"messages": TURNS}, {"messages": TURNS[:2], "answers": ["One"]}]))
    assert isinstance(task, TextTask) and task.form == "chat"
    last = task.train[1]
    assert last.outputs == ("one", "One") and isinstance(last.input, Conversation)
    for copied in (last, copy.deepcopy(last), pickle.loads(pickle.dumps(last))):
        assert copied.input == "user: red cat" and copied.input.turns == (Message("user", "red cat"),)  # type: ignore[union-attr]
    words = chatting()
    encoded = NextToken(words)(task)
    read = words.decode(encoded.train.inputs["input_ids"][0], skip_special_tokens=True)
    assert read == "user red cat <end> assistant one <end> user blue dog <end> assistant two three <end>"
    assert learnt(encoded, words) == "one <end> two three <end> </s>"
    assert learnt(encoded, words, 1) == "one <end> </s>"
    # What is generated from is what training has before the answer, token by token.
    prompts = encoded.encoding.prompts([[said("user", "red cat")], "red cat", TURNS[:3]])
    given = prompts["input_ids"][prompts["attention_mask"].bool()].tolist()
    short, long = encoded.train.inputs["input_ids"][1].tolist(), encoded.train.inputs["input_ids"][0].tolist()
    assert given == [*short[:5], *short[:5], *long[:12]]
    assert prompts["attention_mask"][0].tolist() == [0] * 7 + [1] * 5
    answer = encoded.encoding.answers(["two three"])[0].tolist()
    target = encoded.train.target[0]
    assert target[target != IGNORED][-len(answer) :].tolist() == answer


def test_a_chat_for_an_encoder_decoder_answers_the_last_turn(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "t", [{"messages": TURNS}]))
    words = chatting("seq2seq")
    encoded = TextToText(words, 2)(task)  # type: ignore[arg-type]
    assert learnt(encoded, words) == "<s> two three </s>"
    read = words.decode(encoded.train.inputs["input_ids"][0], skip_special_tokens=True)
    assert read == "user red cat <end> assistant one <end> user blue dog <end> assistant"


def test_a_system_prompt_is_before_every_input_that_has_none_of_its_own(tmp_path: Path) -> None:
    own = [said("system", "blue"), *TURNS[:2]]
    task = read_task(write(tmp_path / "chat", [{"messages": TURNS[:2]}, {"messages": own}], {"system": "be brief"}))
    words = chatting()
    encoded = NextToken(words)(task)  # type: ignore[arg-type]
    read = [words.decode(ids, skip_special_tokens=True) for ids in encoded.train.inputs["input_ids"]]
    assert read[0] == "system be brief <end> user red cat <end> assistant one <end>"
    assert read[1] == "system blue <end> user red cat <end> assistant one <end>"
    row = {"prompt": "red", "completion": "one"}
    for name, rows in (("completion", [row]), ("text_to_text", [{"input": "red", "output": "one"}])):
        told = read_task(write(tmp_path / name, rows, {"system": "be brief", "form": name}))
        encoded = NextToken(words)(told)  # type: ignore[arg-type]
        assert words.decode(encoded.train.inputs["input_ids"][0], skip_special_tokens=True) == "be brief red one"
        assert words.decode(encoded.encoding.prompts(["red"])["input_ids"][0]) == "be brief red"


def test_prompt_and_completion_of_messages_are_a_chat(tmp_path: Path) -> None:
    rows = [{"prompt": TURNS[:1], "completion": TURNS[1:2]}, {"prompt": TURNS[:3], "completion": "two"}]
    task = read_task(write(tmp_path / "t", rows))
    assert isinstance(task, TextTask) and task.form == "chat"
    assert [row.outputs for row in task.train] == [("one",), ("two",)]


def test_a_template_that_rewrites_earlier_turns_has_its_last_answer_learnt(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
        "{{ m['role'] + ' ' + m['content'] + ' <end> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    words = chatting(template=forgetful)
    encoded = NextToken(words)(read_task(write(tmp_path / "t", [{"messages": TURNS}])))  # type: ignore[arg-type]
    assert learnt(encoded, words) == "two three <end> </s>"


def test_long_chats_lose_their_beginning(tmp_path: Path) -> None:
    words = chatting()
    encoder = NextToken(words, max_length=8)
    encoded = encoder(read_task(write(tmp_path / "t", [{"messages": TURNS}])))  # type: ignore[arg-type]
    read = words.decode(encoded.train.inputs["input_ids"][0])
    assert read == "blue dog <end> assistant two three <end> </s>"
    assert learnt(encoded, words) == "two three <end> </s>" and "1 texts longer than 8" in encoder.notes[0]


PROMPT = {"prompt": "red", "completion": "one"}
BAD: list[tuple[str, list[Any], dict[str, Any] | None, str]] = [
    ("no completion", [PROMPT, {"prompt": "red"}], None, r"train\.jsonl:2: no 'prompt' and 'completion'"),
    ("blank completion", [{**PROMPT, "completion": " "}], None, r":1: the output is ' '; expected a string"),
    ("empty prompt", [{**PROMPT, "prompt": ""}], None, r":1: the input is ''; expected a string that is not empty"),
    ("null prompt", [{**PROMPT, "prompt": None}], None, r":1: the input is None"),
    ("no accepted answer", [{**PROMPT, "completion": []}], None, r":1: no output"),
    ("an answer of an object", [{**PROMPT, "completion": {"a": 1}}], None, r":1: 'completion' is \{'a': 1\}"),
    ("two inputs", [{**PROMPT, "input": "blue"}], None, r":1: both 'prompt' and 'input'; they mean the same"),
    ("two outputs", [{**PROMPT, "output": "two"}], None, r":1: both 'completion' and 'output'"),
    ("messages and prompt", [{**PROMPT, "messages": TURNS}], None, r":1: both 'messages' and 'prompt'"),
    ("alpaca", [{"instruction": "x", "input": "y", "output": "z"}], None, r":1: the column 'instruction' is Alpaca's"),
    ("sharegpt", [{"conversations": []}], None, r":1: the column 'conversations' is ShareGPT's"),
    ("from and value", [{"messages": [{"from": "human", "value": "x"}]}], None, r"\[0\] has 'from' and 'value'"),
    ("messages a string", [{"messages": "hello"}], None, r":1: 'messages' is 'hello'; expected a list of messages"),
    ("no messages", [{"messages": []}], None, r":1: 'messages' is an empty list"),
    ("a message a string", [{"messages": ["hi"]}], None, r":1: 'messages'\[0\] is 'hi'; expected an object"),
    ("no role", [{"messages": [{"content": "x"}]}], None, r":1: 'messages'\[0\] has no 'role'; it has 'content'"),
    ("no content", [{"messages": [{"role": "user"}]}], None, r"\[0\] has no 'content'"),
    ("a slip in a role", [{"messages": [said("asistant", "x")]}], None, r"'asistant' is not known; did you mean 'assi"),
    ("another role", [{"messages": [said("tool", "x")]}], None, r"role 'tool' is not known; roles are: system, user"),
    ("tools", [{"messages": [{**said("assistant", "x"), "tool_calls": [1]}]}], None, r"calls of tools are not read"),
    ("parts", [{"messages": [said("user", [{"type": "text"}])]}], None, r"the content is a list of parts"),
    ("null content", [{"messages": [said("user", None)]}], None, r"the content is None; expected a string"),
    ("blank content", [{"messages": [said("user", " ")]}], None, r"the content is ' '; expected a string that is not"),
    ("late system", [{"messages": [*TURNS[:2], said("system", "x")]}], None, r"\[2\]: a system message after others"),
    ("system alone", [{"messages": [said("system", "x")]}], None, r"a system message alone"),
    ("twice", [{"messages": [TURNS[0], TURNS[0]]}], None, r"\[1\]: two 'user' messages in a row; join them"),
    ("nothing to learn", [{"messages": TURNS}, {"messages": TURNS[:3]}], None, r":2: the last message is the user's"),
    ("answer alone", [{"messages": TURNS[1:2]}], None, r":1: an answer alone"),
    ("mixed", [{"messages": TURNS}, PROMPT], None, r":2: no messages, but other rows have some"),
    ("half an emoji", ['{"prompt": "red \\ud83d", "completion": "one"}'], None, r"half a character at place 4"),
    ("half an emoji said", ['{"messages": [{"role": "user", "content": "\\ud83d"}, ' + json.dumps(TURNS[1]) + "]}"],
     None, r"half a character"),
    ("prompt of messages, not chat", [{"prompt": TURNS[:1], "completion": "one"}], {"form": "completion"},
     r":1: the input is \["),
    ("a system that is none", [PROMPT], {"system": 3}, r"task\.json: 'system' is 3; expected a string"),
    ("a slip in a form", [PROMPT], {"form": "completions"}, r"did you mean 'completion'"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "about", "message"), [x[1:] for x in BAD], ids=[x[0] for x in BAD])
def test_bad_text_is_answered_with_file_line_and_the_way_out(
    rows: list[Any], about: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "tasks" / "t", rows, about)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks("folder", root=tmp_path / "tasks")
    assert str(tmp_path / "tasks" / "t") in str(caught.value)


def test_chats_that_a_tokenizer_cannot_write_are_refused_with_task_and_row(tmp_path: Path) -> None:
    task: Any = read_task(write(tmp_path / "t", [{"messages": TURNS}]))
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template"):
        TextToText(tokenizer("seq2seq", WORDS), 2)(task)
    with pytest.raises(ValueError, match=r"task 't', row 0: the tokenizer has no chat template"):
        NextToken(tokenizer("causal", WORDS))(task)
    refusing = "{{ raise_exception('no systems here') }}"
    with pytest.raises(ValueError, match=r"refuses messages of .*: no systems here"):
        NextToken(chatting(template=refusing))(task)
    numbered = "{{ messages | length }}"
    with pytest.raises(ValueError, match=r"the answer cannot be told apart"):
        NextToken(chatting(template=numbered))(task)
    with pytest.raises(ValueError, match=r"task 't' is chat: label matching needs labels"):
        LabelMatching(tokenizer("seq2seq", WORDS))(task)
    plain: Any = NextToken(chatting())(TextTask("p", (read_row(PROMPT),), form="completion"))
    with pytest.raises(ValueError, match=r"messages for the task 'p', which is completion"):
        plain.encoding.prompts([TURNS[:1]])


def test_answers_are_generated_from_conversations() -> None:
    from text_backbones import written

    from pyro_lift import TaskPosterior

    known = written("llama").posterior
    words = chatting()
    row = read_row({"messages": TURNS[:2]}, "chat")
    task = NextToken(words)(TextTask("t", (row,), form="chat"))
    posterior = TaskPosterior(known.adapter, task, known.thetas)
    texts = posterior.generate([[said("user", "red cat")], "red cat", TURNS[:3]], max_new_tokens=4)
    assert len(texts) == 3 and texts[0] == texts[1]
    ids = words("user red cat <end> assistant", add_special_tokens=False, return_tensors="pt")["input_ids"]
    by_hand = posterior.generate(ids, max_new_tokens=4)
    assert words.batch_decode(by_hand, skip_special_tokens=True)[0].strip() == texts[0]
    assert torch.isfinite(posterior.score([TURNS[:3]], ["two three"]).log_prob).all()
