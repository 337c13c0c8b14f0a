"""Adapters for servers of many LoRAs, and merged models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from saved_priors import logits, trained
from text_backbones import TEXTS, WRITERS, posterior_of, written
from tiny_backbones import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pyro_lift import LiFT, TaskPosterior
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.saving.served import check_served, served_name


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2", "llama"])
def test_a_merged_model_is_the_network_with_the_adapter(name: str, tmp_path: Path) -> None:
    posterior = posterior_of(name)
    before = {key: x.clone() for key, x in posterior.adapter.backbone.state_dict().items()}
    loader: Any = AutoModelForSeq2SeqLM if name in ("bart", "t5") else AutoModelForCausalLM
    tokens = AutoTokenizer.from_pretrained
    for which in ("mean", 1):
        posterior.merge_and_save(tmp_path / str(which), which)
        model = loader.from_pretrained(tmp_path / str(which)).eval()
        assert not isinstance(model, peft.PeftModel)
        named = {key: x for key, x in posterior.task.train.named.items() if key != "labels"}
        theta = posterior.thetas.mean(0) if which == "mean" else posterior.thetas[1]
        with torch.no_grad(), posterior.adapter.bound(theta):
            expected = posterior.adapter.backbone(**named).logits
        with torch.no_grad():
            torch.testing.assert_close(model(**named).logits, expected, atol=1e-4, rtol=1e-4)
        assert len(tokens(tmp_path / str(which))) == 24
    after = posterior.adapter.backbone.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items()) and len(before) == len(after)
    assert len(posterior.generate(TEXTS)) == 3


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    posterior = written("bart").posterior
    with pytest.raises(ValueError, match="a merged model is one network"):
        posterior.merge_and_save(tmp_path, "draws")
    headed = TaskPosterior(posterior.adapter, posterior.task, posterior.thetas, torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="has a head of its own"):
        headed.merge_and_save(tmp_path)
    family = FAMILIES["timm"]
    backbone = family.make()
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2), seed=0)
    with pytest.raises(ValueError, match="has no save_pretrained"):
        TaskPosterior(adapter, family.task("t"), adapter.initial.unsqueeze(0)).merge_and_save(tmp_path)


def test_adapters_are_exported_as_servers_load_them(tmp_path: Path) -> None:
    known = trained("gpt2")
    folders = known.prior.export_adapters(tmp_path)
    assert list(folders) == ["phi", "component-0", "component-1", "task-t0", "task-t1"]
    about = json.loads((tmp_path / "adapters.json").read_text())
    assert about["rank"] == 2 and about["max_lora_rank"] == 8
    assert about["adapters"] == {name: name for name in folders}
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders.values()]
    for config in configs:
        assert config["r"] == 2 and config["bias"] == "none" and not config["modules_to_save"]
        assert sorted(config["target_modules"]) == sorted(about["target_modules"])
        assert not config["use_dora"] and not config["rank_pattern"]
    for name, which in (("phi", "phi"), ("component-1", 1), ("task-t0", "t0")):
        network = peft.PeftModel.from_pretrained(copy.deepcopy(known.backbone), folders[name])
        known.prior.to_peft(tmp_path / "again", which)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(known.backbone), tmp_path / "again")
        torch.testing.assert_close(logits(network, known.tasks[0]), logits(again, known.tasks[0]))


def test_names_are_made_safe_and_stay_apart(tmp_path: Path) -> None:
    assert served_name("tweet eval/stance: Climate") == "tweet-eval-stance-Climate"
    assert served_name("../..") == "adapter" and served_name("a.b_c-1") == "a.b_c-1"
    family = FAMILIES["gpt2"]
    backbone = family.make()
    options: dict[str, Any] = {"sgd_steps": 2, "burn_in": 2, "samples": 4, "batch_size": 2}
    lift = LiFT(backbone, recipe(backbone, rank=2), seed=0, **options)
    prior = lift.meta_train([family.task("a b"), family.task("a/b")], progress=False)
    with pytest.raises(ValueError, match=r"'task-a-b'.*Rename one of the tasks"):
        prior.export_adapters(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_servers_do_not_load_are_refused_by_their_option() -> None:
    backbone = FAMILIES["gpt2"].make()
    targets: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    for config, message in (
        (peft.LoraConfig(r=2, rank_pattern={"h.0.attn.c_attn": 3}, **targets), "rank_pattern"),
        (peft.LoraConfig(r=513, **targets), r"r=513: .* ranks up to 512"),
        (
            peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
            "a IA3 adapter cannot be served",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_served(adapt_backbone(backbone, config, seed=0))


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_starts_biases_and_other_layers_that_servers_do_not_load_are_refused() -> None:
    llama: Any = WRITERS["llama"].make()
    for options, message in (
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' has moved the base"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"lora_embedding_A.* is no factor of a linear layer"),
    ):
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        with pytest.raises(ValueError, match=message):
            check_served(adapt_backbone(llama, config, seed=0))


def test_what_a_server_passes_over_is_noted() -> None:
    llama: Any = WRITERS["llama"].make()
    assert check_served(adapt_backbone(llama, recipe(llama, rank=2), seed=0))["notes"] == []
    some = check_served(adapt_backbone(llama, recipe(llama, rank=2, layers_to_transform=[1]), seed=0))
    (note,) = some["notes"]
    assert note.startswith("'model.layers.0.self_attn.q_proj' and 3 more layers of its kind have no adapter: LoRAX")
    bart: Any = WRITERS["bart"].make()
    (note,) = check_served(adapt_backbone(bart, recipe(bart, rank=2), seed=0))["notes"]
    assert "not a causal language model" in note
