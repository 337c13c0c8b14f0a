"""Old names of modules: each is the module under its new name, says so, and leaves that module as it was."""

from __future__ import annotations

import importlib
import sys

import pytest

from pyro_lift.support.moved import MOVED


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_name_is_the_module_under_its_new_one(name: str) -> None:
    new = importlib.import_module(f"pyro_lift.{MOVED[name]}")
    spec = new.__spec__
    sys.modules.pop(f"pyro_lift.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"pyro_lift\.{name} is now pyro_lift\.{MOVED[name]}"):
        old = importlib.import_module(f"pyro_lift.{name}")
    assert old is new and new.__spec__ is spec and new.__name__ == f"pyro_lift.{MOVED[name]}"


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pyro_lift\.hubb"):
        importlib.import_module("pyro_lift.hubb")
