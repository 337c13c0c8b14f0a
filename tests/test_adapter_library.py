"""Priors from LoRAs that exist already: the three methods against closed forms, gauges, and refusals by name."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_priors import logits, trained
from tiny_backbones import bert, matching_task
from torch import Tensor, nn

from pyro_lift import LiFTPrior, LiFTSettings
from pyro_lift.defaults import one_width
from pyro_lift.inference.fixed_theta import FixedThetaPosterior, exact_prior, phi_chain
from pyro_lift.inference.gibbs import conjugate
from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.lora_factors import aligned
from pyro_lift.saving.library import read_library
from pyro_lift.saving.peft_folder import write_peft


def zoo_of(
    root: Path, number: int = 4, spread: float = 0.02, **options: Any
) -> tuple[nn.Module, RandomAdapter, Tensor]:
    """A base model, an adapter on a copy of it, and folders of weights around one start."""
    torch.manual_seed(1)
    base = bert().eval()
    mine = copy.deepcopy(base)
    adapter = adapt_backbone(mine, recipe(mine, rank=2))
    centre = adapter.initial + 0.05 * torch.randn(adapter.dim)
    thetas = centre + spread * torch.randn(number, adapter.dim)
    for i, theta in enumerate(thetas):
        write_peft(adapter, theta, root / f"lora-{i}")
    return base, adapter, thetas


def folders(root: Path) -> list[Path]:
    return sorted(root.glob("lora-*"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_exact_prior_is_the_conditional_of_phi(tmp_path: Path) -> None:
    base, _, thetas = zoo_of(tmp_path)
    settings = LiFTSettings(sigma=0.2)
    prior = LiFTPrior.from_adapters(folders(tmp_path), base, beta=0.05, settings=settings)
    weight, mean, variance = prior.mixture.moments
    one = torch.ones(thetas.shape[1])
    pair = NormalPair("phi", "theta", 0 * one, one / 0.2**2, one * 0.05**2)
    exact = conjugate.draw(pair, thetas.double().sum(0), 4, 1.0, torch.zeros_like(one))
    torch.testing.assert_close(mean[0], exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(variance[0].float(), one / (4 / 0.05**2 + 1 / 0.2**2))
    assert weight.tolist() == [1.0]
    assert prior.tasks == ("lora-0", "lora-1", "lora-2", "lora-3")
    assert prior.adapt(matching_task("new"), steps=4, draws=2, seed=0).thetas.shape == (2, prior.adapter.dim)


def test_without_beta_the_adapters_own_spread_is_taken(tmp_path: Path) -> None:
    base, _, thetas = zoo_of(tmp_path)
    prior = LiFTPrior.from_adapters(folders(tmp_path), base)
    assert prior.settings.beta == pytest.approx(float(thetas.var(0, unbiased=False).mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "mixture", "chain"])
def test_the_exported_zoo_gives_the_same_prior_back(method: Any, tmp_path: Path) -> None:
    base, _, _ = zoo_of(tmp_path)
    options: dict[str, Any] = {"method": method, "components": 1 if method == "exact" else 2}
    options["settings"] = LiFTSettings(burn_in=20, samples=250)
    first = LiFTPrior.from_adapters(folders(tmp_path), copy.deepcopy(base), **options)
    zoo = read_library(folders(tmp_path), copy.deepcopy(base))
    for name, theta in zip(zoo.names, zoo.thetas, strict=True):
        write_peft(zoo.adapter, theta, tmp_path / "again" / name)
    second = LiFTPrior.from_adapters(folders(tmp_path / "again"), base, **options)
    for ours, theirs in zip(first.mixture.moments, second.mixture.moments, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    third = LiFTPrior.from_pretrained(first.save_pretrained(tmp_path / "saved"), first.adapter)
    for ours, theirs in zip(first.mixture.moments, third.mixture.moments, strict=True):
        assert torch.equal(ours, theirs)


def test_a_meta_trained_zoo_exported_and_imported_is_the_same_prior(tmp_path: Path) -> None:
    one = trained("bert")
    paths = [path for path in one.prior.to_peft_library(tmp_path) if path.name.startswith("task-")]
    prior = LiFTPrior.from_adapters(paths, copy.deepcopy(one.backbone), beta=0.03)
    thetas = torch.stack([one.prior.theta(name) for name in one.prior.tasks])
    mean, variance = exact_prior(thetas, 0.03, one_width(prior.settings.sigma))
    torch.testing.assert_close(prior.mixture.moments.mean[0], mean, atol=1e-5, rtol=1e-5)
    assert float(prior.mixture.moments.variance[0, 0]) == pytest.approx(variance, rel=1e-5)


def test_a_mixture_finds_two_groups_of_adapters(tmp_path: Path) -> None:
    base, adapter, thetas = zoo_of(tmp_path, 6)
    shift = 0.1 * torch.randn(adapter.dim)
    for i in range(3):
        write_peft(adapter, thetas[i] + shift, tmp_path / f"lora-{i}")
    prior = LiFTPrior.from_adapters(folders(tmp_path), base, method="mixture", components=2)
    weight, mean, _ = prior.mixture.moments
    groups = sorted([thetas[:3].mean(0) + shift, thetas[3:].mean(0)], key=lambda x: float(x[0]))
    torch.testing.assert_close(torch.stack(sorted(mean, key=lambda x: float(x[0]))), torch.stack(groups))
    torch.testing.assert_close(weight, torch.tensor([0.5, 0.5]).to(weight))


@pytest.mark.parametrize("scale", ["N", "1"])
def test_the_papers_chain_has_its_own_law(scale: Any) -> None:
    """phi is linear in phi: with a = eta/2 (c/beta^2 + 1/sigma^2) and theta_i in turn, its law is in closed form."""
    torch.manual_seed(5)
    N, D, beta, sigma = 3, 3000, 0.5, 1.0
    c = N if scale == "N" else 1
    thetas = torch.tensor([-0.4, 0.1, 0.9]).unsqueeze(-1).expand(N, D).clone()
    posterior = FixedThetaPosterior(thetas, torch.zeros(D), beta, sigma, scale)
    eta = 0.02
    chain = phi_chain(posterior, itertools.cycle(range(N)), eta, torch.Generator().manual_seed(0))
    draws = torch.stack(list(itertools.islice(chain, 600, 603)))
    a = 0.5 * eta * (c / beta**2 + 1 / sigma**2)
    variance = eta / (1 - (1 - a) ** 2)
    # The mean is periodic with the tasks: m' = (1 - a) m + b theta_i; iterate it to its cycle.
    m, cycle = 0.0, {}
    for step in range(603):
        m = (1 - a) * m + 0.5 * eta * c / beta**2 * float(thetas[step % N, 0])
        cycle[step] = m
    for k, draw in enumerate(draws):
        assert float(draw.mean()) == pytest.approx(cycle[600 + k], abs=4 * math.sqrt(variance / D))
        assert float(draw.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / D))


def test_turned_factors_are_warned_of_and_aligned_without_changing_a_network(tmp_path: Path) -> None:
    base, adapter, thetas = zoo_of(tmp_path, 4, spread=0.0)
    task = matching_task("t")
    turned = thetas.clone()
    for i in range(1, 4):
        for a in (e for e in adapter.layout if ".lora_A." in e.name):
            b = next(e for e in adapter.layout if e.name == a.name.replace(".lora_A.", ".lora_B."))
            R = torch.linalg.qr(torch.randn(2, 2))[0]
            turned[i, a.part] = (R @ thetas[i, a.part].view(a.shape)).reshape(-1)
            turned[i, b.part] = (thetas[i, b.part].view(b.shape) @ R.T).reshape(-1)
        write_peft(adapter, turned[i], tmp_path / f"lora-{i}")
    back = aligned(adapter, turned)
    torch.testing.assert_close(back, back[:1].expand_as(back), atol=1e-5, rtol=0)
    for before, after in zip(turned, back, strict=True):
        with adapter.bound(before):
            own = logits(adapter.backbone, task)
        with adapter.bound(after):
            torch.testing.assert_close(logits(adapter.backbone, task), own, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match=r"did not start from the same initial factors.*align=True"):
        apart = LiFTPrior.from_adapters(folders(tmp_path), copy.deepcopy(base), beta=0.05)
    together = LiFTPrior.from_adapters(folders(tmp_path), base, beta=0.05, align=True)
    loss = []
    for prior in (apart, together):  # the mean of the zoo should be the network they all are
        with prior.adapter.bound(prior.mixture.moments.mean[0].float()):
            theirs = logits(prior.adapter.backbone, task)
        with adapter.bound(thetas[0]):
            loss.append(float((theirs - logits(adapter.backbone, task)).abs().max()))
    assert loss[1] < 0.1 * loss[0]


def other_rank(folder: Path) -> None:
    edit(folder, r=3)


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)] = torch.zeros(3, 5)
    save_file(tensors, folder / "adapter_model.safetensors")


def extra_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.more.lora_A.weight": torch.zeros(2, 16)}, folder / "adapter_model.safetensors"
    )


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


REFUSALS: list[tuple[Callable[[Path], None], str]] = [
    (other_rank, r"lora-1/adapter_config\.json: r=3, but 2 in .*lora-0: adapters of other ranks"),
    (
        lambda f: edit(f, target_modules=["query"]),
        r"lora-1.*target_modules=\['query'\], but \['attention\.out",
    ),
    (lambda f: edit(f, use_rslora=True), r"lora-1.*use_rslora=True, but False in .*lora-0: rsLoRA scales"),
    (lambda f: edit(f, lora_alpha=32), r"lora-1.*lora_alpha=32, but 4 in"),
    (lambda f: edit(f, rank_pattern={"query": 4}), r"lora-1.*rank_pattern=\{'query': 4\}, but \{\}"),
    (lambda f: edit(f, base_model_name_or_path="me/other"), r"lora-1.*base model 'me/other', but 'me/bert' in"),
    (lambda f: edit(f, peft_type="LOHA"), r"lora-1.*a LOHA adapter; only LoRA"),
    (lambda f: edit(f, use_dora=True), r"lora-1.*use_dora=True is not supported"),
    (lambda f: edit(f, init_lora_weights="pissa_niter_4"), r"lora-1.*init_lora_weights='pissa_niter_4' moves the base"),
    (lambda f: edit(f, modules_to_save=["classifier"]), r"lora-1.*modules_to_save=\['classifier'\]"),
    (lambda f: edit(f, bias="all"), r"lora-1.*bias='all'"),
    (lambda f: (f / "adapter_config.json").unlink(), r"lora-1: no adapter_config\.json here"),
    (lambda f: (f / "adapter_config.json").write_text("{") and None, r"adapter_config\.json: not JSON"),  # type: ignore[list-item]
    (lambda f: (f / "adapter_config.json").write_text("{}") and None, r"adapter_config\.json: no key 'peft_type'"),  # type: ignore[list-item]
    (missing_tensor, r"lora-1/adapter_model\.safetensors: tensor 'base_model.*' is missing"),
    (extra_tensor, r"adapter_model\.safetensors: tensor 'base_model\.model\.more\.lora_A\.weight' is not part"),
    (wrong_shape, r"adapter_model\.safetensors: tensor '.*' has shape \(3, 5\), not \(2, 16\)"),
    (not_finite, r"adapter_model\.safetensors: tensor '.*' holds values that are not finite"),
    (pickled, r"no adapter_model\.safetensors here\. adapter_model\.bin is pickle"),
    (truncated, r"adapter_model\.safetensors: cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_adapters_that_cannot_share_a_space_are_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    base, _, _ = zoo_of(tmp_path, 3)
    for folder in folders(tmp_path):
        edit(folder, base_model_name_or_path="me/bert")
    damage(tmp_path / "lora-1")
    with pytest.raises(ValueError, match=message):
        LiFTPrior.from_adapters(folders(tmp_path), base)


def test_other_refusals(tmp_path: Path) -> None:
    base, adapter, _ = zoo_of(tmp_path, 2, spread=0.0)
    paths = folders(tmp_path)
    with pytest.raises(ValueError, match="1 adapters given"):
        LiFTPrior.from_adapters(paths[:1], base)
    with pytest.raises(ValueError, match="the adapters are all the same"):
        LiFTPrior.from_adapters(paths, copy.deepcopy(base))
    with pytest.raises(ValueError, match=r"one Gaussian\. Use method='mixture'"):
        LiFTPrior.from_adapters(paths, base, components=2)
    with pytest.raises(ValueError, match="3 components"):
        LiFTPrior.from_adapters(paths, adapter, method="mixture", components=3, beta=0.1)
    other = peft.get_peft_model(copy.deepcopy(base), recipe(base, rank=3))
    with pytest.raises(ValueError, match="r=2, but 3 in the backbone's own adapter"):
        LiFTPrior.from_adapters(paths, other)
    with pytest.raises(ValueError, match="past its stability limit"):
        LiFTPrior.from_adapters(paths, adapter, method="chain", step_size=10.0, beta=0.1)
