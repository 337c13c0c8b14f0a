"""Texts of more tokens than a network has places for are refused by name; as many as it has are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_backbones import V, bart, bert, gpt2, t5
from torch import Tensor

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.likelihoods import next_tokens, shift_right
from pyro_lift.models.observation import check_width, outputs
from pyro_lift.models.places import places_of

SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def roberta() -> Any:
    return hf.RobertaModel(hf.RobertaConfig(**SIZES, intermediate_size=16, max_position_embeddings=34, pad_token_id=1))


def opt() -> Any:
    config = hf.OPTConfig(**SIZES, ffn_dim=16, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=1)
    return hf.OPTForCausalLM(config)


def llama() -> Any:
    config = hf.LlamaConfig(**SIZES, intermediate_size=16, num_key_value_heads=2, max_position_embeddings=32)
    return hf.LlamaForCausalLM(config)


def adapter_of(make: Callable[[], Any]) -> RandomAdapter:
    torch.manual_seed(0)
    network = make()
    return adapt_backbone(network, recipe(network, rank=2), seed=0)


def texts(length: int, n: int = 5, pad: int = 0, short: int | None = None) -> dict[str, Tensor]:
    """Rows of so many tokens; all but the fourth are cut to ``short`` by their masks."""
    x = torch.randint(5, V, (n, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(x)
    if short is not None:
        mask[:, short:] = 0
        mask[3] = 1
    return {"input_ids": x.masked_fill(mask == 0, pad), "attention_mask": mask}


def matching(name: str, x: dict[str, Tensor], **parts: Any) -> Task:
    labels = torch.randint(5, V, (2, 3), generator=torch.Generator().manual_seed(0))
    named = {"input_ids": labels, "attention_mask": torch.ones_like(labels)}
    return Task(name, (x, torch.arange(5) % 2), "matching", label_texts=named, **parts)


def causal(name: str, x: dict[str, Tensor]) -> Task:
    return Task(name, (x, next_tokens(x["input_ids"], x["attention_mask"])), "tokens")


def written(name: str, x: dict[str, Tensor], answer: int) -> Task:
    y = torch.randint(5, V, (5, answer), generator=torch.Generator().manual_seed(answer))
    return Task(name, ({**x, "decoder_input_ids": shift_right(y, 2)}, y), "tokens")


@pytest.mark.parametrize(
    ("make", "task", "padding"),
    [(bert, matching, True), (roberta, matching, False), (gpt2, causal, True), (opt, causal, False)],
)
def test_one_token_more_than_places_is_refused(make: Any, task: Any, padding: bool) -> None:
    adapter = adapter_of(make)
    assert check_width(adapter, [task("fits", texts(32))], None) > 0
    said = ", padding included" if padding else ""
    refused = (
        rf"task 'long', train data, 'input_ids': row \d has (33|40) tokens{said}; \w+ has places for 32\. Cut .*max_"
    )
    with pytest.raises(ValueError, match=refused):
        check_width(adapter, [task("fits", texts(32)), task("long", texts(40 if make is bert else 33))], None)


@pytest.mark.parametrize(("make", "task"), [(roberta, matching), (opt, causal), (bert, matching)])
def test_a_later_row_is_found_and_padding_that_takes_no_place_is_read(make: Any, task: Any) -> None:
    adapter = adapter_of(make)
    wide = texts(40, pad=1, short=20)
    with pytest.raises(ValueError, match="row 3 has 40 tokens"):
        check_width(adapter, [task("long", wide)], None)
    short = {name: x.index_copy(0, torch.tensor([3]), x[:1]) for name, x in wide.items()}
    if make is roberta:  # its other buffers are as long as the places, where no token types are given
        short["token_type_ids"] = torch.zeros_like(short["input_ids"])
    assert check_width(adapter, [task("short", short)], None) > 0
    assert outputs(adapter, task("short", short).train, adapter.initial, None).isfinite().all()


def test_decoders_have_places_of_their_own() -> None:
    adapter = adapter_of(bart)
    assert check_width(adapter, [written("fits", texts(32), 32)], None) == V
    with pytest.raises(ValueError, match=r"'decoder_input_ids': row 0 has 33 tokens.* has places for 32"):
        check_width(adapter, [written("long", texts(6), 33)], None)
    with pytest.raises(ValueError, match=r"'input_ids': row 0 has 33 tokens.* has places for 32"):
        check_width(adapter, [written("long", texts(33), 6)], None)


@pytest.mark.parametrize("make", [t5, llama])
def test_networks_without_a_table_read_texts_of_any_length(make: Any) -> None:
    adapter = adapter_of(make)
    assert places_of(adapter.backbone) == []
    task = written("t", texts(70), 50) if make is t5 else causal("t", texts(70))
    assert check_width(adapter, [task], None) == V


def test_rows_that_bring_their_places_are_not_asked() -> None:
    adapter = adapter_of(bert)
    x = {**texts(32), "position_ids": torch.zeros(5, 32, dtype=torch.long)}
    assert check_width(adapter, [matching("t", x)], None) == 2


def test_all_parts_are_looked_at_and_so_are_rows_to_predict() -> None:
    adapter = adapter_of(bert)
    fits, long = texts(6), texts(40)
    y = torch.arange(5) % 2
    for part in ("dev", "test"):
        with pytest.raises(ValueError, match=f"task 't', {part} data, 'input_ids': row 0 has 40 tokens"):
            check_width(adapter, [matching("t", fits, **{part: (long, y)})], None)
    lift = LiFT(adapter, sgd_steps=0, burn_in=0, samples=8, seed=0)
    prior = lift.meta_train([matching("a", fits), matching("b", fits)], progress=False, calibrate=False)
    for door in (lambda: prior.adapt(matching("t", long)), lambda: prior.adapt_many([matching("t", long)] * 2)):
        with pytest.raises(ValueError, match="task 't', train data, 'input_ids': row 0 has 40 tokens"):
            door()
    with pytest.raises(ValueError, match=r"inputs, 'input_ids': row 0 has 40 tokens.* has places for 32"):
        prior.adapt(matching("t", fits), steps=4, draws=2).predict(long)
