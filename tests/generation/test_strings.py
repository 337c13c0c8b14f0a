"""Strings in, strings out: the encoding travels with the task, the posterior and the prior, and is saved with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_backbones import TEXTS, encoded, posterior_of, written
from text_tokenizers import tokenizer
from tiny_backbones import FAMILIES

from pyro_lift import LiFT, LiFTPrior, TaskPosterior
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.support.archive import sealed, write_json


@pytest.mark.parametrize("name", ["bart", "gpt2", "llama"])
@pytest.mark.parametrize("which", ["mean", "draws", 1])
def test_strings_are_read_as_the_tasks_own_and_strings_are_given_back(name: str, which: Any) -> None:
    posterior = posterior_of(name)
    texts = posterior.generate(TEXTS, which=which, max_new_tokens=6, num_return_sequences=2, num_beams=2)
    assert len(texts) == 6 and all(isinstance(text, str) for text in texts)
    words = tokenizer("causal")
    alone = []
    for text in TEXTS:
        given = f"<s> [colours] {text} </s>" if name == "bart" else text
        ids = words(given, add_special_tokens=False, return_tensors="pt")["input_ids"]
        tokens = posterior.generate(ids, which=which, max_new_tokens=6, num_return_sequences=2, num_beams=2)
        alone += [x.strip() for x in words.batch_decode(tokens, skip_special_tokens=True)]
    assert texts == alone and any(texts)


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_a_saved_posterior_reads_and_writes_strings(name: str, tmp_path: Path) -> None:
    posterior = posterior_of(name)
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = TaskPosterior.from_pretrained(tmp_path / "posterior", written(name).backbone)
    assert loaded.generate(TEXTS, which="draws") == posterior.generate(TEXTS, which="draws")
    assert loaded.encoding is not None and loaded.encoding.about() == posterior.encoding.about()  # type: ignore[union-attr]
    (tmp_path / "posterior" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"posterior: the tokenizer cannot be read"):
        TaskPosterior.from_pretrained(tmp_path / "posterior", written(name).backbone)
    plain = written(name).posterior
    plain.save_pretrained(tmp_path / "posterior")
    assert not (tmp_path / "posterior" / "tokenizer_config.json").exists()
    with pytest.raises(TypeError, match="nothing says how to encode them"):
        TaskPosterior.from_pretrained(tmp_path / "posterior", written(name).backbone).generate(TEXTS)


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_texts_that_are_cut_are_counted_in_the_log(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = posterior_of(name)
    encoder: Any = posterior.encoding.encoder  # type: ignore[union-attr]
    monkeypatch.setattr(encoder, "max_length", 16)
    before = dict(encoder.cut)
    long = " ".join(["red"] * (2 * encoder.max_length))
    posterior.generate(TEXTS, max_new_tokens=2)
    assert not caplog.records
    posterior.generate([*TEXTS, long], max_new_tokens=2)
    assert f"1 of {len(TEXTS) + 1} inputs are longer than {encoder.max_length} tokens" in caplog.text
    caplog.clear()
    posterior.score([long, long], ["red", "blue"])
    assert "2 of 2 inputs are longer" in caplog.text
    assert encoder.cut == before  # which counts the task's own rows


def test_an_encoding_that_is_not_known_is_refused_by_the_file(tmp_path: Path) -> None:
    posterior_of("bart").save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["encoding"]["encoder"] = "Morse"
    write_json(tmp_path / "config.json", sealed({key: x for key, x in about.items() if key != "checksum"}))
    with pytest.raises(ValueError, match=r"config\.json.*'Morse'"):
        TaskPosterior.from_pretrained(tmp_path, written("bart").backbone)


def test_a_prior_writes_without_any_adaptation_and_after_it(tmp_path: Path) -> None:
    backbone = written("bart").backbone
    options: dict[str, Any] = {"sgd_steps": 3, "burn_in": 2, "samples": 6, "batch_size": 2}
    lift = LiFT(backbone, recipe(backbone, rank=2), seed=0, **options)
    prior = lift.meta_train([encoded("bart", name) for name in ("a", "b")], progress=False)
    prior.save_pretrained(tmp_path)
    loaded = LiFTPrior.from_pretrained(tmp_path, backbone)
    assert loaded.generate(TEXTS) == prior.generate(TEXTS) and len(prior.generate(TEXTS)) == 3
    ids = tokenizer()(["[a] red dog"], return_tensors="pt")["input_ids"]
    by_hand = prior.encoding.decode(prior.generate(ids, 0))  # type: ignore[union-attr]
    assert prior.generate(["red dog"], 0, task="a") == by_hand
    assert len(loaded.adapt(encoded("bart", "c"), steps=2, draws=1).generate(TEXTS)) == 3
    with pytest.raises(ValueError, match="which=4: the prior's components are"):
        prior.generate(TEXTS, 4)


def test_classes_of_strings_and_of_what_a_tokenizer_returns_are_predicted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES["bert"]
    backbone = family.make().eval()
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    posterior = TaskPosterior(adapter, encoded("bert"), adapter.initial + torch.randn(2, adapter.dim))
    batch = tokenizer()(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=True)
    p = posterior.predict(TEXTS)
    assert p.shape == (3, 2)
    torch.testing.assert_close(posterior.predict(batch), p)
    torch.testing.assert_close(torch.cat([posterior.predict([text]) for text in TEXTS]), p)
    posterior.save_pretrained(tmp_path)
    loaded = TaskPosterior.from_pretrained(tmp_path, backbone)
    torch.testing.assert_close(loaded.predict(TEXTS), p)
    torch.testing.assert_close(loaded.predict(batch), p)


def test_texts_come_in_every_form_and_what_is_none_is_told() -> None:
    import datasets
    import numpy as np
    import pandas as pd

    task = encoded("bert")
    backbone = FAMILIES["bert"].make()
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    posterior = TaskPosterior(adapter, task, adapter.initial.repeat(2, 1))
    words, texts = tokenizer("encoder"), ["red dog", "green cat"]
    expected = posterior.predict(texts)
    data = datasets.Dataset.from_dict({"text": texts})
    tokens = [words(texts, padding=True, return_tensors=kind) for kind in ("pt", "np", None)]
    for given in (tuple(texts), np.array(texts), pd.Series(texts), data["text"], *tokens):
        torch.testing.assert_close(posterior.predict(given), expected)
    for wrong, message in (
        ("red dog", r"give a list of strings, \[text\]"),
        (["red", 3], r"inputs\[1\] is a int, others are strings"),
        (words(["red", "red dog cat"]), r"'input_ids'.* one length: tokenizer\(texts, padding=True\)"),
        (data, r"a data set with the columns 'text'; give one of them: data\['text'\]"),
        ([], "an empty list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            posterior.predict(wrong)


def test_predict_names_generate_where_answers_are_written() -> None:
    posterior = posterior_of("bart")
    for inputs in (TEXTS, tokenizer()(TEXTS, padding=True, return_tensors="pt")):
        with pytest.raises(TypeError, match=r"the task 'colours' is one of written answers\. posterior\.generate"):
            posterior.predict(inputs)
    with pytest.raises(TypeError, match=r"the string 'red dog'; give a list"):
        posterior.predict("red dog")
    family = FAMILIES["bert"]
    backbone = family.make()
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    plain = TaskPosterior(adapter, family.task("t"), adapter.initial.unsqueeze(0))
    with pytest.raises(TypeError, match=r"strings; encode them first.* The task 't' was given in tensors"):
        plain.predict(TEXTS)
