"""Saved folders, damaged or wrong in every way we could think of: each is refused with its file and its tensor."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_priors import trained
from tiny_backbones import bart, bert
from torch import nn

from pyro_lift import LiFTPrior, TaskPosterior
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.support.archive import sealed, write_tensors


class Case(NamedTuple):
    """What is done to a good folder, and what the answer must say."""

    name: str
    damage: Callable[[Path], None]
    message: str
    kind: str = "prior"


def config(change: Callable[[dict[str, Any]], Any], sealed_again: bool = False) -> Callable[[Path], None]:
    """Edit config.json, by hand or with a checksum to match."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        if sealed_again:
            values = sealed(values)
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], kind: str = "prior") -> Callable[[Path], None]:
    """Write other tensors, as if by hand: the record in config.json still describes the old ones."""

    def damage(folder: Path) -> None:
        values = load_file(folder / f"{kind}.safetensors")
        change(values)
        save_file({k: x.contiguous().clone() for k, x in values.items()}, folder / f"{kind}.safetensors")

    return damage


def rewritten(change: Callable[[dict[str, torch.Tensor]], Any], kind: str = "prior") -> Callable[[Path], None]:
    """Write other tensors with a record to match: what a faulty program would do."""

    def damage(folder: Path) -> None:
        values = load_file(folder / f"{kind}.safetensors")
        change(values)
        path = folder / f"{kind}.safetensors"
        record = write_tensors(path, values)
        config(lambda c: c["files"].update({path.name: record}), sealed_again=True)(folder)

    return damage


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def flipped(data: bytes) -> bytes:
    """One bit of the last value."""
    return data[:-1] + bytes([data[-1] ^ 1])


def other_digest(values: dict[str, Any]) -> None:
    name = min(values["base_model"]["tensors"])
    values["base_model"]["tensors"][name][1] = "0" * 12


def rename(values: dict[str, Any]) -> None:
    values["adapter"]["tensors"][0][0] = "q"


PRIOR, POSTERIOR = r"prior\.safetensors", r"posterior\.safetensors"
CASES = [
    Case("no such folder", shutil.rmtree, "no such folder, and not a name of the hub"),
    Case("no config", lambda f: (f / "config.json").unlink(), r"no config\.json here"),
    Case("config not JSON", bytes_of("config.json", lambda b: b[:-20]), r"config\.json: not JSON .*damaged"),
    Case("config not UTF-8", bytes_of("config.json", lambda b: b"\xff" + b), r"config\.json: not JSON"),
    Case("config a list", bytes_of("config.json", lambda b: b"[]"), r"config\.json: a JSON list; expected an object"),
    Case("another kind", config(lambda c: c.update(format="bert")), r"config\.json: format 'bert'; expected"),
    Case("a posterior for a prior", config(lambda c: c.update(format="pyro_lift.posterior")), "Is it the right folder"),
    Case("no version", config(lambda c: c.pop("format_version")), r"config\.json: format_version None"),
    Case(
        "a newer format",
        config(lambda c: c.update(format_version=2)),
        r"format 2, written by .* up to 1\. Upg",
    ),
    Case("no settings", config(lambda c: c.pop("settings")), r"config\.json: key 'settings' is missing"),
    Case("settings a list", config(lambda c: c.update(settings=[])), r"config\.json: 'settings' is a list"),
    Case("an unknown setting", config(lambda c: c["settings"].update(bta=1.0)), r"settings: unknown key 'bta'.*'beta'"),
    Case("a setting of another type", config(lambda c: c["settings"].update(beta="x")), r"settings: beta='x'"),
    Case("a setting out of range", config(lambda c: c["adapt"].update(learning_rate=-1.0)), r"adapt: learning_rate=-1"),
    Case("no components", config(lambda c: c["mixture"].pop("components")), "mixture: key 'components' is missing"),
    Case("another covariance", config(lambda c: c["mixture"].update(covariance="dag")), "mixture: covariance='dag'"),
    Case("more components", config(lambda c: c["mixture"].update(components=3), True), PRIOR + r": tensor 'mixture\.m"),
    Case("nothing recorded", config(lambda c: c["files"].clear(), True), PRIOR + ": nothing is recorded of this file"),
    Case("no tensors at all", lambda f: (f / "prior.safetensors").unlink(), r"no prior\.safetensors here"),
    Case("empty", bytes_of("prior.safetensors", lambda b: b""), PRIOR + ": truncated: 0 of "),
    Case("truncated", bytes_of("prior.safetensors", lambda b: b[:-50]), PRIOR + r": truncated: \d+ of \d+ bytes"),
    Case("padded", bytes_of("prior.safetensors", lambda b: b + b"\0" * 8), PRIOR + ": not safetensors"),
    Case("a pickle", bytes_of("prior.safetensors", lambda b: b"\x80\x04" * len(b)), PRIOR + ": not safetensors"),
    Case("one bit flipped", bytes_of("prior.safetensors", flipped), PRIOR + ": altered since it was written"),
    Case("values changed", tensors(lambda t: t["initial"].add_(1)), PRIOR + ": altered since it was written"),
    Case("a tensor missing", tensors(lambda t: t.pop("initial")), PRIOR + ": tensor 'initial' is missing"),
    Case("a tensor more", tensors(lambda t: t.update(x=torch.ones(1))), PRIOR + ": tensor 'x' does not belong here"),
    Case("a shape", tensors(lambda t: t.update(initial=t["initial"][1:])), PRIOR + r": tensor 'initial' has shape"),
    Case(
        "a dtype",
        tensors(lambda t: t.update(initial=t["initial"].half())),
        PRIOR + ": tensor 'initial' is float16",
    ),
    Case("a nan", rewritten(lambda t: t["initial"].fill_(math.nan)), PRIOR + ": tensor 'initial' holds values that"),
    Case(
        "a moment missing",
        rewritten(lambda t: t.pop("mixture.average.mean")),
        PRIOR + r": tensor 'mixture\.average\.mean' is missing",
    ),
    Case(
        "a moment of another size",
        rewritten(lambda t: t.update({"mixture.moments.mean": torch.zeros(2, 3)})),
        PRIOR + r": tensor 'mixture\.moments\.mean' has shape \(2, 3\)",
    ),
    Case(
        "a negative variance",
        rewritten(lambda t: t["mixture.moments.variance"].neg_()),
        PRIOR + r": tensor 'mixture\.moments\.variance' or its weights hold negative",
    ),
    Case(
        "a preconditioner of another size",
        rewritten(lambda t: t.update({"second_moment.theta": torch.ones(3)})),
        PRIOR + r": tensor 'second_moment\.theta' has shape \(3,\)",
    ),
    Case(
        "an adapter tensor renamed",
        config(rename),
        "adapter tensor 'q' has no place",
    ),
    Case(
        "an adapter tensor gone",
        config(lambda c: c["adapter"]["tensors"].pop()),
        "adapter tensor .* is not in the file",
    ),
    Case("tensors out of order", config(lambda c: c["adapter"]["tensors"].reverse()), "tensors out of order"),
    Case("another dim", config(lambda c: c["adapter"].update(dim=7)), "their sizes do not add up to dim"),
    Case("another rank", config(lambda c: c["peft"].update(r=3)), r"tensor '.*' has shape \(3, 16\) in this"),
    Case(
        "another scale",
        config(lambda c: c["peft"].update(lora_alpha=64, r=2)),
        r"config\.json: altered since it was written",
    ),
    Case(
        "an unknown adapter",
        config(lambda c: c["peft"].update(peft_type="NEW")),
        "PEFT cannot read",
    ),
    Case(
        "other base weights",
        config(other_digest),
        r"made for .*: the weight '.*' has other values \(1 of",
    ),
    Case("a base weight more", config(lambda c: c["base_model"]["tensors"].update(x=[[1], ""])), "has no weight 'x'"),
    Case(
        "no draws",
        tensors(lambda t: t.pop("theta"), "posterior"),
        POSTERIOR + ": tensor 'theta' is missing",
        "posterior",
    ),
    Case(
        "draws of another adapter",
        rewritten(lambda t: t.update(theta=torch.ones(3, 4)), "posterior"),
        POSTERIOR + r": tensor 'theta' has shape \(3, 4\)",
        "posterior",
    ),
    Case(
        "more heads than draws",
        rewritten(lambda t: t.update(head=torch.ones(9, 3, 17)), "posterior"),
        POSTERIOR + ": tensor 'head' has 9 draws, 'theta' 3",
        "posterior",
    ),
    Case("no kind", config(lambda c: c["task"].pop("kind"), True), r"task: key 'kind' is missing", "posterior"),
    Case("another kind of loss", config(lambda c: c["task"].update(kind="x"), True), r"task: kind='x'", "posterior"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    one = trained("bert")
    mixture = OnlineGaussianMixture(2, buffer_size=5)
    for _ in range(9):
        mixture.update(one.prior.adapter.initial + torch.randn(one.prior.adapter.dim))
    prior = LiFTPrior(one.prior.adapter, mixture, one.prior.settings, second_moment=one.prior.second_moment)
    prior.save_pretrained(root / "prior")
    one.posterior.save_pretrained(root / "posterior")
    return root


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_damaged_folder_is_refused_with_its_file_and_tensor(case: Case, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / case.kind, tmp_path / case.kind)
    case.damage(tmp_path / case.kind)
    load: Any = {"prior": LiFTPrior, "posterior": TaskPosterior}[case.kind].from_pretrained  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=case.message):
        load(tmp_path / case.kind, copy.deepcopy(trained("bert").backbone))


def test_copies_for_other_programs_are_missed_and_hinder_nothing(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = copy.deepcopy(trained("bert").backbone)
    for kind, load in (("prior", LiFTPrior.from_pretrained), ("posterior", TaskPosterior.from_pretrained)):
        folder = tmp_path / kind
        shutil.copytree(good / kind, folder)
        caplog.clear()
        load(folder, backbone)
        assert "PEFT and servers do" not in caplog.text
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(flipped(weights.read_bytes()))
        load(folder, backbone)
        assert f"{weights} is not as it was written" in caplog.text
        weights.unlink()
        load(folder, backbone)
        assert f"{weights} is missing" in caplog.text
        caplog.clear()
        values = json.loads((folder / "config.json").read_text())
        del values["copies"]  # as a folder of before
        (folder / "config.json").write_text(json.dumps(sealed(values)))
        load(folder, backbone)
        assert "PEFT and servers do" not in caplog.text


def deeper() -> nn.Module:
    model = bert()
    model.config.num_hidden_layers = 2  # type: ignore[union-attr]
    return type(model)(model.config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bart, r"the adapter does not fit BartForConditionalGeneration"),
        (bert, r"made for another BertModel: the weight '.*' has other values"),
        (deeper, r"this backbone's adapter tensor 'base_model\.model\.encoder\.layer\.1\..*' is not in the file"),
    ],
)
def test_another_base_model_is_refused(make: Callable[[], nn.Module], message: str, good: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LiFTPrior.from_pretrained(good / "prior", make())


def test_an_adapter_of_another_scale_is_refused(good: Path) -> None:
    backbone = copy.deepcopy(trained("bert").backbone)
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2, lora_alpha=64))
    with pytest.raises(ValueError, match="made with lora_alpha=4; this backbone's has 64"):
        LiFTPrior.from_pretrained(good / "prior", adapter)
