"""Where a network ends in features, tasks have heads of their own unasked; where it ends in answers, they share one."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_backbones import hf_vit, picture_task, timm_vit
from torch import nn

from pyro_lift import LiFT, Task
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.observation import own_head_scale
from pyro_lift.settings import AdaptSettings, LiFTSettings

SHORT = LiFTSettings(sgd_steps=3, burn_in=2, samples=4)


def timm_features() -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, num_classes=0, embed_dim=16, depth=1, num_heads=2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "key"), [(hf_vit, "pixel_values"), (timm_features, "x")])
def test_features_call_for_heads_of_the_tasks_own(make: object, key: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = make().eval()  # type: ignore[operator]
    tasks = [picture_task(key)(f"t{i}") for i in range(3)]
    lift = LiFT(network, recipe(network, rank=2), settings=SHORT, adapt=AdaptSettings(steps=4, draws=2), seed=0)
    with caplog.at_level(logging.INFO, "pyro_lift"):
        prior = lift.meta_train(tasks[:2], progress=False)
    assert "every task has a linear head of its own" in caplog.text
    assert prior.settings.head_scale is not None and prior.settings.head == "solve"
    posterior = prior.adapt(tasks[2])
    assert posterior.heads is not None and posterior.heads.shape == (2, 3, 17)
    assert posterior.predict(tasks[2].train).shape == (8, 3)
    assert prior.adapt_many(tasks, block_size=2)[0].heads is not None


@pytest.mark.parametrize("name", ["no-meta-train", "union-train", "maml", "reptile", "lift"])
def test_every_method_has_them(name: str) -> None:
    torch.manual_seed(0)
    network = hf_vit().eval()
    tasks = [picture_task("pixel_values")(f"t{i}") for i in range(2)]
    adapter = adapt_backbone(network, recipe(network, rank=2), seed=0)
    method = BASELINES[name](adapter, Budget(warm_up=2, visits=4, steps=4, draws=2, batch_size=6))
    posterior: object = method.adapt(method.meta_train(tasks), tasks[0])
    heads = posterior.heads  # type: ignore[attr-defined]
    assert heads.shape == (2, 3, 17)


def test_answers_and_heads_that_take_steps_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    answers, features = timm_vit().eval(), hf_vit().eval()
    shared = adapt_backbone(answers, recipe(answers, rank=2), seed=0)
    task = picture_task("x")("t")
    assert own_head_scale(shared, [task], None, solve=True) is None
    assert own_head_scale(shared, [task], 0.3, solve=True) == 0.3
    adapter = adapt_backbone(features, recipe(features, rank=2), seed=0)
    pictures = picture_task("pixel_values")("t")
    assert own_head_scale(adapter, [pictures], None, solve=False) is None
    assert HeadPolicy(update="step").fitted(adapter, [pictures]).scale is None
    assert HeadPolicy().fitted(adapter, [pictures]).scale is not None
    stepped = LiFT(adapter, settings=LiFTSettings(sgd_steps=3, burn_in=2, samples=4, head="langevin"), seed=0)
    with pytest.raises(ValueError, match="not answers: it has no head"):
        stepped.meta_train([pictures], progress=False)
    written = Task("words", ({"pixel_values": torch.randn(4, 3, 8, 8)}, torch.ones(4, 2).long()), "tokens")
    with pytest.raises(ValueError, match="Load the network with a head for tokens"):
        LiFT(adapter, settings=SHORT, seed=0).meta_train([written], progress=False)
