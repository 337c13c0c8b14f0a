"""ProtoNet and ProtoNet-LITE: class means, the exact value and the unbiased gradient, and features of each family."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks

from pyro_lift.inference.baselines.protonet import (
    ProtoNet,
    all_features,
    distances,
    prototypes,
    prototypical_loss,
)
from pyro_lift.inference.baselines.protonet_lite import ProtoNetLITE, lite
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.features import features
from pyro_lift.models.task import Rows, Task


def test_prototypes_are_class_means() -> None:
    found = torch.tensor([[0.0, 2.0], [2.0, 0.0], [4.0, 4.0]])
    task = Task("t", (torch.zeros(3, 1), torch.tensor([0, 0, 2])), num_classes=3)
    means, present = prototypes(found, task)
    torch.testing.assert_close(means, torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]))
    assert present.tolist() == [True, False, True]
    torch.testing.assert_close(distances(found, means, 2.0)[0], torch.tensor([-1.0, -2.0, -10.0]))
    torch.testing.assert_close(distances(found, means, None), distances(found, means, 2.0**0.5))


def test_lite_value_is_exact_and_its_gradient_unbiased() -> None:
    # A loss linear in the support features: the mean over all choices of H rows is the full gradient.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    c = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    full = (c * torch.tanh(x @ W)).sum()
    (expected,) = torch.autograd.grad(full, W)
    gradients = []
    for chosen in combinations(range(5), 2):
        rows = torch.tensor(chosen)
        estimate = (c * lite(torch.tanh(x @ W).detach(), rows, torch.tanh(x[rows] @ W))).sum()
        torch.testing.assert_close(estimate, full)
        gradients.append(torch.autograd.grad(estimate, W)[0])
    assert max(float((g - expected).abs().max()) for g in gradients) > 0.1
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)


def test_lite_with_all_rows_is_protonet() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    theta = (adapter.initial + 0.1).requires_grad_()
    support, query = task.train.take(slice(0, 8)), task.train.take(slice(8, 12))
    found = []
    for method in (ProtoNet(adapter), ProtoNetLITE(adapter, rows=8), ProtoNetLITE(adapter, rows=2)):
        loss = prototypical_loss(method, theta, task, support, query, torch.Generator().manual_seed(0))
        found.append((loss.detach(), torch.autograd.grad(loss, theta)[0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], found[2][0])
    assert float((found[0][1] - found[2][1]).abs().max()) > 1e-3


def test_queries_of_classes_without_support_teach_nothing() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    order = task.train.target.argsort()
    rows = task.train.take(order)
    first, last = rows.take(rows.target == rows.target[0]), rows.take(rows.target == rows.target[-1])
    theta = adapter.initial.clone().requires_grad_()
    loss = prototypical_loss(ProtoNet(adapter), theta, task, first, last, torch.Generator())
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], torch.zeros_like(theta))


@pytest.mark.parametrize("kind", [ProtoNet, ProtoNetLITE])
def test_prototypes_are_adapted_to_a_task(kind: type[ProtoNet] | type[ProtoNetLITE]) -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1, rows=40)[0]
    method = kind(adapter, replace(SMALL, steps=60, learning_rate=0.02, draws=3))
    start = method.adapt(method.meta_train([task]), task)
    assert task.test is not None
    right = (start.predict(task.test).argmax(-1) == task.test.target).double().mean()
    assert float(right) > 0.6  # chance is a third; 20 rows, so a standard error of 0.11


def test_tasks_without_classes_in_common_are_refused() -> None:
    adapter = tiny_adapter()
    task = Task("values", (torch.zeros(3, 4), torch.zeros(3)), "regression")
    with pytest.raises(ValueError, match="'values': prototypes need classes"):
        ProtoNet(adapter).meta_train([task])


def test_features_of_each_family() -> None:
    import timm
    import transformers

    vit = timm.models.VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    pictures = Rows({"": torch.randn(3, 1, 8, 8)}, torch.zeros(3))
    adapter = adapt_backbone(vit, recipe(vit, 2))
    assert features(adapter, pictures, adapter.initial).shape == (3, 16)
    assert all_features(adapter, pictures, adapter.initial, batch_size=2).shape == (3, 16)
    common = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
              "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**common))
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 1]])
    for network in (bart, gpt, bert):
        adapter = adapt_backbone(network, recipe(network, 2))
        rows = Rows({"input_ids": ids, "attention_mask": (ids != 1).long()}, torch.zeros(2))
        padded = Rows(
            {
                "input_ids": torch.cat([ids, torch.ones(2, 2, dtype=torch.long)], 1),
                "attention_mask": torch.cat([(ids != 1).long(), torch.zeros(2, 2, dtype=torch.long)], 1),
            },
            torch.zeros(2),
        )
        one = features(adapter, rows, adapter.initial)
        assert one.shape == (2, 8)
        torch.testing.assert_close(one, features(adapter, padded, adapter.initial), rtol=1e-4, atol=1e-5)
