"""Baselines: one algorithm a file, one protocol. :mod:`pyro_lift.methods.registry` has them all by name."""

from typing import TYPE_CHECKING

from pyro_lift.support.moved import names_moved_from

if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
