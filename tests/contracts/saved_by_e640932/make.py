"""Write the folders beside this file, and ``expected.json``: what was predicted by the objects that were saved.

It was run once, with the code of commit e640932, and is kept to show how. From a checkout of that commit::

    OMP_NUM_THREADS=1 PYTHONPATH=. python /path/to/this/make.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyro
import test_folders_saved_before as problem
import torch

from pyro_lift import LiFT, LiFTPrior, TaskPosterior

warnings.simplefilter("ignore")

#: One layer of the embedded network, so that the folders stay small.
RUN = """
[backbone]
name = "digits"
kind = "timm"
[adapter]
rank = 1
target_modules = ["blocks.1.attn.qkv"]
[tasks]
benchmark = "digits"
[sampler]
sgd_steps = 24
burn_in = 24
samples = 120
[adapt]
steps = 20
draws = 2
[output]
folder = "{folder}"
device = "cpu"
checkpoint_every = 0
"""


def midway(run: Any, folder: Path, step: int, **options: Any) -> Any:
    """Run with checkpoints, and keep only the one of a transition in the middle."""
    with tempfile.TemporaryDirectory() as scratch:
        result = run(checkpoint=Path(scratch) / "run", checkpoint_every=step, **options)
        shutil.copytree(Path(scratch) / "run" / f"step-{step:09d}", folder / f"step-{step:09d}")
    return result


def priors(out: Path, expected: dict[str, Any]) -> None:
    """Priors of two components, and posteriors, with the shared head and with heads of the tasks' own."""
    for name, head_scale in problem.HEADS.items():
        lift = LiFT(problem.adapted_backbone(), seed=0, **problem.SETTINGS, head_scale=head_scale)
        prior: LiFTPrior = lift.meta_train(problem.TASKS, progress=False)
        expected[f"prior_{name}"] = problem.summary(prior)
        prior.save_pretrained(out / f"prior_{name}", results={"accuracy": 0.5})
        posterior: TaskPosterior = prior.adapt(problem.NEW, seed=1, steps=40, draws=3)
        predictions = posterior.predict(problem.ROWS).tolist()
        expected[f"posterior_{name}"] = {"predictions": predictions, "component": posterior.component}
        posterior.save_pretrained(out / f"posterior_{name}")


def chains(out: Path, expected: dict[str, Any]) -> None:
    """Checkpoints in the middle, and where the run ended."""
    pyro.set_rng_seed(3)
    step = problem.WARMUP + problem.SAVED_DRAWS
    still = problem.noiseless_chain()
    midway(still.run, out / "chain_without_noise", step)
    expected["chain_without_noise"] = still.get_samples()["phi"].tolist()
    noisy = problem.noisy_chain(problem.SAVED_DRAWS)
    noisy.run(checkpoint=out / "chain")
    expected["chain"] = problem.noisy_state(noisy)
    for kind, statistics in problem.STATISTICS.items():
        streaming = problem.streaming_chain(statistics)
        midway(streaming.run, out / kind, step)
        expected[kind] = problem.summarised(streaming, kind)
    lift = problem.meta_training()
    prior = midway(lift.meta_train, out / "meta_training", 16, tasks=problem.TASKS, progress=False)
    expected["meta_training"] = problem.summary(prior)


def command_line(out: Path, expected: dict[str, Any]) -> None:
    """What ``train`` and ``adapt`` write."""
    from pyro_lift import commands

    problem.write_task(out / "task")
    (out / "run.toml").write_text(RUN.format(folder="prior"))
    (out / "full.toml").write_text(RUN.format(folder=out / "prior"))
    commands.train(out / "full.toml", progress=False)
    (out / "full.toml").unlink()
    (out / "run.toml").rename(out / "prior" / "run.toml")  # without this machine's path
    commands.adapt(out / "prior", out / "task", out / "adapted", progress=False)
    lines = commands.predict(out / "adapted", out=out / "predictions.jsonl").read_text().splitlines()
    (out / "predictions.jsonl").unlink()
    shutil.rmtree(out / "task")
    record = json.loads((out / "adapted" / "adapt.json").read_text())
    record |= {"prior": "prior", "task_folder": "task"}
    (out / "adapted" / "adapt.json").write_text(json.dumps(record, indent=1) + "\n")
    expected["command_line"] = [json.loads(line)["probabilities"] for line in lines]


def main() -> None:
    """All of it, in a folder that must not be there."""
    out = Path(sys.argv[1]).resolve()
    out.mkdir()
    expected: dict[str, Any] = {}
    torch.set_num_threads(1)
    priors(out, expected)
    chains(out, expected)
    command_line(out / "command_line", expected)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in expected.items()]
    (out / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
