"""The digest of tasks and network: another where a row, a label or a weight is."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.digest import digest


def adapter(seed: int = 0) -> RandomAdapter:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def tasks(shift: int = 0, scale: float = 1.0) -> list[Task]:
    """Labels by one map that all tasks have in common, shifted by some classes."""
    generator = torch.Generator().manual_seed(1)
    common, made = torch.randn(6, 3, generator=generator), []
    for k in range(8):
        x = torch.randn(24, 6, generator=generator)
        made.append(Task(f"t{k}", (scale * x, ((x @ common).argmax(-1) + k * shift) % 3), num_classes=3))
    return made


def test_it_is_of_rows_labels_and_weights() -> None:
    same = digest(adapter(), tasks())
    assert same == digest(adapter(), tasks())
    others = {digest(adapter(), tasks(shift=1)), digest(adapter(), tasks(scale=2.0)), digest(adapter(1), tasks())}
    assert len(others) == 3 and same not in others
    assert digest(adapter().to(torch.bfloat16), tasks()) != same


@pytest.mark.parametrize(("what", "visits"), [("labels", 43), ("network", 330)])
def test_what_was_found_before_the_chain_is_not_taken_for_other_data_or_another_network(
    what: str, visits: int, tmp_path: Path
) -> None:
    options = {"sgd_steps": 200, "burn_in": 5, "samples": 10, "seed": 0}
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == visits:  # after the trial, whose verdict is kept
            raise KeyboardInterrupt

    first = (adapter(), tasks(shift=1)) if what == "labels" else (adapter(1), tasks())
    with pytest.raises(KeyboardInterrupt):
        LiFT(first[0], **options).meta_train(first[1], checkpoint=tmp_path, on_step=stop, progress=False)  # type: ignore[arg-type]
    assert (tmp_path / "joint").is_dir()
    whole = LiFT(adapter(), **options).meta_train(tasks(), progress=False)  # type: ignore[arg-type]
    mended = LiFT(adapter(), **options).meta_train(tasks(), resume=tmp_path, progress=False)  # type: ignore[arg-type]
    assert mended.results == whole.results
    torch.testing.assert_close(mended.mixture.get().mean, whole.mixture.get().mean, rtol=0, atol=0)
