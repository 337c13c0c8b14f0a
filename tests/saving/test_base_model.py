"""A base model of the same weights that computes something else is refused; the same one, however loaded, is not."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from saved_priors import trained
from tiny_backbones import FAMILIES
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.models.architecture import architecture_of, changed_settings, digests_of_values, same_values
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.conventions import base_of
from pyro_lift.support.archive import sealed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a prior on a tiny backbone, with the posterior of a task inside."""
    root = tmp_path_factory.mktemp("saved")

    def of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            trained(name).prior.save_pretrained(folder)
            trained(name).posterior.save_pretrained(folder / "posterior")
        return folder

    return of


def with_config(name: str, **changes: Any) -> nn.Module:
    """The backbone of a prior, its weights in a network of another configuration."""
    plain: Any = trained(name).backbone
    config = copy.deepcopy(plain.config)
    for field, value in changes.items():
        setattr(config, field, value)
    options = {"add_pooling_layer": False} if name == "vit" else {}
    other = type(plain)(config, **options).eval()
    other.load_state_dict(plain.state_dict())
    return other  # type: ignore[no-any-return]


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"num_attention_heads": 4}, r"config\.num_attention_heads was 2 and is 4"),
    ("bert", {"hidden_act": "relu"}, r"config\.hidden_act was 'gelu' and is 'relu'"),
    ("bert", {"layer_norm_eps": 1e-5}, r"config\.layer_norm_eps was 1e-12 and is 1e-05"),
    ("bert", {"is_decoder": True}, r"config\.is_decoder was False and is True"),
    ("bart", {"scale_embedding": True}, r"config\.scale_embedding was False and is True"),
    ("t5", {"relative_attention_max_distance": 16}, r"relative_attention_max_distance was 128 and is 16"),
    ("gpt2", {"n_head": 4}, r"config\.n_head was 2 and is 4"),
    ("vit", {"layer_norm_eps": 0.1}, r"config\.layer_norm_eps was 1e-12 and is 0\.1"),
]


@pytest.mark.parametrize(("name", "changes", "message"), OTHERS, ids=[f"{n}-{next(iter(c))}" for n, c, _ in OTHERS])
def test_the_same_weights_in_another_network_are_refused(
    name: str, changes: dict[str, Any], message: str, saved: Callable[[str], Path]
) -> None:
    other = with_config(name, **changes)
    with pytest.raises(ValueError, match=f"its weights are the same, but .*{message}.* pass check_base=False"):
        LiFTPrior.from_pretrained(saved(name), other)
    with pytest.raises(ValueError, match=message):
        TaskPosterior.from_pretrained(saved(name) / "posterior", other)
    assert LiFTPrior.from_pretrained(saved(name), other, check_base=False).tasks == ("t0", "t1")


def test_so_are_they_in_another_network_of_timm(saved: Callable[[str], Path]) -> None:
    from timm.models import VisionTransformer

    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 4}, r"blocks\.0\.attn\.(head_dim|num_heads) was"),
        ({"num_heads": 2, "act_layer": nn.ReLU}, r"blocks\.0\.mlp\.act\.class was 'GELU' and is 'ReLU'"),
        ({"num_heads": 2, "norm_layer": partial(nn.LayerNorm, eps=0.1)}, r"norm1\.eps was 1e-06 and is 0\.1"),
    ]
    for changes, message in cases:
        other = VisionTransformer(**sizes, **changes).eval()
        other.load_state_dict(trained("timm").backbone.state_dict())
        with pytest.raises(ValueError, match=message):
            LiFTPrior.from_pretrained(saved("timm"), other)


# ----------------------------------------------------------------------------------------- a network of one's own


class Net(nn.Module):
    """Attention by hand, a function and a number for settings, statistics, a count of its calls."""

    def __init__(self, heads: int = 2, activation: Callable[[Tensor], Tensor] = torch.relu, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.activation, self.scale, self.calls = heads, activation, scale, 0
        self.seen: list[int] = []
        self.last, self.seed, self.random_state = [0, 0], random.randint(0, 10**9), random.random()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last[0] += 1
        self.note(x)
        h = self.norm(self.activation(self.first(x)))
        h = torch.softmax(h.view(len(h), self.heads, -1), -1).flatten(1)
        return self.second(self.scale * h)  # type: ignore[no-any-return]

    def note(self, x: Tensor) -> None:
        self.seen.append(len(x))


def net(**settings: Any) -> Net:
    torch.manual_seed(0)
    return Net(**settings).eval()


def shifted() -> Net:
    other = net()
    other.norm.get_buffer("running_mean").add_(0.5)
    return other


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = [Task(f"t{k}", (torch.randn(8, 4), torch.arange(8) % 3), num_classes=3) for k in range(3)]
    config = peft.LoraConfig(r=2, target_modules=["first", "second"])
    lift = LiFT(net(), config, sgd_steps=2, burn_in=2, samples=4, seed=0)
    return lift.meta_train(tasks, progress=False).save_pretrained(tmp_path_factory.mktemp("own") / "prior")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: net(heads=4), "but heads was 2 and is 4, so that it may predict something else"),
        (lambda: net(activation=torch.tanh), r"activation was 'relu\(\)' and is 'tanh\(\)'"),
        (lambda: net(scale=0.5), r"scale was 1\.0 and is 0\.5"),
        (shifted, "norm.running_mean was 'values "),
    ],
)
def test_a_network_of_ones_own_is_known_by_its_settings_and_its_statistics(
    make: Callable[[], Net], message: str, own: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        LiFTPrior.from_pretrained(own, make())


def test_what_forward_counts_is_no_setting(own: Path) -> None:
    used = net()
    used(torch.randn(5, 4))
    assert (used.calls, used.seen, used.last) == (1, [5], [1, 0])
    assert LiFTPrior.from_pretrained(own, used).tasks == ("t0", "t1", "t2")


# -------------------------------------------------------------------------------------------------- half precision


def tuned(network: nn.Module, by: float) -> nn.Module:
    """A copy whose weights have moved by a part of themselves."""
    other = copy.deepcopy(network).float()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + by * torch.randn_like(weight))
    return other


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_copy_in_float16_is_the_same_network(name: str, saved: Callable[[str], Path]) -> None:
    plain = trained(name).backbone
    kinds = [torch.float16, torch.bfloat16]
    for copied in [copy.deepcopy(plain).to(kind) for kind in kinds]:
        for again in (copied, copy.deepcopy(copied).float(), copy.deepcopy(copied).bfloat16()):
            assert LiFTPrior.from_pretrained(saved(name), again).tasks == ("t0", "t1")
    for other in (tuned(plain, 1e-2), tuned(plain, 1e-2).half(), tuned(copy.deepcopy(plain).half(), 1e-2)):
        with pytest.raises(ValueError, match="has other values"):
            LiFTPrior.from_pretrained(saved(name), other)


def test_statistics_in_float16_are_the_same_statistics(own: Path) -> None:
    assert LiFTPrior.from_pretrained(own, net().half().float()).tasks == ("t0", "t1", "t2")
    assert changed_settings(told(net()), told(net().half())) == {}
    assert list(changed_settings(told(net().half()), told(shifted().half()))) == ["norm.running_mean"]
    assert changed_settings(told(net().half()), told(net())) == {}


def test_digests_tell_copies_from_others() -> None:
    x = torch.randn(40, 50) * 10.0 ** torch.linspace(-9, 3, 50)
    digests = digests_of_values(x)
    assert len(digests) == 2 and len(digests_of_values(torch.arange(9))) == 1
    for same in (x.half(), x.half().float(), x.bfloat16(), x.half().bfloat16(), x.double()):
        assert same_values(digests, digests_of_values(same)) and same_values(digests_of_values(same), digests)
    for other in (x * (1 + 2e-2), (x * (1 + 2e-2)).half(), -x, x.flip(0)):
        assert not same_values(digests, digests_of_values(other))


def test_a_folder_of_one_digest_a_weight_loads_as_before(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("bert").prior.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tensors = config["base_model"]["tensors"]
    config["base_model"]["tensors"] = {name: entry[:2] for name, entry in tensors.items()}
    (folder / "config.json").write_text(json.dumps(sealed(config)))
    plain = trained("bert").backbone
    for same in (plain, copy.deepcopy(plain).bfloat16()):
        assert LiFTPrior.from_pretrained(folder, same).tasks == ("t0", "t1")
    with pytest.raises(ValueError, match="has other values"):
        LiFTPrior.from_pretrained(folder, copy.deepcopy(plain).half())


# ------------------------------------------------------------------------------------------------- no false alarms


def told(network: nn.Module) -> dict[str, Any]:
    """The description as it comes back from a file."""
    return json.loads(json.dumps(architecture_of(network)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_adapter_half_precision_and_a_pass_change_nothing(name: str) -> None:
    one = trained(name)
    plain = told(one.backbone)
    assert plain == told(base_of(one.prior.adapter.backbone)), "after training and predictions"
    assert plain == told(copy.deepcopy(one.backbone).to(torch.bfloat16))
    assert plain == told(copy.deepcopy(one.backbone).train())
    wrapped = peft.get_peft_model(copy.deepcopy(one.backbone), recipe(one.backbone, rank=2))
    assert plain == told(wrapped.get_base_model())


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2", "bert", "vit"])
def test_a_network_of_transformers_is_itself_when_it_comes_back_from_a_folder(name: str, tmp_path: Path) -> None:
    plain: Any = trained(name).backbone
    plain.save_pretrained(tmp_path)
    kind: Any = {"bart": "seq2seq", "t5": "seq2seq", "gpt2": "causal", "bert": "encoder", "vit": "vision"}[name]
    for options in ({}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}, {"gradient_checkpointing": True}):
        assert changed_settings(told(plain), told(load_backbone(tmp_path, kind, **options))) == {}, options


def test_what_makes_no_difference_is_left_out(saved: Callable[[str], Path]) -> None:
    changes: dict[str, Any] = {
        "hidden_dropout_prob": 0.5, "use_cache": False, "id2label": {0: "no", 1: "yes", 2: "more"}, "name_or_path": "x",
        "initializer_range": 1.0, "chunk_size_feed_forward": 4, "architectures": ["Other"], "eos_token_id": 3,
        "transformers_version": "4.0.0", "output_hidden_states": True, "problem_type": "regression",
    }  # fmt: skip
    other = with_config("bert", **changes)
    assert LiFTPrior.from_pretrained(saved("bert"), other).tasks == ("t0", "t1")


def test_a_field_that_one_version_of_a_library_lacks_is_no_difference(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((saved("bert") / "config.json").read_text())
    del config["base_model"]["architecture"]["config.type_vocab_size"]
    config["base_model"]["architecture"]["config.position_embedding_type"] = "absolute"
    again = trained("bert").prior.save_pretrained(tmp_path)
    (again / "config.json").write_text(json.dumps(sealed(config)))
    # The tensors are those of the prior that was saved first, which are the same.
    assert LiFTPrior.from_pretrained(again, copy.deepcopy(trained("bert").backbone)).tasks == ("t0", "t1")


def test_a_prior_without_a_description_loads_as_it_did(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("bert").prior.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["base_model"]["architecture"]
    (folder / "config.json").write_text(json.dumps(sealed(config)))
    assert LiFTPrior.from_pretrained(folder, with_config("bert", num_attention_heads=4)).tasks == ("t0", "t1")


def llama(kind: str = "LlamaForCausalLM", **changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return getattr(hf, kind)(hf.LlamaConfig(**{**sizes, **changes}))  # type: ignore[no-any-return]


def test_which_token_is_padding_counts_where_a_network_reads_it() -> None:
    for kind, counts in {"LlamaForCausalLM": False, "LlamaForSequenceClassification": True}.items():
        assert bool(changed_settings(told(llama(kind)), told(llama(kind, pad_token_id=2)))) is counts
    roberta = [hf.RobertaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=16, pad_token_id=k) for k in (1, 2)]  # fmt: skip
    one, other = (told(hf.RobertaModel(config)) for config in roberta)
    assert changed_settings(one, other)["config.pad_token_id"] == (1, 2)
    assert "config.pad_token_id" not in told(trained("bert").backbone)


def test_the_most_positions_count_but_where_rotations_do_not_depend_on_them() -> None:
    assert changed_settings(told(llama()), told(llama(max_position_embeddings=128))) == {}
    dynamic: dict[str, Any] = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    changed = changed_settings(told(llama(**dynamic)), told(llama(max_position_embeddings=128, **dynamic)))
    assert changed["config.max_position_embeddings"] == (64, 128)
    base: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert list(changed_settings(told(llama()), told(llama(**base)))) == ["config.rope_parameters.rope_theta"]


def test_numbers_that_differ_by_rounding_are_the_same() -> None:
    scale = 8**-0.5
    assert changed_settings({"scale": scale, "k": [1, 2]}, {"scale": scale * (1 + 1e-12), "k": [1, 2.0]}) == {}
    assert changed_settings({"eps": 1e-12}, {"eps": 1e-5}) == {"eps": (1e-12, 1e-5)}


def test_a_network_inside_another_has_its_place_in_the_name() -> None:
    class Outer(nn.Module):
        def __init__(self, bert: nn.Module) -> None:
            super().__init__()
            self.bert, self.head = bert, nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bert(x).last_hidden_state[:, 0])  # type: ignore[no-any-return]

    bert = FAMILIES["bert"].make()
    found = told(Outer(bert))
    assert found["bert.config.num_attention_heads"] == 2 and found["class"] == "Outer"
    adapter = adapt_backbone(Outer(bert), peft.LoraConfig(r=2, target_modules=["query"]), seed=0)
    assert told(base_of(adapter.backbone)) == found


def test_configurations_inside_a_configuration_are_described_too() -> None:
    text = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    vision |= {"intermediate_size": 16}
    found = told(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    assert found["config.text_config.num_attention_heads"] == 2
    assert found["config.vision_config.num_attention_heads"] == 4
