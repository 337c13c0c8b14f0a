"""A task of written answers that leaves out what the decoder reads is refused, and told what makes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_backbones import D, V, bart, seq2seq_task, t5
from torch import Tensor

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.likelihoods import shift_right
from pyro_lift.models.observation import check_width

FAST: dict[str, Any] = {"sgd_steps": 0, "burn_in": 0, "samples": 8, "seed": 0}


def labelled(name: str = "hf", answer: int = 6) -> Task:
    """Rows in transformers' form; answers as long as questions are what BART would not notice."""
    x = torch.randint(5, V, (8, 6), generator=torch.Generator().manual_seed(0))
    y = torch.randint(5, V, (8, answer), generator=torch.Generator().manual_seed(1))
    return Task(name, {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}, "tokens")


def adapter_of(network: Any, **options: Any) -> RandomAdapter:
    return adapt_backbone(network, recipe(network, rank=2), seed=0, **options)


@pytest.mark.parametrize("answer", [6, 4])
@pytest.mark.parametrize(("make", "start"), [(bart, 2), (t5, 0)])
def test_it_is_refused_with_the_way_out(make: Any, start: int, answer: int) -> None:
    refused = r"task 'hf': no 'decoder_input_ids' among the inputs \(attention_mask, input_ids\)"
    refused += rf".*shift_right\(targets, {start}\)"
    adapter = adapter_of(make())
    with pytest.raises(ValueError, match=refused):
        check_width(adapter, [labelled(answer=answer)], None)
    prior = LiFT(adapter, **FAST).meta_train([seq2seq_task("a"), seq2seq_task("b")], progress=False)
    for door in (
        lambda: LiFT(adapter, **FAST).meta_train([seq2seq_task("a"), labelled()], progress=False),
        lambda: prior.adapt(labelled(answer=answer)),
        lambda: prior.adapt_many([seq2seq_task("a"), labelled(answer=answer)]),
    ):
        with pytest.raises(ValueError, match=refused):
            door()


def test_the_way_out_is_what_transformers_does() -> None:
    torch.manual_seed(0)
    network: Any = bart().eval()
    task = labelled()
    target = task.train.target
    inputs = {**task.train.inputs, "decoder_input_ids": shift_right(target, network.config.decoder_start_token_id)}
    ours = network(**inputs).logits
    torch.testing.assert_close(ours, network(**task.train.inputs, labels=target).logits)
    assert check_width(adapter_of(network), [Task("right", (inputs, target), "tokens")], None) == V


@pytest.mark.parametrize("form", ["mapping", "rows", "tensor"])
def test_a_prediction_without_it_says_what_writes_answers(form: str) -> None:
    adapter = adapter_of(bart())
    prior = LiFT(adapter, **FAST).meta_train([seq2seq_task("a"), seq2seq_task("b")], progress=False)
    posterior = prior.adapt(seq2seq_task("c"), steps=4, draws=2)
    rows = labelled().train
    inputs: dict[str, Any] = {"mapping": rows.inputs, "rows": rows, "tensor": rows.inputs["input_ids"]}
    with pytest.raises(TypeError, match=r"without 'decoder_input_ids'.*posterior.generate.*posterior.score"):
        posterior.predict(inputs[form])
    given = {**rows.inputs, "decoder_input_ids": shift_right(rows.target, 2)}
    assert posterior.predict(given).shape == (8, 6, V)


def test_a_readout_of_the_caller_s_may_give_it_to_the_decoder() -> None:
    def readout(network: Any, named: Any) -> Tensor:
        logits: Tensor = network(**named, decoder_input_ids=named["input_ids"]).logits
        return logits

    assert check_width(adapter_of(bart(), readout=readout), [labelled()], None) == V


def test_classes_of_an_encoder_decoder_need_none() -> None:
    config = hf.BartConfig(
        vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_labels=3,
        decoder_attention_heads=2, encoder_ffn_dim=D, decoder_ffn_dim=D, max_position_embeddings=32,
    )  # fmt: skip
    network = hf.BartForSequenceClassification(config)
    x = torch.randint(5, V, (6, 7)).index_fill_(1, torch.tensor([6]), 2)  # the end, at which classes are read
    task = Task("classes", ({"input_ids": x, "attention_mask": torch.ones_like(x)}, torch.arange(6) % 3))
    assert check_width(adapter_of(network), [task], None) == 3
