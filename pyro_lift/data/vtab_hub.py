"""Tasks of VTAB that the Hugging Face hub has as pictures with one label; 1,000 training pictures, drawn by us."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.pixels import as_rgb

__all__ = ["HUB", "HubSource", "vtab_from_hub"]

#: VTAB-1K's sizes.
NUM_TRAIN, NUM_DEV = 800, 200
#: Of the drawn pictures.
SEED = 0


class HubSource(NamedTuple):
    """Where the hub has a task, and what its columns are called."""

    path: str
    config: str | None = None
    image: str = "image"
    label: str = "label"


#: The structured tasks are not here: their labels are rules over factors that no copy with one label has.
HUB: dict[str, HubSource] = {
    "cifar100": HubSource("uoft-cs/cifar100", image="img", label="fine_label"),
    "caltech101": HubSource("dpdl-benchmark/caltech101"),
    "dtd": HubSource("tanganke/dtd"),
    "oxford_flowers102": HubSource("dpdl-benchmark/oxford_flowers102"),
    "oxford_iiit_pet": HubSource("timm/oxford-iiit-pet"),
    "svhn": HubSource("ufldl-stanford/svhn", "cropped_digits"),
    "sun397": HubSource("tanganke/sun397"),
    "patch_camelyon": HubSource("1aurent/PatchCamelyon"),
    "eurosat": HubSource("tanganke/eurosat"),
    "resisc45": HubSource("tanganke/resisc45"),
}


def vtab_from_hub(name: str, group: str, classes: int, *, size: int = 224, test_rows: int = 1000) -> ImageTask | None:
    """A task from the hub, None where it has none that we know.

    800 pictures to learn from and 200 to choose on, a random choice of the training part with a fixed seed: not
    VTAB-1K's own thousand, which are the first of another package's order. Pictures are resized to a square.

    Args:
        name: of :data:`HUB`.
        group: that the task is in.
        classes: how many labels there are.
        size: side of the square in pixels.
        test_rows: longest test set, a random choice too.

    Raises:
        ValueError: a label outside the classes, columns of other names.
    """
    from datasets import load_dataset

    source = HUB.get(name)
    if source is None:
        return None
    train, test = (load_dataset(source.path, source.config, split=part) for part in ("train", "test"))
    for column in (source.image, source.label):
        if column not in train.column_names:
            raise ValueError(f"{source.path}: no column {column!r} among {', '.join(train.column_names)}.")
    generator = np.random.default_rng(SEED)
    first = generator.permutation(len(train))[: NUM_TRAIN + NUM_DEV]
    judged = np.sort(generator.permutation(len(test))[:test_rows])
    named = getattr(train.features[source.label], "names", None)
    labels = tuple(map(str, named or range(classes)))
    parts = (first[:NUM_TRAIN], first[NUM_TRAIN:])
    learnt, chosen = (_images(train, source, rows, size) for rows in parts)
    return ImageTask(name, learnt, labels, chosen, _images(test, source, judged, size), group)


def _images(data: Any, source: HubSource, rows: Any, size: int) -> Images:
    from PIL import Image

    pictures, target = [], []
    for row in rows.tolist():
        fields = data[row]
        small = as_rgb(fields[source.image]).resize((size, size), Image.Resampling.BILINEAR)
        pictures.append(torch.from_numpy(np.array(small)))
        target.append(int(fields[source.label]))
    return Images(torch.stack(pictures), torch.tensor(target))
