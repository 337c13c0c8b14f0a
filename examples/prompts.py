"""Prompts and completions: few-shot tasks of strings, from the command line alone.

    python examples/prompts.py
    python examples/prompts.py --smoke

A small causal model of characters (three layers, width 64) is trained for a minute to answer ``bird=`` with one of some
twenty edits of the word, any of them: what to do is not said. Then come the tasks, folders of prompts and completions.
Each wants one edit, and all want it in one manner that the model has not seen: in capitals, with an exclamation mark.
LiFT learns from thirteen of them, ``pyro-lift train``. Six others, whose edits none of the thirteen has, are adapted to
with a dozen rows each, ``pyro-lift adapt``, and their test rows are answered, ``pyro-lift predict``. Beside it the
untrained adapter is adapted with the same steps and settings, ``pyro-lift adapt --untrained``.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

LETTERS = "aeioubdlmnrst"
PAD, BEGIN, END = 0, 1, 2
IGNORED = -100

EDITS: dict[str, Callable[[str], str]] = {
    "copy": lambda w: w,
    "reverse": lambda w: w[::-1],
    "twice": lambda w: w + w,
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "without-first": lambda w: w[1:],
    "without-last": lambda w: w[:-1],
    "rotate-left": lambda w: w[1:] + w[0],
    "rotate-right": lambda w: w[-1] + w[:-1],
    "swap-ends": lambda w: w[-1] + w[1:-1] + w[0],
    "sort": lambda w: "".join(sorted(w)),
    "stutter": lambda w: "".join(c + c for c in w),
    "dashes": lambda w: "-".join(w),
    "first-twice": lambda w: w[0] + w,
    "last-twice": lambda w: w + w[-1],
    "plural": lambda w: w + "s",
    "ends": lambda w: w[0] + w[-1],
    "odd": lambda w: w[::2],
    "even": lambda w: w[1::2],
}
#: Edits in other letters, which the model learns so that it knows capitals; no task wants them.
IN_CAPITALS: dict[str, Callable[[str], str]] = {
    "upper": lambda w: w.upper(),
    "capital": lambda w: w.capitalize(),
    "last-capital": lambda w: w[:-1] + w[-1].upper(),
    "exclaim": lambda w: w + "!",
}
NEW = ("reverse", "last-twice", "rotate-left", "without-last", "swap-ends", "ends")


def in_manner(answer: str) -> str:
    """The manner that all tasks share."""
    return answer.upper() + "!"


def word(rng: random.Random) -> str:
    """Three to five letters."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 5)))


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    width: int = 64
    layers: int = 3
    base_steps: int = 1200
    base_rows: int = 96
    rows: int = 64
    new_rows: int = 12
    test_rows: int = 40
    tasks: int = 100
    new_tasks: int = 100
    run: str = ""


SMOKE = Sizes(
    width=16, layers=1, base_steps=5, base_rows=8, rows=4, new_rows=4, test_rows=4, tasks=2, new_tasks=1,
    run="sgd_steps = 3\nburn_in = 3\nsamples = 6\n[adapt]\nsteps = 4\ndraws = 2",
)  # fmt: skip
#: Of so few tasks a longer chain writes more right (docs/results/text.md).
CHAIN = "burn_in = 200\nsamples = 400"


# ------------------------------------------------------------------------------------------------ the base model


def tokenizer() -> Any:
    """A character a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *" =-!"]
    plain = Tokenizer(models.WordLevel({c: k for k, c in enumerate(characters)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    plain.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def train_base(folder: Path, sizes: Sizes) -> float:
    """Train a small Llama on words and one of their edits each; returns its last loss, in nats an answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    characters = tokenizer()
    numbers = characters.get_vocab()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(characters), hidden_size=sizes.width, intermediate_size=2 * sizes.width,
            num_hidden_layers=sizes.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END, tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=sizes.base_steps, pct_start=0.05)
    rng, edits, losses = random.Random(0), [*EDITS.values(), *IN_CAPITALS.values()], []
    for _ in range(sizes.base_steps):
        ids = torch.full((sizes.base_rows, 18), PAD)
        target = torch.full((sizes.base_rows, 18), IGNORED)
        for row in range(sizes.base_rows):
            given = word(rng)
            line = [*(numbers[c] for c in f"{given}={rng.choice(edits)(given)}"), END]
            ids[row, : len(line)] = torch.tensor(line)
            target[row, len(given) : len(line) - 1] = torch.tensor(line[len(given) + 1 :])
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        loss = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / sizes.base_rows
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    characters.save_pretrained(folder)
    return sum(losses[-50:]) / len(losses[-50:])


# ------------------------------------------------------------------------------------------------ the tasks


def write_task(folder: Path, name: str, train: int, test: int) -> None:
    """A folder of prompts and completions; no word twice."""
    rng = random.Random(name)
    words: list[str] = []
    while len(words) < train + test:
        if (new := word(rng)) not in words:
            words.append(new)
    folder.mkdir(parents=True)
    for part, some in (("train", words[:train]), ("test", words[train:])):
        rows = [{"prompt": f"{given}=", "completion": in_manner(EDITS[name](given))} for given in some]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pyro_lift(*arguments: str | Path) -> None:
    """A line for the shell, run in this process."""
    from pyro_lift.cli import app

    print("$ pyro-lift", *arguments, flush=True)
    app([str(each) for each in arguments], standalone_mode=False)


def by_adam(out: Path) -> dict[str, dict[str, float]]:
    """Exact match of plain fine-tuning by Adam, from the untrained adapter and from one trained on all tasks together.

    Steps, rows of a minibatch, rate, gradients of the joint training and networks averaged over are LiFT's.
    """
    from pyro_lift import TaskPosterior
    from pyro_lift.bench.text_to_text import WritingSettings, written_scores
    from pyro_lift.config import read_config
    from pyro_lift.data.folder import read_task
    from pyro_lift.defaults import resolved
    from pyro_lift.inference.baselines.protocol import Budget
    from pyro_lift.methods.registry import BASELINES
    from pyro_lift.wiring import adapter_of, task_of, tasks_of

    config = read_config(out / "run.toml")
    adapter, known = adapter_of(config), tasks_of(config).train
    rate = resolved(config.sampler, adapter).learning_rate or 0.0
    budget = Budget(warm_up_learning_rate=rate, meta_learning_rate=rate, learning_rate=rate)
    scores: dict[str, dict[str, float]] = {}
    for name in ("no-meta-train", "union-train"):
        method = BASELINES[name](adapter, budget)
        state = method.meta_train(known)
        for folder in sorted((out / "new").iterdir()):
            task = task_of(config, folder)
            texts: Any = read_task(folder)
            found: Any = method.adapt(state, task)
            rows: Any = texts.test
            posterior = TaskPosterior(adapter, task, found.thetas)
            how = WritingSettings(beams=1, max_new_tokens=16)
            assert task.test is not None
            scores.setdefault(folder.name, {})[name] = written_scores(posterior, task, task.test, rows, how)["score"]
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prompts-output"), help="folder; a base model in it is kept")
    parser.add_argument(
        "--sampler", help="lines of [sampler], such as 'samples = 300'; by default a chain of twice the usual length"
    )
    parser.add_argument(
        "--adam", action="store_true", help="fine-tune by Adam beside, without and after joint training"
    )
    parser.add_argument("--smoke", action="store_true", help="everything tiny; shows that it runs")
    given = parser.parse_args()
    out: Path = given.out
    if (out / "tasks").exists():
        parser.error(f"{out} holds a run. Give another --out.")
    sizes = SMOKE if given.smoke else Sizes()
    sampler = ("" if given.smoke else CHAIN) if given.sampler is None else given.sampler
    if not (out / "base").exists():
        start = time.perf_counter()
        loss = train_base(out / "base", sizes)
        print(f"base model: {loss:.2f} nats an answer after {time.perf_counter() - start:.0f} s", flush=True)
    known = [name for name in EDITS if name not in NEW][: sizes.tasks]
    for name in known:
        write_task(out / "tasks" / name, name, sizes.rows, sizes.test_rows)
    for name in NEW[: sizes.new_tasks]:
        write_task(out / "new" / name, name, sizes.new_rows, sizes.test_rows)
    (out / "run.toml").write_text(
        f'[backbone]\nname = "{out / "base"}"\nkind = "causal"\n[tasks]\nroot = "{out / "tasks"}"\nmax_length = 32\n'
        f'[output]\nfolder = "{out / "prior"}"\ndevice = "cpu"\n[sampler]\n{sampler}\n{sizes.run}\n'
    )
    pyro_lift("train", out / "run.toml")
    scores: dict[str, list[float]] = {}
    for name in NEW[: sizes.new_tasks]:
        for method, flags in (("LiFT", ()), ("untrained", ("--untrained",))):
            adapted = out / "adapted" / f"{name}-{method}"
            pyro_lift("adapt", out / "prior", "--task", out / "new" / name, "--out", adapted, *flags)
            pyro_lift("predict", adapted, "--max-new-tokens", "16")
            scores.setdefault(name, []).append(json.loads((adapted / "adapt.json").read_text())["score"])
    columns = ["LiFT", "untrained"]
    if given.adam:
        columns += ["no-meta-train", "union-train"]
        for name, beside in by_adam(out).items():
            scores[name] += [beside[column] for column in columns[2:]]
    rows = {**scores, "mean": [sum(column) / len(scores) for column in zip(*scores.values(), strict=True)]}
    lines = ["exact match   " + "".join(f"{column:>15}" for column in columns)]
    lines += [f"{name:<14}" + "".join(f"{value:>15.3f}" for value in values) for name, values in rows.items()]
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
