"""A program without its subsampling is the same program over all data."""

from __future__ import annotations

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import sequential, vectorised
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.subsample_messenger import SubsampleMessenger

from pyro_lift import whole


def density(model: object, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.as_tensor(poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum())


def test_its_density_is_that_of_the_program_with_full_plates() -> None:
    values = {"phi": torch.randn(2).double(), "theta": torch.randn(6, 2).double()}
    torch.testing.assert_close(density(whole(vectorised(1)), values), density(vectorised(None), values))


def test_it_holds_for_a_plate_that_is_iterated_over_and_for_minibatches_inside() -> None:
    values = {"phi": torch.randn(2).double()}
    for i in range(6):
        values |= {f"theta_{i}": torch.randn(2).double(), f"head_{i}": torch.randn(1 + i % 3).double()}
    full = density(sequential(batch=None, block=None), values)
    torch.testing.assert_close(density(whole(sequential()), values), full)


def test_only_the_named_plates_are_filled() -> None:
    trace = poutine.trace(whole(sequential(batch=2, block=1), "tasks")).get_trace()
    assert len(trace.nodes["tasks"]["value"]) == 6 and len(trace.nodes["data_3"]["value"]) == 2


def test_indices_from_outside_are_kept() -> None:
    def model() -> None:
        with pyro.plate("tasks", 6, subsample=torch.tensor([4])):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    assert poutine.trace(whole(model)).get_trace().nodes["tasks"]["value"].tolist() == [4]


def test_pyro_is_as_it_was_afterwards_also_after_an_error() -> None:
    before = SubsampleMessenger.__dict__["_subsample"].__func__

    def fails() -> None:
        whole(vectorised(1))()
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        whole(fails)()
    assert SubsampleMessenger.__dict__["_subsample"].__func__ is before
    assert len(poutine.trace(vectorised(1)).get_trace().nodes["tasks"]["value"]) == 1


def test_nuts_svi_and_predictive_run_it() -> None:
    model = whole(vectorised(1))
    with pytest.raises(NotImplementedError, match="subsample"):
        MCMC(NUTS(vectorised(1)), num_samples=1, warmup_steps=1, disable_progbar=True).run()
    mcmc = MCMC(NUTS(model), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["theta"].shape == (3, 6, 2)
    SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    pyro.clear_param_store()
    predicted = Predictive(poutine.uncondition(model), mcmc.get_samples())()
    assert predicted["y"].shape == (3, 6, 1, 2)  # of the law; the data are broadcast to it


def at_top(x: torch.Tensor) -> None:
    with pyro.plate("tasks", 3, subsample_size=1) as index:
        pyro.sample("theta", dist.Normal(x[index], 1.0))


def test_it_pickles_where_the_program_does() -> None:
    again = pickle.loads(pickle.dumps(whole(at_top)))
    assert poutine.trace(again).get_trace(torch.zeros(3)).nodes["theta"]["value"].shape == (3,)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a Pyro program"):
        whole(3.0)  # type: ignore[arg-type]
