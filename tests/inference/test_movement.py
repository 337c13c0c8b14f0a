"""A chain that has not moved is said to have not, in words; one that has is let pass."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from programs import vectorised

from pyro_lift import MCMC, SGLD, LiFT, LiFTSettings, SGLDGibbs, Task, summarise
from pyro_lift.inference.movement import Mixing, judged, mixing_of, reach_of
from pyro_lift.settings import KERNEL_OPTIONS

GOOD = [Mixing("phi[0]", 1.01, 900.0), Mixing("phi[1]", 1.0, 700.0)]
FAR: dict[str, float | str] = {"tasks": 10.0, "block_size": 1.0, "thinning": 1.0, "step_size": 0.1, "curvature": 4.0}
FAR |= {"a_theta (phi)": 0.01, "a_phi (phi)": 0.0}


def test_nothing_speaks_against_a_run_that_mixed() -> None:
    assert judged(GOOD, 1, 2000, FAR) == []


@pytest.mark.parametrize(
    ("mixing", "chains", "steps", "words"),
    [
        ([*GOOD, Mixing("tau", 1.42, 400.0)], 1, FAR, r"halves disagree: R-hat of tau is 1\.42"),
        ([*GOOD, Mixing("tau", 1.42, 900.0)], 4, FAR, r"chains disagree: R-hat of tau is 1\.42"),
        ([*GOOD, Mixing("tau", 1.0, 13.0)], 1, FAR, "2,000 draws of tau are worth 13 independent ones, .* 28% of its"),
        ([*GOOD, Mixing("tau", float("nan"), float("nan"))], 1, FAR, "tau has not moved at all"),
        (GOOD, 1, {**FAR, "step_size": 0.001}, r"theta around phi has been moved 200 times, 2 relaxation times"),
        (GOOD, 1, {**FAR, "step_size": 0.001, "curvature": 1.0}, r"moved 200 times, 2 relaxation times"),
    ],
)
def test_what_speaks_against_a_run_is_said_with_the_ways_out(
    mixing: list[Mixing], chains: int, steps: dict[str, float | str], words: str
) -> None:
    said = judged(mixing, chains, 2000, steps)
    assert len(said) == 2 or chains == 4
    assert re.search(words, " ".join(said))
    assert "subsample_size" in said[-1] and 'theta_update="hmc"' in said[-1]


ALL: dict[str, float | str] = {**FAR, "block_size": 10.0}
LANGEVIN = {"kernel": "SGLDGibbs", "phi_update": "gibbs", "theta_update": "sgld", "temperature": 1.0, "thinning": 1}
LANGEVIN |= {"warmup_steps": 500, "wider": "", "left_open": [], "ways": [], "leapfrog_steps": 10, "phi_step_size": 0.1}


@pytest.mark.parametrize(
    ("steps", "in_force", "said", "unsaid"),
    [
        (ALL, {}, r"num_samples=2000 here; about 15,400 would do", "subsample_size|block_size|hmc|saga|nuts"),
        (ALL, {}, r"larger step_size \(0\.1 here\)", "measured"),
        (ALL, {"left_open": ["step_size"]}, r"larger step_size \(measured: 0\.1\)", "here\\) moves"),
        ({**ALL, "step_size": 0.9}, {}, "num_samples", "step_size"),  # close to its limit, 4 / curvature
        (FAR, {"wider": "subsample_size"}, "larger subsample_size, or none: a visit takes 1 of 10", "block_size"),
        (FAR, {"wider": "block_size"}, "larger block_size: a visit takes 1 of 10", "subsample_size"),
        (ALL, {"theta_update": "hmc"}, "longer trajectories \\(leapfrog_steps=10 here", "theta_update|step_size"),
        (ALL, {"theta_update": "hmc", "warmup_steps": 20}, "warmup_steps=20 here", "theta_update| step_size"),
        (ALL, {"theta_update": "exact"}, "num_samples", "step_size|leapfrog|warmup_steps"),
        (ALL, {"ways": ['translation="saga"']}, 'translation="saga" moves phi', "hmc"),
        (ALL, {"phi_update": "nuts", "warmup_steps": 20}, "warmup_steps=20 here", "step_size|hmc|saga"),
        (ALL, {"phi_update": "langevin"}, r"larger phi_step_size \(0\.1 here\)", "hmc"),
        (ALL, {"temperature": 0.0}, "Leave temperature out", "step_size|num_samples|hmc"),
        (ALL, {"thinning": 7}, "thinning=7 here", "hmc"),
        (
            ALL,
            {"names": KERNEL_OPTIONS},
            r"\(samples=2000 here; .* a larger learning_rate moves",
            "step_size|num_samples",
        ),
        (
            FAR,
            {"names": KERNEL_OPTIONS, "wider": "subsample_size"},
            r"\(a larger block_size: a visit",
            "subsample_size",
        ),
        (ALL, {"names": KERNEL_OPTIONS, "ways": ['theta_update="hmc"']}, "samples=2000", "theta_update"),
    ],
)
def test_advice_is_what_is_not_so_already(
    steps: dict[str, float | str], in_force: dict[str, Any], said: str, unsaid: str
) -> None:
    advice = judged([Mixing("tau", 1.0, 13.0)], 1, 2000, steps, {**LANGEVIN, **in_force})[-1]
    assert re.search(said, advice), advice
    assert not re.search(unsaid, advice), advice


def test_settings_of_lift_are_what_the_options_of_its_kernel_are_called_in_advice() -> None:
    assert {name for name in KERNEL_OPTIONS.values() if name} <= {f.name for f in fields(LiFTSettings)}
    lift = LiFT(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0"]), seed=0)
    kernel = lift.kernel(lift.program([Task(n, (torch.ones(2, 4), torch.arange(2)), num_classes=3) for n in "ab"]))
    assert kernel.option_names == KERNEL_OPTIONS


def test_a_kernel_that_tells_nothing_of_itself_is_advised_of_what_every_one_has() -> None:
    advice = judged([Mixing("tau", 1.0, 13.0)], 1, 2000, {})[-1]
    assert "num_samples" in advice and "warmup_steps" in advice and " step_size" not in advice


@pytest.mark.parametrize(
    ("options", "warmup", "said", "unsaid"),
    [
        (
            {"step_size": 1e-4},
            0,
            ["subsample_size", "step_size (0.0001 here)", 'translation="saga"', "hmc"],
            ["block_size"],
        ),
        ({"step_size": 1e-4, "translation": "saga"}, 0, ["subsample_size", "hmc"], ["saga"]),
        ({"theta_update": "hmc", "step_size": 1e-5}, 5, ["leapfrog_steps=10", "warmup_steps=5"], ["theta_update"]),
        ({"step_size": 1e-4, "preconditioner": "rms"}, 0, ["subsample_size"], ["hmc"]),
    ],
)
def test_what_is_set_is_not_advised_and_log_and_summary_say_the_same(
    options: dict[str, Any], warmup: int, said: list[str], unsaid: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        mcmc = MCMC(SGLDGibbs(vectorised(), seed=0, **options), 100, warmup, disable_progbar=True)
        mcmc.run()
    doubts = summarise(mcmc).doubts
    assert f"this run cannot be trusted yet: {' '.join(doubts)}" in caplog.messages
    assert all(word in doubts[-1] for word in said), doubts[-1]
    assert not any(word in doubts[-1] for word in unsaid), doubts[-1]


def test_a_run_too_short_to_tell_is_not_judged() -> None:
    assert judged([Mixing("phi", 3.0, 2.0)], 1, 99, {}) == []


def test_independent_draws_mix_and_a_slow_walk_does_not() -> None:
    stream = torch.Generator().manual_seed(0)
    white = torch.randn(2, 600, 3, generator=stream)
    walk = torch.randn(2, 600, generator=stream).cumsum(1)
    still = torch.ones(2, 600)
    good, slow, none = mixing_of({"white": white}), mixing_of({"walk": walk}), mixing_of({"still": still})
    assert [m.name for m in good] == ["white[0]", "white[1]", "white[2]"] and slow[0].name == "walk"
    assert all(m.r_hat < 1.02 and m.ess > 800 for m in good)
    assert slow[0].r_hat > 1.1 and slow[0].ess < 50
    assert judged(good, 2, 600, {}) == []
    assert "has not moved at all" in judged(none, 2, 600, {})[0]


def test_reach_counts_visits_and_relaxation_times() -> None:
    steps: dict[str, float | str] = {"tasks": 10.0, "block_size": 2.0, "thinning": 3.0, "a_theta (phi)": 0.1}
    steps |= {"a_phi (phi)": 0.02, "phi_update": "langevin"}
    assert reach_of(steps, 50) == {
        "visits_per_task": 30.0,
        "theta (phi)": pytest.approx(3.0),
        "phi (phi)": pytest.approx(3.0),
    }


def test_a_slow_chain_is_logged_and_summarised_in_words_and_a_quick_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        slow = MCMC(SGLDGibbs(vectorised(), step_size=1e-4, seed=0), 120, 0, disable_progbar=True)
        slow.run()
    assert "cannot be trusted yet" in caplog.text and "0.008 relaxation times of its fastest" in caplog.text
    summary = summarise(slow)
    assert summary.doubts and "cannot be trusted yet" in str(summary)
    caplog.clear()

    def plain() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        MCMC(SGLD(plain, 50.0, integrator="exponential", seed=0), 150, 0, disable_progbar=True).run()
    assert "cannot be trusted" not in caplog.text


def test_a_single_chain_that_mixed_has_an_r_hat_of_its_halves_and_no_doubts() -> None:
    def plain() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    mcmc = MCMC(SGLD(plain, 50.0, integrator="exponential", seed=0), 150, 0, disable_progbar=True)
    mcmc.run()
    summary = summarise(mcmc)
    assert summary.doubts == [] and 0.98 < summary.worst_r_hat < 1.05
