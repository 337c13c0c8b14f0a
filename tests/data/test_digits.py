"""The digit family: what is shared between its parts, and what must not be."""

from __future__ import annotations

import pytest
import torch

from pyro_lift.data.digits import Scanner, digit_backbone, digit_family, digit_images, scan


def test_no_image_is_both_trained_and_judged_on() -> None:
    train, test = digit_images("train").images.flatten(1), digit_images("test").images.flatten(1)
    assert len(train) + len(test) == 1797
    # scikit-learn's set holds no image twice, so equal pixels would mean an equal image.
    assert float(torch.cdist(train, test).min()) > 0.0


def test_an_unknown_half_is_refused() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        digit_images("dev")


def test_tasks_take_their_rows_from_the_right_half() -> None:
    family = digit_family(3)
    assert (len(family.train), len(family.dev), len(family.test)) == (24, 6, 12)
    assert all(task.test is None for task in family.train)
    assert all(len(task.train) == 25 for task in [*family.train, *family.test])
    assert all(task.test is not None and len(task.test) == 300 for task in family.test)
    assert len(set(family.scanners.values())) == len(family.scanners) == 42


def test_a_family_is_a_function_of_its_seed() -> None:
    first, again, other = digit_family(1, num_train=2), digit_family(1, num_train=2), digit_family(2, num_train=2)
    assert torch.equal(first.train[1].train.positional[0], again.train[1].train.positional[0])
    assert not torch.equal(first.train[1].train.positional[0], other.train[1].train.positional[0])


def test_a_scanner_that_does_nothing_changes_nothing() -> None:
    images = digit_images("test").images[:8]
    torch.testing.assert_close(scan(images, Scanner(), torch.Generator()), images, atol=1e-5, rtol=0)


def test_a_right_angle_turns_the_image() -> None:
    images = digit_images("test").images[:8]
    turned = scan(images, Scanner(angle=90.0), torch.Generator())
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-4, rtol=0)


def test_inversion_contrast_and_grain() -> None:
    images = digit_images("test").images[:8]
    dim = scan(images, Scanner(contrast=0.5, inverted=True), torch.Generator())
    torch.testing.assert_close(dim, 0.75 - 0.5 * images, atol=1e-5, rtol=0)
    grainy = scan(images, Scanner(grain=0.2), torch.Generator().manual_seed(0)) - images
    # 2,048 pixels: the standard error of their standard deviation is 0.2 / sqrt(2 * 2048) = 0.003.
    assert float(grainy.std()) == pytest.approx(0.2, abs=4 * 0.0032)


def test_the_shipped_backbone_reads_upright_digits_and_not_scanned_ones() -> None:
    pool = digit_images("test")
    model = digit_backbone()
    assert sum(p.numel() for p in model.parameters()) < 600_000
    with torch.no_grad():
        upright = float((model(pool.images).argmax(-1) == pool.labels).float().mean())
        turned = scan(pool.images, Scanner(angle=90.0, inverted=True), torch.Generator())
        foreign = float((model(turned).argmax(-1) == pool.labels).float().mean())
    assert upright > 0.93
    assert foreign < 0.4
