"""Old names of modules: each is the module under its new name, says so, and leaves that module as it was."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

from pyro_lift.support.moved import MOVED, SPLIT


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


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("inference.kernels", "SGLD", "inference.sgld_kernel"),
        ("inference.kernels", "SGLDGibbs", "inference.gibbs.kernel"),
        ("inference.kernels", "MCMC", "inference.mcmc"),
        ("inference.store", "DeviceStore", "inference.stores.memory"),
        ("inference.rules", "adam", "inference.adaptation.update_rules"),
        ("inference.baselines", "BASELINES", "methods.registry"),
        ("inference.baselines", "Budget", "inference.baselines.protocol"),
        ("inference.baselines.protocol", "Ensemble", "inference.adaptation.predict"),
        ("lift", "LiFTPrior", "prior"),
        ("lift", "AdaptSettings", "settings"),
        ("models.likelihoods", "LabelMatching", "models.readouts"),
        ("commands", "read_tensor_task", "data.tensors"),
        ("config", "from_dict", "support.schema"),
    ],
)
def test_a_name_is_found_where_it_was(module: str, name: str, home: str) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        old = importlib.import_module(f"pyro_lift.{module}")
        assert getattr(old, name) is getattr(importlib.import_module(f"pyro_lift.{home}"), name)


@pytest.mark.parametrize("module", sorted(SPLIT))
def test_a_split_module_knows_no_name_that_never_was(module: str) -> None:
    old = importlib.import_module(f"pyro_lift.{module}")
    with pytest.raises(AttributeError, match="never_was"):
        _ = old.never_was
    for home in SPLIT[module]:
        importlib.import_module(f"pyro_lift.{home}")
