"""Train the backbone that the demo ships: a small timm ViT on the training half of scikit-learn's digits.

Upright, clean images under a mild augmentation; nothing of the demo's scanners. Two minutes on two CPU cores.

    python examples/train_digit_backbone.py --out digits_vit.safetensors
    python examples/train_digit_backbone.py --smoke
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from pyro_lift.data.digits import Scanner, digit_backbone, digit_images, scan


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """One mild, random, upright scanner for the whole batch."""
    angle, slant, size, grain = torch.rand(4, generator=generator).tolist()
    scanner = Scanner(24 * angle - 12, 0.3 * slant - 0.15, 0.9 + 0.2 * size, grain=0.1 * grain)
    return scan(images, scanner, generator)


def train(steps: int, seed: int = 0) -> torch.nn.Module:
    """AdamW with a cosine schedule, batches of 64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = digit_backbone(pretrained=False).train()
    images, labels = digit_images("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="backbone"):
        rows = torch.randint(len(labels), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(
            model(augmented(images[rows], generator)), labels[rows], label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits_vit.safetensors"))
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; nothing is written")
    options = parser.parse_args()
    with torch.enable_grad():
        model = train(20 if options.smoke else options.steps, options.seed)
    images, labels = digit_images("test")
    accuracy = float((model(images).argmax(-1) == labels).double().mean())
    print(f"{sum(p.numel() for p in model.parameters())} weights, accuracy on the other half: {accuracy:.3f}")
    if not options.smoke:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, options.out)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
