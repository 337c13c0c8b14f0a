"""Options of transformers' ``generate``: each means for several draws, and in every form, what it means for one."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers as hf
from conftest import ROOT
from text_backbones import CAUSAL, TEXTS, WRITERS, posterior_of, written
from transformers import GenerationConfig

from pyro_lift import TaskPosterior
from pyro_lift.data.encode import TextToText
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
SPECIAL = {"pad_token_id": 0, "eos_token_id": 2}


def thrice(name: str) -> TaskPosterior:
    """Three equal draws, which are their own average."""
    known = written(name).posterior
    return TaskPosterior(known.adapter, known.task, known.thetas[:1].repeat(3, 1))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefix_allowed_tokens_fn": lambda _, __: [4, 5, 6], "num_beams": 2},
        {"min_new_tokens": 6},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(max_new_tokens=5, num_beams=2, **SPECIAL)},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: ", ".join(options),
)
def test_equal_draws_write_together_what_each_writes(name: str, options: dict[str, Any]) -> None:
    if "guidance_scale" in options and name not in CAUSAL:
        pytest.skip("transformers guides causal models")
    length = {} if "generation_config" in options else {"max_new_tokens": 6}
    inputs = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    together, alone = (thrice(name).generate(inputs, which=which, **options, **length) for which in ("draws", 0))
    assert together.tolist() == alone.tolist()


@pytest.mark.parametrize("name", ["bart", "llama"])
@pytest.mark.parametrize("which", [0, "draws"])
def test_a_generation_config_means_what_its_options_mean(
    name: str, which: Any, caplog: pytest.LogCaptureFixture
) -> None:
    known = written(name).posterior
    options: dict[str, Any] = {"num_beams": 2, "repetition_penalty": 1.3}
    with caplog.at_level(logging.WARNING, "transformers"):
        for length in ({"max_new_tokens": 4}, {"max_length": 9}, {}):
            config = GenerationConfig(**options, **length, **SPECIAL)
            before = config.to_dict()
            given = known.generate(IDS, which=which, generation_config=config)
            assert given.tolist() == known.generate(IDS, which=which, **options, **length, **SPECIAL).tolist()
            assert config.to_dict() == before
    assert "generation_config" not in caplog.text


def test_several_outputs_are_refused_wherever_they_are_asked_for() -> None:
    known = written("bart").posterior
    config = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True, **SPECIAL)
    assert len(known.generate(IDS, generation_config=config).sequences) == 2
    with pytest.raises(ValueError, match=r"return_dict_in_generate=True with 2 inputs, batch_size=1"):
        known.generate(IDS, generation_config=config, batch_size=1)
    network: Any = known.adapter.backbone.get_base_model()  # type: ignore[operator]
    network.generation_config.return_dict_in_generate = True
    with pytest.raises(ValueError, match=r"return_dict_in_generate=True with 2 inputs, batch_size=1"):
        known.generate(IDS, batch_size=1)
    attentions = GenerationConfig(output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"output_attentions=True: with which='draws' .* Use which=0"):
        known.generate(IDS, which="draws", generation_config=attentions)


@pytest.mark.parametrize("name", ["bart", "gpt2"])
@pytest.mark.parametrize("which", [0, "draws"])
def test_a_mask_may_be_a_keyword_as_transformers_has_it(name: str, which: Any) -> None:
    known = written(name).posterior
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0], [5, 9, 7]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    beside = known.generate({"input_ids": ids, "attention_mask": mask}, which=which, max_new_tokens=4)
    as_keyword = known.generate(ids, which=which, attention_mask=mask, max_new_tokens=4, batch_size=2)
    assert as_keyword.tolist() == beside.tolist()


def test_a_decoders_beginning_may_be_a_keyword() -> None:
    known = written("bart").posterior
    begun = torch.tensor([[2, 5], [2, 6]])
    whole = known.generate({"input_ids": IDS, "decoder_input_ids": begun}, max_new_tokens=4)
    assert known.generate(IDS, decoder_input_ids=begun, max_new_tokens=4, batch_size=1).tolist() == whole.tolist()


@pytest.mark.parametrize(
    "column", [np.array, pd.Series, lambda texts: datasets.Dataset.from_dict({"text": texts})["text"]]
)
def test_a_column_of_a_table_is_a_list_of_strings(column: Any) -> None:
    posterior = posterior_of("llama")
    texts = column(TEXTS)
    assert not isinstance(texts, list)
    assert posterior.generate(texts, max_new_tokens=4) == posterior.generate(TEXTS, max_new_tokens=4)
    answers = column(["one", "two", "four"])
    given = posterior.score(texts, answers).log_prob
    torch.testing.assert_close(given, posterior.score(TEXTS, ["one", "two", "four"]).log_prob)


def test_empty_and_unknown_texts_are_read_and_scored() -> None:
    for name in ("bart", "llama"):
        posterior = posterior_of(name)
        for which in ("mean", "draws"):
            together = posterior.generate(["", "   ", "xyzzy", "red dog"], which=which, max_new_tokens=4)
            alone = [posterior.generate([text], which=which, max_new_tokens=4)[0] for text in ("", "   ", "xyzzy")]
            assert together[:3] == alone
        assert torch.isfinite(posterior.score(["", "red"], ["one", ""]).log_prob).all()


@pytest.mark.parametrize("which", [0, "draws"])
def test_stop_strings_need_no_tokenizer_where_strings_are_encoded(which: Any) -> None:
    folder = ROOT / "backbones" / "bart-novels"
    backbone: Any = load_backbone(folder, "seq2seq")
    encoder = TextToText(hf.AutoTokenizer.from_pretrained(folder), backbone.config.decoder_start_token_id, 32)
    adapter = adapt_backbone(backbone, recipe(backbone, rank=1), seed=0)
    task = encoder(TextTask("novels", (TextRow("It was", (" the best of times",)),)))
    posterior = TaskPosterior(adapter, task, adapter.initial.repeat(2, 1))
    options: dict[str, Any] = {"max_new_tokens": 12, "forced_eos_token_id": None, "which": which}
    (whole,) = posterior.generate(["It was the best of times,"], **options)
    stop = whole.split()[0][-1]
    (text,) = posterior.generate(["It was the best of times,"], stop_strings=[stop], **options)
    assert stop in text and len(text) < len(whole) and whole.startswith(text)


def test_longer_texts_than_there_are_places_for_are_named() -> None:
    for name, needed in (("gpt2", "inputs of 3 tokens and up to 100"), ("bart", "inputs of 3 tokens and up to 100")):
        known = written(name).posterior
        for which in ("mean", "draws"):
            with pytest.raises(ValueError, match=rf"{needed} of output: the backbone has places for 32\."):
                known.generate(IDS, which=which, max_new_tokens=100, eos_token_id=None)
        with pytest.raises(ValueError, match=r"inputs of 3 tokens and up to 90 of output"):
            known.score(IDS, torch.full((2, 90), 5))
        with pytest.raises(ValueError, match=r"inputs of 40 tokens and up to \d+ of output"):
            known.generate(torch.full((1, 40), 5))


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (IDS, {"generation_config": {"max_new_tokens": 3}}, TypeError, r"generation_config is a dict; expected"),
        (IDS, {"inputs_embeds": torch.zeros(2, 3, 16)}, ValueError, r"inputs_embeds as an option; the inputs are"),
        (IDS, {"input_ids": IDS}, ValueError, r"input_ids as an option"),
        (["red"], {"attention_mask": [[1]]}, ValueError, r"attention_mask beside strings"),
        (IDS, {"max_new_tokens": 0}, ValueError, r"max_new_tokens.*greater than 0"),
        (IDS, {"num_return_sequences": 3, "max_new_tokens": 3}, ValueError, r"num_return_sequences"),
        ((text for text in TEXTS), {}, TypeError, r"expected strings, or tokens"),
        ([None], {}, TypeError, r"inputs\[0\] is None; the rows of task .* are texts"),
    ],
)
@pytest.mark.parametrize("which", [0, "draws"])
def test_options_without_a_meaning_are_refused(
    inputs: Any, options: dict[str, Any], error: type[Exception], message: str, which: Any
) -> None:
    with pytest.raises(error, match=message):
        posterior_of("gpt2").generate(inputs, which=which, **options)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_base_of_bfloat16_writes_what_plain_peft_writes(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    known = written(name)
    half = known.backbone.to(torch.bfloat16)
    adapter = adapt_backbone(half, recipe(half, rank=2), seed=0)
    assert adapter.initial.dtype == torch.float32
    posterior = TaskPosterior(adapter, known.posterior.task, known.posterior.thetas)
    posterior.to_peft(tmp_path, 0)
    network = peft.PeftModel.from_pretrained(half, tmp_path).eval()
    theirs = torch.as_tensor(
        network.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, **options)
    )
    given = 1 if half.config.is_encoder_decoder else IDS.shape[1]
    ours = posterior.generate(IDS, which=0, max_new_tokens=6, **options)
    assert ours.tolist() == theirs[:, given:].tolist()
    assert posterior.generate(IDS, which="draws", max_new_tokens=6, **options).shape[0] == 2
