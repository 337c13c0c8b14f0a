"""Digests of tasks and network: others where a row, a label or a weight is; runs of other data are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from resumed_runs import stops_at

from pyro_lift import LiFT, Task
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.digest import digest, digest_of_network, digests_of_tasks
from pyro_lift.settings import LiFTSettings
from pyro_lift.tuning.whose_heads import RULES, run_config


def adapter(seed: int = 0) -> RandomAdapter:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def tasks(shift: int = 0, scale: float = 1.0) -> list[Task]:
    """Labels by one map that all tasks have in common, shifted by some classes."""
    generator = torch.Generator().manual_seed(1)
    common, made = torch.randn(6, 3, generator=generator), []
    for k in range(8):
        x = torch.randn(24, 6, generator=generator)
        made.append(Task(f"t{k}", (scale * x, ((x @ common).argmax(-1) + k * shift) % 3), num_classes=3))
    return made


def test_it_is_of_rows_labels_and_weights() -> None:
    same = digest(adapter(), tasks())
    assert same == digest(adapter(), tasks())
    others = {digest(adapter(), tasks(shift=1)), digest(adapter(), tasks(scale=2.0)), digest(adapter(1), tasks())}
    assert len(others) == 3 and same not in others
    assert digest(adapter().to(torch.bfloat16), tasks()) != same


@pytest.mark.parametrize(("what", "visits"), [("labels", 43), ("network", 330)])
def test_what_was_found_before_the_chain_is_not_taken_for_other_data_or_another_network(
    what: str, visits: int, tmp_path: Path
) -> None:
    options = {"sgd_steps": 200, "burn_in": 5, "samples": 10, "seed": 0}
    stop = stops_at(visits)  # after the trial, whose verdict is kept
    first = (adapter(), tasks(shift=1)) if what == "labels" else (adapter(1), tasks())
    with pytest.raises(KeyboardInterrupt):
        LiFT(first[0], **options).meta_train(first[1], checkpoint=tmp_path, on_step=stop, progress=False)  # type: ignore[arg-type]
    assert (tmp_path / "joint").is_dir()
    whole = LiFT(adapter(), **options).meta_train(tasks(), progress=False)  # type: ignore[arg-type]
    mended = LiFT(adapter(), **options).meta_train(tasks(), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    assert mended.results == whole.results
    torch.testing.assert_close(mended.mixture.get().mean, whole.mixture.get().mean, rtol=0, atol=0)


OPTIONS = {"sgd_steps": 4, "burn_in": 3, "samples": 6, "sgd_learning_rate": 1e-3, "seed": 0}


def stopped(folder: Path) -> None:
    """Save a run that has come to the middle of its chain."""
    with pytest.raises(KeyboardInterrupt):
        LiFT(adapter(), **OPTIONS).meta_train(  # type: ignore[arg-type]
            tasks(), checkpoint=folder, checkpoint_every=1, on_step=stops_at(9), progress=False
        )


def relabelled(*which: int) -> list[Task]:
    """The tasks, with the labels of some moved by one class: their rows and the first block are as they were."""
    moved = set(which)
    return [
        Task(t.name, (t.train.inputs[""], (t.train.target + (k in moved)) % 3), num_classes=3)
        for k, t in enumerate(tasks())
    ]


def test_a_chain_goes_on_with_the_same_data_alone_and_names_the_tasks_that_differ(tmp_path: Path) -> None:
    stopped(tmp_path)
    for which, named in (((5,), "rows of task 't5' "), ((2, 7), "rows of tasks 't2', 't7' ")):
        with pytest.raises(ValueError, match=named + ".*labels.*Go on with the same data"):
            LiFT(adapter(), **OPTIONS).meta_train(relabelled(*which), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    whole = LiFT(adapter(), **OPTIONS).meta_train(tasks(), progress=False)  # type: ignore[arg-type]
    again = LiFT(adapter(), **OPTIONS).meta_train(tasks(), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(again.mixture.get().mean, whole.mixture.get().mean, rtol=0, atol=0)


def test_a_chain_does_not_go_on_with_another_network_however_near(tmp_path: Path) -> None:
    stopped(tmp_path)
    near = adapter()
    with torch.no_grad():
        near.backbone.get_parameter("base_model.model.2.base_layer.bias").mul_(1.0 + 1e-5)
    with pytest.raises(ValueError, match=r"weights of the backbone are others .*Go on with the same network"):
        LiFT(near, **OPTIONS).meta_train(tasks(), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    assert digest_of_network(adapter()) == digest_of_network(adapter()) != digest_of_network(near)


def steeper(slope: float = 0.5) -> RandomAdapter:
    """A network of the same weights with another function between them."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LeakyReLU(slope), torch.nn.Linear(8, 3))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def test_a_chain_does_not_go_on_with_the_same_weights_in_another_network(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert digest_of_network(adapter()) == digest_of_network(steeper())
    with pytest.raises(ValueError, match=r"1\.class was 'Tanh' when the run was saved and is 'LeakyReLU'\. Go on with"):
        LiFT(steeper(), **OPTIONS).meta_train(tasks(), resume=tmp_path, progress=False)  # type: ignore[arg-type]


def test_what_was_found_before_the_chain_is_not_taken_for_another_network(tmp_path: Path) -> None:
    class Of:
        folder, transitions = tmp_path, 0

        def __init__(self, network: RandomAdapter | None) -> None:
            told = {} if network is None else run_config(LiFTSettings(), 0, network, tasks(), rules=RULES)
            self.config = {"seed": 0, **{name: x for name, x in told.items() if name == "architecture"}}

    def kept(network: RandomAdapter | None) -> WorkBefore:
        return WorkBefore.of(Of(network), "joint", lambda: "rows and weights")[0]  # type: ignore[arg-type]

    kept(steeper(0.5)).data("joint", lambda: {"rate": 0.1})
    assert kept(steeper(0.5)).has("joint") and not kept(steeper(0.6)).has("joint") and not kept(adapter()).has("joint")
    assert kept(None).has("joint"), "a run of before says nothing of its network"
    kept(None).data("cross-fit", lambda: {"rate": 0.1})
    assert kept(adapter()).has("cross-fit"), "nor does what it kept"


def test_the_start_of_an_adapter_is_no_part_of_the_network() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    first, second = (adapt_backbone(copy.deepcopy(net), config, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.initial, second.initial)
    assert digest_of_network(first) == digest_of_network(second)


def of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs be saved as by a version that kept no digests of tasks, nor asked their rows about the class layer."""

    def config(*run: Any, **options: Any) -> dict[str, Any]:
        told = run_config(*run, **options)
        del told["task_data"], told["network"], told["architecture"], told["class layer"]
        return told

    monkeypatch.setattr("pyro_lift.lift.run_config", config)


def test_a_chain_saved_without_digests_goes_on_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        of_before(earlier)
        stopped(tmp_path)
    LiFT(adapter(), **OPTIONS).meta_train(relabelled(5), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    for path in tmp_path.glob("step-*/state.json"):
        assert not {"task_data", "network", "architecture"} & json.loads(path.read_text())["config"].keys()


def test_a_run_saved_without_digests_keeps_what_it_found_before_its_chain_and_its_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sgd_steps": 150, "burn_in": 5, "samples": 12, "stop_every": 4, "head": "shared", "seed": 0}
    far = Task("t0", (1e3 * tasks()[0].train.inputs[""], tasks()[0].train.target), num_classes=3)
    given, count = [*tasks()[1:5], far, *tasks()[5:]], 0
    with monkeypatch.context() as earlier:
        of_before(earlier)
        earlier.setattr("pyro_lift.before_chain.leaves_outliers_out", lambda session: False)
        whole = LiFT(adapter(), **options).meta_train(given, progress=False)  # type: ignore[arg-type]

        def stop() -> None:
            nonlocal count
            looked = list(tmp_path.glob("looks"))
            count += bool(looked)
            if count == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            LiFT(adapter(), **options).meta_train(  # type: ignore[arg-type]
                given, checkpoint=tmp_path, checkpoint_every=1, on_step=stop, progress=False
            )
    looks = (tmp_path / "looks" / "looks.json").read_text()
    monkeypatch.setattr("pyro_lift.before_chain.JointRun", None)  # nothing is trained anew
    again = LiFT(adapter(), **options).meta_train(given, resume=tmp_path, progress=False)  # type: ignore[arg-type]
    assert again.settings == whole.settings and again.results == whole.results
    torch.testing.assert_close(again.mixture.get().mean, whole.mixture.get().mean, rtol=0, atol=0)
    assert json.loads(looks)["looks"][0] == json.loads((tmp_path / "looks" / "looks.json").read_text())["looks"][0]


def test_label_texts_and_the_order_of_rows_count() -> None:
    x, y, texts = torch.arange(8).view(4, 2), torch.tensor([0, 1, 0, 1]), {"input_ids": torch.tensor([[1], [2]])}
    other = {"input_ids": torch.tensor([[2], [1]])}
    made = [
        Task("m", (x, y), "matching", label_texts=texts),
        Task("m", (x, y), "matching", label_texts=other),
        Task("m", (x.flip(0), y), "matching", label_texts=texts),
        Task("m", (x, 1 - y), "matching", label_texts=texts),
    ]
    assert len({digests_of_tasks([task])["m"] for task in made}) == 4
