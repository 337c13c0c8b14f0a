"""One backbone, several adapters, and a caller who goes on using PEFT: independent, or refused with the way out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, RandomAdapter, Task, TaskPosterior
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.saving.peft_folder import write_peft

Lora = peft.LoraConfig
QUICK: dict[str, Any] = {"sgd_steps": 20, "burn_in": 3, "samples": 12, "sgd_learning_rate": 1e-2, "seed": 0}


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def config(rank: int = 2) -> Any:
    return Lora(r=rank, target_modules=["0", "2"])


def peft_model(name: str = "default", network: nn.Module | None = None) -> Any:
    return peft.get_peft_model(base() if network is None else network, config(), adapter_name=name)


def task(i: int = 0) -> Task:
    generator = torch.Generator().manual_seed(i)
    return Task(f"t{i}", (torch.randn(16, 4, generator=generator), torch.arange(16) % 3), num_classes=3)


TASKS = [task(i) for i in range(3)]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))


def trained(backbone: Any, peft_config: Any = None, **options: Any) -> tuple[LiFTPrior, TaskPosterior]:
    prior = LiFT(backbone, peft_config, **{**QUICK, **options}).meta_train(TASKS[:2], progress=False)
    return prior, prior.adapt(TASKS[2], steps=20, draws=4)


def export(posterior: TaskPosterior, folder: Path) -> Tensor:
    """The output of the posterior's PEFT export on the plain network."""
    return peft.PeftModel.from_pretrained(base(), str(posterior.to_peft(folder))).eval()(X).detach()  # type: ignore[no-any-return]


def own_output(posterior: TaskPosterior) -> Tensor:
    return posterior.adapter(X, theta=posterior.thetas.mean(0)).detach()  # type: ignore[no-any-return]


def another_lift(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    trained(network, config(), components=2)


def another_rank(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    trained(network, config(3))


def another_adapter(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    adapt_backbone(network, config())


def its_prior_loaded(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    loaded = LiFTPrior.from_pretrained(prior.save_pretrained(folder / "prior"), network)
    loaded.adapt(TASKS[0], steps=20, draws=4)


def its_prior_loaded_onto_its_own_adapter(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    LiFTPrior.from_pretrained(prior.save_pretrained(folder / "prior"), prior.adapter)


def another_prior_loaded_onto_its_adapter(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    other = LiFT(base(), config(), **{**QUICK, "seed": 5}).meta_train(TASKS[:2], progress=False)
    assert not torch.equal(other.adapter.initial, prior.adapter.initial)
    loaded = LiFTPrior.from_pretrained(other.save_pretrained(folder / "other"), prior.adapter)
    assert torch.equal(loaded.adapter.initial, other.adapter.initial)


def a_prior_from_adapters_on_its_adapter(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    folders = prior.to_peft_library(folder / "library")
    LiFTPrior.from_adapters(folders, prior.adapter, beta=0.1)


def a_posterior_loaded(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    posterior = prior.adapt(TASKS[1], steps=20, draws=4)
    TaskPosterior.from_pretrained(posterior.save_pretrained(folder / "posterior"), network).predict(X)


def peft_itself(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    peft.get_peft_model(network, config(3))


def moved_in_a_copy(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    LiFT(prior.adapter, **QUICK, device="cpu").adapter.double()


def its_caller_moves_it(network: nn.Module, prior: LiFTPrior, folder: Path) -> None:
    network.double().train()


USES = [
    another_lift,
    another_rank,
    another_adapter,
    its_prior_loaded,
    its_prior_loaded_onto_its_own_adapter,
    another_prior_loaded_onto_its_adapter,
    a_prior_from_adapters_on_its_adapter,
    a_posterior_loaded,
    peft_itself,
    moved_in_a_copy,
    its_caller_moves_it,
]


@pytest.mark.parametrize("use", USES)
def test_what_is_made_on_a_backbone_later_leaves_earlier_priors_and_posteriors_alone(
    use: Callable[[nn.Module, LiFTPrior, Path], None], tmp_path: Path
) -> None:
    network = base()
    prior, posterior = trained(network, config())
    start, predictions, output = prior.adapter.initial.clone(), posterior.predict(X), own_output(posterior)
    use(network, prior, tmp_path)
    assert torch.equal(prior.adapter.initial, start)
    assert torch.equal(posterior.predict(X), predictions)
    torch.testing.assert_close(export(posterior, tmp_path / "export"), output)
    assert float((output - base()(X).detach()).abs().max()) > 1e-3


def test_the_caller_s_network_stays_what_it_was() -> None:
    network = base()
    state = {name: x.clone() for name, x in network.state_dict().items()}
    output = network(X).detach()
    trained(network, config())
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert torch.equal(network(X).detach(), output)


def test_the_weights_are_in_memory_once_and_the_configuration_is_not_written_to() -> None:
    network = base()
    chosen = Lora(r=2, target_modules="all-linear")
    before = copy.deepcopy(chosen)
    adapter = adapt_backbone(network, chosen)
    places = {p.untyped_storage().data_ptr() for p in adapter.backbone.parameters()}
    assert {p.untyped_storage().data_ptr() for p in network.parameters()} <= places
    assert chosen == before


def test_hooks_of_the_caller_s_network_are_called() -> None:
    network, calls = base(), []
    adapter = adapt_backbone(network, config())
    handle = network[1].register_forward_hook(lambda module, inputs, output: calls.append(1))
    adapter(X, theta=adapter.initial)
    handle.remove()
    adapter(X, theta=adapter.initial)
    assert calls == [1]


def test_two_adapters_may_stand_on_one_peft_model() -> None:
    model = peft_model()
    first, posterior = trained(model)
    predictions = posterior.predict(X)
    second, _ = trained(model, components=2)
    assert torch.equal(first.adapter.initial, second.adapter.initial)
    assert torch.equal(posterior.predict(X), predictions)
    assert torch.equal(RandomAdapter(first.adapter.backbone).initial, first.adapter.initial)


def test_one_network_gives_one_chain_for_one_seed_wherever_the_global_stream_is() -> None:
    network = base()
    torch.manual_seed(1)
    first = LiFT(network, config(), seed=3).adapter.initial
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = LiFT(copy.deepcopy(network), config(), seed=3).adapter.initial
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(LiFT(network, config(), seed=4).adapter.initial, first)
    assert not torch.equal(LiFT(network, config()).adapter.initial, LiFT(network, config()).adapter.initial)


# ------------------------------------------------------------------------------------------------- what PEFT does to it


def merged(model: Any) -> None:
    with torch.no_grad():
        [p.add_(0.1) for name, p in model.named_parameters() if "lora_B" in name]
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def of_another_name(model: Any) -> None:
    model.add_adapter("other", config())
    model.set_adapter("other")


def two_at_once(model: Any) -> None:
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])


def taken_out(model: Any) -> None:
    model.unload()


def wrapped_again(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model.get_base_model(), config())


def base_trained_further(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model()[0].weight.add_(0.1)


CHANGES = {
    merged: "merged the adapter into the base weights.*unmerge_adapter",
    disabled: "disabled the adapter.*enable_adapter_layers",
    of_another_name: r"in use is .*'other'.*set_adapter\('default'\)",
    two_at_once: "in use is .*'default', 'other'",
    taken_out: "no longer in the network",
    wrapped_again: "no longer in the network|in use",
    base_trained_further: r"frozen weight .*0\.base_layer\.weight' was changed in place",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_peft_does_to_a_model_later_is_found_at_the_next_run(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = peft_model()
    prior, posterior = trained(model)
    lift = LiFT(model, **QUICK)
    change(model)
    for run in (
        lambda: lift.meta_train(TASKS, progress=False),
        lambda: prior.adapt(TASKS[0]),
        lambda: posterior.predict(X),
        lambda: prior.save_pretrained(tmp_path / "prior"),
        lambda: posterior.to_peft(tmp_path / "posterior"),
    ):
        with pytest.raises(ValueError, match=CHANGES[change]):  # type: ignore[index]
            run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [merged, disabled, two_at_once])
def test_a_model_that_is_not_in_use_is_refused_when_the_adapter_is_made(change: Callable[[Any], None]) -> None:
    model = peft_model()
    change(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    for make in (RandomAdapter, adapt_backbone, LiFT):
        with pytest.raises(ValueError, match=r"merged|disabled|several PEFT adapters are active"):
            make(model)


def test_the_base_is_a_plain_network_whose_weights_the_caller_changes() -> None:
    network = base()
    prior, posterior = trained(network, config())
    network.load_state_dict(base(7).state_dict())
    for run in (lambda: prior.adapt(TASKS[0]), lambda: posterior.predict(X)):
        with pytest.raises(ValueError, match="was changed in place since the adapter was made"):
            run()


def test_merging_and_taking_apart_again_is_allowed() -> None:
    model = peft_model()
    prior, posterior = trained(model)
    predictions = posterior.predict(X)
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        prior.adapter(X, theta=prior.adapter.initial)
    torch.testing.assert_close(posterior.predict(X), predictions)


def test_tensors_that_an_export_would_leave_out_are_refused() -> None:
    model = peft_model()
    model.get_base_model()[0].base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.base_layer\.bias' is not part of the PEFT adapter 'default'"):
        LiFT(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = peft.get_peft_model(peft_model(), Lora(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="a PEFT model inside a PEFT model"):
        LiFT(nested)
    with pytest.raises(ValueError, match="is_trainable=True"):
        LiFT(peft_model().requires_grad_(False))
    with pytest.raises(TypeError, match="leave peft_config out"):
        LiFT(adapt_backbone(base(), config()), config())


# --------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("name", ["default", "mine", "lora_A", "0"])
def test_an_export_holds_the_chosen_adapter_alone_under_the_default_name(name: str, tmp_path: Path) -> None:
    model = peft_model(name)
    model.add_adapter("another", config(1))
    prior, posterior = trained(model)
    exports = [prior.to_peft(tmp_path / "phi"), posterior.to_peft(tmp_path / "mean")]
    exports += [prior.save_pretrained(tmp_path / "prior"), posterior.save_pretrained(tmp_path / "posterior")]
    for folder in exports:
        assert not [path for path in folder.iterdir() if path.is_dir()]
        names = set(load_file(folder / "adapter_model.safetensors"))
        assert names == {f"base_model.model.{k}.lora_{f}.weight" for k in "02" for f in "AB"}
    torch.testing.assert_close(export(posterior, tmp_path / "again"), own_output(posterior))
    loaded = LiFTPrior.from_pretrained(tmp_path / "prior", base())
    assert torch.equal(loaded.adapter.initial, prior.adapter.initial)
    LiFTPrior.from_pretrained(tmp_path / "prior", peft_model("third"))
    torch.testing.assert_close(
        TaskPosterior.from_pretrained(tmp_path / "posterior", base()).predict(X), posterior.predict(X)
    )


def test_a_module_of_the_adapter_s_own_name_keeps_it(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"default": nn.Linear(4, 8), "other": nn.Linear(8, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.blocks["other"](torch.tanh(self.blocks["default"](x))))

    network = Net()
    prior, _ = trained(network, Lora(r=2, target_modules=["default", "other"]))
    prior.save_pretrained(tmp_path / "prior")
    folders = prior.to_peft_library(tmp_path / "library")
    assert LiFTPrior.from_pretrained(tmp_path / "prior", network).adapter.dim == prior.adapter.dim
    assert LiFTPrior.from_adapters(folders, network, beta=0.1).adapter.dim == prior.adapter.dim


def test_a_network_without_peft_says_so_before_anything_is_written(tmp_path: Path) -> None:
    network = base()
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    prior = LiFT(RandomAdapter(network), **QUICK).meta_train(TASKS, progress=False)
    for write in (prior.save_pretrained, prior.to_peft):
        with pytest.raises(ValueError, match="Sequential is not a PEFT model"):
            write(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_kept_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft.get_peft_model(base().to(dtype), config(), autocast_adapter_dtype=False)
    half = [Task(t.name, (t.train.positional[0].to(dtype), t.train.target), num_classes=3) for t in TASKS]
    prior = LiFT(model, **QUICK).meta_train(half, progress=False)
    posterior = prior.adapt(half[0], temperature=0.0, learning_rate=1e-4, steps=20, draws=5)
    assert prior.adapter.initial.dtype == posterior.thetas.dtype == torch.float32
    assert float((posterior.thetas[0] == posterior.thetas[-1]).float().mean()) < 0.1
    assert prior.adapter(X.to(dtype), theta=prior.adapter.initial).dtype == torch.float32
    written = load_file(
        write_peft(prior.adapter, posterior.thetas[0], tmp_path / "export") / "adapter_model.safetensors"
    )
    assert {x.dtype for x in written.values()} == {dtype}
    headed = LiFT(model, **QUICK, head_scale=0.5).meta_train(half, progress=False).adapt(half[0], steps=8, draws=2)
    assert headed.heads is not None and bool(torch.isfinite(headed.predict(half[0].train)).all())


@pytest.mark.parametrize("move", ["double", "half", "bfloat16"])
def test_an_adapter_moves_as_a_whole(move: str) -> None:
    adapter = adapt_backbone(base(), config())
    getattr(adapter, move)()
    dtypes = {adapter.initial.dtype, *(p.dtype for p in adapter.backbone.parameters())}
    assert dtypes == {{"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}[move]}
    output = adapter(X.to(adapter.initial.dtype), theta=adapter.initial)
    assert output.shape == (5, 3)
    if move != "double":
        with pytest.raises(ValueError, match=r"a chain's moves are lost. Call adapter.float\(\)"):
            LiFT(adapter, **QUICK).meta_train(TASKS, progress=False)
    assert LiFT(adapter.float(), **QUICK).meta_train(TASKS, progress=False).adapter.dim == adapter.dim


@pytest.mark.gpu
def test_cuda_and_cpu_move_an_adapter_as_a_whole() -> None:
    adapter = adapt_backbone(base(), config())
    assert adapter.cuda()(X.cuda(), theta=adapter.initial).device.type == "cuda"
    assert adapter.cpu()(X, theta=adapter.initial).device.type == "cpu"


# ------------------------------------------------------------------------------------------------------- without a head


def test_features_get_heads_of_the_tasks_own_and_are_refused_where_there_are_no_classes() -> None:
    import timm
    import transformers as hf

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = hf.BertModel(hf.BertConfig(vocab_size=20, **sizes))
    picture = hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)
    plain = timm.models.VisionTransformer(img_size=8, patch_size=4, num_classes=0, embed_dim=8, depth=1, num_heads=2)
    ids, pixels, labels = torch.randint(3, 20, (8, 5)), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    cases: list[tuple[Any, Any, Any]] = [
        (text, ["query"], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        (picture, "all-linear", {"pixel_values": pixels}),
        (plain, ["qkv"], pixels),
    ]
    for network, targets, rows in cases:
        tasks = [Task(f"t{i}", (rows, labels), num_classes=4) for i in range(2)]
        lift = LiFT(network, Lora(r=1, target_modules=targets), **QUICK)
        posterior = lift.meta_train(tasks, progress=False).adapt(tasks[0], steps=4, draws=2)
        assert posterior.heads is not None and posterior.heads.shape == (2, 4, 9)
        stepping = LiFT(network, Lora(r=1, target_modules=targets), head="langevin", **QUICK)
        with pytest.raises(ValueError, match=r"output is 8 features, not answers.*head_scale=0.5"):
            stepping.meta_train(tasks, progress=False)
        written = [Task("r", (rows, torch.ones(8, 2).long()), "tokens")]
        with pytest.raises(ValueError, match="Load the network with a head for tokens"):
            LiFT(network, Lora(r=1, target_modules=targets), head_scale=0.5, **QUICK).meta_train(
                written, progress=False
            )
        prior = LiFT(network, Lora(r=1, target_modules=targets), head_scale=0.5, **QUICK).meta_train(
            tasks, progress=False
        )
        assert prior.adapt(tasks[0], steps=4, draws=2).predict(tasks[0].train).shape == (8, 4)
