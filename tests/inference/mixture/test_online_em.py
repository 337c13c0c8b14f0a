"""Online EM against exact moments, Eq. 14 to the letter, batch EM, and scikit-learn."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from pyro.ops.streaming import StatsOfDict
from torch import Tensor

from pyro_lift import OnlineGaussianMixture
from pyro_lift.inference.mixture.batch_em import Covariance, Moments, Stopping, fit, kmeans_start, log_densities
from pyro_lift.inference.mixture.online_em import init, pooled, step

COVARIANCES = ["diag", "spherical", "full"]


def three(n: int = 600, seed: int = 0, d: int = 2) -> Tensor:
    """Draws of a mixture of three well separated Gaussians, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 5.0]], dtype=torch.float64).repeat(1, (d + 1) // 2)[:, :d]
    which = torch.randint(3, (n,), generator=generator)
    scale = torch.tensor([0.7, 1.0, 0.5], dtype=torch.float64)[which, None]
    return centres[which] + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def stream(x: Tensor, *args: Any, **options: Any) -> OnlineGaussianMixture:
    mixture = OnlineGaussianMixture(*args, **options)
    for row in x:
        mixture.update(row)
    return mixture


def assert_moments(a: Moments, b: Moments, **tolerance: Any) -> None:
    for first, second in zip(a, b, strict=True):
        torch.testing.assert_close(first, second, **tolerance)


@pytest.mark.parametrize("buffer_size", [2, 40, 1_000])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_is_the_exact_mean_and_variance(covariance: Any, buffer_size: int) -> None:
    x = three(200, d=3)
    _, mean, variance = stream(x, 1, covariance, buffer_size=buffer_size).moments
    exact = torch.cov(x.T, correction=0)
    expected = {"diag": exact.diagonal(), "spherical": exact.diagonal().mean().reshape(1), "full": exact}[covariance]
    torch.testing.assert_close(mean[0], x.mean(0))
    # A full matrix gets a thousandth of the floor on its diagonal at every step.
    torch.testing.assert_close(variance[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_a_step_is_eq_14_to_the_letter(covariance: Any) -> None:
    x = three(60)
    moments = fit(x[:30], 3, covariance)[0]
    state = init(moments, 30.0)
    n = 30.0 * moments.weight
    mean = moments.mean.clone()
    square = torch.einsum("kd,ke->kde", mean, mean)
    square = square + (moments.variance if covariance == "full" else torch.diag_embed(moments.variance))
    for row in x[30:]:
        variance = square - torch.einsum("kd,ke->kde", mean, mean)
        if covariance == "diag":
            variance = variance.diagonal(dim1=-2, dim2=-1)
        q = torch.softmax(log_densities(Moments(n / n.sum(), mean, variance), row, covariance), -1)
        keep, new = (n / (n + q))[:, None], (q / (n + q))[:, None]
        mean = keep * mean + new * row
        square = keep[..., None] * square + new[..., None] * torch.outer(row, row)
        n = n + q
        state = step(state, row, covariance, power=1.0, floor=0.0)
    variance = square - torch.einsum("kd,ke->kde", mean, mean)
    variance = variance if covariance == "full" else variance.diagonal(dim1=-2, dim2=-1)
    assert_moments(state.moments, Moments(n / n.sum(), mean, variance), rtol=1e-9, atol=1e-9)


def test_equal_components_stay_equal_for_ever() -> None:
    one = fit(three(50), 1, "diag")[0]
    state = init(Moments(torch.full((3,), 1 / 3).double(), *(part.repeat(3, 1) for part in one[1:])), 3.0)
    for row in three(100):
        state = step(state, row, "diag", power=0.7, floor=0.0)
    torch.testing.assert_close(state.moments.mean, state.moments.mean[:1].expand(3, 2))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_batch_em_equals_scikit_learns_from_the_same_start(covariance: Any) -> None:
    from sklearn.mixture import GaussianMixture

    x = three(300)
    start = kmeans_start(x, 3, covariance, 1e-9, torch.Generator().manual_seed(0))
    ours, score = fit(x, 3, covariance, start=start, stopping=Stopping(500, 1e-12), floor=1e-12)
    precision = torch.linalg.inv(start.variance) if covariance == "full" else 1.0 / start.variance
    oracle = GaussianMixture(
        3,
        covariance_type=covariance,
        tol=1e-12,
        max_iter=500,
        reg_covar=0.0,
        weights_init=start.weight.numpy(),
        means_init=start.mean.numpy(),
        precisions_init=precision.squeeze(-1).numpy() if covariance == "spherical" else precision.numpy(),
    ).fit(x.numpy())
    np.testing.assert_allclose(ours.weight, oracle.weights_, rtol=1e-5)
    np.testing.assert_allclose(ours.mean, oracle.means_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        ours.variance.reshape(oracle.covariances_.shape), oracle.covariances_, rtol=1e-4, atol=1e-5
    )
    assert score == pytest.approx(oracle.score(x.numpy()), rel=1e-7)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_online_pass_comes_close_to_batch_em(covariance: Any) -> None:
    x = three(1_500)
    online = stream(x, 3, covariance)
    batch, score = fit(x, 3, covariance)
    moments = online.moments
    found = float(log_densities(moments, x, covariance).logsumexp(-1).mean())
    # Batch EM is the maximum; the statistical limit of the gap is parameters / (2 n), here at most 17 / 3000 nats.
    assert 0.0 <= score - found < 17 / 3_000
    order = torch.cdist(batch.mean, moments.mean).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(moments.mean[order], batch.mean, atol=0.1, rtol=0)


def test_get_is_the_mixture_and_report_says_what_to_look_at() -> None:
    x = three(400)
    mixture = stream(x.float(), 3)
    got = mixture.get()
    assert got.mean.dtype == torch.float32 and got.event_shape == (2,)
    expected = log_densities(mixture.moments, x, "diag").logsumexp(-1)
    torch.testing.assert_close(got.log_prob(x.float()).double(), expected, rtol=1e-3, atol=1e-3)
    report = mixture.report()
    assert report["seen"] == 400 and sum(report["n"]) == pytest.approx(400.0)
    assert report["log_likelihood"] < float(expected.mean()) + 0.05
    distance = np.array(report["distance"])
    np.testing.assert_allclose(distance, np.linalg.norm(mixture.moments.mean[:, None] - mixture.moments.mean, axis=-1))
    separation = np.array(report["separation"])
    assert (separation[~np.eye(3, dtype=bool)] > 3.0).all() and (separation.diagonal() == 0.0).all()
    full = stream(x, 3, "full").get()
    assert full.component_distribution.covariance_matrix.shape == (3, 2, 2)


def test_the_papers_recipe_counts_as_its_n_j() -> None:
    x = three(300)
    mixture = stream(x, 3, count=100, schedule="counts")
    assert sum(mixture.report()["n"]) == pytest.approx(600.0)
    assert mixture.seen == 300
    light = stream(x, 3, count=1, schedule="counts")
    gap = [float((m.moments.mean.sort(0).values - fit(x, 3)[0].mean.sort(0).values).norm()) for m in (mixture, light)]
    assert all(math.isfinite(g) for g in gap)


# --------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("cut", [0, 1, 37, 99, 100])
def test_merging_shards_of_one_component_is_one_pass(covariance: Any, cut: int) -> None:
    x = three(100, d=3)
    whole = stream(x, 1, covariance, buffer_size=5)
    first, second = (stream(part, 1, covariance, buffer_size=5) for part in (x[:cut], x[cut:]))
    merged = first.merge(second)
    assert_moments(merged.moments, whole.moments, rtol=1e-4, atol=1e-4)
    assert merged.seen == 100 and (first.seen, second.seen) == (cut, 100 - cut)


def permuted(mixture: OnlineGaussianMixture, order: list[int]) -> OnlineGaussianMixture:
    tensors = mixture.state_dict()
    moved = {k: v[order] if k.startswith(("moments", "average")) else v for k, v in tensors.items()}
    copy = OnlineGaussianMixture(mixture.components, mixture.covariance)
    copy.load_state_dict(moved)
    return copy


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_merging_matches_components_first(covariance: Any) -> None:
    first, second = stream(three(400, 0), 3, covariance), stream(three(400, 1), 3, covariance)
    merged = first.merge(second)
    for order in ([1, 2, 0], [2, 1, 0]):
        assert_moments(first.merge(permuted(second, order)).moments, merged.moments)
    # Neither side is touched, and the result goes on learning by itself.
    before = first.moments
    merged.update(torch.zeros(2).double())
    assert_moments(first.moments, before, rtol=0, atol=0)
    share = pooled(first.moments, first.moments, 0.3, covariance)
    assert_moments(share, first.moments)


def test_merging_an_empty_side_adds_nothing_and_kinds_do_not_mix() -> None:
    full, empty = stream(three(100), 2), OnlineGaussianMixture(2)
    for merged in (full.merge(empty), empty.merge(full)):
        assert_moments(merged.moments, full.moments, rtol=0, atol=0)
        assert merged is not full
    with pytest.raises(ValueError, match="components=2 and 3: only mixtures of one kind merge"):
        full.merge(OnlineGaussianMixture(3))
    with pytest.raises(ValueError, match="mixtures over 2 and 3 coordinates do not merge"):
        full.merge(stream(three(100, d=3), 2))


def test_pyros_container_merges_chains() -> None:
    stats = StatsOfDict(default=lambda: OnlineGaussianMixture(1, buffer_size=4))
    x = three(60)
    for i, row in enumerate(x):
        stats.update({(i % 2, "phi"): row})
    first, second = (stats.stats[c, "phi"] for c in (0, 1))
    torch.testing.assert_close(first.merge(second).get().mean, x.mean(0))


# --------------------------------------------------------------------------------------------- life cycle


@pytest.mark.parametrize("cut", [0, 3, 50, 250])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_saved_and_loaded_stream_goes_on_as_if_nothing_had_happened(covariance: Any, cut: int) -> None:
    x = three(300)
    whole = stream(x, 2, covariance, buffer_size=20)
    first = stream(x[:cut], 2, covariance, buffer_size=20)
    second = OnlineGaussianMixture(2, covariance, buffer_size=20)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for row in x[cut:]:
        second.update(row)
    assert_moments(second.moments, whole.moments, rtol=0, atol=0)
    assert second.report() == whole.report()
    assert repr(second) == f"OnlineGaussianMixture(2, '{covariance}', seen=300)"


def test_a_wrong_state_is_refused() -> None:
    tensors = stream(three(300), 3).state_dict()
    with pytest.raises(ValueError, match="a state of 3 components for a mixture of 2"):
        OnlineGaussianMixture(2).load_state_dict(tensors)
    del tensors["average.mean"]
    with pytest.raises(ValueError, match=r"tensor 'average.mean' is missing"):
        OnlineGaussianMixture(3).load_state_dict(tensors)


@pytest.mark.parametrize("seen", [2, 40])
def test_a_bad_draw_is_refused_and_changes_nothing(seen: int) -> None:
    mixture = stream(three(seen), 2, buffer_size=10)
    before = mixture.moments
    for bad, message in (
        (torch.tensor([math.nan, 0.0]).double(), f"draw {seen} is not finite"),
        (torch.tensor([0.0, math.inf]).double(), f"draw {seen} is not finite"),
        (torch.zeros(3).double(), "a draw of length 3 for a mixture over 2 coordinates"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture.update(bad)
    assert mixture.seen == seen
    assert_moments(mixture.moments, before, rtol=0, atol=0)


def test_too_few_draws_are_refused() -> None:
    mixture = OnlineGaussianMixture(3)
    mixture.update(torch.zeros(2))
    with pytest.raises(ValueError, match="1 draws for 3 components: at least one each"):
        mixture.get()
    with pytest.raises(ValueError, match="at least as many draws are needed"):
        fit(torch.zeros(2, 2), 3)


def test_a_start_from_burn_in_draws() -> None:
    burn_in, x = three(200, 5), three(200, 6)
    mixture = OnlineGaussianMixture(3)
    mixture.start(burn_in)
    assert mixture.seen == 200
    assert_moments(mixture.moments, fit(burn_in, 3, "diag", floor=1e-6 * burn_in.var(0, unbiased=False).mean())[0])
    mixture.update(x[0])
    with pytest.raises(ValueError, match="start\\(\\) comes before the first update"):
        mixture.start(burn_in)


def test_a_component_never_collapses_on_one_draw() -> None:
    x = torch.cat([torch.zeros(50, 2), torch.ones(1, 2)]).double()
    for covariance in COVARIANCES:
        variance = stream(x, 2, covariance, buffer_size=10).moments.variance  # type: ignore[arg-type]
        spread = variance.diagonal(dim1=-2, dim2=-1) if covariance == "full" else variance
        assert bool((spread > 0.0).all()) and bool(torch.isfinite(spread).all())


@pytest.mark.slow
def test_one_pass_over_3000_samples_of_three_gaussians_is_at_the_statistical_limit() -> None:
    """Twenty seeds of the example; batch EM from the same start is the yardstick, 17 / 6000 = 0.0028 the limit."""
    spec = importlib.util.spec_from_file_location("online_em_example", ROOT / "examples" / "online_em.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    records = [r for seed in range(20) for r in example.run(seed, 3_000, every=10_000)]
    kl = {name: np.array([r["kl"] for r in records if r["method"] == name]) for name in example.NAMES}
    online, batch = kl["online EM"], kl["batch EM, same start"]
    assert len(online) == 20
    assert np.median(online) <= 0.006 and online.max() <= 0.02, online
    assert np.median(online) <= 1.5 * np.median(batch), (online, batch)


def test_merging_keeps_the_draws_dtype() -> None:
    for sizes in ((3, 3), (300, 3), (3, 300)):
        streams = []
        for n in sizes:
            streams.append(OnlineGaussianMixture(2))
            for x in torch.randn(n, 4):
                streams[-1].update(x)
        assert streams[0].merge(streams[1]).get().mean.dtype == torch.float32


@pytest.mark.parametrize("covariance", ["diag", "spherical", "full"])
def test_a_mixture_from_moments_streams_on_as_the_one_they_came_from(covariance: Covariance) -> None:
    draws = torch.randn(80, 3, dtype=torch.float64) + 4.0 * torch.arange(80).remainder(2).unsqueeze(-1)
    first = OnlineGaussianMixture(2, covariance, buffer_size=50, schedule="counts")
    for x in draws[:60]:
        first.update(x)
    second = OnlineGaussianMixture.from_moments(first.moments, first.seen, covariance, schedule="counts")
    assert (second.components, second.seen) == (2, 60)
    for x in draws[60:]:
        first.update(x)
        second.update(x)
    for a, b in zip(first.moments, second.moments, strict=True):
        torch.testing.assert_close(a, b)


def test_moments_that_are_no_mixture_are_refused() -> None:
    mean, variance = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="sum to 1"):
        OnlineGaussianMixture.from_moments(Moments(torch.ones(2), mean, variance), 10)
    with pytest.raises(ValueError, match="least variance is 0"):
        OnlineGaussianMixture.from_moments(Moments(torch.full((2,), 0.5), mean, variance.fill_diagonal_(0.0)), 10)
