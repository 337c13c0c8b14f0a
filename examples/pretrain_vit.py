"""Train a small vision transformer at 32 pixels from unlabelled pictures: two views of a picture know each other.

Two random crops of every picture, each with some of its patches hidden. The class tokens of the two must find each
other among the other pictures *of the same data set* (a contrastive loss in which telling data sets apart earns
nothing), and the hidden patches are painted in (mean absolute error). Of the NPZ files only ``x_train`` is read: no
label, no dev or test picture. AdamW with a cosine schedule, the forward pass in bfloat16.

    python examples/pretrain_vit.py FOLDER_OF_NPZ --out backbones/vit-patches --minutes 15
    python examples/pretrain_vit.py --smoke
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, normalize, unfold
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import ViTModel

SIZE, PATCH = 32, 8
SIZES = {"small": (192, 5, 4), "smoke": (32, 1, 2)}


def read_pictures(folder: Path) -> list[Tensor]:
    """The training pictures of each NPZ file, ``[n, 3, 32, 32]`` in [-1, 1]."""
    pictures = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            x = torch.from_numpy(file["x_train"])
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        x = interpolate(x, size=SIZE, mode="bilinear", align_corners=False, antialias=True)
        pictures.append(x.expand(-1, 3, -1, -1).contiguous())
    if not pictures:
        raise ValueError(f"{folder}: no .npz file here.")
    return pictures


def views(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each picture (half to all of its side), with its own contrast, brightness and colour balance."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    zoom = uniform(0.55, 1.0)
    grid = torch.zeros(len(x), 2, 3)
    grid[:, 0, 0] = zoom
    grid[:, 1, 1] = zoom
    grid[:, :, 2] = uniform(-1.0, 1.0, 2) * (1.0 - zoom).unsqueeze(-1)
    x = grid_sample(x, affine_grid(grid, list(x.shape), align_corners=False), align_corners=False)
    x = x * uniform(0.6, 1.4, 1, 1, 1) * uniform(0.8, 1.2, 3, 1, 1) + uniform(-0.3, 0.3, 1, 1, 1)
    return x.clamp(-1.0, 1.0)


class Learner(nn.Module):
    """The transformer with what only its training needs: a projection for the contrast, a painter of patches."""

    def __init__(self, size: str) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        width, depth, heads = SIZES[size]
        config = ViTConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit: ViTModel = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.project = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.GELU(), nn.Linear(2 * width, 128)
        )
        self.paint = nn.Linear(width, 3 * PATCH * PATCH)

    def forward(self, pictures: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[2n, 128]`` and painted patches ``[2n, P, 192]``."""
        states = self.vit(pictures, bool_masked_pos=hidden).last_hidden_state
        return normalize(self.project(states[:, 0]).float(), dim=-1), self.paint(states[:, 1:]).float()


def loss_of(learner: Learner, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The contrastive loss and the painting loss of one batch ``[n, 3, 32, 32]`` of a single data set."""
    both = torch.cat([views(x, generator), views(x, generator)])
    hidden = torch.rand(len(both), (SIZE // PATCH) ** 2, generator=generator) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        vectors, painted = learner(both, hidden.int())
    similarity = (vectors @ vectors.T / 0.2).fill_diagonal_(-math.inf)
    partner = torch.arange(len(both)).roll(len(x))
    patches = unfold(both, PATCH, stride=PATCH).mT
    return cross_entropy(similarity, partner), (painted - patches).abs()[hidden].mean()


def train(learner: Learner, pictures: list[Tensor], *, minutes: float, batch: int, peak: float) -> dict[str, Any]:
    """Train for so many minutes; the schedule is a function of the time spent."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    total, began, step, curve = 60 * minutes, time.monotonic(), 0, []
    bar = tqdm(total=round(total), unit="s", desc="vit")
    while (spent := time.monotonic() - began) < total:
        share = spent / total
        for group in optimizer.param_groups:
            group["lr"] = peak * min(share / 0.05, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * share)))
        pool = pictures[step % len(pictures)]
        chosen = torch.randperm(len(pool), generator=generator)[:batch]
        contrast, paint = loss_of(learner, pool[chosen], generator)
        optimizer.zero_grad()
        (contrast + paint).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        step += 1
        curve.append((contrast.item(), paint.item()))
        recent = np.mean(curve[-len(pictures) :], 0)
        bar.set_postfix({"contrast": f"{recent[0]:.3f}", "paint": f"{recent[1]:.3f}", "step": step}, refresh=False)
        bar.update(round(spent) - bar.n)
    bar.close()
    last = np.mean(curve[-10 * len(pictures) :], 0)
    return {
        "parameters": sum(p.numel() for p in learner.vit.parameters()),
        "pictures": sum(map(len, pictures)),
        "minutes": round(spent / 60, 1),
        "steps": step,
        "batch": batch,
        "contrast": round(float(last[0]), 4),
        "paint": round(float(last[1]), 4),
    }


def write(learner: Learner, record: dict[str, Any], folder: Path) -> None:
    """Weights in half precision, how pictures are prepared, and a record of the run."""
    learner.vit.embeddings.mask_token = None  # of use in this training alone
    learner.vit.half().save_pretrained(folder)
    preparation = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", help="folder of NPZ files with x_train [n, H, W, C] uint8")
    parser.add_argument("--out", type=Path, default=Path("vit-patches"))
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch", type=int, default=128, help="pictures; each is seen twice")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--smoke", action="store_true", help="seconds, noise for pictures, nothing is kept")
    options = parser.parse_args()
    if options.pictures is None and not options.smoke:
        parser.error("give the folder of pictures, or --smoke")
    torch.manual_seed(0)
    if options.smoke:
        learner = Learner("smoke")
        record = train(learner, [torch.rand(16, 3, SIZE, SIZE)] * 2, minutes=0.02, batch=8, peak=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            write(learner, record, Path(folder))
    else:
        learner = Learner("small")
        pictures = read_pictures(options.pictures)
        record = train(learner, pictures, minutes=options.minutes, batch=options.batch, peak=options.rate)
        options.out.mkdir(parents=True, exist_ok=True)
        write(learner, record, options.out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
