"""Priors and posteriors saved, loaded, and exported as plain PEFT adapters; wrong files are named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from saved_priors import logits, trained

from pyro_lift import LiFTPrior, TaskPosterior


@pytest.mark.parametrize("name", ["bart", "t5", "bert", "vit", "timm"])
def test_every_export_loads_in_plain_peft_with_the_same_logits(name: str, tmp_path: Path) -> None:
    one = trained(name)
    prior, posterior, adapter = one.prior, one.posterior, one.prior.adapter
    weight, mean, _ = prior.mixture.moments
    exports = {
        tmp_path / "phi": (weight[:, None] * mean).sum(0),
        tmp_path / "component-0": mean[0],
        tmp_path / "component-1": mean[1],
        tmp_path / "task-t0": prior.mcmc.kernel.theta(0)["theta"],
        tmp_path / "task-t1": prior.mcmc.kernel.theta(1)["theta"],
    }
    assert prior.to_peft_library(tmp_path) == list(exports)
    with pytest.warns(FutureWarning, match="to_peft_zoo is now called to_peft_library"):
        assert prior.to_peft_zoo(tmp_path) == list(exports)
    exports |= {posterior.to_peft(tmp_path / "draw", 2): posterior.thetas[2]}
    exports |= {posterior.to_peft(tmp_path / "mean"): posterior.thetas.mean(0)}
    exports |= {posterior.save_pretrained(tmp_path / "posterior"): posterior.thetas.mean(0)}
    exports |= {prior.save_pretrained(tmp_path / "prior"): mean[int(weight.argmax())]}
    plain = logits(one.backbone, one.tasks[2])
    for folder, theta in exports.items():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(one.backbone), folder).eval()
        with adapter.bound(theta.to(adapter.initial)):
            ours = logits(adapter.backbone, one.tasks[2])
        theirs = logits(loaded, one.tasks[2])
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        assert float((theirs - plain).abs().max()) > 1e-4, f"{folder.name} does nothing"


@pytest.mark.slow
def test_an_export_loads_where_there_is_no_pyro_lift(tmp_path: Path) -> None:
    one = trained("bert")
    one.posterior.to_peft(tmp_path / "adapter", 0)
    one.backbone.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    code = (
        "import sys, peft, transformers;"
        f"base = transformers.AutoModel.from_pretrained({str(tmp_path / 'base')!r});"
        f"peft.PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r});"
        "assert not [name for name in sys.modules if name.startswith(('pyro_lift', 'pyro.'))]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", ["bart", "t5", "bert", "vit"])
def test_a_prior_loaded_adapts_to_the_same_draws(name: str, tmp_path: Path) -> None:
    one = trained(name)
    one.prior.save_pretrained(tmp_path, results={"accuracy": 0.5})
    torch.manual_seed(99)
    before = torch.get_rng_state()
    read = LiFTPrior.from_pretrained(tmp_path, copy.deepcopy(one.backbone))
    assert torch.equal(torch.get_rng_state(), before), "loading moved the caller's random stream"
    for ours, theirs in zip(one.prior.mixture.moments, read.mixture.moments, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(read.adapter.initial, one.prior.adapter.initial)
    assert (read.settings, read.adapt_settings, read.seed) == (one.prior.settings, one.prior.adapt_settings, 0)
    assert (read.tasks, read.results["accuracy"]) == (("t0", "t1"), 0.5) and read.results == one.prior.results
    ours, theirs = (p.adapt(one.tasks[2], steps=8, draws=3, seed=5).thetas for p in (one.prior, read))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="the weights of its tasks are not saved: task='t0'"):
        read.theta("t0")


@pytest.mark.parametrize("name", ["bart", "bert", "vit"])
def test_a_posterior_loaded_predicts_the_same(name: str, tmp_path: Path) -> None:
    one = trained(name)
    one.posterior.save_pretrained(tmp_path)
    read = TaskPosterior.from_pretrained(tmp_path, copy.deepcopy(one.backbone))
    inputs = {k: x for k, x in one.tasks[2].train.inputs.items() if not k.startswith("label_")}
    torch.testing.assert_close(read.predict(inputs), one.posterior.predict(inputs), atol=1e-6, rtol=0)
    assert (read.task.name, read.task.kind, read.component) == ("t2", one.tasks[2].kind, one.posterior.component)
    assert TaskPosterior.from_pretrained(tmp_path, one.prior.adapter, one.tasks[2]).task is one.tasks[2]


def test_a_head_of_the_tasks_own_is_exported_beside_the_adapter(tmp_path: Path) -> None:
    one = trained("vit")
    posterior = one.posterior
    assert posterior.heads is not None
    head = load_file(posterior.to_peft(tmp_path, 1) / "head.safetensors")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(one.backbone), tmp_path).eval()
    features = logits(loaded, one.tasks[2])[:, 0]
    alone = TaskPosterior(posterior.adapter, one.tasks[2], posterior.thetas[1:2], posterior.heads[1:2])
    theirs = torch.softmax(features @ head["weight"].T + head["bias"], -1)
    torch.testing.assert_close(theirs, alone.predict(one.tasks[2].train), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("samples", [3, 30])
def test_mixtures_come_back_from_their_buffer_and_from_their_stream(
    components: int, samples: int, tmp_path: Path
) -> None:
    from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture

    one = trained("bert")
    mixture = OnlineGaussianMixture(components, "spherical", buffer_size=10)
    for _ in range(samples):
        mixture.update(one.prior.adapter.initial + torch.randn(one.prior.adapter.dim))
    LiFTPrior(one.prior.adapter, mixture, one.prior.settings).save_pretrained(tmp_path)
    read = LiFTPrior.from_pretrained(tmp_path, one.prior.adapter)
    assert read.mixture.seen == samples
    for ours, theirs in zip(mixture.moments, read.mixture.moments, strict=True):
        assert torch.equal(ours, theirs)


def test_the_card_says_what_was_learned_and_its_head_is_yaml(tmp_path: Path) -> None:
    one = trained("bert")
    text = (one.prior.save_pretrained(tmp_path / "p", results={"accuracy": 0.625}) / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft" and "pyro-lift" in header["tags"] and "base_model" not in header
    beta = one.prior.settings.beta
    assert isinstance(beta, list) and len(beta) == len(one.prior.adapter.layout)
    width = f"| `beta` | `{min(beta):.3g} .. {max(beta):.3g}, by module` |"
    for part in ("K = 2", "`t0`, `t1`", width, "| accuracy | 0.625 |", "| `adapt.steps` | `100` |"):
        assert part in text, part
    card = (one.posterior.save_pretrained(tmp_path / "q") / "README.md").read_text()
    assert "for the task 't2'" in card and "3 draws" in card


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    one = trained("bert")
    (tmp_path / "notes.txt").write_text("mine")
    one.prior.save_pretrained(tmp_path)
    one.prior.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert LiFTPrior.from_pretrained(tmp_path, one.prior.adapter).mixture.components == 2


def test_a_push_uploads_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen["repo"] = (repo_id, options)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
            read = LiFTPrior.from_pretrained(folder_path, trained("bert").prior.adapter)
            seen["uploaded"] = (repo_id, read.tasks, options)
            return type("Info", (), {"commit_url": "address"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert trained("bert").prior.push_to_hub("me/prior", private=True, token="t") == "address"
    assert seen["token"] == "t" and seen["repo"] == ("me/prior", {"private": True, "exist_ok": True})
    assert seen["uploaded"] == ("me/prior", ("t0", "t1"), {"commit_message": "Upload by pyro_lift"})


def test_a_name_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = trained("bert").prior.save_pretrained(tmp_path / "p")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision: str(folder) if revision == "v1" else ""
    )
    read = LiFTPrior.from_pretrained("me/prior", trained("bert").prior.adapter, revision="v1")
    assert read.tasks == ("t0", "t1")


def test_a_base_model_in_half_precision_is_the_same_base_and_check_base_lets_another_pass(tmp_path: Path) -> None:
    one = trained("bert")
    one.prior.save_pretrained(tmp_path)
    half = copy.deepcopy(one.backbone).to(torch.bfloat16)
    assert LiFTPrior.from_pretrained(tmp_path, half).adapter.dim == one.prior.adapter.dim
    other = copy.deepcopy(one.backbone)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="has other values"):
        LiFTPrior.from_pretrained(tmp_path, copy.deepcopy(other))
    assert LiFTPrior.from_pretrained(tmp_path, other, check_base=False).tasks == ("t0", "t1")


@pytest.mark.parametrize(("which", "message"), [(2, "components are 0 .. 1"), ("t9", "'t9' is not known")])
def test_an_unknown_export_is_refused(which: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained("bert").prior.to_peft(tmp_path / "x", which)
    with pytest.raises(ValueError, match=r"a draw's number, 0 \.\. 2"):
        trained("bert").posterior.to_peft(tmp_path / "x", 3)


def test_a_folder_is_json_and_safetensors_only(tmp_path: Path) -> None:
    folder = trained("bert").prior.save_pretrained(tmp_path)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "prior.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["files"]["prior.safetensors"]["tensors"].keys() == load_file(folder / "prior.safetensors").keys()
    assert config["versions"]["pyro-lift"]
