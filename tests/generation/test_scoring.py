"""Scores of given texts, against sums by hand over single rows and single draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from text_backbones import TEXTS, WRITERS, Written, posterior_of, written
from torch import Tensor

from pyro_lift import TaskPosterior
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.models.likelihoods import log_likelihood

ANSWERS = ["one", "two three four", "cat"]


def by_hand(known: Written, prompt: list[int], answer: list[int]) -> Tensor:
    """Log probabilities ``[S, L, V]`` of the tokens of one answer, each draw and row alone, without any padding."""
    adapter, parts = known.posterior.adapter, []
    for theta in known.posterior.thetas:
        with adapter.bound(theta), torch.no_grad():
            if known.backbone.config.is_encoder_decoder:
                start = known.backbone.config.decoder_start_token_id
                named = {
                    "input_ids": torch.tensor([prompt]),
                    "decoder_input_ids": torch.tensor([[start, *answer[:-1]]]),
                }
                logits = adapter.backbone(**named).logits[0]
            else:
                logits = adapter.backbone(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        parts.append(torch.log_softmax(logits, -1))
    return torch.stack(parts)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_each_row_and_draw_alone(name: str, side: str) -> None:
    known = written(name)
    if known.backbone.config.is_encoder_decoder and side == "left":
        side = "right"  # positions of an encoder begin at the left
    prompts, answers = [[5, 6, 7, 8], [9, 10], [11, 12, 13]], [[14, 15, 2], [16, 17, 18, 2], [19, 5]]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    outputs = torch.zeros(3, 6, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        where = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
        outputs[row, : len(answer)] = torch.tensor(answer)
        outputs[row, len(answer) :] = 2 if answer[-1] == 2 else 0  # end tokens, as beams leave them, or padding
    scores = known.posterior.score({"input_ids": ids, "attention_mask": mask}, outputs, batch_size=2)
    assert scores.lengths.tolist() == [len(answer) for answer in answers]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        log_p, n = by_hand(known, prompt, answer), len(answer)
        token = log_p[:, torch.arange(n), answer]
        torch.testing.assert_close(scores.log_prob[row], token.sum(-1).exp().mean().log(), atol=1e-4, rtol=1e-4)
        mean = log_p.exp().mean(0)
        entropy = -(mean * mean.log()).sum(-1)
        inside = -(log_p.exp() * log_p).sum(-1).mean(0)
        expected = {"token_log_prob": mean[torch.arange(n), answer].log(), "entropy": entropy}
        expected["mutual_information"] = entropy - inside
        for field, value in expected.items():
            given = getattr(scores, field)[row]
            torch.testing.assert_close(given[:n], value, atol=1e-4, rtol=1e-4)
            assert (given[n:] == 0.0).all()
        assert (entropy - inside > 1e-3).any()


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_padding_tokens_that_a_network_has_written_are_tokens(name: str) -> None:
    """A bad network writes them; at a row's end they are padding."""
    known = written(name)
    outputs = torch.tensor([[0, 5, 0, 6], [0, 0, 0, 0], [7, 5, 0, 0], [7, 0, 2, 0]])
    scores = known.posterior.score([[5, 6, 7]] * 4, outputs)
    assert scores.lengths.tolist() == [4, 4, 2, 3]
    for row, answer in enumerate(([0, 5, 0, 6], [0] * 4, [7, 5], [7, 0, 2])):
        token = by_hand(known, [5, 6, 7], answer)[:, torch.arange(len(answer)), answer]
        torch.testing.assert_close(scores.log_prob[row], token.sum(-1).exp().mean().log(), atol=1e-4, rtol=1e-4)


def test_one_draw_disagrees_with_nobody() -> None:
    known = written("t5").posterior
    scores = TaskPosterior(known.adapter, known.task, known.thetas[:1]).score([[5, 6]], [[7, 8, 2]])
    torch.testing.assert_close(scores.mutual_information, torch.zeros(1, 3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(scores.token_log_prob.sum(-1), scores.log_prob)
    torch.testing.assert_close(scores.per_token, scores.log_prob / 3)


@pytest.mark.parametrize("name", ["bart", "gpt2", "llama"])
def test_strings_are_scored_as_they_were_learnt(name: str) -> None:
    posterior = posterior_of(name)
    scores = posterior.score(TEXTS, ANSWERS)
    encoder: Any = posterior.encoding.encoder  # type: ignore[union-attr]
    rows = tuple(TextRow(text, (answer,)) for text, answer in zip(TEXTS, ANSWERS, strict=True))
    train = encoder(TextTask("colours", rows)).train
    draws = []
    for theta in posterior.thetas:
        with torch.no_grad():
            draws.append(log_likelihood("tokens", posterior.adapter(theta=theta, **train.named), train.target))
    total = torch.logsumexp(torch.stack(draws), 0) - math.log(len(draws))
    torch.testing.assert_close(scores.log_prob, total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_what_was_generated_can_be_scored(name: str) -> None:
    """Beams of the averaged network report the sum of the averaged log probabilities of their tokens."""
    known = written(name)
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3).long()}
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "length_penalty": 0.0, "which": "draws"}
    tokens = known.posterior.generate(inputs, **options)
    whole = known.posterior.generate(inputs, return_dict_in_generate=True, output_scores=True, **options)
    scores = known.posterior.score(inputs, tokens)
    torch.testing.assert_close(scores.token_log_prob.sum(-1), whole.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (["one"], ValueError, r"1 outputs for 3 inputs"),
        ("one", TypeError, r"the string 'one'; give a list"),
        ([[1, 2], [3]], TypeError, r"outputs: expected strings, or tokens"),
        (torch.zeros(3, 2), ValueError, r"torch\.float32 of shape \[3, 2\]; expected token numbers"),
        (torch.full((3, 2), -100), ValueError, r"outputs, row 0: no token to score"),
    ],
)
def test_outputs_that_cannot_be_scored_are_refused(outputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        posterior_of("bart").score(TEXTS, outputs)
