"""How unevenly regressions vary, as left-out rows say it: by draws of the model itself."""

from __future__ import annotations

import torch

from pyro_lift.models.dispersion import Dispersion
from pyro_lift.tuning.dispersion import ALIKE, Widths, fitted_dispersion
from pyro_lift.tuning.search import Trial, Tuning


def drawn(number: int, known: float | None, seed: int, values: tuple[float, ...] = (1.0,)) -> list[Widths]:
    """Draw tasks whose variances are scaled inverse chi-squared, or all alike, times what values vary by."""
    generator = torch.Generator().manual_seed(seed)
    told = []
    for _ in range(number):
        s = 1.0
        if known is not None:
            s = known / float(torch.randn(int(known), generator=generator).square().sum())
        scale = s * torch.tensor(values).double()
        own, others = (torch.randn(n, len(values), generator=generator).double().square() for n in (18, 30))
        told.append(Widths(18, scale * own.mean(0), scale * others, torch.ones(30, len(values)).double()))
    return told


def test_tasks_that_are_alike_are_found_to_be() -> None:
    for seed in range(5):
        found = fitted_dispersion(drawn(24, None, seed))
        assert found is not None and found[0].rows == ALIKE and abs(found[1] - 1.0) < 0.2


def test_tasks_that_are_not_are_predicted_as_wide_as_they_are() -> None:
    for seed in range(5):
        found = fitted_dispersion(drawn(24, 3.0, seed))
        assert found is not None and found[0].rows <= 8.0
        others = drawn(100, 3.0, 100 + seed)
        before = torch.stack([(each.miss / each.variance).mean() for each in drawn(24, 3.0, seed)]).mean()
        loss = [0.5 * ((f := found[1] * found[0].of(e.left_out, 18).factors).log() + e.miss / f).mean() for e in others]
        plain = [0.5 * (before.log() + e.miss / before).mean() for e in others]
        gain = torch.stack(plain) - torch.stack(loss)
        assert float(gain.mean()) > 2.0 * float(gain.std()) / len(gain) ** 0.5


def test_values_of_another_scale_are_told_apart() -> None:
    found = fitted_dispersion(drawn(24, None, 0, (1.0, 100.0)))
    assert found is not None
    dispersion, temperature = found
    factors = temperature * dispersion.of(torch.tensor([1.0, 100.0]), 18).factors
    torch.testing.assert_close(factors, torch.tensor([1.0, 100.0]).double(), rtol=0.3, atol=0.0)


def test_one_odd_task_does_not_make_the_others_wider() -> None:
    told = drawn(15, None, 0)
    odd = drawn(1, None, 1)[0]
    told.append(odd._replace(left_out=400.0 * odd.left_out, miss=400.0 * odd.miss))
    found = fitted_dispersion(told)
    assert found is not None
    factor = found[1] * found[0].of(torch.tensor([1.0]), 18).factors
    assert 0.6 < float(factor) < 1.6  # the mean over tasks of their ratios is 26


def test_few_tasks_say_nothing() -> None:
    assert fitted_dispersion(drawn(3, None, 0)) is None


def test_it_goes_with_the_tuning() -> None:
    trial = Trial("as given", 0, 1.0, 0.5, 2.0)
    told = Dispersion(8.0, (1.0, 2.0), (0.5, 1.5))
    tuning = Tuning("as given", {}, {}, (trial,), ("a",), "mse", 1.0, (), told)
    assert Tuning.from_dict(tuning.to_dict()) == tuning
