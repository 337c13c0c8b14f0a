"""Shakespeare: LiFT, Union Train and No Meta Train on roles that were not trained on, next-token prediction.

    python examples/shakespeare.py --root FOLDER
    python examples/shakespeare.py --smoke

FOLDER holds Gutenberg's etext 100 of 1994 (100.txt), or shakespeare*.jsonl(.gz) with one record a line: play,
character, text; see docs/tasks.md. The backbone is our small BART, which has read no Shakespeare.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from pyro_lift.bench.comparison import ComparisonSettings, benchmark_of, run
from pyro_lift.bench.example_arguments import parser, settings_of
from pyro_lift.data import load_tasks

OWN = Path(__file__).resolve().parent.parent / "backbones" / "bart-novels"
MEASURES = {"perplexity": "perplexity", "nll": "NLL a token", "accuracy": "token accuracy", "ece": "ECE"}
#: A few minutes of one slow core with the BART of 6.3 M parameters; more is better.
DEFAULTS = ComparisonSettings(warm_up=122, visits=61, steps=12, draws=3, dev_tasks=2, rates=(1e-3, 4e-3), test_rows=24)


def make_up(path: Path) -> None:
    """Three plays of four characters who say few words, each its own."""
    rng = random.Random(0)
    words = [
        "the",
        "of",
        "and",
        "my",
        "thou",
        "lord",
        "king",
        "love",
        "night",
        "death",
        "heart",
        "come",
        "fair",
        "sweet",
    ]
    with path.open("w", encoding="utf-8") as file:
        for play in range(3):
            for character in range(4):
                mine = rng.sample(words, 8)
                for _ in range(12):
                    record = {"play": f"play{play}", "character": f"Role {character}"}
                    file.write(json.dumps({**record, "text": " ".join(rng.choices(mine, k=6))}) + "\n")


def main() -> None:
    """Command line."""
    options = parser(__doc__ or "", DEFAULTS, "shakespeare-output")
    options.add_argument("--split", default="random-80/10/10", help="random- or play-, 80/10/10 or 60/10/30")
    options.add_argument("--roles", default=152, type=int, help="those with the most lines (default 152)")
    options.add_argument("--context", default=3, type=int, help="lines before that are read (default 3)")
    given = options.parse_args()
    settings = settings_of(given, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        root, split, roles = given.root, given.split, given.roles
        if given.smoke and root is None:
            root, split, roles = Path(folder) / "shakespeare.jsonl", "random-80/10/10", 12
            make_up(root)
        found = load_tasks("shakespeare", split, root, num_roles=roles, context=given.context)
    backbone = given.backbone or OWN
    run(benchmark_of(found, backbone, "seq2seq", settings, MEASURES), settings, given.out)


if __name__ == "__main__":
    main()
