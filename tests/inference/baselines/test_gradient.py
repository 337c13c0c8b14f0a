"""MAML and its kin against finite differences, deep copies of the network, and closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_methods import FULL, SMALL, one_episode, spread, tiny_adapter, tiny_tasks
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_lift.inference.adaptation.gradients import Weights
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.bootstrapped_maml import BootstrappedMAML, predictive_divergence
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import twice_differentiable
from pyro_lift.inference.baselines.finetune import loss_of
from pyro_lift.inference.baselines.imaml import (
    ImplicitMAML,
    conjugate_gradients,
    hessian_product,
    neumann_series,
)
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.reptile import Reptile
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows

STEPS = (1e-5, -1e-5)


def reference_loss(adapter: RandomAdapter, rows: Rows, theta: dict[str, Tensor]) -> Tensor:
    """The same loss by a deep copy of the network and torch's own functional call: none of our binding."""
    network = copy.deepcopy(adapter.backbone)
    return cross_entropy(torch.func.functional_call(network, theta, (rows.inputs[""],)), rows.target)


def reference_maml(adapter: RandomAdapter, episode: Episode, phi: Tensor, k: int, rate: float) -> Tensor:
    """Query loss after k steps of gradient descent."""
    theta = {name: x.clone() for name, x in adapter.bind(phi).items()}
    for _ in range(k):
        g = torch.autograd.grad(
            reference_loss(adapter, episode.support, theta), list(theta.values()), create_graph=True
        )
        theta = {name: x - rate * gx for (name, x), gx in zip(theta.items(), g, strict=True)}
    return reference_loss(adapter, episode.query, theta)


@pytest.mark.parametrize("k", [1, 3])
def test_maml_gradient_is_that_of_a_deep_copied_reference(k: int) -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    method, episode = MAML(adapter, FULL, inner_steps=k, inner_learning_rate=0.7), one_episode(task)
    phi = spread(adapter)
    found = method.gradient(phi, episode, Heads(adapter, [task], FULL, 0.1), torch.Generator())
    leaf = phi.clone().requires_grad_()
    expected = torch.autograd.grad(reference_maml(adapter, episode, leaf, k, 0.7), leaf)[0]
    torch.testing.assert_close(found, expected)


def test_maml_gradient_equals_finite_differences_and_the_first_order_one_does_not() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, phi, heads = one_episode(task), spread(adapter), Heads(adapter, [task], FULL, 0.1)
    method = MAML(adapter, FULL, inner_learning_rate=0.7)
    found = method.gradient(phi, episode, heads, torch.Generator())
    first = replace(method, first_order=True).gradient(phi, episode, heads, torch.Generator())
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        v = torch.randn(adapter.dim, generator=generator, dtype=torch.float64)
        up, down = (reference_maml(adapter, episode, (phi + e * v).requires_grad_(), 1, 0.7).item() for e in STEPS)
        assert float(found @ v) == pytest.approx((up - down) / 2e-5, rel=1e-6)
        assert abs(float(first @ v) - (up - down) / 2e-5) > 1e-3


def test_first_order_maml_is_maml_without_the_hessian() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, phi, heads, rate = one_episode(task), spread(adapter), Heads(adapter, [task], FULL, 0.1), 0.7
    method = MAML(adapter, FULL, inner_learning_rate=rate)
    full = method.gradient(phi, episode, heads, torch.Generator())
    first = replace(method, first_order=True).gradient(phi, episode, heads, torch.Generator())
    product = hessian_product(loss_of(adapter, task, FULL), Weights(phi), episode.support)
    torch.testing.assert_close(full, first - rate * product(first))


def test_a_task_with_its_own_head_adapts_and_keeps_it() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    budget = replace(FULL, heads=HeadPolicy(scale=1.0, update="step"))
    heads = Heads(adapter, [task], budget, 0.1)
    MAML(adapter, budget).gradient(spread(adapter), one_episode(task), heads, torch.Generator())
    assert heads.values[0] is not None and heads.values[0].abs().max() > 0


class Quadratic:
    """Support loss (theta - a)' H (theta - a) / 2, query loss c' theta: the implicit gradient in closed form."""

    def __init__(self, dim: int = 7) -> None:
        generator = torch.Generator().manual_seed(2)
        root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.H = root @ root.T / dim
        self.c = torch.randn(dim, generator=generator, dtype=torch.float64)

    def loss(self, weights: Weights, rows: Rows) -> Tensor:
        return 0.5 * weights.theta @ self.H @ weights.theta


def test_implicit_gradient_of_a_quadratic_is_the_closed_form() -> None:
    q, regularisation = Quadratic(), 0.5
    rows = Rows({"": torch.zeros(1, 1)}, torch.zeros(1))
    product = hessian_product(q.loss, Weights(torch.ones(7, dtype=torch.float64)), rows)

    def operator(v: Tensor) -> Tensor:
        return v + product(v) / regularisation

    A = torch.eye(7, dtype=torch.float64) + q.H / regularisation
    expected = torch.linalg.solve(A, q.c)
    largest = float(torch.linalg.eigvalsh(A).max())
    torch.testing.assert_close(conjugate_gradients(operator, q.c, 7), expected)
    torch.testing.assert_close(neumann_series(operator, q.c, 400, 1.0 / largest), expected)
    # A few terms are the partial sum; a scale that diverges ends where terms begin to grow.
    s, eye = 0.5 / largest, torch.eye(7, dtype=torch.float64)
    partial = s * sum(torch.linalg.matrix_power(eye - s * A, j) @ q.c for j in range(4))
    torch.testing.assert_close(neumann_series(operator, q.c, 3, s), partial)
    assert torch.isfinite(neumann_series(operator, q.c, 50, 100.0)).all()


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    b = torch.tensor([1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradients(lambda v: -v, b, 5), b)


def test_implicit_gradient_of_a_network_solves_its_linear_system() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, phi, heads = one_episode(task), spread(adapter), Heads(adapter, [task], FULL, 0.1)
    method = ImplicitMAML(adapter, FULL, regularisation=20.0, solver_steps=adapter.dim)
    first = replace(method, solver_steps=0).gradient(phi, episode, heads, torch.Generator())
    cg, neumann = (
        replace(method, solver=s, solver_steps=60).gradient(phi, episode, heads, torch.Generator())
        for s in ("cg", "neumann")
    )
    adapted = method.solve_inner(phi, episode, heads, torch.Generator())
    product = hessian_product(loss_of(adapter, task, FULL), adapted, episode.support)
    torch.testing.assert_close(cg + product(cg) / 20.0, first)
    torch.testing.assert_close(cg, neumann, rtol=1e-5, atol=1e-9)


def test_imaml_inner_problem_is_the_proximal_one() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, phi, heads = one_episode(task), spread(adapter), Heads(adapter, [task], FULL, 0.1)
    method = ImplicitMAML(adapter, FULL, regularisation=2.0, inner_steps=2000, inner_learning_rate=0.1)
    theta = method.solve_inner(phi, episode, heads, torch.Generator()).theta.requires_grad_()
    (g,) = torch.autograd.grad(loss_of(adapter, task, FULL)(Weights(theta), episode.support), theta)
    torch.testing.assert_close(g, -2.0 * (theta.detach() - phi), rtol=1e-6, atol=1e-9)


def test_reptile_with_one_plain_step_is_joint_gradient_descent() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    budget = replace(FULL, warm_up=0, visits=3, meta_learning_rate=0.2)
    method = Reptile(adapter, budget, inner_steps=1, tasks_per_step=3, outer_rate=0.5, inner="sgd")
    found = method.meta_train(tasks).phi
    theta = adapter.initial.clone().requires_grad_()
    bound = adapter.bind(theta)
    joint = sum(reference_loss(adapter, task.train, bound) for task in tasks) / 3
    expected = theta - 0.5 * 0.2 * torch.autograd.grad(joint, theta)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.detach())


def test_bootstrapped_gradient() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    episode, phi, heads = one_episode(task), spread(adapter), Heads(adapter, [task], FULL, 0.1)
    method = BootstrappedMAML(adapter, FULL, inner_steps=2, inner_learning_rate=0.7, target_steps=2)
    for still in (replace(method, target_steps=0), replace(method, target_learning_rate=0.0)):
        g = still.gradient(phi, episode, heads, torch.Generator())
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-14)
    found = method.gradient(phi, episode, heads, torch.Generator())

    def steps(theta: Tensor, rows: Rows, k: int) -> Tensor:
        for _ in range(k):
            theta = (
                theta
                - 0.7
                * torch.autograd.grad(reference_loss(adapter, rows, adapter.bind(theta)), theta, create_graph=True)[0]
            )
        return theta

    leaf = phi.clone().requires_grad_()
    adapted = steps(leaf, episode.support, 2)
    target = steps(adapted, episode.query, 2).detach()

    def log_p(theta: Tensor) -> Tensor:
        network = copy.deepcopy(adapter.backbone)
        return torch.func.functional_call(network, adapter.bind(theta), (episode.query.inputs[""],)).log_softmax(-1)  # type: ignore[no-any-return]

    p = log_p(target).detach()
    divergence = (p.exp() * (p - log_p(adapted))).sum(-1).mean()
    torch.testing.assert_close(found, torch.autograd.grad(divergence, leaf)[0])


def test_divergence_of_each_kind_is_that_of_torchs_distributions() -> None:
    from torch.distributions import Categorical, Normal, kl_divergence

    a, b = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    each = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    target = torch.tensor([[1, 2, -100]] * 4)
    torch.testing.assert_close(predictive_divergence("tokens", a, b, target), each[:, :2].sum(-1))
    torch.testing.assert_close(predictive_divergence("classification", a[0], b[0], target), each[0])
    expected = kl_divergence(Normal(a[0], 0.3), Normal(b[0], 0.3)).sum(-1)
    torch.testing.assert_close(predictive_divergence("regression", a[0], b[0], target, 0.3), expected)


def test_attention_has_a_double_backward_where_it_is_set() -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)

    def twice() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match="derivative"):
        twice()
    with twice_differentiable():
        assert torch.isfinite(twice()).all()


def test_memory_is_reckoned_before_the_run_and_refused_with_numbers() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(2)
    sizes = [MAML(adapter, SMALL, inner_steps=k).needed_bytes(tasks) for k in (1, 2, 3)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=2)
    assert sizes[1] > sizes[0]
    small = replace(SMALL, memory_limit=sizes[1] - 1)
    MAML(adapter, small, inner_steps=1).meta_train(tasks)
    for k in (2, 3):
        with pytest.raises(MemoryError, match=r"MiB are needed .* may be taken. Use first_order=True"):
            MAML(adapter, small, inner_steps=k).meta_train(tasks)
    assert sizes[0] > MAML(adapter, SMALL, first_order=True).needed_bytes(tasks)
