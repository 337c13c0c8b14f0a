"""Likelihoods: label matching, label scoring, next tokens, against the same thing written out plainly."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel

from pyro_lift import LiFT, RandomAdapter, Task
from pyro_lift.inference.adaptation.predict import label_probabilities, predict
from pyro_lift.models.likelihoods import IGNORED, log_likelihood, next_tokens, shift_right
from pyro_lift.models.observation import outputs
from pyro_lift.models.readouts import LabelMatching, LabelScoring, pool

D = 16


@pytest.fixture
def encoder() -> BertModel:
    config = BertConfig(
        vocab_size=30, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config).eval()


@pytest.fixture
def adapter(encoder: BertModel) -> RandomAdapter:
    return RandomAdapter(peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["query", "value"])))


def texts(*shape: int, shortest: int = 2) -> dict[str, Tensor]:
    """Random token numbers, padded on the right with 0."""
    lengths = torch.randint(shortest, shape[-1] + 1, shape[:-1])
    mask = (torch.arange(shape[-1]) < lengths.unsqueeze(-1)).long()
    return {"input_ids": torch.randint(1, 30, shape) * mask, "attention_mask": mask}


def vector(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """One text, without its padding."""
    n = int(mask.sum())
    states = encoder(input_ids=ids[None, :n], attention_mask=mask[None, :n]).last_hidden_state[0]
    mean = states.mean(0)
    return mean / mean.norm()  # type: ignore[no-any-return]


def matching_task(rows: int, classes: int) -> Task:
    return Task(f"m{rows}", (texts(rows, 7), torch.arange(rows) % classes), "matching", label_texts=texts(classes, 4))


def test_matching_is_the_scaled_cosine_of_texts_encoded_one_by_one(adapter: RandomAdapter) -> None:
    task = matching_task(5, 3)
    assert task.label_texts is not None
    logits = outputs(adapter, task.train, adapter.initial, None)
    net = adapter.backbone
    with torch.no_grad():
        inputs = torch.stack([vector(net, *row) for row in zip(*task.train.inputs.values(), strict=True)])
        labels = torch.stack([vector(net, *row) for row in zip(*task.label_texts.values(), strict=True)])
    torch.testing.assert_close(logits, 20.0 * inputs @ labels.T, atol=2e-5, rtol=1e-5)


def test_options_of_a_row_are_matched_with_that_row_and_absent_ones_have_no_probability(adapter: RandomAdapter) -> None:
    options = texts(4, 3, 5)
    options["attention_mask"][1, 2] = 0
    inputs = texts(4, 7) | {f"option_{key}": x for key, x in options.items()}
    task = Task("mc", (inputs, torch.tensor([0, 1, 2, 0])), "matching")
    theta = adapter.initial.clone().requires_grad_()
    logits = outputs(adapter, task.train, theta, None)
    assert torch.softmax(logits, -1)[1, 2] == 0.0
    log_likelihood("matching", logits, task.train.target).sum().backward()
    assert theta.grad is not None and torch.isfinite(theta.grad).all()
    for row in (0, 3):
        alone = {key: x[row : row + 1] for key, x in inputs.items() if not key.startswith("option")}
        shared = {f"label_{key}": x[row] for key, x in options.items()}
        torch.testing.assert_close(adapter(theta=theta, **alone, **shared)[0], logits[row], atol=2e-5, rtol=1e-5)


def test_padding_changes_no_logit(adapter: RandomAdapter) -> None:
    task = matching_task(4, 2)
    wide = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in task.train.named.items()}
    torch.testing.assert_close(
        adapter(theta=adapter.initial, **wide),
        outputs(adapter, task.train, adapter.initial, None),
        atol=2e-5,
        rtol=1e-5,
    )


def test_several_tasks_at_once_are_each_matched_to_their_own_labels(adapter: RandomAdapter) -> None:
    tasks = [matching_task(4, 3), matching_task(4, 3)]
    thetas = adapter.initial + 0.1 * torch.randn(2, adapter.dim)
    stacked = {name: torch.stack([task.train.named[name] for task in tasks]) for name in tasks[0].train.named}
    together = adapter(theta=thetas, **stacked)
    assert adapter._block.one_pass
    for one, task, theta in zip(together, tasks, thetas, strict=True):
        torch.testing.assert_close(one, outputs(adapter, task.train, theta, None), atol=2e-5, rtol=1e-5)


def test_minibatches_and_predictions_know_the_label_texts(adapter: RandomAdapter) -> None:
    task = matching_task(5, 3)
    whole = predict(adapter, adapter.initial[None], task.train, "matching")
    parts = predict(adapter, adapter.initial[None], task.train, "matching", batch_size=2)
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (5, 3)
    torch.testing.assert_close(whole.sum(-1), torch.ones(5))


@pytest.mark.parametrize("head_scale", [None, 1.0])
@pytest.mark.parametrize("head", ["solve", "langevin"])
def test_matching_tasks_with_unequal_numbers_of_labels_need_no_shared_head(
    adapter: RandomAdapter, head_scale: float | None, head: Any
) -> None:
    tasks = [matching_task(5, 2), matching_task(6, 4)]
    lift = LiFT(adapter, sgd_steps=2, burn_in=2, samples=4, head_scale=head_scale, head=head, seed=0)
    posterior = lift.meta_train(tasks, progress=False).adapt(tasks[1], steps=4, draws=2)
    assert posterior.predict(tasks[1].train).shape == (6, 4)
    assert (posterior.heads is None) == (head == "langevin")  # the similarities alone


def test_every_adapter_weight_learns_from_matching(adapter: RandomAdapter) -> None:
    task = matching_task(8, 3)
    theta = (adapter.initial + 0.1 * torch.randn(adapter.dim)).requires_grad_()
    log_likelihood("matching", outputs(adapter, task.train, theta, None), task.train.target).sum().backward()
    assert theta.grad is not None and bool((theta.grad != 0).all())


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pooling_sees_no_padding(how: Any) -> None:
    hidden, mask = torch.randn(3, 6, 4), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    wild = torch.where(mask.unsqueeze(-1) == 1, hidden, torch.tensor(1e6))
    for i, n in enumerate((6, 4, 1)):
        expected = {"mean": hidden[i, :n].mean(0), "first": hidden[i, 0], "last": hidden[i, n - 1]}[how]
        torch.testing.assert_close(pool(wild, mask, how)[i], expected)


def test_last_token_pooling_of_left_padded_texts() -> None:
    hidden, mask = torch.randn(1, 4, 2), torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask, "last"), hidden[:, 3])


@pytest.mark.parametrize("normalised", [False, True])
def test_label_scores_are_the_models_own_losses(normalised: bool) -> None:
    config = BartConfig(
        vocab_size=30, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    inputs, labels = texts(3, 6), texts(2, 4)
    named = inputs | {f"label_{key}": x for key, x in labels.items()}
    scoring = LabelScoring(config.decoder_start_token_id, length_normalised=normalised)
    with torch.no_grad():
        scores = scoring(model, named)
        for i in range(3):
            for c in range(2):
                n = int(labels["attention_mask"][c].sum())
                one = {key: x[i : i + 1] for key, x in inputs.items()}
                loss = model(**one, labels=labels["input_ids"][c : c + 1, :n]).loss  # transformers' mean over tokens
                expected = -loss if normalised else -n * loss
                torch.testing.assert_close(scores[i, c], expected, atol=1e-5, rtol=1e-5)


def test_class_probabilities_of_a_text_to_text_model_are_averaged_over_draws() -> None:
    config = BartConfig(
        vocab_size=30, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    model = peft.get_peft_model(BartForConditionalGeneration(config), peft.LoraConfig(target_modules=["q_proj"]))
    adapter, scoring = RandomAdapter(model), LabelScoring(config.decoder_start_token_id)
    target = torch.randint(1, 30, (5, 3))
    inputs = texts(5, 6) | {"decoder_input_ids": shift_right(target, config.decoder_start_token_id)}
    task, labels = Task("t", (inputs, target), "tokens"), texts(2, 4)
    thetas = adapter.initial + 0.5 * torch.randn(3, adapter.dim)
    p = label_probabilities(adapter, thetas, task.train, labels, scoring, batch_size=2)
    singles = [label_probabilities(adapter, theta[None], task.train, labels, scoring) for theta in thetas]
    torch.testing.assert_close(p, torch.stack(singles).mean(0))
    torch.testing.assert_close(p.sum(-1), torch.ones(5))
    assert not torch.allclose(singles[0], singles[1])


def test_shift_right_is_transformers_own() -> None:
    from transformers.models.bart.modeling_bart import shift_tokens_right

    target = torch.tensor([[0, 7, 8, 2], [0, 9, 2, IGNORED]])
    ours = shift_right(target, 2)
    theirs = shift_tokens_right(target, 1, 2)
    counts = target != IGNORED
    assert torch.equal(ours[counts], theirs[counts])
    assert bool((ours >= 0).all())


def test_next_tokens_leave_out_padding_and_prompt() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 5, 6], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    x = IGNORED
    assert next_tokens(ids, mask).tolist() == [[6, 7, 8, x], [x, x, 6, x], [6, x, x, x]]
    prompt = torch.tensor([2, 1, 1])
    assert next_tokens(ids, mask, prompt).tolist() == [[x, 7, 8, x], [x, x, 6, x], [6, x, x, x]]


def test_token_likelihood_is_a_sum_over_the_tokens_that_count() -> None:
    logits, target = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [4, IGNORED, IGNORED]])
    log_p = torch.log_softmax(logits, -1)
    expected = torch.stack([log_p[0, 0, 1] + log_p[0, 1, 2], log_p[1, 0, 4]])
    torch.testing.assert_close(log_likelihood("tokens", logits, target), expected)


def test_regression_is_normal_and_summed_over_outputs() -> None:
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])
    expected = -0.5 * (0.5 / 2.0) ** 2 - 2 * (math.log(2.0) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(log_likelihood("regression", output, target, 2.0), torch.tensor([expected]))


def test_what_is_missing_or_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="no label texts among the inputs input_ids, attention_mask"):
        LabelMatching()(lambda **_: None, texts(2, 3))
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        LabelMatching(pooling="meen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale=0"):
        LabelMatching(scale=0)
