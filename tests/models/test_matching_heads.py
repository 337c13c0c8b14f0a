"""Label matching with a head: its mode by scikit-learn and torch.optim, zero-shot without rows, folds by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tiny_backbones import FAMILIES, V, bert, matching_task
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.inference.baselines.finetune import finetune, finetune_each
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.block_likelihood import stack_rows
from pyro_lift.models.head_choice import SCALE_SHARES, choose_head
from pyro_lift.models.heads import (
    BIAS_SD,
    HeadModel,
    ScalePrior,
    choose_prior_sd,
    laplace_head,
    scale_of,
    scaling_of,
    solve_head,
)
from pyro_lift.models.observation import network_output, outputs
from pyro_lift.models.readouts import ABSENT, LabelMatching, LabelScoring
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head, held_out_log_prob, solved_heads
from pyro_lift.settings import AdaptSettings, LiFTSettings

Joined = tuple[Tensor, Tensor]


def joined(n: int, features: int, classes: int, seed: int = 0) -> Joined:
    """Features and similarities side by side, and labels that both say something about."""
    generator = torch.Generator().manual_seed(seed)
    x = 2.0 + 3.0 * torch.randn(n, features, generator=generator, dtype=torch.float64)
    similarity = 0.1 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    own = torch.randn(features, classes, generator=generator, dtype=torch.float64) if features else 0.0
    linear = scaling_of(x).apply(x) @ own if features else 0.0
    noise = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return torch.cat([x, similarity], -1), (15.0 * similarity + linear + noise).argmax(-1)


def text_adapter(seed: int = 0, **options: Any) -> RandomAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bert().eval()
        adapter = adapt_backbone(network, recipe(network, rank=2), seed=seed, **options)
    adapter.double()
    return adapter


def text_tasks(number: int) -> list[Task]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return [matching_task(f"t{i}") for i in range(number)]


def option_task(name: str, options: int = 3, rows: int = 9) -> Task:
    """Rows with options of their own, the last option of the second row absent."""
    generator = torch.Generator().manual_seed(len(name) + options)
    ids = torch.randint(5, V, (rows, 6), generator=generator)
    texts = torch.randint(5, V, (rows, options, 3), generator=generator)
    mask = torch.ones_like(texts)
    mask[1, -1] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"option_input_ids": texts, "option_attention_mask": mask}
    return Task(name, (inputs, torch.arange(rows) % (options - 1)), "matching")


# ------------------------------------------------------------------------------------------------------ the problem


def test_scale_and_head_together_are_scikit_learns_for_two_classes() -> None:
    x, y = joined(40, 6, 2)
    sd, tau = 0.4, 9.0
    found = solve_head(x, y, HeadModel(2, scale=ScalePrior(0.0, tau)), prior_sd=sd).head
    assert torch.equal(found[:, 6:8], scale_of(found) * torch.eye(2).double())
    # Two classes: the difference of two weights of sd s is one of sd s sqrt(2); the scale is shared already.
    standard, root = scaling_of(x[:, :6]).apply(x[:, :6]), 2.0**0.5
    difference = x[:, 7:8] - x[:, 6:7]
    z = torch.cat([root * sd * standard, torch.full((40, 1), root * BIAS_SD).double(), tau * difference], 1).numpy()
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-14, solver="newton-cg", max_iter=10_000)
    expected = torch.from_numpy(model.fit(z, y.numpy()).decision_function(z))
    logits = x @ found[:, :-1].T + found[:, -1]
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=1e-6, atol=1e-6)
    assert float(scale_of(found)) == pytest.approx(tau * float(model.coef_[0, -1]), rel=1e-5)


def test_a_given_scale_is_an_offset() -> None:
    x, y = joined(30, 6, 3)
    found = solve_head(x, y, HeadModel(3, scale=ScalePrior(12.0, 0.0)), prior_sd=0.4).head
    plain = solve_head(x[:, :6], y, HeadModel(3), prior_sd=0.4, offset=12.0 * x[:, 6:]).head
    torch.testing.assert_close(found[:, :6], plain[:, :-1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[:, -1], plain[:, -1], rtol=1e-8, atol=1e-9)
    assert torch.equal(found[:, 6:9], 12.0 * torch.eye(3).double())


@pytest.mark.parametrize(("n", "features", "classes"), [(40, 6, 3), (12, 30, 4), (20, 0, 3)])
def test_scale_and_head_together_are_at_the_mode_that_lbfgs_finds(n: int, features: int, classes: int) -> None:
    x, y = joined(n, features, classes)
    sd, prior = 0.4, ScalePrior(10.0, 6.0)
    found = solve_head(x, y, HeadModel(classes, scale=prior), prior_sd=sd)
    scaling = scaling_of(x[:, :features])
    z, similarity = scaling.apply(x[:, :features]), x[:, features:]
    w = torch.zeros(classes, features, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(classes, dtype=torch.float64, requires_grad=bool(features))
    s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        logits = s * similarity + z @ w.T + b
        data = -logits.log_softmax(-1)[torch.arange(n), y].sum()
        prior_loss = (w / sd).square().sum() + (b / BIAS_SD).square().sum() + ((s - prior.mean) / prior.sd).square()
        return data + 0.5 * prior_loss

    leaves = [w, b, s] if features else [s]
    optimiser = torch.optim.LBFGS(
        leaves, lr=1.0, max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    assert float(scale_of(found.head)) == pytest.approx(float(s.detach()), rel=1e-6)
    expected = (s * similarity + z @ w.T + b).detach()
    ours = x @ found.head[:, :-1].T + found.head[:, -1]
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), rtol=1e-6, atol=1e-6)
    assert float(found.loss) == pytest.approx(float(loss().detach()), rel=1e-9)
    assert abs(float(s.detach()) - float(prior.mean)) > 0.1  # the rows moved it


def test_no_row_is_plain_label_matching_whatever_the_prior() -> None:
    x, y = joined(8, 5, 3)
    for sd in (0.0, 4.0):
        model = HeadModel(3, scale=ScalePrior(7.0, sd))
        for head in (
            solve_head(x[:0], y[:0], model, prior_sd=0.5).head,
            solve_head(x, y, model, prior_sd=0.5, weight=torch.zeros(8)).head,
        ):
            assert head.shape == (3, 9)
            torch.testing.assert_close(x @ head[:, :-1].T + head[:, -1], 7.0 * x[:, 5:], rtol=1e-12, atol=1e-12)
    options = solve_head(x[:0, 5:], y[:0], HeadModel(3, scale=ScalePrior(7.0, 7.0)), prior_sd=1.0).head
    assert torch.equal(options[:, :-1], 7.0 * torch.eye(3).double())


def test_a_start_at_the_mode_needs_no_step() -> None:
    x, y = joined(30, 50, 3)
    model = HeadModel(3, scale=ScalePrior(10.0, 5.0))
    cold = solve_head(x, y, model, prior_sd=0.3)
    warm = solve_head(x, y, model, prior_sd=0.3, start=cold.head)
    assert cold.iterations > 1 and warm.iterations <= 1
    torch.testing.assert_close(warm.head, cold.head, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("scale", "seed"), [(40.0, 2), (100.0, 1), (300.0, 1)])
def test_similarities_that_saturate_the_softmax_are_overcome(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    x = torch.cat([x, 0.2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)], -1)
    found = solve_head(x, torch.arange(6) % 3, HeadModel(3, scale=ScalePrior(scale, 0.0)), prior_sd=2.0)
    assert float(found.gradient_norm) < 1e-5 and found.iterations < 60


def test_several_problems_at_once_have_scales_of_their_own() -> None:
    many = [joined(16, 4, 3, seed) for seed in range(3)]
    x, y = torch.stack([a for a, _ in many]), torch.stack([b for _, b in many])
    means = torch.tensor([2.0, 8.0, 20.0], dtype=torch.float64)
    for sd in (0.0, 3.0):
        together = solve_head(x, y, HeadModel(3, scale=ScalePrior(means, sd)), prior_sd=0.4).head
        for k in range(3):
            alone = solve_head(x[k], y[k], HeadModel(3, scale=ScalePrior(float(means[k]), sd)), prior_sd=0.4).head
            torch.testing.assert_close(together[k], alone, rtol=1e-7, atol=1e-7)


def test_draws_around_the_mode_have_the_inverse_hessian_for_their_covariance() -> None:
    x, y = joined(25, 2, 2, seed=3)
    model, sd = HeadModel(2, scale=ScalePrior(5.0, 4.0)), 0.5
    mode = solve_head(x, y, model, prior_sd=sd).head
    draws = laplace_head(x, y, model, mode, 20_000, prior_sd=sd, generator=torch.Generator().manual_seed(0))
    scaling = scaling_of(x[:, :2])
    z = torch.cat([scaling.apply(x[:, :2]), torch.ones(25, 1).double()], -1)

    def energy(flat: Tensor) -> Tensor:  # [w, b] by class, then s
        logits = flat[-1] * x[:, 2:] + z @ flat[:6].view(2, 3).T
        width = torch.tensor([sd, sd, BIAS_SD] * 2 + [4.0]).double()
        centred = torch.cat([flat[:6], flat[-1:] - 5.0]) / width
        return -logits.log_softmax(-1)[torch.arange(25), y].sum() + 0.5 * centred.square().sum()

    body = scaling.unfolded(torch.cat([mode[:, :2], mode[:, -1:]], -1))
    hessian = torch.autograd.functional.hessian(energy, torch.cat([body.reshape(-1), scale_of(mode)[None]]))
    expected = torch.linalg.inv(torch.as_tensor(hessian))[-1, -1].sqrt()
    assert float(scale_of(draws).std()) == pytest.approx(float(expected), rel=0.03)
    assert float(scale_of(draws).mean()) == pytest.approx(float(scale_of(mode)), abs=0.1)


def test_similarities_are_refused_for_regression_and_where_features_are_too_few() -> None:
    x, y = joined(6, 2, 3)
    with pytest.raises(ValueError, match="for classes, not for regression"):
        solve_head(x, y.double(), HeadModel(3, "regression", scale=ScalePrior(1.0, 1.0)), prior_sd=1.0)
    with pytest.raises(ValueError, match="2 features are fewer than the similarities to 3 labels"):
        solve_head(x[:, :2], y, HeadModel(3, scale=ScalePrior(1.0, 1.0)), prior_sd=1.0)


# ------------------------------------------------------------------------------------------------------- the choice


def test_the_scale_is_that_of_the_best_cross_validation_beside_its_prior() -> None:
    x, y = joined(30, 5, 3)
    x[:, 5:] *= 2.0
    found = choose_head(x, y, 3, 10.0)
    tried: dict[tuple[float, float], float] = {}
    for share in (1.0, *SCALE_SHARES):
        choice = choose_prior_sd(x, y, HeadModel(3, scale=ScalePrior(10.0 * share, 0.0)))
        tried[10.0 * share, choice.sd] = 30 * min(choice.scores) + 0.5 * (share - 1.0) ** 2
    assert found.model.scale is not None
    assert (found.model.scale.mean, found.sd) == min(tried, key=lambda pair: tried[pair])


def test_no_scale_beyond_the_usual_one_is_tried_but_the_one_without_rows() -> None:
    x, y = joined(30, 5, 3)
    x[:, 5:] *= 0.1
    x[torch.arange(30), 5 + y] += 0.5  # the texts say it all: the larger the scale, the better
    for scale, most in ((7.0, 14.0), (15.0, 15.0), (50.0, 50.0)):
        model = choose_head(x, y, 3, scale).model
        assert model.scale == ScalePrior(most, 0.0)


def test_texts_that_say_nothing_leave_a_linear_probe() -> None:
    x, y = joined(60, 4, 2)
    x[:, 4:] = x[:, 4:].flip(-1)  # each text speaks for the other class
    found = choose_head(x, y, 2, 20.0)
    assert found.model.scale == ScalePrior(0.0, 0.0)
    assert found.sd == choose_prior_sd(x[:, :4], y, HeadModel(2)).sd
    assert choose_head(x[:1], y[:1], 2, 20.0).model.scale == ScalePrior(20.0, 0.0)  # nothing to be left out


def test_a_choice_is_made_once_for_the_same_features_and_anew_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = joined(24, 4, 2)
    made: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return choose_prior_sd(*arguments, **options)

    monkeypatch.setattr("pyro_lift.models.head_choice.choose_prior_sd", counted)
    first, before = choose_head(x, y, 2, 20.0), len(made)
    assert before and choose_head(x.clone(), y.clone(), 2, 20.0) == first and len(made) == before
    other = x.clone()
    other[0, 0] += 1e-6
    for arguments in ((other, y, 2, 20.0), (x, 1 - y, 2, 20.0), (x, y, 2, 10.0), (x, y, 2), (x[:-1], y[:-1], 2, 20.0)):
        before = len(made)
        choose_head(*arguments)
        assert len(made) > before


# ---------------------------------------------------------------------------------------------------- held-out rows


@pytest.mark.parametrize("features", [5, 0])
def test_each_row_is_judged_by_the_head_and_scale_of_the_other_folds(features: int) -> None:
    x, y = joined(14, features, 3)
    model = HeadModel(3, scale=ScalePrior(10.0, 0.0 if features else 8.0))
    found = held_out_log_prob(x, y, model, 0.4, folds=3)
    order = torch.argsort(y, stable=True) if features else torch.arange(14)
    for k in range(3):
        left, kept = order[k::3], torch.cat([order[j::3] for j in range(3) if j != k])
        head = solve_head(x[kept], y[kept], model, prior_sd=0.4).head
        expected = (x[left] @ head[:, :-1].T + head[:, -1]).log_softmax(-1)[torch.arange(len(left)), y[left]]
        torch.testing.assert_close(found[left], expected, rtol=1e-7, atol=1e-7)


def test_a_row_alone_is_judged_by_its_label_text() -> None:
    x, y = joined(9, 4, 3)
    model = HeadModel(3, scale=ScalePrior(10.0, 0.0))
    single = held_out_log_prob(x[:1], y[:1], model, 0.4)
    zero_shot = (10.0 * x[:1, 4:]).log_softmax(-1)[0, y[0]]
    torch.testing.assert_close(single, zero_shot[None], rtol=1e-9, atol=1e-9)
    padded = torch.cat([x, torch.full((3, 7), 9.0).double()])
    weight = torch.cat([torch.full((9,), 2.0), torch.zeros(3)])
    alone = held_out_log_prob(x, y, model, 0.4)
    found = held_out_log_prob(padded, torch.cat([y, y[:3]]), model, 0.4, weight=weight)
    torch.testing.assert_close(found[:9], alone, rtol=1e-6, atol=1e-7)
    assert (found[9:] == 0).all() and (alone < 0).all()


# ------------------------------------------------------------------------------------------------------ the network


def test_what_a_head_takes_is_the_encoded_text_beside_its_similarities() -> None:
    adapter, task = text_adapter(), text_tasks(1)[0]
    found = network_output(adapter, task.train, adapter.initial)
    assert found.shape == (8, 16 + 3)
    torch.testing.assert_close(found[:, :16].norm(dim=-1), torch.ones(8).double())
    torch.testing.assert_close(20.0 * found[:, 16:], outputs(adapter, task.train, adapter.initial, None))
    heads = SolvedHeads(adapter, [task], adapter.initial)
    none = heads.choice(0).model._replace(scale=ScalePrior(20.0, 0.0))
    plain = solve_head(found[:0], task.train.target[:0], none, prior_sd=1.0).head
    torch.testing.assert_close(
        outputs(adapter, task.train, adapter.initial, plain), outputs(adapter, task.train, adapter.initial, None)
    )


def test_a_block_of_tasks_is_the_tasks_one_by_one() -> None:
    adapter, tasks = text_adapter(), text_tasks(3)
    heads = SolvedHeads(adapter, tasks, adapter.initial)
    generator = torch.Generator().manual_seed(0)
    thetas = adapter.initial + 0.2 * torch.randn(3, adapter.dim, generator=generator, dtype=torch.float64)
    block = stack_rows([task.train for task in tasks], [8, 8, 8], "matching")
    together = heads.block_log_likelihood([0, 1, 2], block, thetas)
    alone = torch.stack([heads.log_prob_at(k, tasks[k].train, thetas[k]).sum() for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-8)
    modes = torch.stack([heads.solve(0, theta) for theta in thetas])
    each = torch.stack([outputs(adapter, tasks[0].train, t, h).softmax(-1) for t, h in zip(thetas, modes, strict=True)])
    found = predict(adapter, thetas, tasks[0].train, "matching", heads=modes)
    torch.testing.assert_close(found, each.mean(0))


def test_the_gradient_goes_through_inputs_and_label_texts() -> None:
    adapter, task = text_adapter(), text_tasks(1)[0]
    heads = SolvedHeads(adapter, [task], adapter.initial)
    theta = (adapter.initial + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(heads.log_prob_at(0, task.train, theta).sum(), theta)
    direction = torch.randn(adapter.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    joined_at = network_output(adapter, task.train, theta.detach())
    choice = heads.choice(0)

    def held_fixed(step: float) -> float:
        """The held-out log likelihood at a step, by the folds' heads of the start."""
        moved = network_output(adapter, task.train, theta.detach() + step * direction)
        order, total = torch.argsort(task.train.target, stable=True), 0.0
        for k in range(4):
            left, kept = order[k::4], torch.cat([order[j::4] for j in range(4) if j != k])
            head = solve_head(joined_at[kept], task.train.target[kept], choice.model, prior_sd=choice.sd).head
            logits = moved[left] @ head[:, :-1].T + head[:, -1]
            total += float(logits.log_softmax(-1)[torch.arange(len(left)), task.train.target[left]].sum())
        return total

    numeric = (held_fixed(1e-5) - held_fixed(-1e-5)) / 2e-5
    assert float(gradient @ direction) == pytest.approx(numeric, rel=1e-4)


def test_rows_with_options_of_their_own_have_a_scale_alone() -> None:
    adapter, task = text_adapter(), option_task("options")
    found = network_output(adapter, task.train, adapter.initial)
    assert found.shape == (9, 3) and float(found[1, 2]) == ABSENT
    heads = SolvedHeads(adapter, [task], adapter.initial)
    head = heads.solve(0, adapter.initial)
    assert torch.equal(head[:, :-1], scale_of(head) * torch.eye(3).double()) and (head[:, -1] == 0).all()
    assert float(scale_of(head)) != 20.0
    p = outputs(adapter, task.train, adapter.initial, head).softmax(-1)
    assert float(p[1, 2]) == 0.0
    fewer = option_task("others", options=2)
    expected = scale_of(head) * network_output(adapter, fewer.train, adapter.initial)
    torch.testing.assert_close(outputs(adapter, fewer.train, adapter.initial, head), expected)


def test_other_readouts_have_no_head_beside_their_scores() -> None:
    plain, task = text_adapter(), text_tasks(1)[0]
    assert has_solved_head(plain, task, None)
    scored = text_adapter(readout=LabelScoring(0))
    assert not has_solved_head(scored, task, None)
    assert solved_heads("solve", scored, [task], None, scored.initial) is None
    assert solved_heads("sample", plain, [task], None, plain.initial) is None
    assert SolvedHeads(text_adapter(readout=LabelMatching(5.0)), [task], plain.initial).scale == 5.0
    with pytest.raises(ValueError, match="scale"):
        SolvedHeads(plain, [task], plain.initial, scale=0.0)


def test_fine_tuning_has_the_same_heads_in_a_block_and_alone() -> None:
    adapter, tasks = text_adapter(), text_tasks(2)
    budget = Budget(steps=4, draws=2, batch_size=100, heads=HeadPolicy(update="solve"))
    block = finetune_each(adapter, tasks, adapter.initial, budget)
    for k, task in enumerate(tasks):
        alone = finetune(adapter, task, adapter.initial, budget)
        assert alone.heads is not None and alone.heads.shape == (2, 3, 16 + 3 + 1)
        torch.testing.assert_close(block[k].thetas, alone.thetas, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(block[k].heads, alone.heads, rtol=1e-5, atol=1e-6)
    stepped = Budget(steps=4, draws=2, heads=HeadPolicy(update="step"))
    assert finetune(adapter, tasks[0], adapter.initial, stepped).heads is None


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_front_door_solves_saves_and_loads_them(block_size: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    backbone = FAMILIES["bert"].make().eval()
    tasks = [matching_task(f"t{i}") for i in range(3)]
    own = copy.deepcopy(backbone)
    settings = LiFTSettings(sgd_steps=3, burn_in=2, samples=4, block_size=block_size)
    lift = LiFT(own, recipe(own, rank=2), settings=settings, adapt=AdaptSettings(steps=4, draws=2), seed=0)
    prior = lift.meta_train(tasks[:2], progress=False)
    heads = SolvedHeads(lift.adapter, tasks[:2], lift.adapter.initial)
    scales = [heads.choice(k).model.scale for k in range(2)]
    mean = sum(float(scale.mean) for scale in scales if scale is not None) / 2
    assert prior.matching_scale == pytest.approx(max(mean, 1.0))
    posterior = prior.adapt(tasks[2])
    assert posterior.heads is not None and posterior.heads.shape == (2, 3, 16 + 3 + 1)
    again = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), copy.deepcopy(backbone))
    assert again.matching_scale == prior.matching_scale
    torch.testing.assert_close(again.adapt(tasks[2]).heads, posterior.heads)
    folder = posterior.save_pretrained(tmp_path / "posterior")
    loaded = TaskPosterior.from_pretrained(folder, copy.deepcopy(backbone))
    torch.testing.assert_close(loaded.predict(tasks[2].train), posterior.predict(tasks[2].train))
    new_text = {name: x[:2] for name, x in tasks[2].train.inputs.items()}
    assert loaded.predict(new_text).shape == (2, 3)
    exported = load_file(folder / "head.safetensors")
    assert exported["weight"].shape == (3, 16) and exported["bias"].shape == (3,)
    torch.testing.assert_close(exported["similarity_scale"], scale_of(posterior.heads.mean(0)))
    assert "similarity_scale" in (folder / "README.md").read_text()
    many = prior.adapt_many(tasks, block_size=2)
    assert all(one.heads is not None for one in many)


def test_steps_on_the_head_leave_label_matching_as_it_was() -> None:
    torch.manual_seed(3)
    backbone = FAMILIES["bert"].make().eval()
    tasks = [matching_task(f"t{i}") for i in range(3)]
    settings = LiFTSettings(sgd_steps=3, burn_in=2, samples=4, head="langevin")
    lift = LiFT(backbone, recipe(backbone, rank=2), settings=settings, adapt=AdaptSettings(steps=4, draws=2), seed=0)
    prior = lift.meta_train(tasks[:2], progress=False)
    assert prior.matching_scale is None
    posterior = prior.adapt(tasks[2])
    assert posterior.heads is None
    plain = [outputs(lift.adapter, tasks[2].train, theta, None).softmax(-1) for theta in posterior.thetas]
    torch.testing.assert_close(posterior.predict(tasks[2].train), torch.stack(plain).mean(0).detach())
