"""Encoders: what strings and pictures become, read back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_lift.data.encode import LabelMatching, NextToken, Pictures, TextToText, check_tokenizer
from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.models.likelihoods import IGNORED

WORDS = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", "a", "b", "c", "d", "yes", "no", "[", "]", "t"]


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def test_classification_is_matched_to_its_label_strings(tokenizer: Any) -> None:
    rows = (TextRow("a b", ("no",)), TextRow("c", ("yes",)))
    encode = LabelMatching(tokenizer)
    task = encode(TextTask("t", rows, test=rows[:1], form="classification", metric="ACC", labels=("yes", "no")))
    assert (task.kind, task.labels, task.metric) == ("matching", ("yes", "no"), "ACC")
    assert task.train.inputs["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]
    assert task.train.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert task.train.target.tolist() == [1, 0]
    assert task.label_texts is not None and task.label_texts["input_ids"].tolist() == [[1, 9, 2], [1, 10, 2]]
    assert task.test is not None and len(task.test) == 1 and encode.notes == ()


def test_labels_that_the_tokenizer_takes_for_one_are_noted_and_kept(tokenizer: Any) -> None:
    rows = (TextRow("a b", ("x",)), TextRow("c", ("y",)))  # neither is in the vocabulary
    encode = LabelMatching(tokenizer)
    task = encode(TextTask("t", rows, form="classification", labels=("x", "y", "no")))
    assert task.labels == ("x", "y", "no") and task.train.target.tolist() == [0, 1]
    (note,) = encode.notes
    assert "t: the tokenizer does not tell these labels apart" in note and "'x' and 'y'" in note and "no" in note
    encode(TextTask("t", rows[:1], form="classification", labels=("x", "no")))
    assert encode.notes == ()  # the same task again, without them


def test_every_row_has_its_own_options_and_absent_ones_have_no_mask(tokenizer: Any) -> None:
    train = (TextRow("a", ("b",), ("a", "b", "c d")), TextRow("b", ("c",), ("c", "d")))
    test = (TextRow("a", ("a",), ("a", "b", "c", "d")),)
    task = LabelMatching(tokenizer)(TextTask("t", train, test=test, form="multiple_choice", metric="ACC"))
    assert task.num_classes == 4 and task.test is not None
    assert task.train.inputs["option_attention_mask"].any(-1).tolist() == [
        [True] * 3 + [False],
        [True] * 2 + [False] * 2,
    ]
    assert task.train.inputs["option_input_ids"][0, 2].tolist() == [1, 7, 8, 2]
    assert (task.train.target.tolist(), task.test.target.tolist()) == ([1, 0], [0])


def test_text_to_text_has_the_tasks_name_in_front_and_decodes_from_the_start_token(tokenizer: Any) -> None:
    rows = (TextRow("a", ("b c",)), TextRow("b", ("d", "a")))
    task = TextToText(tokenizer, start_token=2)(TextTask("t", rows))
    assert tokenizer.decode(task.train.inputs["input_ids"][0]) == "<s> [ t ] a </s>"
    assert task.train.target.tolist() == [[1, 6, 7, 2], [1, 8, 2, IGNORED]]
    assert task.train.inputs["decoder_input_ids"].tolist() == [[2, 1, 6, 7], [2, 1, 8, 2]]


def test_context_without_a_line_becomes_a_mask(tokenizer: Any) -> None:
    rows = (TextRow("", ("b",)), TextRow("a", ("b",)))
    task = TextToText(tokenizer, start_token=2)(TextTask("t", rows, form="next_token", metric="Perplexity"))
    assert task.train.inputs["input_ids"].tolist() == [[1, 3, 2], [1, 5, 2]]


def test_a_causal_model_predicts_the_output_and_the_end_alone(tokenizer: Any) -> None:
    task = NextToken(tokenizer)(TextTask("t", (TextRow("a b", ("c d",)), TextRow("a", ("b",)))))
    assert task.train.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 6, 2, 0, 0]]
    x = IGNORED
    assert task.train.target.tolist() == [[x, 7, 8, 2, x], [6, 2, x, x, x]]


def test_a_long_input_of_a_causal_model_loses_its_beginning_never_its_output(tokenizer: Any) -> None:
    encode = NextToken(tokenizer, max_length=4)
    task = encode(TextTask("t", (TextRow("a b c d", ("b c",)),)))
    assert task.train.inputs["input_ids"].tolist() == [[8, 6, 7, 2]]
    assert task.train.target.tolist() == [[6, 7, 2, IGNORED]]
    assert encode.notes == ("1 texts longer than 4 tokens were cut (most: t 1)",)


def test_long_texts_are_cut_counted_and_reported(tokenizer: Any) -> None:
    encode = LabelMatching(tokenizer, max_length=4)
    rows = (TextRow("a b c d", ("no",)), TextRow("a", ("no",)))
    task = encode(TextTask("t", rows, form="classification", metric="ACC", labels=("yes", "no")))
    assert task.train.inputs["input_ids"].tolist() == [[1, 5, 6, 2], [1, 5, 2, 0]]
    assert encode.notes == ("1 texts longer than 4 tokens were cut (most: t 1)",)


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="task 't' is text_to_text: label matching needs"):
        LabelMatching(tokenizer)(TextTask("t", (TextRow("a", ("b",)),)))
    with pytest.raises(ValueError, match="does not fit the model: it has 14 tokens, the model 10 embeddings"):
        check_tokenizer(tokenizer, 10)
    check_tokenizer(tokenizer, 14)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        check_tokenizer(tokenizer, 14)


def test_an_encoder_reads_answers_that_come_again_as_classes(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has to write a task.json for each of a dozen tasks whose answers are plainly classes."""
    rows = tuple(TextRow(text, (answer,)) for text, answer in zip("abcd", ("no", "yes", "no", "yes "), strict=True))
    named = TextTask("t", rows, test=rows[:1], form="classification", metric="ACC", labels=("no", "yes"))
    with caplog.at_level("INFO", "pyro_lift"):
        task = (encode := LabelMatching(tokenizer))(TextTask("t", rows, test=rows[:1]))
    assert encode.notes == ("1 tasks name no classes: their distinct answers are read as such (most: t 2)",)
    assert "task 't': its 2 distinct answers are read as classes: 'no', 'yes'" in caplog.text
    expected = LabelMatching(tokenizer)(named)
    assert (task.labels, task.kind, task.metric) == (expected.labels, "matching", "ACC")
    assert torch.equal(task.train.target, expected.train.target)
    assert task.encoding.form == "classification" and task.encoding.labels == ("no", "yes")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (("no", "no", "no", "no"), "its 4 training rows have 1 distinct"),
        (("1.5", "2.5", "3.0", "1.5"), "its 4 training rows have 3 distinct"),
        (("no", "yes", "no", "yes", "maybe"), "its 5 training rows have 3 distinct"),
    ],
)
def test_answers_that_may_be_other_than_classes_are_refused(
    tokenizer: Any, answers: tuple[str, ...], message: str
) -> None:
    rows = tuple(TextRow("a", (answer,)) for answer in answers)
    with pytest.raises(ValueError, match=message):
        LabelMatching(tokenizer)(TextTask("t", rows))


def test_answers_read_as_classes_hold_for_all_parts_and_are_one_a_row(tokenizer: Any) -> None:
    rows = tuple(TextRow("a", (answer,)) for answer in ("no", "yes", "no", "yes"))
    with pytest.raises(ValueError, match=r"task 't', test row 0: label 'maybe' is not one of 'no', 'yes'\."):
        LabelMatching(tokenizer)(TextTask("t", rows, test=(TextRow("b", ("maybe",)),)))
    several = (TextRow("b", ("no", "nope")), *rows)
    with pytest.raises(ValueError, match="label matching needs"):
        LabelMatching(tokenizer)(TextTask("t", several))
    alike = (*rows, TextRow("b", ("No",)), TextRow("b", ("No",)))
    with pytest.raises(ValueError, match="labels 'No' and 'no' differ in letter case"):
        LabelMatching(tokenizer)(TextTask("t", alike))


@pytest.mark.parametrize("form", ["text_to_text", "classification", "multiple_choice"])
def test_a_tokenizer_without_a_padding_token_encodes_what_counts_alike(tokenizer: Any, form: Any) -> None:
    rows = (TextRow("a b c", ("yes",), ("yes", "no", "b c")), TextRow("d", ("no",), ("no", "yes")))
    labels = ("yes", "no") if form == "classification" else ()
    task = TextTask("t", rows if form == "multiple_choice" else tuple(TextRow(r.input, r.outputs) for r in rows),
                    form=form, labels=labels)  # fmt: skip
    makers: list[Callable[[Any], LabelMatching | NextToken | TextToText]] = [LabelMatching]
    if form == "text_to_text":
        makers = [NextToken, partial(TextToText, start_token=1)]
    for make in makers:
        padded = make(tokenizer)(task)
        bare = copy.deepcopy(tokenizer)
        bare.pad_token = None
        unpadded = make(bare)(task)
        assert bare.pad_token is None  # the caller's tokenizer is as it was
        assert torch.equal(padded.train.target, unpadded.train.target)
        for name, ids in padded.train.inputs.items():
            place = name.replace("input_ids", "attention_mask")
            counts = (
                padded.train.inputs[place].bool() if place in padded.train.inputs else padded.train.target != IGNORED
            )
            assert torch.equal(ids[counts], unpadded.train.inputs[name][counts]), name


def test_pictures_are_resized_scaled_and_given_the_backbones_channels(tmp_path: Path) -> None:
    from PIL import Image

    gray = torch.full((2, 8, 8, 1), 255, dtype=torch.uint8)
    encode = Pictures(4, [0.5] * 3, [0.5] * 3)
    task = encode(ImageTask("p", Images(gray, torch.tensor([0, 1])), ("x", "y")))
    torch.testing.assert_close(task.train.inputs["pixel_values"], torch.ones(2, 3, 4, 4))
    assert task.num_classes == 2
    Image.new("RGB", (9, 5), (255, 0, 0)).save(tmp_path / "red.png")
    files = Images((tmp_path / "red.png",), torch.tensor([0]))
    red = encode(ImageTask("p", files, ("x", "y"))).train.inputs["pixel_values"]
    assert red.shape == (1, 3, 4, 4) and red[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png: not a picture"):
        encode(ImageTask("p", Images((tmp_path / "bad.png",), torch.tensor([0])), ("x", "y")))
