"""Nothing that is worth something is overwritten by a folder of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import LiFT
from pyro_lift.saving.destination import check_destination


def test_a_prior_and_a_posterior_do_not_take_each_others_folder_or_another_models(tmp_path: Path) -> None:
    tasks = tiny_tasks(4)
    prior = LiFT(tiny_adapter(), sgd_steps=2, burn_in=2, samples=4, seed=0).meta_train(tasks, progress=False)
    posterior = prior.adapt(tasks[0], steps=4, draws=2)
    for first, second, kind in ((prior, posterior, "prior"), (posterior, prior, "posterior")):
        folder = tmp_path / kind
        first.save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(FileExistsError, match=f"holds a {kind}, which .* overwrite. Give another folder"):
            second.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        first.save_pretrained(folder)  # an older one of its kind is replaced
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "file").write_text("")
    for saved in (prior, posterior):
        with pytest.raises(FileExistsError, match="holds another model"):
            saved.save_pretrained(model)
        with pytest.raises(FileExistsError, match="is a file"):
            saved.save_pretrained(tmp_path / "file")
    assert list(model.iterdir()) == [model / "config.json"]


def test_a_damaged_folder_of_the_same_kind_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileExistsError, match="another model"):
        check_destination(tmp_path, "prior")
    (tmp_path / "prior.safetensors").write_bytes(b"")
    check_destination(tmp_path, "prior")
    check_destination(tmp_path / "new", "posterior")
