"""Picture shifts: one data set of colour pictures, photographed by another camera in each task.

The idea of :mod:`~pyro_lift.data.digits` on real pictures. Every camera of the family is held askew, by 30 to 90
degrees, which a backbone has hardly seen; each one also has its own white balance, exposure, blur and grain. The
question, and so the classes, are the same in every task: what the tasks share is worth learning, and what a camera has
of its own is worth adapting to.

Pictures to learn from come from the data set's training part, pictures to be judged by from its test part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample

from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.pictures import read_pictures
from pyro_lift.support.options import check_number

__all__ = ["Camera", "load_shifts", "photographed"]


@dataclass(frozen=True)
class Camera:
    """What one task does to its pictures.

    Attributes:
        angle: rotation in degrees.
        size: scale of what is seen.
        balance: factor of each colour, red, green and blue.
        gamma: exponent of the brightness in [0, 1].
        blur: standard deviation of a Gaussian blur, in pixels.
        grain: standard deviation of the noise added to each value in [0, 1].
    """

    angle: float = 0.0
    size: float = 1.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    blur: float = 0.0
    grain: float = 0.0


def photographed(pictures: Tensor, camera: Camera, generator: torch.Generator) -> Tensor:
    """Return pictures ``uint8 [n, H, W, C]`` as a camera gives them; the grain is drawn from ``generator``."""
    x = pictures.movedim(-1, 1).float() / 255.0
    angle = math.radians(camera.angle)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = affine_grid((turn / camera.size).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    x = grid_sample(x, grid, align_corners=False, padding_mode="reflection")
    if camera.blur > 0.0:
        reach = torch.arange(-2, 3, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (reach / camera.blur) ** 2)
        kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 5)
        x = conv2d(x, kernel.unsqueeze(-2), padding=(0, 2), groups=x.shape[1])
        x = conv2d(x, kernel.unsqueeze(-1), padding=(2, 0), groups=x.shape[1])
    x = x.clamp(0.0, 1.0) ** camera.gamma
    if x.shape[1] == 3:
        x = x * torch.tensor(camera.balance).view(1, 3, 1, 1)
    x = x + camera.grain * torch.randn(x.shape, generator=generator)
    return (255.0 * x).round().clamp(0.0, 255.0).to(torch.uint8).movedim(1, -1).contiguous()


def load_shifts(
    split: str = "sign_digits",
    root: str | Path | None = None,
    *,
    seed: int = 0,
    num_train: int = 24,
    num_dev: int = 4,
    num_test: int = 8,
    rows: int = 25,
    test_rows: int = 200,
) -> TaskCollection[ImageTask]:
    """Load one data set of pictures as a family of tasks, a function of the seed.

    Args:
        split: name of the data set, ``NAME.npz`` or a folder ``NAME``
            (:func:`~pyro_lift.data.pictures.read_pictures`).
        root: the folder that it lies in.
        seed: of the cameras, and of which pictures each task gets.
        num_train: tasks to meta-train on.
        num_dev: tasks to choose on.
        num_test: tasks to be judged by; no camera stands in two of the three lists.
        rows: labelled pictures of each task.
        test_rows: pictures that a task is judged by, at most.

    Raises:
        ValueError: no root; a data set without test pictures, or whose pictures are files.
        FileNotFoundError: no such data set.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test), ("rows", rows)):
        check_number(name, value, least=1, open_below=False, whole=True)
    if root is None:
        raise ValueError("root=None: pass the folder with the data set of pictures.")
    place = Path(root) / f"{split}.npz"
    place = place if place.is_file() else Path(root) / split
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such data set of pictures.")
    source = read_pictures(place)
    if source.test is None or not isinstance(source.train.pictures, Tensor):
        raise ValueError(f"{place}: an NPZ file with training and test pictures is needed.")
    generator = torch.Generator().manual_seed(seed)

    def draw(images: Images, count: int, camera: Camera) -> Images:
        assert isinstance(images.pictures, Tensor)
        chosen = torch.randperm(len(images), generator=generator)[:count]
        return Images(photographed(images.pictures[chosen], camera, generator), images.target[chosen])

    def task(name: str, judged: bool) -> ImageTask:
        camera = _random_camera(generator)
        assert source.test is not None
        test = draw(source.test, test_rows, camera) if judged else None
        return ImageTask(name, draw(source.train, rows, camera), source.labels, test=test, group=split)

    return TaskCollection(
        f"shifts of {split}",
        tuple(task(f"train-{k:02d}", False) for k in range(num_train)),
        tuple(task(f"dev-{k:02d}", True) for k in range(num_dev)),
        tuple(task(f"test-{k:02d}", True) for k in range(num_test)),
    )


def _random_camera(generator: torch.Generator) -> Camera:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return Camera(
        angle=uniform(30.0, 90.0),
        size=uniform(0.8, 1.1),
        balance=(uniform(0.6, 1.0), uniform(0.6, 1.0), uniform(0.6, 1.0)),
        gamma=uniform(0.6, 1.6),
        blur=uniform(0.0, 0.8),
        grain=uniform(0.02, 0.1),
    )
