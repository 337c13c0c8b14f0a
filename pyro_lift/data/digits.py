"""The embedded family of tasks: scikit-learn's handwritten digits, read by a different scanner in each task.

Every scanner of the family turns the page, by 20 to 100 degrees, which the backbone has never seen; each one also has
its own slant, size, contrast, blur and grain. What the tasks share is therefore worth learning, and what they do not
share is worth adapting to. No file is downloaded: the 1,797 images come with scikit-learn.

Images are split once, by index, into a training and a test half. Every image that any backbone or task is trained or
adapted on comes from the first, every image that any task is judged by from the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate

from pyro_lift.models.task import Task

__all__ = ["IMAGE_SIZE", "DigitFamily", "Scanner", "digit_backbone", "digit_family", "digit_images", "scan"]

#: Side of an image after enlargement: the originals are 8 by 8.
IMAGE_SIZE = 16
#: Of the split by index into training and test images; part of the family's definition, not of an experiment.
SPLIT_SEED = 1797
NUM_CLASSES = 10


class Pool(NamedTuple):
    """Images ``[n, 1, 16, 16]`` in [0, 1] and labels ``[n]``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scanner:
    """What one task does to the page.

    Attributes:
        angle: rotation in degrees.
        slant: shear, in widths per height.
        size: scale of the writing.
        contrast: share of the full range between ink and paper.
        blur: standard deviation of a Gaussian blur, in pixels.
        grain: standard deviation of the noise added to each pixel.
        inverted: whether ink and paper change places.
    """

    angle: float = 0.0
    slant: float = 0.0
    size: float = 1.0
    contrast: float = 1.0
    blur: float = 0.0
    grain: float = 0.0
    inverted: bool = False


class DigitFamily(NamedTuple):
    """Tasks to meta-train on, to tune on, and to be judged by; and the scanner of each, by the task's name."""

    train: list[Task]
    dev: list[Task]
    test: list[Task]
    scanners: dict[str, Scanner]


@cache
def digit_images(part: str) -> Pool:
    """The ``"train"`` or ``"test"`` half of the images, upright and clean."""
    from sklearn.datasets import load_digits

    if part not in ("train", "test"):
        raise ValueError(f"part={part!r}: expected 'train' or 'test'.")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    images = interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0.0, 1.0)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    half = order[: len(order) // 2] if part == "train" else order[len(order) // 2 :]
    return Pool(images[half], labels[half])


def scan(images: Tensor, scanner: Scanner, generator: torch.Generator) -> Tensor:
    """The images as a scanner gives them, ``[n, 1, 16, 16]``; the grain is drawn from ``generator``."""
    angle = math.radians(scanner.angle)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = torch.tensor([[1.0, scanner.slant], [0.0, 1.0]])
    matrix = torch.cat([rotation @ shear / scanner.size, torch.zeros(2, 1)], 1)
    grid = nn.functional.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, align_corners=False, padding_mode="zeros")
    moved = _blurred(moved, scanner.blur)
    if scanner.inverted:
        moved = 1.0 - moved
    moved = 0.5 + scanner.contrast * (moved - 0.5)
    return moved + scanner.grain * torch.randn(moved.shape, generator=generator)


def _blurred(images: Tensor, sd: float) -> Tensor:
    if sd <= 0.0:
        return images
    reach = torch.arange(-2, 3, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (reach / sd) ** 2)
    kernel = kernel / kernel.sum()
    images = nn.functional.conv2d(images, kernel.view(1, 1, 5, 1), padding=(2, 0))
    return nn.functional.conv2d(images, kernel.view(1, 1, 1, 5), padding=(0, 2))


def _random_scanner(generator: torch.Generator) -> Scanner:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return Scanner(
        angle=uniform(20.0, 100.0),
        slant=uniform(-0.35, 0.35),
        size=uniform(0.8, 1.1),
        contrast=uniform(0.5, 1.0),
        blur=uniform(0.0, 0.8),
        grain=uniform(0.05, 0.2),
    )


def digit_family(
    seed: int = 0,
    *,
    num_train: int = 24,
    num_dev: int = 6,
    num_test: int = 12,
    train_rows: int = 25,
    adapt_rows: int = 25,
    test_rows: int = 300,
) -> DigitFamily:
    """A family of tasks, a function of the seed alone.

    Args:
        seed: of the scanners, and of which images each task gets.
        num_train: tasks to meta-train on.
        num_dev: tasks to tune on.
        num_test: tasks to be judged by; no scanner stands in two of the three lists.
        train_rows: labelled images of a meta-training task.
        adapt_rows: labelled images of a dev or test task.
        test_rows: images a dev or test task is judged by, at most 898.
    """
    generator = torch.Generator().manual_seed(seed)
    train_pool, test_pool = digit_images("train"), digit_images("test")
    scanners: dict[str, Scanner] = {}

    def draw(pool: Pool, rows: int, scanner: Scanner) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(pool.labels), generator=generator)[:rows]
        return scan(pool.images[chosen], scanner, generator), pool.labels[chosen]

    def task(name: str, rows: int, judged: bool) -> Task:
        scanner = scanners[name] = _random_scanner(generator)
        train = draw(train_pool, rows, scanner)
        test = draw(test_pool, test_rows, scanner) if judged else None
        return Task(name, train, num_classes=NUM_CLASSES, test=test)

    return DigitFamily(
        [task(f"train-{i:02d}", train_rows, judged=False) for i in range(num_train)],
        [task(f"dev-{i:02d}", adapt_rows, judged=True) for i in range(num_dev)],
        [task(f"test-{i:02d}", adapt_rows, judged=True) for i in range(num_test)],
        scanners,
    )


def digit_backbone(pretrained: bool = True) -> nn.Module:
    """The shipped timm ViT, trained on upright clean digits by ``examples/train_digit_backbone.py``.

    Args:
        pretrained: False gives random weights, as the training script starts from.
    """
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=4, in_chans=1, num_classes=NUM_CLASSES, embed_dim=64, depth=3, num_heads=4
    )
    if pretrained:
        from safetensors.torch import load

        model.load_state_dict(load((resources.files("pyro_lift.data") / "digits_vit.safetensors").read_bytes()))
    ready: nn.Module = model.eval()
    return ready
