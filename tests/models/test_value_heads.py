"""Heads of regressions: their strength by scikit-learn's ridge, what rows left out say by hand, and the front door."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from short_runs import SHORT
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.distributions import Normal

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.class_head import ClassHead, are_alike
from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.head_problem import HeadModel, apply_head
from pyro_lift.models.heads import folds, laplace_head, scaling_of, solve_head
from pyro_lift.models.observation import has_head, network_output, own_head_scale
from pyro_lift.models.solved_heads import SolvedHeads, held_out_log_prob
from pyro_lift.models.value_head import RATIO_WIDTHS, best_width, choose_value_head, standard_ratios
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.head_mean import head_mean
from pyro_lift.tuning.whose_heads import RULES, run_config

WIDTH = 8


def rows(n: int, features: int = 5, values: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.randn(n, features, generator=generator).double() + 2.0
    slope = torch.randn(features, values, generator=generator).double()
    y = 40.0 + x @ slope + torch.randn(n, values, generator=generator).double()
    return x, y.squeeze(-1)


def network(width: int = WIDTH) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, width))


def adapter(width: int = WIDTH) -> RandomAdapter:
    return adapt_backbone(network(width), peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def tasks(number: int = 8, n: int = 12, *, values: int = 0, shared: bool = True, seed: int = 1) -> list[Task]:
    """Values that a linear map of the features makes, one for all tasks or each its own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(WIDTH, max(values, 1), generator=torch.Generator().manual_seed(0))
    made = []
    for k in range(number):
        x = torch.randn(n + 40, 6, generator=generator)
        own = torch.randn(common.shape, generator=generator)
        with torch.no_grad():
            features = network()(x)
        y = features @ (common + 0.1 * own if shared else own) + 0.1 * torch.randn(n + 40, 1, generator=generator)
        y = y if values else y.squeeze(-1)
        made.append(Task(f"t{seed}-{k}", (x[:n], y[:n]), "regression", test=(x[n:], y[n:])))
    return made


def ridge(x: Tensor, y: Tensor, ratio: float) -> Ridge:
    return Ridge(alpha=ratio**-2).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("values", [1, 3])
def test_a_centred_head_is_the_ridge_of_scikit_learn(values: int) -> None:
    x, y = rows(12, values=values)
    z = scaling_of(x).apply(x)
    for n in (12, 4):  # more rows than features, and fewer
        choice = choose_value_head(x[:n], y[:n])
        head = solve_head(x[:n], y[:n], choice.model, prior_sd=choice.sd).head
        scaling = scaling_of(x[:n])
        expected = ridge(scaling.apply(x[:n]), y[:n], choice.sd / choice.model.noise_scale)
        found = apply_head(x, head).numpy().squeeze()
        assert found == pytest.approx(expected.predict(scaling.apply(x).numpy()).squeeze(), rel=1e-8)
    assert z.shape == x.shape


@pytest.mark.parametrize("n", [8, 23])
def test_the_noise_is_what_rows_left_out_show_at_the_best_strength(n: int) -> None:
    x, y = rows(n)
    choice = choose_value_head(x, y)
    z, fold = scaling_of(x).apply(x), folds(y, min(n, 10), stratified=False)
    assert len(fold.unique()) == min(n, 10)
    costs, noises = [], []
    for width, ratio in zip(RATIO_WIDTHS, standard_ratios(5), strict=True):
        missed = torch.zeros(n).double()
        for k in fold.unique():
            fit = ridge(z[fold != k], y[fold != k], ratio)
            missed[fold == k] = torch.from_numpy(fit.predict(z[fold == k].numpy())) - y[fold == k]
        variance = float(missed.square().mean()) + 1e-4 * float(y.var(correction=0))
        costs.append(0.5 * n * math.log(variance) + math.log(width) ** 2)
        noises.append(math.sqrt(variance))
    best = costs.index(min(costs))
    # Features are centred over all rows, so the prior of the bias, which is wide and not flat, is felt by a fold.
    assert choice.model.noise_scale == pytest.approx(noises[best], rel=2e-3)
    assert choice.sd == pytest.approx(standard_ratios(5)[best] * noises[best], rel=2e-3)
    noise = choice.model.noise_scale
    assert choice.score == pytest.approx(float(Normal(0.0, noise).log_prob(torch.tensor(noise))), rel=1e-5)


def test_units_and_levels_of_targets_change_nothing() -> None:
    x, y = rows(15)
    choices = [choose_value_head(x, scale * y + level) for scale, level in ((1.0, 0.0), (2e5, 7e6), (1e-4, -3.0))]
    for choice, scale in zip(choices, (1.0, 2e5, 1e-4), strict=True):
        assert choice.sd == pytest.approx(scale * choices[0].sd, rel=1e-6)
        assert choice.model.noise_scale == pytest.approx(scale * choices[0].model.noise_scale, rel=1e-6)
    assert choose_value_head(x, torch.full((15,), 3.0)).model.noise_scale > 0.0  # and nothing to divide by


def test_exact_targets_want_a_weak_ridge_and_noise_a_strong_one() -> None:
    x, _ = rows(30)
    exact, noise = x @ torch.arange(5.0).double(), torch.randn(30, generator=torch.Generator().manual_seed(1)).double()

    def ratio(choice: HeadChoice) -> float:
        return choice.sd / choice.model.noise_scale

    assert ratio(choose_value_head(x, exact)) > 10 * ratio(choose_value_head(x, noise))
    assert ratio(choose_value_head(x, exact, width=32.0)) > 40 * ratio(choose_value_head(x, noise, width=0.25))


def test_the_width_of_several_tasks_is_the_best_for_all_of_their_left_out_rows() -> None:
    exact = [(x, x @ torch.arange(5.0).double()) for x in (rows(12, seed=k)[0] for k in range(4))]
    noise = [(x, torch.randn(12, generator=torch.Generator().manual_seed(9)).double()) for x, _ in exact]
    assert best_width(exact) >= 16.0 and best_width(noise) <= 0.5
    assert best_width([*exact, *noise]) == best_width([*noise, *exact])
    assert best_width([(x[:1], y[:1]) for x, y in exact]) == 1.0 == best_width([])


def test_a_single_row_says_only_where_values_lie() -> None:
    x, y = rows(1)
    choice = choose_value_head(x, y, noise_scale=2.0)
    assert math.isnan(choice.score) and choice.model.noise_scale == 2.0
    head = solve_head(x, y, choice.model, prior_sd=choice.sd).head
    assert apply_head(x + 100.0, head).item() == pytest.approx(float(y), rel=1e-6)


def test_a_head_around_another_is_that_where_its_prior_is_narrow() -> None:
    x, y = rows(20)
    around = torch.randn(1, 6, generator=torch.Generator().manual_seed(4)).double()
    model = choose_value_head(x, y, around=around).model
    assert model.around is around and not model.centred
    narrow = model._replace(bias_sd=1e-6)
    head = solve_head(x, y, narrow, prior_sd=1e-6).head
    torch.testing.assert_close(head, around, rtol=0, atol=1e-6)
    known = x @ around[0, :-1] + around[0, -1]
    exact = choose_value_head(x, known + 0.01 * (y - y.mean()), around=around)
    assert exact.score > choose_value_head(x, known + 0.01 * (y - y.mean())).score


def test_draws_stand_around_a_centred_mode() -> None:
    x, y = rows(9)
    choice = choose_value_head(x, y)
    mode = solve_head(x, y, choice.model, prior_sd=choice.sd).head
    generator = torch.Generator().manual_seed(0)
    draws = laplace_head(x, y, choice.model, mode, 4000, prior_sd=choice.sd, generator=generator)
    outputs = apply_head(x, draws)  # [S, n, 1]
    error = outputs.std(0) / math.sqrt(4000)
    assert float(((outputs.mean(0) - apply_head(x, mode)) / error).abs().max()) < 4.5
    cold = laplace_head(x, y, choice.model, mode, 2, prior_sd=choice.sd, generator=generator, temperature=0.0)
    torch.testing.assert_close(cold, mode.expand(2, -1, -1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("values", [1, 2])
def test_each_row_is_predicted_by_the_ridge_of_the_other_folds(values: int) -> None:
    x, y = rows(11, values=values)
    model = HeadModel(values, "regression", noise_scale=0.7, bias_sd=50.0, centred=True)
    found = held_out_log_prob(x, y, model, 0.35, folds=3, noise_scale=2.0)
    fold = torch.arange(11) % 3
    for k in range(3):
        kept = fold != k
        scaling = scaling_of(x[kept])
        fit = ridge(scaling.apply(x[kept]), y[kept], 0.5)
        predicted = torch.from_numpy(fit.predict(scaling.apply(x[~kept]).numpy()))
        density = Normal(predicted, 2.0).log_prob(y[~kept])
        expected = density if values == 1 else density.sum(-1)
        torch.testing.assert_close(found[~kept], expected, rtol=1e-8, atol=1e-8)


def test_padding_counts_nothing_and_a_single_row_neither() -> None:
    x, y = rows(10)
    model = HeadModel(1, "regression", centred=True)
    alone = held_out_log_prob(x, y, model, 0.4)
    padded, weight = torch.cat([x, x[:3]]), torch.cat([torch.ones(10), torch.zeros(3)]).double()
    found = held_out_log_prob(padded, torch.cat([y, 9e9 * y[:3]]), model, 0.4, weight=weight)
    torch.testing.assert_close(found[:10], alone)
    assert float(found[10:].abs().max()) == 0.0
    assert float(held_out_log_prob(x[:1], y[:1], model, 0.4).abs().max()) == 0.0
    # Nor where heads know a level alone: of two rows, and of equal values.
    assert float(held_out_log_prob(x[:2], y[:2], model, 0.4).abs().max()) == 0.0
    assert float(held_out_log_prob(x, torch.full_like(y, 3.0), model, 0.4).abs().max()) == 0.0
    around = HeadModel(1, "regression", around=torch.ones(1, 6).double())
    assert float(held_out_log_prob(x[:2], y[:2], around, 0.4).abs().min()) > 0.0


def test_tasks_of_different_noise_share_a_pass() -> None:
    strange = tasks(1, shared=False, seed=5)[0]
    made = [*tasks(3), Task("wide", (strange.train.positional[0], 300.0 * strange.train.target), "regression")]
    mean = head_mean(adapter(), tasks(8))
    assert mean is not None
    heads = SolvedHeads(adapter(), made, adapter().initial, mean=mean.head, noise_scale=1.5)
    assert {heads.choice(k).model.around is None for k in range(4)} == {True, False}  # one is none of them
    features = torch.stack([network_output(adapter(), task.train, adapter().initial) for task in made])
    target = torch.stack([task.train.target for task in made])
    together = heads.log_prob(range(4), features, target)
    for k, task in enumerate(made):
        torch.testing.assert_close(
            together[k], heads.log_prob_at(k, task.train, adapter().initial), rtol=1e-5, atol=1e-5
        )


def test_a_score_is_under_the_noise_of_the_program() -> None:
    heads = SolvedHeads(adapter(), tasks(1), adapter().initial, noise_scale=0.8)
    noise = heads.choice(0).model.noise_scale
    expected = -0.5 * math.log(2.0 * math.pi * 0.64) - 0.5 * noise**2 / 0.64
    assert heads.score(0) == pytest.approx(expected)
    heads.noise_scale = 1.6
    assert heads.score(0) == pytest.approx(-0.5 * math.log(2.0 * math.pi * 2.56) - 0.5 * noise**2 / 2.56)


def test_regressions_have_heads_on_features_and_on_none_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pyro_lift")
    made = tasks(2)
    assert own_head_scale(adapter(), made, None, solve=True) == 1.0
    assert own_head_scale(adapter(), made, None, solve=False) is None  # heads that take steps are asked for
    assert own_head_scale(adapter(), made, 0.3, solve=False) == 0.3
    assert "8 features: every task has a linear head of its own" in caplog.text
    assert own_head_scale(adapter(1), made, None, solve=True) is None
    assert own_head_scale(adapter(1), made, 0.3, solve=True) is None
    assert "head_scale=0.3 has nothing to stand on" in caplog.text
    assert has_head(made[0], 1.0) and not has_head(made[0], None)


def test_heads_stand_around_one_where_tasks_predict_alike() -> None:
    alike = head_mean(adapter(), tasks(8, n=6))
    assert alike is not None and alike.gain > 2 * alike.error and alike.head.head.shape == (1, WIDTH + 1)
    apart = head_mean(adapter(), tasks(8, n=12, shared=False))
    assert apart is not None and apart.head.of(tasks(1)[0]) is None and not apart.results()
    assert apart.head.width > 4.0  # but its tasks are alike in that their rows are nearly exact
    several = head_mean(adapter(), tasks(8, n=6, values=2))
    assert several is not None and several.head.head.shape == (2, WIDTH + 1)
    mixed = [*tasks(4), *tasks(4, values=2, seed=2)]
    assert head_mean(adapter(), mixed) is None


def unexplained(posterior: TaskPosterior, task: Task) -> float:
    assert task.test is not None
    missed = posterior.predict(task.test) - task.test.target
    return float(missed.square().mean() / task.test.target.var())


@pytest.mark.parametrize(("values", "shared"), [(0, True), (2, True), (0, False)])
def test_a_network_of_features_learns_regressions(values: int, shared: bool, tmp_path: Path) -> None:
    made, new = tasks(values=values, shared=shared), tasks(2, values=values, shared=shared, seed=7)
    lift = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT)
    prior = lift.meta_train(made)
    posterior = prior.adapt(new[0], seed=0)
    assert posterior.heads is not None and posterior.heads.shape[1:] == (max(values, 1), WIDTH + 1)
    assert unexplained(posterior, new[0]) < (0.3 if shared else 0.8)
    assert new[0].test is not None
    sd = posterior.predict_sd(new[0].test)
    assert sd.shape == posterior.predict(new[0].test).shape == new[0].test.target.shape
    posterior.save_pretrained(tmp_path / "posterior")
    again = TaskPosterior.from_pretrained(tmp_path / "posterior", network())
    assert torch.equal(again.predict(new[0].test), posterior.predict(new[0].test))
    assert torch.equal(again.predict_sd(new[0].test), sd)
    prior.save_pretrained(tmp_path / "prior")
    loaded = LiFTPrior.from_pretrained(tmp_path / "prior", network())
    assert loaded.head_mean is not None and prior.head_mean is not None
    assert (len(loaded.head_mean.head) > 0) == shared and loaded.head_mean.width == prior.head_mean.width
    torch.testing.assert_close(loaded.adapt(new[0], seed=0).predict(new[0].test), posterior.predict(new[0].test))


def test_tasks_of_features_adapt_together_and_have_as_many_values() -> None:
    made, new = tasks(), tasks(3, seed=7)
    prior = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT).meta_train(made)
    for posterior, task in zip(prior.adapt_many(new, seed=0), new, strict=True):
        assert unexplained(posterior, task) < 0.3


@pytest.mark.parametrize("head", ["laplace", "langevin"])
def test_other_heads_of_regressions(head: str) -> None:
    made, new = tasks(), tasks(2, seed=7)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    given: dict[str, Any] = {"head_scale": 1.0} if head == "langevin" else {}
    prior = LiFT(network(), config, head=head, **given, **SHORT).meta_train(made)
    posterior = prior.adapt(new[0], seed=0)
    assert posterior.heads is not None and bool(torch.isfinite(posterior.heads).all())
    assert new[0].test is not None and bool((posterior.predict_sd(new[0].test) > 0).all())


def test_heads_that_are_shared_are_refused_on_features() -> None:
    with pytest.raises(ValueError, match="leave head open: each task then has a linear head"):
        LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), head="shared", **SHORT).meta_train(tasks())


def few(made: Sequence[Task]) -> list[int]:
    return [len(task.train) for task in made]


def test_tasks_of_a_row_or_two_are_learned_from() -> None:
    made = [*tasks(4, n=1), *tasks(4, n=2, seed=2), *tasks(2, n=3, seed=3)]
    assert few(made) == [1] * 4 + [2] * 4 + [3] * 2
    prior = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT).meta_train(made)
    for n in (1, 2):
        new = tasks(1, n=n, seed=9)[0]
        assert bool(torch.isfinite(prior.adapt(new, seed=0).predict(new.train)).all())


def test_rows_that_say_nothing_of_the_features_are_no_error() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    equal = [Task(task.name, (task.train.positional[0], torch.full((12,), 5.0)), "regression") for task in tasks()]
    for made in (tasks(n=2, shared=False), equal):
        prior = LiFT(network(), config, **SHORT).meta_train(made)
        assert bool(torch.isfinite(prior.adapt(tasks(1, n=5, seed=9)[0], seed=0).thetas).all())


def test_a_single_row_leaves_the_head_of_all_tasks_nearly_as_it_is() -> None:
    x, y = rows(30)
    around = solve_head(x, y, HeadModel(1, "regression", centred=True), prior_sd=0.5).head
    choice = choose_value_head(x[:1], y[:1] + 5.0, around=around)
    head = solve_head(x[:1], y[:1] + 5.0, choice.model, prior_sd=choice.sd).head
    assert float((apply_head(x, head) - apply_head(x, around)).abs().max()) < 1.0


def test_a_feature_that_comes_to_be_level_on_a_tasks_rows_gets_no_steep_head() -> None:
    x, y = rows(12)
    choice = choose_value_head(x[:3], y[:3])
    level = x.mean(0) + 1e-6 * (x - x.mean(0))  # a saturated unit: level on these rows, not on others
    free = solve_head(level[:3], y[:3], choice.model._replace(least_spread=None), prior_sd=choice.sd).head
    held = solve_head(level[:3], y[:3], choice.model, prior_sd=choice.sd).head
    assert float((apply_head(x, free) - y.unsqueeze(-1)).abs().max()) > 1e4
    assert float((apply_head(x, held) - y.unsqueeze(-1)).abs().max()) < 10.0 * float(y.std())


def test_a_feature_is_divided_by_no_less_than_half_of_what_it_varies_by_over_all_tasks() -> None:
    x, y = rows(3)
    usual = torch.tensor([100.0, 1e-6, 1e-6, 1e-6, 1e-6]).double()
    own, told = choose_value_head(x, y).model.least_spread, choose_value_head(x, y, feature_sd=usual).model.least_spread
    assert own is not None and told is not None
    torch.testing.assert_close(told, torch.cat([torch.tensor([50.0]).double(), own[1:]]))
    slopes = [
        solve_head(x, y, model, prior_sd=sd).head[0, 0].abs()
        for model, sd, _ in (choose_value_head(x, y), choose_value_head(x, y, feature_sd=usual))
    ]
    assert slopes[1] < 0.1 * slopes[0]  # so a slope on it is thought unlikely
    same = choose_value_head(x, y, feature_sd=0.1 * scaling_of(x).sd)  # which changes nothing where rows vary as usual
    assert same[1:] == choose_value_head(x, y)[1:]


def test_tasks_of_three_rows_go_by_how_features_vary_over_all_tasks(tmp_path: Path) -> None:
    mean = head_mean(adapter(), tasks(8, shared=False))
    assert mean is not None and mean.head.feature_sd is not None
    x = torch.cat([task.train.inputs[""] for task in tasks(8, shared=False)])
    torch.testing.assert_close(mean.head.feature_sd, network()(x).detach().std(0), rtol=1e-4, atol=0.0)
    prior = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT).meta_train(
        tasks(8, shared=False), progress=False
    )
    loaded = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), network())
    assert loaded.head_mean is not None and loaded.head_mean.feature_sd is not None and prior.head_mean is not None
    assert are_alike(loaded.head_mean, prior.head_mean)
    assert not are_alike(prior.head_mean, prior.head_mean._replace(feature_sd=2.0 * loaded.head_mean.feature_sd))
    assert not are_alike(prior.head_mean, prior.head_mean._replace(feature_sd=None))


def test_one_task_of_equal_targets_does_not_decide_for_all() -> None:
    x = torch.randn(14, 6, generator=torch.Generator().manual_seed(3))
    equal = Task("equal", (x, torch.full((14,), 5.0)), "regression")
    found = head_mean(adapter(), [*tasks(8, n=6), equal])
    assert found is not None and len(found.head.head) == 1


def common(number: int, n: int, own: float, seed: int = 1) -> list[Task]:
    """Noisy values of one linear map of the features, and of a share of each task's own."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    made = []
    for k in range(number):
        x = torch.randn(n + 60, 6, generator=generator)
        with torch.no_grad():
            features = network()(x)
        y = features @ (slope + own * torch.randn(WIDTH, generator=generator)) + torch.randn(
            n + 60, generator=generator
        )
        made.append(Task(f"c{seed}-{k}", (x[:n], y[:n]), "regression", test=(x[n:], y[n:])))
    return made


def error(net: RandomAdapter, made: Sequence[Task], mean: ClassHead) -> Tensor:
    """Compute the mean square error of solved heads on rows that they have not seen, by task."""
    heads, found = SolvedHeads(net, made, net.initial, mean=mean), []
    for k, task in enumerate(made):
        assert task.test is not None
        output = apply_head(network_output(net, task.test, net.initial).double(), heads.solve(k, net.initial).double())
        found.append((output.squeeze(-1) - task.test.target).square().mean())
    return torch.stack(found)


def test_tasks_say_together_how_near_to_the_head_of_all_theirs_are() -> None:
    net = adapter()
    one, apart = (head_mean(net, common(8, 15, own)) for own in (0.0, 1.0))
    assert one is not None and one.head.around_width is not None and one.head.around_width < 0.5
    assert apart is None or len(apart.head.head) == 0 or (apart.head.around_width or 0.0) > 1.0
    each = head_mean(net, common(8, 15, 0.0), around=False)
    assert each is not None and each.head.around_width is None
    torch.testing.assert_close(each.head.head, one.head.head)
    new = common(64, 20, 0.0, seed=5)  # more than FEW, which do not choose
    gains = error(net, new, each.head) - error(net, new, one.head)
    differ = gains[gains.abs() > 1e-9]
    assert len(differ) > 8 and float((differ > 0).double().mean()) > 0.75 and float(gains.mean()) > 0.0


def test_how_near_they_are_is_saved_and_a_folder_from_before_leaves_it_to_each_task(tmp_path: Path) -> None:
    prior = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT).meta_train(
        common(8, 15, 0.0), progress=False
    )
    assert prior.head_mean is not None and prior.head_mean.around_width is not None
    read = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path), network())
    assert read.head_mean is not None and are_alike(read.head_mean, prior.head_mean)
    new = common(1, 15, 0.0, seed=7)[0]
    assert new.test is not None
    torch.testing.assert_close(read.adapt(new, seed=0).predict(new.test), prior.adapt(new, seed=0).predict(new.test))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "head_around_width": 0.0})))
    with pytest.raises(DamagedError, match="'head_around_width'"):
        LiFTPrior.from_pretrained(tmp_path, network())
    before = {name: value for name, value in config.items() if name != "head_around_width"}
    (tmp_path / "config.json").write_text(json.dumps(sealed(before)))
    old = LiFTPrior.from_pretrained(tmp_path, network())
    assert old.head_mean is not None and old.head_mean.around_width is None


def test_a_run_of_before_goes_on_with_each_task_choosing_how_near_it_is(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "value widths"}
    seen = []
    for rules, folder in ((then, tmp_path / "then"), (RULES, tmp_path / "today")):
        lift = LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT)
        made = common(8, 15, 0.0)
        config = run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        mean = lift.before_chain(made, Session(folder, config=config)).run.head_mean
        assert mean is not None
        seen.append(mean.head.around_width is None)
    assert seen == [True, False]
