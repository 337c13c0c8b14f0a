"""The way to read a network is gone on with that unseen tasks are predicted better with."""

from __future__ import annotations

import logging

import pytest

from pyro_lift.tuning.both_ways import loses_to
from pyro_lift.tuning.cross_fit import CrossFit


def found(*losses: float, noise: float | None = None) -> CrossFit:
    return CrossFit(1, 1.0, losses=losses, noise=noise)


@pytest.mark.parametrize(("noise", "said"), [(None, "scores the tasks' classes"), (0.3, "output the value")], ids=str)
def test_the_way_of_the_lower_loss_goes_on(noise: float | None, said: str, caplog: pytest.LogCaptureFixture) -> None:
    better, worse = found(0.5, 0.6, 0.7, noise=noise), found(0.6, 0.8, 0.9, noise=noise)
    with caplog.at_level(logging.INFO, "pyro_lift"):
        assert loses_to(worse, better) and not loses_to(better, worse)
    assert all(each in caplog.text for each in (said, "It stays as it stands.", "The heads stay."))


@pytest.mark.parametrize(
    "unknown", [None, found(noise=0.3), found(0.1, noise=0.3)], ids=["none", "no loss", "one task"]
)
def test_where_nothing_is_known_a_regression_keeps_its_network_and_classes_their_heads(
    unknown: CrossFit | None,
) -> None:
    values, classes = found(0.5, 0.6, noise=0.3), found(0.5, 0.6)
    assert loses_to(unknown, values)
    of_classes = None if unknown is None else unknown._replace(noise=None)
    assert not loses_to(of_classes, classes) and not loses_to(classes, of_classes)
