"""Text tasks by the command line alone: train, adapt, and predict rows with and without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_files import TOML
from command_files import prepare as prepare_tensors
from safetensors.torch import load_file, save_file
from text_backbones import WRITERS
from text_tokenizers import WORDS, tokenizer
from tiny_backbones import FAMILIES
from transformers import RobertaConfig, T5Config
from typer.testing import CliRunner

from pyro_lift import TaskPosterior, commands, wiring
from pyro_lift.cli import app
from pyro_lift.commands import Writing
from pyro_lift.config import read_config
from pyro_lift.data.chats import Message
from pyro_lift.wiring import adapter_of

TEMPLATE = "{% for m in messages %}{{ m['content'] + ' </s> ' }}{% endfor %}"
KINDS = {"bart": "seq2seq", "llama": "causal", "bert": "encoder"}


def row_of(form: str, k: int, *, answered: bool = True) -> dict[str, Any]:
    given, said = f"{WORDS[k % 3]} {WORDS[7 + k % 2]}", WORDS[3 + k % 3]
    if form == "chat":
        messages = [{"role": "user", "content": given}, {"role": "assistant", "content": said}]
        return {"messages": messages if answered else messages[:1]}
    fields = {"completion": ("prompt", "completion")}.get(form, ("input", "output"))
    row: dict[str, Any] = {fields[0]: given} | ({fields[1]: said} if answered else {})
    return row | ({"options": [WORDS[3], WORDS[4], WORDS[5]]} if form == "multiple_choice" else {})


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepare(name: str, form: str, root: Path) -> Path:
    """A backbone with its tokenizer, two training tasks and a new one, and a run's file."""
    backbone = (WRITERS[name] if name in WRITERS else FAMILIES[name]).make()
    backbone.save_pretrained(root / "model")  # type: ignore[operator, unused-ignore]
    words = tokenizer(KINDS[name])
    words.chat_template = TEMPLATE
    words.save_pretrained(root / "model")
    for task in ("tasks/a", "tasks/b", "new"):
        (root / task).mkdir(parents=True)
        for part, count in (("train", 6), ("test", 3)):
            (root / task / f"{part}.jsonl").write_text(lines([row_of(form, k) for k in range(count)]))
        if form == "classification":
            (root / task / "task.json").write_text(json.dumps({"form": form}))
    text = TOML.format(model=root / "model", kind=KINDS[name], tasks=root / "tasks", out=root / "prior", extra="")
    (root / "run.toml").write_text(text.replace("[tasks]", "[tasks]\nmax_length = 16"))
    return root / "run.toml"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "form"),
    [("bart", "completion"), ("bart", "multiple_choice"), ("llama", "chat"), ("llama", "classification")],
)
def test_texts_are_written_for_rows_with_and_without_answers(name: str, form: str, tmp_path: Path) -> None:
    run("train", prepare(name, form, tmp_path))
    adapted = tmp_path / "adapted"
    run("adapt", tmp_path / "prior", "--task", tmp_path / "new", "--out", adapted)
    assert 0.0 <= json.loads((adapted / "adapt.json").read_text())["score"] <= 1.0
    run("predict", adapted, "--beams", "2", "--max-new-tokens", "4")
    known = read(adapted / "predictions.jsonl")
    assert [line["accepted"] for line in known] == [[WORDS[3 + k]] for k in range(3)]
    # The folder of the new rows has another name and no training rows, and no answers.
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "test.jsonl").write_text(lines([row_of(form, k, answered=False) for k in range(3)]))
    run("predict", adapted, "--task", tmp_path / "later", "--out", tmp_path / "later.jsonl", "--beams", "2",
        "--max-new-tokens", "4")  # fmt: skip
    new = read(tmp_path / "later.jsonl")
    for one, other in zip(known, new, strict=True):
        one.pop("accepted")
        assert one == other
        assert one["log_prob"] < 0.0 and one["entropy"] > 0.0 and one["mutual_information"] >= 0.0
    if form in ("multiple_choice", "classification"):
        assert all(sum(line["probabilities"].values()) == pytest.approx(1.0, abs=1e-5) for line in new)
        assert all(line["label"] in WORDS[3:6] for line in new)

    posterior = TaskPosterior.from_pretrained(adapted, adapter_of(read_config(tmp_path / "run.toml")))
    inputs: list[Any] = [f"{WORDS[k % 3]} {WORDS[7 + k % 2]}" for k in range(3)]
    if form == "chat":
        inputs = [[Message("user", text)] for text in inputs]
    assert posterior.generate(inputs, num_beams=2, max_new_tokens=4) == [line["text"] for line in new]


def test_one_file_of_rows_is_predicted_by_draws_and_by_consensus(tmp_path: Path) -> None:
    commands.train(prepare("bart", "text_to_text", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    file = tmp_path / "rows.jsonl"
    file.write_text(lines([row_of("text_to_text", k, answered=k == 1) for k in range(3)]))
    for writing in (Writing("draws"), Writing("draws", "mbr", max_new_tokens=3), Writing(1)):
        written = read(commands.predict(tmp_path / "adapted", file, tmp_path / "out.jsonl", writing=writing))
        assert [set(line) >= {"row", "text", "log_prob"} for line in written] == [True] * 3
        assert [line.get("accepted") for line in written] == [None, ["two"], None]
    with pytest.raises(ValueError, match="which='some'"):
        commands.predict(tmp_path / "adapted", file, tmp_path / "out.jsonl", writing=Writing("some"))


def test_rows_without_labels_have_their_classes_predicted(tmp_path: Path) -> None:
    commands.train(prepare("bert", "classification", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    known = read(commands.predict(tmp_path / "adapted"))
    file = tmp_path / "rows.tsv"
    file.with_suffix(".jsonl").write_text(lines([row_of("classification", k, answered=False) for k in range(3)]))
    new = read(commands.predict(tmp_path / "adapted", file.with_suffix(".jsonl"), tmp_path / "out.jsonl"))
    assert [line["label"] for line in new] == [line["label"] for line in known]
    for one, other in zip(known, new, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    file.with_suffix(".jsonl").write_text('{"input": "red cat"}\n{"input": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the input is 3"):
        commands.predict(tmp_path / "adapted", file.with_suffix(".jsonl"), tmp_path / "out.jsonl")
    file.with_suffix(".jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows to predict"):
        commands.predict(tmp_path / "adapted", file.with_suffix(".jsonl"), tmp_path / "out.jsonl")


def test_rows_with_answers_are_scored_and_bring_them_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    commands.train(prepare("bert", "classification", tmp_path), progress=False)
    record = commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False).results
    known = read(commands.predict(tmp_path / "adapted"))
    printed = capsys.readouterr().out
    for name, title in (("score", "score (ACC)"), ("accuracy", "accuracy"), ("nll", "nll")):
        assert f"{title}: {record[name]:.4f}" in printed
    assert [line["accepted"] for line in known] == [[row_of("classification", k)["output"]] for k in range(3)]
    inputs = [row_of("classification", k)["input"] for k in range(3)]
    for text in ("\n".join(inputs), "\n".join(["text", *inputs])):  # a table of one column, with and without its name
        (tmp_path / "rows.tsv").write_text(text)
        new = read(commands.predict(tmp_path / "adapted", tmp_path / "rows.tsv", tmp_path / "out.jsonl"))
        assert [line["label"] for line in new] == [line["label"] for line in known]
        assert not any("accepted" in line for line in new) and "accuracy" not in capsys.readouterr().out
    (tmp_path / "rows.tsv").write_text("red cat\nred cat\tblue\n")
    with pytest.raises(ValueError, match=r"rows\.tsv:1: no tab"):
        commands.predict(tmp_path / "adapted", tmp_path / "rows.tsv", tmp_path / "out.jsonl")
    (tmp_path / "rows.jsonl").write_text(lines([{"input": " ".join(WORDS * 3)}, {"input": "red cat"}]))
    commands.predict(tmp_path / "adapted", tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert "1 of 2 inputs are longer than 16 tokens" in caplog.text


@pytest.mark.parametrize(("name", "message"), [("gone.jsonl", "no such file"), ("empty", "no rows"), ("x.csv", "no r")])
def test_a_place_without_rows_to_predict_is_named(name: str, message: str, tmp_path: Path) -> None:
    commands.train(prepare("bert", "classification", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=rf"{name}: {message}.*Expected a file of rows"):
        commands.predict(tmp_path / "adapted", tmp_path / name, tmp_path / "out.jsonl")


def test_options_of_rows_without_answers_are_chosen_from(tmp_path: Path) -> None:
    commands.train(prepare("bert", "multiple_choice", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    (tmp_path / "later").mkdir()
    rows = [row_of("multiple_choice", k, answered=False) for k in range(3)]
    rows[1]["options"] = ["red", "two"]
    (tmp_path / "later" / "test.jsonl").write_text(lines(rows))
    new = read(commands.predict(tmp_path / "adapted", tmp_path / "later", tmp_path / "out.jsonl"))
    assert all(line["option"] == row["options"][line["label"]] for line, row in zip(new, rows, strict=True))


def test_tensors_without_labels_and_without_training_rows_are_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    commands.train(prepare_tensors("bert", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    known = read(commands.predict(tmp_path / "adapted"))
    assert "accuracy: " in capsys.readouterr().out
    tensors = load_file(tmp_path / "new" / "test.safetensors")
    (tmp_path / "later").mkdir()
    unlabelled = {name: x for name, x in tensors.items() if not name.startswith("label")}
    save_file(unlabelled, tmp_path / "later" / "test.safetensors")
    assert read(commands.predict(tmp_path / "adapted", tmp_path / "later", tmp_path / "out.jsonl")) == known
    assert "accuracy" not in capsys.readouterr().out
    wrong = {**tensors, "labels": tensors["labels"] + 7}
    save_file(wrong, tmp_path / "later" / "test.safetensors")
    assert read(commands.predict(tmp_path / "adapted", tmp_path / "later", tmp_path / "out.jsonl")) == known
    assert "the predictions are not scored" in caplog.text
    save_file({"labels": tensors["labels"]}, tmp_path / "later" / "test.safetensors")
    with pytest.raises(ValueError, match=r"test\.safetensors: no inputs among labels"):
        commands.predict(tmp_path / "adapted", tmp_path / "later", tmp_path / "out.jsonl")


def test_an_encoder_decoder_writes_for_tensors_that_nobody_has_answered(tmp_path: Path) -> None:

    commands.train(prepare_tensors("t5", tmp_path), progress=False)
    commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)
    tensors = load_file(tmp_path / "new" / "test.safetensors")
    save_file({name: tensors[name] for name in ("input_ids", "attention_mask")}, tmp_path / "rows.safetensors")
    out = commands.predict(
        tmp_path / "adapted", tmp_path / "rows.safetensors", tmp_path / "out.jsonl", writing=Writing(max_new_tokens=3)
    )
    assert [len(line["tokens"]) <= 3 for line in read(out)] == [True] * 8
    posterior = TaskPosterior.from_pretrained(tmp_path / "adapted", adapter_of(read_config(tmp_path / "run.toml")))
    given = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    scores = posterior.score(given, torch.tensor([line["tokens"] for line in read(out)]))
    assert [line["log_prob"] for line in read(out)] == pytest.approx(scores.log_prob.tolist(), abs=1e-5)
    mean = scores.entropy.sum(-1) / scores.lengths
    assert [line["entropy"] for line in read(out)] == pytest.approx(mean.tolist(), abs=1e-5)


def test_the_untrained_adapter_is_adapted_to_a_task_from_where_it_was_before(tmp_path: Path) -> None:
    file = prepare("llama", "completion", tmp_path)
    # Steps that go nowhere show where they began.
    file.write_text(file.read_text().replace("[adapt]", "[adapt]\nlearning_rate = 1e-9\ntemperature = 0.0"))
    run("train", file)
    initial = adapter_of(read_config(file)).initial
    for options, at_start in (((), False), (("--untrained",), True)):
        out = tmp_path / f"adapted{len(options)}"
        run("adapt", tmp_path / "prior", "--task", tmp_path / "new", "--out", out, *options)
        thetas = TaskPosterior.from_pretrained(out, adapter_of(read_config(file))).thetas
        assert torch.allclose(thetas, initial.expand_as(thetas), atol=1e-5) == at_start
        assert json.loads((out / "adapt.json").read_text()).get("untrained", False) == at_start


def test_development_rows_end_an_adaptation_as_the_file_says(tmp_path: Path) -> None:
    file = prepare("llama", "completion", tmp_path)
    text = file.read_text().replace("[adapt]\nsteps = 4", "[adapt]\nsteps = 12\ndev_every = 4\npatience = 1")
    file.write_text(text)
    (tmp_path / "new" / "dev.jsonl").write_text((tmp_path / "new" / "test.jsonl").read_text())
    run("train", file)
    run("adapt", tmp_path / "prior", "--task", tmp_path / "new", "--out", tmp_path / "adapted")
    record = json.loads((tmp_path / "adapted" / "adapt.json").read_text())
    assert record["adaptation steps kept"] in (4, 8, 12) and record["adaptation steps taken"] in (8, 12)
    assert record["development score"] == pytest.approx(record["score"])  # the test rows are the same


def test_texts_longer_than_the_backbone_has_places_for_are_cut_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = prepare("bart", "completion", tmp_path)
    file.write_text(file.read_text().replace("max_length = 16", "max_length = 500"))
    row = {"prompt": "red cat " * 40, "completion": "one"}
    (tmp_path / "tasks" / "a" / "train.jsonl").write_text(lines([row] * 3))
    (tmp_path / "new" / "test.jsonl").write_text(lines([row] * 3))
    output = run("train", file)
    assert "3 texts longer than 32 tokens were cut" in output
    assert "max_length=500" in caplog.text and "has places for 32 tokens" in caplog.text
    run("adapt", tmp_path / "prior", "--task", tmp_path / "new", "--out", tmp_path / "adapted")
    run("predict", tmp_path / "adapted", "--max-new-tokens", "4")
    assert len(read(tmp_path / "adapted" / "predictions.jsonl")) == 3


def test_the_first_places_of_a_roberta_are_no_places() -> None:
    assert wiring._places(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert wiring._places(T5Config()) is None
