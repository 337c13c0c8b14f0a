"""Heads are solved: scikit-learn's modes, the exact posterior of a regression, and cross-validation done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pyro_lift.models.heads import (
    BIAS_SD,
    CHOOSING,
    LEAST_SPREAD,
    HeadModel,
    choose_prior_sd,
    folds,
    laplace_head,
    scaling_of,
    solve_head,
)


def blobs(n: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 1.0 + 2.0 * torch.randn(n, features, generator=generator, dtype=torch.float64)
    x[:, 0] *= 50.0
    own = torch.randn(features, classes, generator=generator, dtype=torch.float64)
    return x, (scaling_of(x).apply(x) @ own + torch.randn(n, classes, generator=generator)).argmax(-1)


def log_posterior(x: Tensor, y: Tensor, head: Tensor, sd: float) -> Tensor:
    scaling = scaling_of(x)
    standard = scaling.unfolded(head)
    logits = scaling.apply(x) @ standard[:, :-1].T + standard[:, -1]
    prior = -0.5 * (standard[:, :-1] / sd).square().sum() - 0.5 * (standard[:, -1] / BIAS_SD).square().sum()
    return logits.log_softmax(-1)[torch.arange(len(y)), y].sum() + prior


@pytest.mark.parametrize(("n", "features", "classes"), [(40, 6, 3), (30, 64, 4), (9, 20, 3)])
def test_mode_is_that_of_scikit_learn(n: int, features: int, classes: int) -> None:
    x, y = blobs(n, features, classes)
    assert len(set(y.tolist())) == classes
    sd = 0.4
    found = solve_head(x, y, HeadModel(classes), prior_sd=sd)
    z = np.concatenate([sd * scaling_of(x).apply(x).numpy(), np.full((n, 1), BIAS_SD)], 1)
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-14, solver="newton-cg", max_iter=10_000)
    expected = model.fit(z, y.numpy()).predict_log_proba(z)
    ours = (x @ found.head[:, :-1].T + found.head[:, -1]).log_softmax(-1)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_mode_has_no_gradient_and_the_bound_on_its_distance_holds() -> None:
    x, y = blobs(30, 8, 3)
    found = solve_head(x, y, HeadModel(3), prior_sd=0.5)
    head = found.head.clone().requires_grad_()
    value = log_posterior(x, y, head, 0.5)
    torch.testing.assert_close(-value.detach(), found.loss)
    (gradient,) = torch.autograd.grad(value, head)
    assert float(found.gradient_norm) < 1e-8
    assert float(gradient.abs().max()) < 1e-5
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        moved = found.head + 1e-2 * torch.randn(found.head.shape, generator=generator, dtype=torch.float64)
        assert log_posterior(x, y, moved, 0.5) < value


def test_a_start_at_the_mode_needs_no_step_and_gives_the_same() -> None:
    x, y = blobs(30, 50, 3)
    cold = solve_head(x, y, HeadModel(3), prior_sd=0.5)
    warm = solve_head(x, y, HeadModel(3), prior_sd=0.5, start=cold.head)
    assert cold.iterations > 1 and warm.iterations <= 1
    torch.testing.assert_close(warm.head, cold.head, rtol=1e-8, atol=1e-8)


def test_several_tasks_in_one_pass_are_the_tasks_one_by_one() -> None:
    parts = [blobs(12, 20, 3, seed=0), blobs(9, 20, 3, seed=1), blobs(30, 20, 3, seed=2)]
    longest = max(len(y) for _, y in parts)
    x = torch.stack([torch.cat([x, torch.full((longest - len(x), 20), 7.0, dtype=torch.float64)]) for x, _ in parts])
    y = torch.stack([torch.cat([y, y.new_zeros(longest - len(y))]) for _, y in parts])
    weight = torch.stack([(torch.arange(longest) < len(part[1])).double() for part in parts])
    widths = torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64)
    together = solve_head(x, y, HeadModel(3), prior_sd=widths, weight=weight).head
    for k, (own_x, own_y) in enumerate(parts):
        alone = solve_head(own_x, own_y, HeadModel(3), prior_sd=float(widths[k])).head
        torch.testing.assert_close(together[k], alone, rtol=1e-6, atol=1e-7)


def test_a_head_is_added_to_an_offset() -> None:
    x, y = blobs(20, 30, 3)
    offset = torch.randn(20, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    head = solve_head(x, y, HeadModel(3), prior_sd=0.2, offset=offset).head.requires_grad_()
    scaling = scaling_of(x)
    standard = scaling.unfolded(head)
    logits = offset + scaling.apply(x) @ standard[:, :-1].T + standard[:, -1]
    prior = (standard[:, :-1] / 0.2).square().sum() + (standard[:, -1] / BIAS_SD).square().sum()
    value = logits.log_softmax(-1)[torch.arange(20), y].sum() - 0.5 * prior
    assert float(torch.autograd.grad(value, head)[0].abs().max()) < 1e-5
    values = solve_head(x, offset + 1.0, HeadModel(3, "regression"), prior_sd=0.2, offset=offset).head
    expected = solve_head(x, torch.ones_like(offset), HeadModel(3, "regression"), prior_sd=0.2).head
    torch.testing.assert_close(values, expected)


def test_a_class_without_rows_keeps_a_small_probability_and_one_class_is_no_error() -> None:
    x, y = blobs(20, 6, 3)
    head = solve_head(x, y, HeadModel(4), prior_sd=0.3).head
    share = (x @ head[:, :-1].T + head[:, -1]).softmax(-1)[:, 3].mean()
    assert 0.001 < float(share) < 0.1
    one = solve_head(x, torch.zeros(20, dtype=torch.long), HeadModel(1), prior_sd=0.3).head
    torch.testing.assert_close(one, torch.zeros_like(one))


def test_constant_features_single_rows_and_float32_are_solved() -> None:
    x = torch.full((1, 5), 3.0)
    found = solve_head(x, torch.tensor([1]), HeadModel(3), prior_sd=0.3).head
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    assert int((x @ found[:, :-1].T + found[:, -1]).argmax()) == 1


def test_a_feature_that_one_row_alone_makes_vary_is_not_blown_up_and_one_of_another_scale_is_kept() -> None:
    x, _ = blobs(20, 9, 3)
    x[:, 1] *= 1e-3  # in another unit, but all rows tell how it varies
    x[:, 2], x[:, 3] = 0.0, 0.0
    x[7, 2] = 1e-3  # as a unit of a ReLU network that was off in all rows but one
    sd = x.std(0, correction=0)
    expected = sd.clone()
    expected[2], expected[3] = LEAST_SPREAD * sd[sd > 0.0].median(), 1.0
    torch.testing.assert_close(scaling_of(x).sd, expected)
    padded, count = torch.cat([x, 1e3 * torch.ones_like(x)]), torch.cat([torch.ones(20), torch.zeros(20)])
    torch.testing.assert_close(scaling_of(torch.stack([padded, padded]), count.expand(2, -1)).sd[1], expected)
    new = torch.zeros_like(x[:1])
    new[0, 2] = 1.0
    assert scaling_of(x).apply(new)[0, 2] < 10.0 < 100.0 < (new - x.mean(0))[0, 2] / sd[2]


def test_two_rows_say_neither_how_features_vary_nor_that_their_class_is_certain() -> None:
    losses = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(202, 30, generator=generator, dtype=torch.float64).relu()
        y = (x[:, :3] + 0.3 * torch.randn(202, 3, generator=generator)).argmax(-1)
        model = HeadModel(3)
        head = solve_head(x[:2], y[:2], model, prior_sd=choose_prior_sd(x[:2], y[:2], model).sd).head
        logits = x[2:] @ head[:, :-1].T + head[:, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, y[2:]))
    # 13 with the spread of the two rows, 19 with the width that is best for them too.
    assert torch.stack(losses).mean() < 2.0


def test_regression_is_the_exact_posterior_mean_and_its_draws_have_the_exact_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    x = scaling_of(x).apply(x)  # standardised already, so that the prior is on the weights themselves
    y = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    sd, noise = 0.6, 0.5
    design = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], -1)
    width = torch.tensor([sd, sd, sd, BIAS_SD], dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / noise**2 + torch.diag(width**-2))
    mean = covariance @ design.T @ y / noise**2
    model = HeadModel(2, "regression", noise)
    found = solve_head(x, y, model, prior_sd=sd)
    torch.testing.assert_close(found.head, mean.T)
    assert float(found.gradient_norm) < 1e-10
    draws = laplace_head(x, y, model, found.head, 40_000, prior_sd=sd, generator=generator)
    error = 4 * float(covariance.diagonal().max()) / math.sqrt(40_000)
    torch.testing.assert_close(draws.mean(0), mean.T, rtol=0, atol=4 * math.sqrt(float(covariance.max()) / 40_000))
    for output in range(2):
        torch.testing.assert_close(torch.cov(draws[:, output].T), covariance, rtol=0, atol=2 * error)
    torch.testing.assert_close(
        torch.cov(torch.cat([draws[:, 0], draws[:, 1]], -1).T)[:4, 4:], torch.zeros(4, 4).double(), rtol=0, atol=error
    )


def test_laplace_draws_of_a_softmax_have_the_inverse_hessian_for_covariance() -> None:
    x, y = blobs(12, 2, 3)
    x = scaling_of(x).apply(x)
    mode = solve_head(x, y, HeadModel(3), prior_sd=0.7).head
    hessian = torch.autograd.functional.hessian(lambda h: -log_posterior(x, y, h.view(3, 3), 0.7), mode.flatten())
    covariance = torch.linalg.inv(hessian)
    generator = torch.Generator().manual_seed(0)
    half = laplace_head(x, y, HeadModel(3), mode, 40_000, prior_sd=0.7, generator=generator, temperature=0.25)
    error = 4 * float(covariance.diagonal().max()) / math.sqrt(40_000)
    torch.testing.assert_close(torch.cov(half.flatten(1).T), 0.25 * covariance, rtol=0, atol=error)
    cold = laplace_head(x, y, HeadModel(3), mode, 2, prior_sd=0.7, generator=generator, temperature=0.0)
    torch.testing.assert_close(cold, mode.expand(2, 3, 3))


def test_choice_of_the_prior_is_cross_validation_by_hand() -> None:
    x, y = blobs(21, 30, 3)
    choice = choose_prior_sd(x, y, HeadModel(3), most_folds=5, tried=(0.01, 0.1, 0.5))
    z, fold = scaling_of(x).apply(x), folds(y, 5, stratified=True)
    for sd, score in zip(choice.tried, choice.scores, strict=True):
        total = 0.0
        for k in range(5):
            kept, left = fold != k, fold == k
            inputs = torch.cat([sd * z, torch.full((21, 1), BIAS_SD, dtype=torch.float64)], -1)
            model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-12, solver="newton-cg")
            model.fit(inputs[kept].numpy(), y[kept].numpy())
            log_p = model.predict_log_proba(inputs[left].numpy())
            total -= float(log_p[np.arange(int(left.sum())), y[left].numpy()].sum())
        assert score == pytest.approx(total / 21, rel=1e-4)
    told = [21 * score + 0.5 * math.log(sd / 0.1) ** 2 for sd, score in zip(choice.tried, choice.scores, strict=True)]
    best = int(np.argmin(told))
    assert choice.sd == choice.tried[best] and choice.loss == choice.scores[best]


def test_of_thousands_of_rows_a_thousand_choose_the_width_and_each_class_keeps_its_part() -> None:
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(3000, generator=generator) < 0.1).long()
    x = torch.randn(3000, 4, generator=generator) + y.unsqueeze(-1)
    some = torch.cat([torch.nonzero(y == c).flatten() for c in (0, 1)])[torch.arange(CHOOSING) * 3].sort().values
    whole, part = choose_prior_sd(x, y, HeadModel(2)), choose_prior_sd(x[some], y[some], HeadModel(2))
    assert whole.scores == part.scores and whole.sd == part.sd
    assert abs(float(y[some].double().mean()) - float(y.double().mean())) < 2 / CHOOSING
    few = choose_prior_sd(x[:CHOOSING], y[:CHOOSING], HeadModel(2))  # not fewer than all
    assert few.scores != part.scores


def test_the_chosen_prior_is_wide_for_clear_labels_and_narrow_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    clear = (x[:, :2].sum(-1) > 0).long()
    noise = torch.randint(2, (60,), generator=generator)
    assert choose_prior_sd(x, clear, HeadModel(2)).sd > 4 * choose_prior_sd(x, noise, HeadModel(2)).sd
    single = choose_prior_sd(x[:1], clear[:1], HeadModel(2))
    assert single.sd in single.tried and math.isnan(single.scores[0])


def test_folds_share_every_class_out() -> None:
    y = torch.tensor([0] * 10 + [1] * 5 + [2])
    fold = folds(y, 5, stratified=True)
    for k in range(5):
        assert int((y[fold == k] == 0).sum()) == 2
        assert int((y[fold == k] == 1).sum()) == 1
    assert sorted(torch.bincount(fold).tolist()) == [3, 3, 3, 3, 4]


def test_wrong_input_is_refused_with_its_value() -> None:
    x, y = blobs(5, 3, 2)
    with pytest.raises(ValueError, match=r"label 2 is outside the head's range 0 \.\. 1"):
        solve_head(x, torch.full((5,), 2), HeadModel(2), prior_sd=1.0)
    with pytest.raises(ValueError, match="without a row"):
        solve_head(x[:0], y[:0], HeadModel(2), prior_sd=1.0)
    with pytest.raises(ValueError, match="not finite"):
        solve_head(x * float("nan"), y, HeadModel(2), prior_sd=1.0)
    with pytest.raises(ValueError, match="prior_sd=0"):
        solve_head(x, y, HeadModel(2), prior_sd=0.0)
