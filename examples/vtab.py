"""VTAB-1K: LiFT, Union Train and No Meta Train on the unseen tasks of one group of picture tasks, a head each.

    python examples/vtab.py --root FOLDER --split structured
    python examples/vtab.py --smoke

FOLDER holds the tasks as NPZ files or as folders of pictures; see docs/tasks.md. Tasks that are not of VTAB's 19 join
the group that their file declares. VTAB has no tasks to choose on: one of each training group is held out for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pyro_lift.bench.comparison import ComparisonSettings, benchmark_of, hold_out, run
from pyro_lift.bench.example_arguments import parser, settings_of
from pyro_lift.data import load_tasks
from pyro_lift.data.vtab import VTAB
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy

OWN = Path(__file__).resolve().parent.parent / "backbones" / "vit-patches"
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
SMOKE = ("svhn", "patch_camelyon", "eurosat", "dsprites_loc", "smallnorb_ele")
#: A few minutes of one slow core with the ViT of 2.3 M parameters; more is better.
DEFAULTS = ComparisonSettings(
    warm_up=400,
    visits=60,
    steps=120,
    draws=3,
    batch_size=16,
    dev_tasks=2,
    rates=(1e-3, 4e-3),
    meta_rate=1e-3,
    n_inflate=30.0,
)


def make_up(folder: Path) -> None:
    """Pictures of noise with a bright column that goes with the class."""
    rng = np.random.default_rng(0)
    for name in SMOKE:
        classes = VTAB[name].classes
        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            y = np.arange(2 * classes) % classes
            x = rng.integers(0, 120, (len(y), 32, 32, 3), dtype=np.uint8)
            for picture, k in zip(x, y, strict=True):
                picture[:, 32 * k // classes : 32 * (k + 1) // classes] += 100
            arrays |= {f"x_{part}": x, f"y_{part}": y}
        np.savez(folder / f"{name}.npz", **arrays)


def main() -> None:
    """Command line."""
    options = parser(__doc__ or "", DEFAULTS, "vtab-output")
    options.add_argument("--split", default="structured", help="the group that is tested")
    options.add_argument(
        "--hold-out", nargs="*", help="training tasks to choose rates on; by default the last of each group"
    )
    given = options.parse_args()
    settings = settings_of(given, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        root, split = given.root, given.split
        if given.smoke and root is None:
            root, split = folder, "structured"
            make_up(Path(folder))
        found = load_tasks("vtab", split, root, others=True)
    last = {task.group: task.name for task in found.train}
    found = hold_out(found, list(last.values()) if given.hold_out is None else given.hold_out)
    backbone = given.backbone or OWN
    run(
        benchmark_of(found, backbone, "vision", settings, MEASURES, HeadPolicy(scale=1.0, update="solve")),
        settings,
        given.out,
    )


if __name__ == "__main__":
    main()
