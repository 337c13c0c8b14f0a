"""Files for the command line: a configuration, tasks, a backbone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from tiny_backbones import FAMILIES

from pyro_lift import Task

KINDS = {"bart": "seq2seq", "t5": "seq2seq", "gpt2": "causal", "bert": "encoder", "vit": "vision"}


TOML = """
[backbone]
name = "{model}"
kind = "{kind}"
[adapter]
rank = 2
[tasks]
benchmark = "folder"
root = "{tasks}"
[sampler]
sgd_steps = 3
burn_in = 3
samples = 6
batch_size = 4
{extra}
[adapt]
steps = 4
draws = 2
[output]
folder = "{out}"
device = "cpu"
"""


def write_task(task: Task, folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        tensors = {**task.train.named, "labels": task.train.target}
        metadata = {"kind": task.kind}
        save_file({k: x.contiguous().clone() for k, x in tensors.items()}, folder / f"{part}.safetensors", metadata)


def prepare(family: str, root: Path) -> Path:
    """A backbone, two training tasks, a new task and a run's file in a folder."""
    one = FAMILIES[family]
    one.make().save_pretrained(root / "model")  # type: ignore[operator]
    for name in ("tasks/a", "tasks/b", "new"):
        write_task(one.task(name), root / name)
    extra = "" if one.head_scale is None else f"head_scale = {one.head_scale}"
    text = TOML.format(model=root / "model", kind=KINDS[family], tasks=root / "tasks", out=root / "prior", extra=extra)
    (root / "run.toml").write_text(text)
    return root / "run.toml"
