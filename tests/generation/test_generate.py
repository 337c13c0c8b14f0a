"""Generated text: what plain PEFT writes, what draws write together, and how prompts may lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from callers_world import module, settings
from text_backbones import CAUSAL, WRITERS, Written, written
from tiny_backbones import FAMILIES
from torch import Tensor

from pyro_lift import TaskPosterior
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 8},
    "beams": {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "penalty": {"max_new_tokens": 8, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampling": {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_k": 6},
}


def prompts(name: str, count: int = 4) -> dict[str, Tensor]:
    rows = WRITERS[name].task("t").train
    return {key: rows.inputs[key][:count] for key in ("input_ids", "attention_mask")}


def by_peft(known: Written, which: int | str, inputs: dict[str, Tensor], folder: Path, **options: Any) -> Tensor:
    """What PEFT's own model of the exported folder writes after the prompt."""
    known.posterior.to_peft(folder, which)
    network = peft.PeftModel.from_pretrained(copy.deepcopy(known.backbone), folder).eval()
    torch.manual_seed(1)
    given = 1 if known.backbone.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return torch.as_tensor(network.generate(**inputs, **options))[:, given:]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("how", ["greedy", "beams", "penalty"])
def test_a_draw_writes_what_plain_peft_writes_and_so_do_draws_of_which_there_is_one(
    name: str, how: str, tmp_path: Path
) -> None:
    known, inputs = written(name), prompts(name)
    for which in (0, "mean"):
        theirs = by_peft(known, which, inputs, tmp_path / str(which), **DECODING[how])
        ours = known.posterior.generate(inputs, which=which, **DECODING[how])
        assert ours.tolist() == theirs.tolist()
        assert len({tuple(row) for row in ours.tolist()}) > 1
    first = TaskPosterior(known.posterior.adapter, known.posterior.task, known.posterior.thetas[:1])
    assert torch.equal(
        first.generate(inputs, which="draws", **DECODING[how]), first.generate(inputs, which=0, **DECODING[how])
    )


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("how", DECODING)
def test_equal_draws_write_together_what_each_writes(name: str, how: str) -> None:
    """The averaging network itself, with its caches side by side: equal draws are their own average."""
    known, inputs = written(name), prompts(name)
    thrice = TaskPosterior(known.posterior.adapter, known.posterior.task, known.posterior.thetas[:1].repeat(3, 1))
    together, alone = (thrice.generate(inputs, which=which, **DECODING[how]) for which in ("draws", 0))
    assert together.tolist() == alone.tolist()


def averaged(known: Written, inputs: dict[str, Tensor], after: Tensor) -> Tensor:
    """Probabilities of the next token after ``after`` ``[n, L]``, each draw in one pass without a cache."""
    adapter, total = known.posterior.adapter, torch.zeros(())
    for theta in known.posterior.thetas:
        if known.backbone.config.is_encoder_decoder:
            named = {**inputs, "decoder_input_ids": after}
        else:
            ids = torch.cat([inputs["input_ids"], after], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(after)], 1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with adapter.bound(theta), torch.no_grad():
            total = total + torch.softmax(adapter.backbone(**named).logits[:, -1], -1)
    return total / len(known.posterior.thetas)


@pytest.mark.parametrize("name", WRITERS)
def test_at_every_step_several_draws_write_by_the_average_of_their_probabilities(name: str) -> None:
    known, inputs = written(name), prompts(name)
    options = {"max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
    output = known.posterior.generate(inputs, which="draws", **options)
    begun = output.sequences.shape[1] - len(output.scores)
    given = 0 if known.backbone.config.is_encoder_decoder else begun
    for step, scores in enumerate(output.scores):
        by_hand = averaged(known, inputs, output.sequences[:, given : begun + step])
        going_on = ~(output.sequences[:, begun : begun + step] == 2).any(-1)
        torch.testing.assert_close(torch.softmax(scores, -1)[going_on], by_hand[going_on], atol=1e-5, rtol=0.0)
    singles = [known.posterior.generate(inputs, which=k, max_new_tokens=5).tolist() for k in range(3)]
    assert singles[0] != singles[1]


@pytest.mark.parametrize("name", WRITERS)
def test_beams_of_several_draws_have_the_scores_of_their_averaged_probabilities(name: str) -> None:
    """A cache that is not reordered with the beams gives other scores than passes without any cache."""
    known, inputs = written(name), prompts(name)
    options = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 3}
    output = known.posterior.generate(
        inputs, which="draws", return_dict_in_generate=True, output_scores=True, **options
    )
    given = 1 if known.backbone.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    each = {key: x.repeat_interleave(3, 0) for key, x in inputs.items()}
    start = 0 if known.backbone.config.is_encoder_decoder else given
    total, going_on = torch.zeros(12), torch.ones(12, dtype=torch.bool)
    for step in range(output.sequences.shape[1] - given):
        p = averaged(known, each, output.sequences[:, start : given + step])
        token = output.sequences[:, given + step]
        total += torch.where(going_on, p.gather(-1, token.unsqueeze(-1)).squeeze(-1).log(), 0.0)
        going_on &= token != 2
    torch.testing.assert_close(output.sequences_scores, total, atol=1e-4, rtol=1e-4)
    without = known.posterior.generate(inputs, which="draws", use_cache=False, **options)
    assert without.tolist() == known.posterior.generate(inputs, which="draws", **options).tolist()


def shortened(inputs: dict[str, Tensor], side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Rows of different lengths with padding on a side, and each row without any."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    rows = []
    for row in range(len(ids)):
        cut = row % 3
        rows.append(ids[row : row + 1, cut:] if side == "left" else ids[row : row + 1, : ids.shape[1] - cut])
        where = slice(0, cut) if side == "left" else slice(ids.shape[1] - cut, None)
        ids[row, where], mask[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, rows


def until_end(tokens: Tensor) -> list[list[int]]:
    """Rows up to their end token: what follows it, end tokens or padding, depends on the longest row."""
    return [row[: row.index(2)] if 2 in row else [token for token in row if token != 0] for row in tokens.tolist()]


@pytest.mark.parametrize(
    ("name", "side"),
    [("bart", "right"), ("t5", "right"), *((name, side) for name in CAUSAL for side in ("left", "right"))],
)
@pytest.mark.parametrize("which", ["mean", "draws"])
@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_padding_and_batches_change_nothing(name: str, side: str, which: Any, how: str) -> None:
    known = written(name)
    inputs, rows = shortened(prompts(name, 5), side)
    options = DECODING[how]
    together = known.posterior.generate(inputs, which=which, **options)
    in_batches = known.posterior.generate(inputs, which=which, batch_size=2, **options)
    assert until_end(together) == until_end(in_batches)
    alone = [known.posterior.generate(row, which=which, **options) for row in rows]
    assert until_end(together) == [row for part in alone for row in until_end(part)]


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_answers_are_taken_off_rows(name: str) -> None:
    known = written(name)
    rows = WRITERS[name].task("t").train
    if name == "bart":
        expected = known.posterior.generate({key: rows.inputs[key] for key in ("input_ids", "attention_mask")})
    else:
        target = rows.target.clone()
        target[:, :3] = -100  # four tokens are given: the target at a place is the token after it
        rows = type(rows)(rows.inputs, target)
        expected = known.posterior.generate(rows.inputs["input_ids"][:, :4])
    assert torch.equal(known.posterior.generate(rows), expected)


@pytest.mark.parametrize("which", ["mean", "draws"])
def test_sampling_has_a_seed_of_its_own_and_leaves_the_callers_world_alone(which: Any) -> None:
    known, inputs = written("bart"), prompts("bart")
    before, network = settings(), module(known.posterior.adapter.backbone)
    first, again, other = (
        known.posterior.generate(inputs, which=which, seed=seed, **DECODING["sampling"]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert settings() == before and module(known.posterior.adapter.backbone) == network


def test_the_text_that_others_agree_with_most_is_taken() -> None:
    known, inputs = written("bart"), prompts("bart")
    thetas = known.posterior.thetas[[0, 1, 2, 1, 1]]
    posterior = TaskPosterior(known.posterior.adapter, known.posterior.task, thetas)
    chosen = posterior.generate(inputs, which="draws", consensus="mbr", max_new_tokens=6)
    second = posterior.generate(inputs, which=1, max_new_tokens=6)
    assert chosen.tolist() == second.tolist()  # three of five say it


def test_the_backbones_own_generation_config_is_kept_to() -> None:
    known, inputs = written("llama"), prompts("llama")
    network: Any = known.posterior.adapter.backbone.get_base_model()  # type: ignore[operator]
    network.generation_config.max_new_tokens = 3
    network.generation_config.suppress_tokens = list(range(3, 12))
    for which in ("mean", "draws"):
        tokens = known.posterior.generate(inputs, which=which)
        assert tokens.shape[1] == 3 and not torch.isin(tokens, torch.arange(3, 12)).any()
    assert known.posterior.generate(inputs, max_new_tokens=5, eos_token_id=None).shape[1] == 5


def test_without_a_length_texts_are_64_tokens_at_most_or_what_there_are_places_for() -> None:
    for name, length in (("llama", 64 - 6), ("gpt2", 32 - 6), ("t5", 64)):
        known, inputs = written(name), prompts(name, 1)
        assert known.posterior.generate(inputs, eos_token_id=None).shape[1] == length


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ("text", {}, TypeError, r"the string 'text'; give a list of strings"),
        (["text"], {}, TypeError, r"strings, but nothing says how to encode them"),
        ([], {}, ValueError, r"an empty list"),
        (["a", 1], {}, TypeError, r"inputs\[1\] is a int, others are strings"),
        ({"ids": [[1]]}, {}, ValueError, r"no 'input_ids' among 'ids'"),
        ([[1, 2], [3]], {}, TypeError, r"are the rows of unequal length\?"),
        (torch.zeros(2, 3), {}, ValueError, r"'input_ids' is torch\.float32 of shape \[2, 3\]"),
        (torch.zeros(3, dtype=torch.long), {}, ValueError, r"of shape \[3\]; expected numbers \[n, L\]"),
        (torch.ones(2, 0, dtype=torch.long), {}, ValueError, r"of shape \[2, 0\]"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, {}, ValueError, r"row 0: the attention mask is all"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1]]}, {}, ValueError, r"'attention_mask' has 1 rows"),
        ([[5, 6]], {"which": 7}, ValueError, r"which=7: expected 'mean', 'draws' or a draw's number, 0 \.\. 2"),
        ([[5, 6]], {"which": True}, ValueError, r"which=True"),
        ([[5, 6]], {"consensus": "mbr"}, ValueError, r"it is of which='draws'"),
        ([[5, 6]], {"which": "draws", "consensus": "vote"}, ValueError, r"consensus='vote'"),
        ([[5, 6]], {"which": "draws", "output_attentions": True}, ValueError, r"Use which=0"),
        ([[5, 6]], {"seed": -1}, ValueError, r"seed=-1"),
        ([[5, 6]], {"batch_size": 0}, ValueError, r"batch_size=0"),
        ([[5, 6]], {"num_beans": 2}, ValueError, r"num_beans"),
    ],
)
def test_what_cannot_be_generated_from_is_refused(
    inputs: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        written("gpt2").posterior.generate(inputs, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_networks_that_write_no_text_say_so(name: str) -> None:
    family = FAMILIES[name]
    backbone = family.make()
    adapter: RandomAdapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    posterior = TaskPosterior(adapter, family.task("t"), adapter.initial.unsqueeze(0))
    with pytest.raises(TypeError, match="writes no text"):
        posterior.generate([[5, 6]])
