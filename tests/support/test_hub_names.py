"""A name that is no folder here and nothing on the hub: the answer is short and says that both were looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_files import prepare

from pyro_lift import LiFTPrior
from pyro_lift.config import read_config
from pyro_lift.models.backbones import load_backbone
from pyro_lift.wiring import encoder_of

LONG = "We couldn't connect to 'https://huggingface.co'.\nCheck your connection or " + "see the documentation " * 50


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that cannot be reached, in a folder that is empty; returns the names that it was asked for."""
    import huggingface_hub
    import transformers
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    def absent(name: Any, *args: Any, **options: Any) -> Any:
        del args, options
        asked.append(str(name))
        raise OSError(LONG)

    def missing(name: str, **options: Any) -> Any:
        del options
        asked.append(name)
        raise LocalEntryNotFoundError(LONG)

    for loader in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "AutoImageProcessor"):
        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", absent)
    monkeypatch.setattr("timm.create_model", absent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    monkeypatch.chdir(tmp_path)
    return asked


def check(words: str, name: str, here: Path) -> None:
    assert f"{name}: no such folder in {here}, and the hub gave nothing of that name (We couldn't connect" in words
    assert "documentation" not in words and len(words) < 400


@pytest.mark.parametrize("kind", ["causal", "encoder", "vision", "timm"])
def test_a_backbone_of_a_folder_that_is_not_there(kind: Any, no_hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such folder") as raised:
        load_backbone("models/mine", kind)
    check(str(raised.value), "models/mine", tmp_path)
    assert no_hub == ["models/mine"]


@pytest.mark.parametrize(
    "name", ["./models/mine", "../mine", "models/of/mine", "my models/mine", "/nowhere/mine", "~/m"]
)
def test_what_the_hub_cannot_have_is_not_asked_of_it(name: str, no_hub: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder.*, and not a name of the hub"):
        load_backbone(name, "encoder")
    assert no_hub == []


def test_a_file_is_no_folder(no_hub: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileNotFoundError, match="mine: is a file; give the folder"):
        load_backbone("mine", "encoder")
    assert no_hub == []


def test_a_prior_of_a_folder_that_is_not_there(no_hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder") as raised:
        LiFTPrior.from_pretrained("runs/prior", torch.nn.Linear(2, 2))
    check(str(raised.value), "runs/prior", tmp_path)
    assert no_hub == ["runs/prior"]


def test_a_name_that_the_hub_refuses_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="my runs/prior: no such folder, and not a name of the hub"):
        LiFTPrior.from_pretrained("my runs/prior", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_stands_beside_a_backbone_is_looked_for_in_the_same_way(
    family: str, no_hub: list[str], tmp_path: Path
) -> None:
    path = prepare(family, tmp_path)
    path.write_text(path.read_text().replace(str(tmp_path / "model"), "models/mine"))
    with pytest.raises(OSError, match="no such folder") as raised:
        encoder_of(read_config(path))
    check(str(raised.value), "models/mine", tmp_path)
    assert no_hub == ["models/mine"]
