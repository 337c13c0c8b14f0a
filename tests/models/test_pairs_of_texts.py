"""What rows of label matching have beside their tokens reaches the encoder, or is refused: checked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_backbones import D, V, bert
from torch import Tensor

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.block_likelihood import block_outputs, stack_rows
from pyro_lift.models.features import features
from pyro_lift.models.observation import check_width, outputs
from pyro_lift.models.readouts import LabelMatching, pool
from pyro_lift.models.task import Rows


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(5, V, shape, generator=torch.Generator().manual_seed(seed))


def pairs(name: str = "pairs", texts: int = 4, length: int = 6, **besides: Tensor) -> Task:
    """Eight pairs of texts in ten places, of which the longest fills six; second texts begin at the third."""
    x = tokens(1, 8, 10)
    mask = (torch.arange(10) < length).long().expand(8, 10).contiguous()
    mask[::2, 5:] = 0
    types = ((torch.arange(10) >= 3) & mask.bool()).long()
    inputs = {"input_ids": x, "attention_mask": mask, "token_type_ids": types, **besides}
    labels = tokens(2, 3, texts)
    return Task(name, (inputs, torch.arange(8) % 3), "matching",
                label_texts={"input_ids": labels, "attention_mask": torch.ones_like(labels)})  # fmt: skip


def encoder(layers: int = 1) -> Any:
    torch.manual_seed(0)
    network: Any = bert(layers).eval()
    network.embeddings.token_type_embeddings.weight.data.mul_(20.0)
    return network


def adapter_of(network: Any, **options: Any) -> RandomAdapter:
    config = recipe(network, rank=2)
    known = adapt_backbone(network, config, seed=0, **options)
    known.double()
    return known


def by_hand(network: Any, rows: Rows) -> Tensor:
    """Scaled cosines of each text alone, at the length that it has."""

    def vector(ids: Tensor, mask: Tensor, **besides: Tensor) -> Tensor:
        kept = int(mask.sum())
        named = {"input_ids": ids[:kept], **{name: x[:kept] for name, x in besides.items()}}
        states = network.double()(**{name: x[None] for name, x in named.items()}).last_hidden_state
        return torch.nn.functional.normalize(pool(states)[0], dim=0)

    besides = {name: x for name, x in rows.inputs.items() if name not in ("input_ids", "attention_mask")}
    x = [
        vector(rows.inputs["input_ids"][k], rows.inputs["attention_mask"][k], **{n: v[k] for n, v in besides.items()})
        for k in range(len(rows))
    ]
    labels = [
        vector(*row) for row in zip(rows.shared["label_input_ids"], rows.shared["label_attention_mask"], strict=True)
    ]
    return 20.0 * torch.stack(x) @ torch.stack(labels).T


@pytest.mark.parametrize("texts", [1, 4, 12])  # two passes, one, and label texts that are longer
@pytest.mark.parametrize("besides", ["none", "position_ids"])
@pytest.mark.parametrize("frozen_prefix", ["on", "off"])
@torch.no_grad()
def test_token_types_and_positions_reach_the_encoder(texts: int, besides: str, frozen_prefix: str) -> None:
    network = encoder(2)
    config = recipe(network, rank=2)
    config.layers_to_transform = [1]
    adapter = adapt_backbone(network, config, seed=0, frozen_prefix=frozen_prefix)  # type: ignore[arg-type]
    adapter.double()
    more: dict[str, Any] = (
        {} if besides == "none" else {"position_ids": torch.arange(10).flip(0).expand(8, 10).contiguous()}
    )
    task = pairs(texts=texts, **more)
    expected = by_hand(network, task.train)
    torch.testing.assert_close(outputs(adapter, task.train, adapter.initial, None), expected)
    plain = {name: x for name, x in task.train.inputs.items() if name != "token_type_ids"}
    assert not torch.allclose(by_hand(network, Rows(plain, task.train.target, task.train.shared)), expected, atol=0.1)


@torch.no_grad()
def test_blocks_and_head_inputs_have_them_too() -> None:
    adapter = adapter_of(encoder())
    tasks = [pairs("a"), pairs("b", length=9)]
    block = stack_rows([task.train for task in tasks], [8, 8], "matching")
    theta = torch.stack([adapter.initial, adapter.initial + 0.3])
    each = torch.stack([outputs(adapter, task.train, at, None) for task, at in zip(tasks, theta, strict=True)])
    torch.testing.assert_close(
        block_outputs(adapter, block, theta), each.flatten(0, 1).view_as(block_outputs(adapter, block, theta))
    )
    named = tasks[0].train.named
    found = adapter(theta=adapter.initial, head_inputs=True, **named)
    torch.testing.assert_close(20.0 * found[:, -3:], outputs(adapter, tasks[0].train, adapter.initial, None))


@torch.no_grad()
def test_options_may_have_token_types_of_their_own() -> None:
    network = encoder()
    adapter = adapter_of(network)
    x, options = tokens(1, 2, 5), tokens(2, 2, 3, 5)
    types = (torch.arange(5) >= 2).long()
    named = {
        "input_ids": x, "attention_mask": torch.ones_like(x), "token_type_ids": types.expand(2, 5),
        "option_input_ids": options, "option_attention_mask": torch.ones_like(options),
        "option_token_type_ids": types.expand(2, 3, 5),
    }  # fmt: skip
    of_rows = adapter(theta=adapter.initial, **named)
    for row in range(2):
        shared = {f"label_{name.removeprefix('option_')}": x[row] for name, x in named.items() if "option" in name}
        mine = {name: x[row : row + 1] for name, x in named.items() if "option" not in name}
        torch.testing.assert_close(adapter(theta=adapter.initial, **mine, **shared)[0], of_rows[row])


@torch.no_grad()
def test_a_first_segment_alone_is_the_same_to_the_bit_as_none() -> None:
    adapter = adapter_of(encoder())
    with_zeros = pairs(token_type_ids=torch.zeros(8, 10, dtype=torch.long))
    without = {name: x for name, x in with_zeros.train.named.items() if name != "token_type_ids"}
    assert torch.equal(
        adapter(theta=adapter.initial, **without), adapter(theta=adapter.initial, **with_zeros.train.named)
    )


@torch.no_grad()
def test_features_of_baselines_have_them() -> None:
    adapter, task = adapter_of(encoder()), pairs()
    expected = pool(adapter.backbone(**task.train.inputs).last_hidden_state, task.train.inputs["attention_mask"])
    torch.testing.assert_close(features(adapter, task.train, adapter.initial), expected)


def test_what_the_encoder_does_not_take_is_refused() -> None:
    config = hf.DistilBertConfig(vocab_size=V, dim=D, hidden_dim=D, n_layers=1, n_heads=2, max_position_embeddings=32)
    adapter = adapter_of(hf.DistilBertModel(config))
    refused = r"task 'pairs': the encoder, DistilBertModel, takes no 'token_type_ids'\. Leave it out"
    with pytest.raises(ValueError, match=refused):
        check_width(adapter, [pairs()], None)
    texts = {"input_ids": tokens(2, 3, 4), "attention_mask": torch.ones(3, 4).long()}
    plain = pairs().train.inputs
    rows = ({name: plain[name] for name in texts}, torch.arange(8) % 3)
    texts["token_type_ids"] = torch.zeros(3, 4).long()
    with pytest.raises(ValueError, match=refused):
        check_width(adapter, [Task("pairs", rows, "matching", label_texts=texts)], None)


def test_pairs_to_predict_are_refused_where_training_had_none() -> None:
    lift = LiFT(encoder(), recipe(encoder(), rank=2), sgd_steps=0, burn_in=0, samples=8, seed=0)
    single = [pairs(name) for name in "ab"]
    for task in single:
        del task.train.inputs["token_type_ids"]  # type: ignore[attr-defined]
    posterior = lift.meta_train(single, progress=False, calibrate=False).adapt(single[0], steps=4, draws=2)
    given = dict(pairs().train.inputs)
    with pytest.raises(ValueError, match="'token_type_ids' of pairs of texts, but the rows of task 'a'"):
        posterior.predict(given)
    given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])  # as tokenizers bring them for single texts
    assert torch.equal(posterior.predict(given), posterior.predict(single[0].train.inputs))


def test_the_readout_alone_keeps_what_it_did() -> None:
    assert LabelMatching().names_read({"input_ids": tokens(0, 1, 2), "label_input_ids": tokens(0, 1, 2)}) == {
        "input_ids", "attention_mask",
    }  # fmt: skip
