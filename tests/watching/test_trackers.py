"""Trackers: TensorBoard by its own files; the others by stand-ins that take what the libraries' interfaces take."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_files import prepare
from typer.testing import CliRunner

from pyro_lift.cli import app
from pyro_lift.config import read_config
from pyro_lift.watching import Callback, MLflow, TensorBoard, Trackio, WandB, watch
from pyro_lift.watching.named import check_log, named_callback

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def run_with(
    callback: Callback, kind: str = "meta-train", losses: tuple[float, ...] = (3.0, 2.0, float("nan"))
) -> None:
    with watch([callback], kind, total=len(losses), rate=0.1, name="x") as on_step:
        for loss in losses:
            on_step.tell(loss=loss, step_size=0.5, phase="sgd")


def test_tensorboard_finds_the_curves_in_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, every=1) as callback:
        run_with(callback)
        run_with(callback, "adapt", (1.0,))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"meta-train/loss", "meta-train/step_size", "meta-train/seconds", "adapt/loss"} <= set(scalars)
    assert [(e.step, e.value) for e in events.Scalars("meta-train/loss")] == [(1, 3.0), (2, 2.0)]  # NaN has no point
    assert [e.step for e in events.Scalars("meta-train/step_size")] == [1, 2, 3]
    assert "meta-train/settings/text_summary" in events.Tags()["tensors"]


class Library:
    """Records calls; its functions take the arguments that the real ones take."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.active: object | None = None

    def named(self, name: str) -> list[Any]:
        return [value for call, value in self.calls if call == name]


class Wandb(Library):
    def init(self, project: str | None = None, name: str | None = None, mode: str | None = None) -> Wandb:
        self.calls.append(("init", (project, name, mode)))
        self.config = types.SimpleNamespace(update=lambda d, allow_val_change=None: self.calls.append(("config", d)))
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", (name, step_metric)))

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert step is None  # W&B's own step counts upwards only
        self.calls.append(("log", data))

    def finish(self, exit_code: int | None = None) -> None:
        self.calls.append(("finish", exit_code))


class TrackioLibrary(Library):
    def init(self, project: str, *, name: str | None = None, config: dict[str, Any] | None = None) -> None:
        self.calls.append(("init", (project, name, config)))

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", metrics))

    def finish(self) -> None:
        self.calls.append(("finish", None))


class Mlflow(Library):
    def active_run(self) -> object | None:
        return self.active

    def start_run(
        self, run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None
    ) -> None:
        self.active = object()
        self.calls.append(("start", (run_id, experiment_id, run_name)))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.calls.append(("params", dict(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name in metrics:
            assert all(c.isalnum() or c in "_-. /" for c in name)  # what MLflow lets a name have
        self.calls.append(("log", (dict(metrics), step)))

    def end_run(self, status: str = "FINISHED") -> None:
        self.active = None
        self.calls.append(("end", status))


def put(monkeypatch: pytest.MonkeyPatch, name: str, library: Any) -> Any:
    import sys

    monkeypatch.setitem(sys.modules, name, library)
    return library


def test_weights_and_biases_have_one_run_with_a_step_for_each_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(monkeypatch, "wandb", Wandb())
    with WandB("project", every=1, mode="offline") as callback:
        run_with(callback)
        run_with(callback, "adapt", (1.0,))
    assert library.named("init") == [("project", None, "offline")] and library.named("finish") == [None]
    assert library.named("config")[0] == {"meta-train/rate": 0.1, "meta-train/name": "x"}
    assert library.named("define")[0] == ("meta-train/*", "meta-train/step")
    first, _, third, fourth = library.named("log")
    assert (first["meta-train/step"], first["meta-train/loss"], first["meta-train/step_size"]) == (1, 3.0, 0.5)
    assert third["meta-train/step"] == 3 and "meta-train/loss" not in third and fourth["adapt/step"] == 1


def test_trackio_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(monkeypatch, "trackio", TrackioLibrary())
    with Trackio("project", every=2, name="try") as callback:
        run_with(callback)
    config = {"meta-train/rate": 0.1, "meta-train/name": "x"}
    assert library.named("init") == [("project", "try", config)] and library.named("finish") == [None]
    assert [line["meta-train/step"] for line in library.named("log")] == [2, 3]  # every second, and the last


def test_mlflow_has_a_run_of_its_own_unless_one_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(monkeypatch, "mlflow", Mlflow())
    with MLflow(every=1, run_name="try") as callback:
        run_with(callback, "adapt/a: b")
    assert library.named("start") == [(None, None, "try")] and library.named("end") == ["FINISHED"]
    assert library.named("params") == [{"adapt/a_ b/rate": 0.1, "adapt/a_ b/name": "x"}]
    assert library.named("log")[0][0]["adapt/a_ b/loss"] == 3.0 and library.named("log")[2][1] == 3
    library.calls.clear()
    library.active = object()
    with MLflow(every=1) as callback:
        run_with(callback)
    assert library.named("start") == library.named("end") == [] and library.active is not None


def test_libraries_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in (("wandb", lambda: WandB("p")), ("trackio", lambda: Trackio("p")), ("mlflow", MLflow)):
        put(monkeypatch, name, None)
        with pytest.raises(ImportError, match=f"pip install {name}"):
            make()


def test_names_of_logs_are_read_or_refused(tmp_path: Path) -> None:
    assert check_log("mlflow") == ("mlflow", "") and check_log("mlflow:7") == ("mlflow", "7")
    assert check_log("json:log") == ("json", "log") and check_log("a/b.jsonl") == ("json", "a/b.jsonl")
    for name, message in (
        ("wandb", r"log 'wandb': a project is missing; write wandb:PROJECT"),
        ("tensorbord:runs", "did you mean 'tensorboard'"),
        ("runs", r"expected a file ending in \.jsonl, or one of tensorboard:FOLDER, wandb:PROJECT, trackio:PROJECT"),
    ):
        with pytest.raises(ValueError, match=message):
            check_log(name)
    assert named_callback(f"json:{tmp_path / 'x'}", every=7).every == 7


def test_the_command_line_logs_to_what_its_flags_and_its_file_say(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = prepare("bert", tmp_path)
    config.write_text(config.read_text() + f'[log]\nto = ["{tmp_path / "file.jsonl"}"]\nevery = 2\n')
    assert read_config(config).log.every == 2
    flags = ["--log", str(tmp_path / "flag.jsonl"), "--log", f"tensorboard:{tmp_path / 'runs'}"]
    result = CliRunner().invoke(app, ["train", str(config), *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    adapted = ["adapt", str(tmp_path / "prior"), "--task", str(tmp_path / "new"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*adapted, *flags], catch_exceptions=False).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "flag.jsonl").read_text().splitlines()]
    steps = [(line["run"], line["name"], line["step"]) for line in lines if "step" in line]
    assert [step for step in steps if step[0] == "meta-train"] == [("meta-train", "", k) for k in range(2, 13, 2)]
    assert [step for step in steps if step[0] == "adapt"] == [("adapt", "new", k) for k in range(2, 5, 2)]
    assert '"run": "adapt"' not in (tmp_path / "file.jsonl").read_text() and list((tmp_path / "runs").iterdir())
    wrong = CliRunner().invoke(app, ["train", str(config), "--log", "wandb"])
    assert wrong.exit_code == 2 and "a project is missing" in wrong.output
