"""Online EM in place against its plain form: the same mixture, draw for draw."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from pyro_lift import OnlineGaussianMixture
from pyro_lift.inference.mixture import batch_em, compiled, online_em
from pyro_lift.inference.mixture.batch_em import Covariance, Moments, fit
from pyro_lift.inference.mixture.in_place import MixtureStream
from pyro_lift.inference.mixture.online_em import MixtureState, init, step

D, K, N = 301, 3, 60
FLOOR = 1e-4


def draws(apart: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A stream that visits three places in turn, ``apart`` standard deviations of one coordinate from each other."""
    places = apart * torch.randn(K, D, dtype=dtype)
    order = torch.arange(N) // 7 % K
    return places[order] + torch.linspace(0.5, 2.0, D, dtype=dtype) * torch.randn(N, D, dtype=dtype)


def start(x: Tensor, covariance: Covariance) -> MixtureState:
    generator = torch.Generator().manual_seed(0)
    return init(batch_em.kmeans_start(x[:20], K, covariance, FLOOR, generator), 20.0)


def both(x: Tensor, covariance: Covariance, power: float, tile: int) -> tuple[MixtureState, MixtureStream]:
    state = start(x, covariance)
    stream = MixtureStream(*state, covariance, power=power, floor=FLOOR, tile=tile)
    for row in x:
        state = step(state, row, covariance, power=power, floor=FLOOR)
        stream.update(row)
    return state, stream


def assert_same(stream: MixtureStream, state: MixtureState, **tolerance: float) -> None:
    for name in ("moments", "average"):
        for field, ours, plain in zip(Moments._fields, getattr(stream, name), getattr(state, name), strict=True):
            torch.testing.assert_close(ours, plain, msg=lambda m, n=f"{name}.{field}": f"{n}: {m}", **tolerance)  # type: ignore[arg-type, misc]
    assert stream.total == state.total and stream.seen == state.seen
    assert stream.log_likelihood == pytest.approx(state.log_likelihood, rel=tolerance["rtol"])


@pytest.mark.parametrize("apart", [0.02, 0.2, 3.0])
@pytest.mark.parametrize("power", [0.7, 1.0])
@pytest.mark.parametrize("covariance", ["diag", "spherical"])
@pytest.mark.parametrize("tile", [64, 1000])
def test_every_draw_as_in_the_plain_form(
    covariance: Literal["diag", "spherical"], power: float, apart: float, tile: int
) -> None:
    state, stream = both(draws(apart), covariance, power, tile)
    assert_same(stream, state, rtol=1e-10, atol=1e-11)


def test_both_soft_and_one_hot_responsibilities_are_among_the_cases() -> None:
    """Else the test above would not reach the components that stand still, or those that move together."""
    for apart, soft in ((0.02, True), (3.0, False)):
        x = draws(apart)
        joint = batch_em.log_densities(start(x, "diag").moments, x, "diag")
        best = torch.softmax(joint, -1).amax(-1)
        assert bool((best < 0.99).any()) is soft


def test_in_single_precision_it_stays_near_the_double_one() -> None:
    x = draws(0.5)
    state, _ = both(x, "diag", 0.7, 64)
    single = MixtureStream(  # type: ignore[misc]
        *(_single(part) if isinstance(part, Moments) else part for part in start(x, "diag")),  # type: ignore[arg-type]
        "diag",  # type: ignore[arg-type]
        power=0.7,
        floor=FLOOR,
        tile=64,
    )
    for row in x.float():
        single.update(row)
    assert single.average.mean.dtype == torch.float32
    torch.testing.assert_close(single.average.mean.double(), state.average.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.average.variance.double(), state.average.variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [0.02, 3.0])
@pytest.mark.parametrize("power", [0.7, 1.0])
@pytest.mark.parametrize("row", [16, 40, 1000])
def test_the_steps_that_are_compiled_are_the_plain_ones(
    row: int, power: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without the compiler: whole rows and what they leave, all of it left, lanes of one row and of several."""
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    x = draws(apart)
    state = start(x, "diag")
    stream = MixtureStream(*state, "diag", power=power, floor=FLOOR, fused=True)
    stream.fused = compiled.FusedSteps(D, row)
    for row_of_x in x:
        state = step(state, row_of_x, "diag", power=power, floor=FLOOR)
        stream.update(row_of_x)
    assert_same(stream, state, rtol=1e-10, atol=1e-11)


def test_compiled_the_steps_are_the_plain_ones() -> None:
    if not compiled.compiles("cpu"):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    dim = 2 * 4 * compiled.ROW + 5
    x = 0.1 * torch.randn(12, dim, dtype=torch.float64)
    moments = Moments(torch.full((2,), 0.5).double(), x[:2].clone(), torch.ones(2, dim, dtype=torch.float64))
    plain, fused = (MixtureStream(*init(moments, 2.0), "diag", power=0.7, floor=FLOOR, fused=f) for f in (False, True))
    for row in x:
        plain.update(row)
        fused.update(row)
    assert fused.fused is not None and plain.fused is None
    for name, value in plain.tensors().items():
        torch.testing.assert_close(fused.tensors()[name], value, rtol=1e-10, atol=1e-11)


def test_without_a_compiler_the_plain_form_is_used_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Tensor:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled, "_compiled", lambda function: broken)
    compiled.compiles.cache_clear()
    state = start(draws(0.5), "diag")
    with pytest.warns(UserWarning, match="not compiled on cpu: No working C"):
        stream = MixtureStream(*state, "diag", power=0.7, floor=FLOOR, fused=True)
    compiled.compiles.cache_clear()
    assert stream.fused is None


def _single(moments: Moments) -> Moments:
    return Moments(*(part.float() for part in moments))


def test_variances_many_orders_of_magnitude_apart() -> None:
    """Products of four variances leave the range of single precision; the log-determinant must not."""
    variance = torch.logspace(-14, 6, 256, dtype=torch.float32).expand(2, -1).contiguous()
    variance = torch.cat([variance, torch.full((2, 64), 1e-30)], -1)
    moments = Moments(torch.full((2,), 0.5), torch.zeros(2, 320), variance)
    stream = MixtureStream(moments, moments, 2.0, 0, 0.0, "diag", power=0.7, floor=0.0)
    expected = variance[0].double().log().sum()
    assert stream._log_det[0] == pytest.approx(float(expected), rel=1e-6)


def test_a_draw_that_is_not_finite_changes_nothing() -> None:
    x = draws(0.5)
    _, stream = both(x, "diag", 0.7, 64)
    before = stream.tensors()
    for value in (torch.nan, torch.inf):
        bad = x[0].clone()
        bad[250] = value
        with pytest.raises(ValueError, match="draw 60 is not finite"):
            stream.update(bad)
    after = stream.tensors()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_em, "DOUBLE_UP_TO", 100)


def _fed(x: Tensor, fused: bool | None = None) -> OnlineGaussianMixture:
    mixture = OnlineGaussianMixture(K, buffer_size=12, fused=fused)
    for row in x:
        mixture.update(row)
    return mixture


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_stream_goes_on_to_the_bit(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    x = draws(0.5).float()
    whole, first = _fed(x, fused), _fed(x[:40], fused)
    assert isinstance(first._running, MixtureStream) and any(first._running.pending)
    second = OnlineGaussianMixture(K, fused=fused)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for row in x[40:]:
        second.update(row)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert second.seen == N and second.dim == D
    assert torch.equal(second.get().mean, whole.get().mean)


@pytest.mark.usefixtures("small_is_large")
def test_merging_leaves_both_sides_as_they_were_and_counts_their_draws() -> None:
    x = draws(0.5).float()
    first, second = _fed(x[:30]), _fed(x[30:])
    before = first.state_dict()
    merged = first.merge(second)
    merged.update(x[0])
    assert merged.seen == N + 1
    assert all(torch.equal(first.state_dict()[name], value) for name, value in before.items())
    weights = merged.report()["n"]
    assert sum(weights) == pytest.approx(N + 1)


@pytest.mark.usefixtures("small_is_large")
def test_the_mixture_chooses_the_stream_by_size_and_agrees_with_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draws(0.5)
    in_place = _fed(x)
    monkeypatch.setattr(online_em, "DOUBLE_UP_TO", 1e9)
    plain = _fed(x)
    assert isinstance(in_place._running, MixtureStream) and isinstance(plain._running, MixtureState)
    torch.testing.assert_close(in_place.get().mean, plain.get().mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(in_place.get().variance, plain.get().variance, rtol=1e-9, atol=1e-10)


def test_batch_em_of_many_coordinates_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draws(0.5)
    for covariance in ("diag", "spherical"):
        together, score = fit(x, K, covariance, seed=1)  # type: ignore[arg-type]
        monkeypatch.setattr(batch_em, "MANY", 10)
        apart, other = fit(x, K, covariance, seed=1)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert other == pytest.approx(score, rel=1e-12)
        for a, b in zip(apart, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
@pytest.mark.parametrize("components", [1, 2])
def test_a_draw_after_equal_ones_is_taken_in_as_by_the_plain_form(components: int, covariance: Covariance) -> None:
    """Variances stand at the floor then, and float32 has no room for the distance of the draw over them."""
    large, small = 60_000, 3
    found = []
    for dim in (large, small):
        mixture = OnlineGaussianMixture(components, covariance, buffer_size=20)
        generator = torch.Generator().manual_seed(0)
        for x in [torch.ones(dim)] * 25 + [1.0 + torch.randn(dim, generator=generator) for _ in range(4)]:
            mixture.update(x)
        assert mixture.seen == 29
        found.append(mixture.moments)
    for moments in found:
        assert all(bool(torch.isfinite(part).all()) for part in moments)
    # Nearly the same shares of draws, by component: in three dimensions they are not quite zero or one.
    shares = [moments.weight.double().sort()[0] for moments in found]
    torch.testing.assert_close(shares[0], shares[1], atol=0.02, rtol=0)
    assert found[0].variance.max() > 1e-3
