"""The command line from files: train, adapt, predict, export; and what wrong files are answered with."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from command_files import KINDS, prepare
from safetensors.torch import save_file
from tiny_backbones import FAMILIES, D
from typer.testing import CliRunner

from pyro_lift import LiFTPrior, TaskPosterior, commands
from pyro_lift.cli import _named, app
from pyro_lift.config import read_config
from pyro_lift.data.folder import read_task
from pyro_lift.models.backbones import load_backbone
from pyro_lift.wiring import adapter_of, task_of, tasks_of


@pytest.mark.parametrize("family", sorted(KINDS))
def test_train_adapt_predict_and_export_from_files(family: str, tmp_path: Path) -> None:
    runner = CliRunner()
    config = prepare(family, tmp_path)
    for arguments in (
        ["train", str(config)],
        ["adapt", str(tmp_path / "prior"), "--task", str(tmp_path / "new"), "--out", str(tmp_path / "adapted")],
        ["predict", str(tmp_path / "adapted")],
    ):
        result = runner.invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "adapted" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    if KINDS[family] in ("encoder", "vision"):
        assert all(sum(line["probabilities"]) == pytest.approx(1.0, abs=1e-5) for line in lines)
        record = json.loads((tmp_path / "adapted" / "adapt.json").read_text())
        right = [line["label"] == i % 3 for i, line in enumerate(lines)]
        assert record["accuracy"] == pytest.approx(sum(right) / 8)

    backbone = load_backbone(tmp_path / "model", KINDS[family])  # type: ignore[arg-type]
    loaded = peft.PeftModel.from_pretrained(backbone, tmp_path / "adapted").eval()
    adapter = adapter_of(read_config(config))
    mean = TaskPosterior.from_pretrained(tmp_path / "adapted", adapter).thetas.mean(0)
    named = {k: x for k, x in FAMILIES[family].task("t").train.named.items() if not k.startswith("label_")}
    with torch.no_grad(), adapter.bound(mean):
        ours, theirs = adapter.backbone(**named), loaded(**named)
    for name in ("logits", "last_hidden_state"):
        if hasattr(ours, name):
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name))


def test_predictions_of_a_posterior_that_is_replaced_are_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commands.train(prepare("bert", tmp_path), progress=False)
    folder = tmp_path / "adapted"
    commands.adapt(tmp_path / "prior", tmp_path / "new", folder, progress=False)
    old = commands.predict(folder).read_text()
    assert "put aside" not in caplog.text and "earlier" not in caplog.text
    commands.adapt(tmp_path / "prior", tmp_path / "new", folder, seed=1, progress=False)
    assert not (folder / "predictions.jsonl").exists()
    assert (folder / "predictions.earlier.jsonl").read_text() == old
    assert "they are now predictions.earlier.jsonl" in caplog.text


def test_the_prior_read_back_is_the_prior_written(tmp_path: Path) -> None:
    config = prepare("bert", tmp_path)
    prior = commands.train(config, progress=False)
    read = LiFTPrior.from_pretrained(tmp_path / "prior", adapter_of(read_config(config)))
    x = torch.randn(prior.adapter.dim)
    torch.testing.assert_close(read.mixture.get().log_prob(x), prior.mixture.get().log_prob(x))
    torch.testing.assert_close(read.second_moment["theta"], prior.second_moment["theta"])
    task = FAMILIES["bert"].task("new")
    torch.testing.assert_close(read.adapt(task, seed=1).thetas, prior.adapt(task, seed=1).thetas)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    config = prepare("bert", tmp_path)
    with pytest.raises(ValueError, match=r"no prior\.safetensors here\. Give the folder that `pyro-lift train` wrote"):
        commands.adapt(tmp_path, tmp_path / "new", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no adapt\.json here"):
        commands.predict(tmp_path)
    run = read_config(config)
    with pytest.raises(ValueError, match="no such folder"):
        task_of(run, tmp_path / "nowhere")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"train\.safetensors: not a safetensors file"):
        task_of(run, bad)
    save_file({"x": torch.zeros(2, D)}, bad / "train.safetensors")
    with pytest.raises(ValueError, match=r"train\.safetensors: no tensor 'labels' among x"):
        task_of(run, bad)


def test_the_tasks_of_a_split_to_be_judged_by_are_not_trained_on(tmp_path: Path) -> None:
    run = read_config(prepare("bert", tmp_path))
    assert [task.name for task in tasks_of(run).train] == ["a", "b"]
    (tmp_path / "tasks" / "split.json").write_text('{"train": ["b"], "test": ["a"]}')
    tasks = tasks_of(run)
    assert [[task.name for task in part] for part in tasks.parts.values()] == [["b"], [], ["a"]]


def test_text_for_a_backbone_of_pictures_is_refused(tmp_path: Path) -> None:
    run = read_config(prepare("vit", tmp_path))
    folder = write_text(tmp_path / "words", train='{"input": "a", "output": "b"}')
    with pytest.raises(ValueError, match=r"task 'words' is text; a 'vision' backbone takes the other"):
        task_of(run, folder)


def test_a_prior_of_another_adapter_is_refused(tmp_path: Path) -> None:
    config = prepare("bert", tmp_path)
    commands.train(config, progress=False)
    saved = tmp_path / "prior" / "run.toml"
    saved.write_text(saved.read_text().replace("rank = 2", "rank = 3"))
    with pytest.raises(ValueError, match=r"prior/config\.json: adapter tensor .* has shape"):
        commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "out", progress=False)


def test_the_keys_are_printed() -> None:
    result = CliRunner().invoke(app, ["keys"])
    assert result.exit_code == 0 and "[sampler]" in result.output


def write_text(folder: Path, about: str = "", **parts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in parts.items():
        (folder / f"{part}.jsonl").write_text(text)
    if about:
        (folder / "task.json").write_text(about)
    return folder


def test_text_folders_go_through_an_encoder_with_label_matching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = prepare("bert", tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "dull", "yes", "no"]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words))
    from transformers import BertTokenizer

    BertTokenizer(vocab=str(tmp_path / "model" / "vocab.txt")).save_pretrained(tmp_path / "model")
    rows = [{"input": "very good film", "output": "good"}, {"input": "dull film", "output": "bad"}]
    lines = "\n".join(map(json.dumps, rows))
    for name in ("text/a", "text/b", "text/new"):
        write_text(tmp_path / name, '{"form": "classification"}', train=lines, test=lines)
    config.write_text(config.read_text().replace(str(tmp_path / "tasks"), str(tmp_path / "text")))
    text = config.read_text().replace("[tasks]", "[tasks]\nmax_length = 4")
    config.write_text(text)
    commands.train(config, progress=False)
    assert "texts longer than 4 tokens were cut (most: a 2" in capsys.readouterr().out
    posterior = commands.adapt(tmp_path / "prior", tmp_path / "text" / "new", tmp_path / "out", progress=False)
    assert posterior.task.labels == ("bad", "good")
    out = commands.predict(tmp_path / "out")
    assert {json.loads(line)["label"] for line in out.read_text().splitlines()} <= {"bad", "good"}


@pytest.mark.parametrize(
    ("about", "train", "message"),
    [
        ("", '{"input": "a", "output": "b"}\n{"input": ', r"train\.jsonl:2: not JSON"),
        ("", "", r"the train split is empty"),
        ('{"form": "clasification"}', '{"input": "a", "output": "b"}', r"did you mean 'classification'"),
        ('{"frm": 1}', '{"input": "a", "output": "b"}', r"task\.json: key='frm' is not known; did you mean 'form'"),
        (
            '{"form": "classification", "labels": ["x", "y"]}',
            '{"input": "a", "output": "x"}\n{"input": "a", "output": "z"}',
            r"train\.jsonl:2: label 'z' is not one of 'x', 'y'",
        ),
    ],
)
def test_bad_text_is_answered_with_file_and_line(tmp_path: Path, about: str, train: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(write_text(tmp_path / "t", about, train=train))


def test_pictures_from_npz_files_with_a_head_of_their_own(tmp_path: Path) -> None:
    import numpy as np

    config = prepare("vit", tmp_path)
    preparation = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(preparation))
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for name, classes in (("a", 2), ("b", 3), ("new", 4)):
        arrays = {f"x_{part}": rng.integers(0, 256, (8, 6, 6, 1), dtype=np.uint8) for part in ("train", "test")}
        arrays |= {f"y_{part}": np.arange(8) % classes for part in ("train", "test")}  # type: ignore[misc]
        np.savez(tmp_path / "pictures" / f"{name}.npz", classes=np.array(list("wxyz")[:classes]), **arrays)  # type: ignore[arg-type]
    text = config.read_text().replace(str(tmp_path / "tasks"), str(tmp_path / "pictures"))
    config.write_text(text.replace("[tasks]", '[tasks]\nnames = ["a", "b"]'))
    commands.train(config, progress=False)
    new = tmp_path / "pictures" / "new.npz"
    posterior = commands.adapt(tmp_path / "prior", new, tmp_path / "out", progress=False)
    assert posterior.heads is not None and posterior.heads.shape[1:] == (4, D + 1)
    lines = [json.loads(line) for line in commands.predict(tmp_path / "out").read_text().splitlines()]
    assert len(lines) == 8 and {line["label"] for line in lines} <= set("wxyz")
    config.write_text(config.read_text().replace('["a", "b"]', '["a", "nwe"]'))
    with pytest.raises(ValueError, match="task='nwe' is not known; did you mean 'new'"):
        commands.train(config, overwrite=True)
    np.savez(new, x_train=np.zeros((2, 4, 4, 3)), y_train=np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match=r"new\.npz: .*expected uint8"):
        read_task(new)


def test_a_posterior_does_not_take_the_priors_or_the_tasks_folder_nor_a_prior_the_models(tmp_path: Path) -> None:
    runner = CliRunner()
    family = next(name for name in sorted(KINDS) if KINDS[name] == "encoder")
    config = prepare(family, tmp_path)
    assert runner.invoke(app, ["train", str(config)], catch_exceptions=False).exit_code == 0
    new, prior = tmp_path / "new", tmp_path / "prior"
    before = {path: path.read_bytes() for path in (*new.iterdir(), *prior.iterdir()) if path.is_file()}
    for out in (prior, new):
        with pytest.raises((OSError, ValueError), match="another folder"):
            commands.adapt(prior, new, out)
    text, run = config.read_text(), read_config(config)
    for folder in (str(tmp_path / "model"), run.tasks.root):
        assert folder is not None
        config.write_text(text.replace(f'folder = "{run.output.folder}"', f'folder = "{folder}"'))
        with pytest.raises((OSError, ValueError), match="another folder"):
            commands.train(config)
    assert {path: path.read_bytes() for path in before} == before


def test_names_may_be_repeated_or_have_commas_between() -> None:
    assert _named(["a, b", "c"]) == ("a", "b", "c") and _named(None) is None
