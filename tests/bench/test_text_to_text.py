"""A comparison's methods judged by what they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from text_backbones import written
from text_tokenizers import tokenizer

from pyro_lift import TaskPosterior
from pyro_lift.bench.text_to_text import WritingSettings, written_scores
from pyro_lift.data.encode import NextToken, TextToText
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.inference.baselines.lora_tuned import LoRATuned
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.metrics.text import qa_f1

TEXTS = ("red cat", "blue dog is a bird", "green")


def posterior_of(name: str, **about: Any) -> tuple[TaskPosterior, TextTask]:
    known = written(name).posterior
    rows = tuple(TextRow(text, ("one two", "red"), about.pop("options", ())) for text in TEXTS)
    task = TextTask("t", rows, test=rows, **about)
    encoder: Any = TextToText(tokenizer(), 2) if name == "bart" else NextToken(tokenizer("causal"))
    return TaskPosterior(known.adapter, encoder(task), known.thetas), task


@pytest.mark.parametrize("name", ["bart", "llama"])
@pytest.mark.parametrize("which", ["mean", "draws"])
def test_the_tasks_metric_is_of_the_strings_that_are_written(name: str, which: Any) -> None:
    posterior, texts = posterior_of(name, metric="QA-F1")
    settings = WritingSettings(which=which, beams=2, max_new_tokens=5)
    task = posterior.task
    assert task.test is not None
    found = written_scores(posterior, task, task.test, texts.test, settings)
    by_hand = posterior.generate(list(TEXTS), which=which, num_beams=2, max_new_tokens=5)
    assert found["score"] == pytest.approx(qa_f1(by_hand, [["one two", "red"]] * 3))
    assert found["empty"] == sum(not text for text in by_hand) / 3
    if (name, which) == ("bart", "mean"):  # a metric that could not tell would pass all the same
        right = [text.split()[0] if text else "none" for text in by_hand]
        rows = [row._replace(outputs=(word,)) for row, word in zip(texts.test, right, strict=True)]
        assert written_scores(posterior, task, task.test, rows, settings)["score"] > 0.0


def test_options_are_scored_as_texts() -> None:
    posterior, texts = posterior_of("bart", form="classification", labels=("one two", "red", "four"), metric="ACC")
    task = posterior.task
    assert task.test is not None
    found = written_scores(posterior, task, task.test, texts.test, WritingSettings("score", "draws"))
    best = []
    for text in TEXTS:
        scores = posterior.score([text] * 3, ["one two", "red", "four"]).log_prob
        best.append(("one two", "red", "four")[int(scores.argmax())])
    assert found["score"] == pytest.approx(sum(label != "four" for label in best) / 3)


def test_a_tuned_lora_is_judged_by_what_its_network_writes() -> None:
    posterior, texts = posterior_of("llama", metric="QA-F1")
    method = LoRATuned(posterior.adapter, Budget(steps=2, draws=1, batch_size=2), rates=(1e-2,))
    task = posterior.task
    assert task.test is not None
    tuned = method.adapt(method.meta_train([task]), task)
    inner = TaskPosterior(posterior.adapter, task, tuned.posterior.thetas)  # type: ignore[attr-defined]
    settings = WritingSettings(max_new_tokens=5)
    rows = [
        row._replace(outputs=(inner.generate([row.input], num_beams=4, max_new_tokens=5)[0],)) for row in texts.test
    ]
    assert written_scores(tuned, task, task.test, rows, settings)["score"] == pytest.approx(1.0)


def test_a_metric_that_compares_no_strings_is_refused() -> None:
    posterior, texts = posterior_of("bart", metric="Perplexity")
    with pytest.raises(ValueError, match="the metric 'Perplexity' compares no strings"):
        written_scores(posterior, posterior.task, posterior.task.train, texts.train, WritingSettings())
    for wrong in ({"answers": "guess"}, {"which": "first"}, {"beams": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WritingSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_crossfit_runs_text_to_text(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "crossfit.py"), "--smoke", "--form", "text-to-text"]
    env = {**os.environ, "CI": "1"}
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["method"] for record in records[::2]] == ["Tuned LoRA", "No Meta Train", "Union Train", "LiFT"]
    assert all(0.0 <= record["score"] <= 1.0 and 0.0 <= record["empty"] <= 1.0 for record in records)
    assert "nothing written" in result.stdout
