"""Libraries of LoRAs: what their compositions must reduce to, clusters, and LiFT with theta_i fixed."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor, nn

from pyro_lift.defaults import one_width, resolved
from pyro_lift.inference.baselines.library import nearest, task_key, train_library
from pyro_lift.inference.baselines.mbc import MBC, MBCState, cluster
from pyro_lift.inference.baselines.retriever import LoRARetriever
from pyro_lift.inference.baselines.shared_peft import SharedPEFT
from pyro_lift.inference.baselines.taskwise_peft import TaskwisePEFT
from pyro_lift.inference.baselines.union_train import union_train
from pyro_lift.inference.fixed_theta import FixedThetaPosterior, exact_draws, phi_chain, random_order
from pyro_lift.lift import LiFT
from pyro_lift.methods.fixed_theta import FixedTheta
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.lora_factors import fusion, lora_pairs, mixture


def loras(adapter: RandomAdapter, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return adapter.initial + torch.randn(number, adapter.dim, generator=generator, dtype=torch.float64)


def products(adapter: RandomAdapter, theta: Tensor) -> list[Tensor]:
    return [theta[b.part].view(b.shape) @ theta[a.part].view(a.shape) for a, b in lora_pairs(adapter)]


def test_a_one_hot_composition_is_that_lora() -> None:
    adapter, x = tiny_adapter(), torch.randn(5, 4, dtype=torch.float64)
    thetas, w = loras(adapter, 3), torch.tensor([0.0, 1.0, 0.0])
    alone = adapter(x, theta=thetas[1])
    torch.testing.assert_close(fusion(thetas, w), thetas[1], rtol=0, atol=0)
    torch.testing.assert_close(adapter(x, theta=mixture(adapter, thetas, w)), alone)


def test_a_mixture_is_the_concatenation_brought_back_to_the_rank() -> None:
    adapter, w = tiny_adapter(), torch.tensor([0.2, 0.5, 0.3])
    thetas = loras(adapter, 3)
    found = products(adapter, mixture(adapter, thetas, w))
    for one, (a, b) in zip(found, lora_pairs(adapter), strict=True):
        A = torch.cat([theta[a.part].view(a.shape) for theta in thetas])  # rank r K
        B = torch.cat([w_i * theta[b.part].view(b.shape) for w_i, theta in zip(w, thetas, strict=True)], 1)
        U, s, V = torch.linalg.svd(B @ A)
        r = a.shape[0]
        torch.testing.assert_close(one, U[:, :r] @ torch.diag(s[:r]) @ V[:r])


def test_a_mixture_of_small_rank_is_exact_and_differs_from_fusion() -> None:
    adapter, w = tiny_adapter(), torch.tensor([0.4, 0.6])
    thetas = loras(adapter, 2)
    for a, b in lora_pairs(adapter):  # two LoRAs of rank one: their sum has the adapter's rank, two
        thetas[:, a.part].view(2, *a.shape)[:, 1:] = 0.0
        thetas[:, b.part].view(2, *b.shape)[:, :, 1:] = 0.0
    summed = [0.4 * x + 0.6 * y for x, y in zip(*(products(adapter, t) for t in thetas), strict=True)]
    for one, expected in zip(products(adapter, mixture(adapter, thetas, w)), summed, strict=True):
        torch.testing.assert_close(one, expected)
    fused = products(adapter, fusion(thetas, w))
    assert max(float((x - y).abs().max()) for x, y in zip(fused, summed, strict=True)) > 0.1


def test_a_mixture_of_untrained_loras_can_still_be_left() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    theta = mixture(adapter, adapter.initial.expand(2, -1), torch.tensor([0.5, 0.5])).requires_grad_()
    x = task.train.inputs[""]
    torch.testing.assert_close(adapter(x, theta=theta).detach(), adapter(x, theta=adapter.initial))
    loss = nn.functional.cross_entropy(adapter(x, theta=theta), task.train.target)
    assert torch.autograd.grad(loss, theta)[0].abs().max() > 1e-4


def test_an_adapter_without_lora_factors_is_refused() -> None:
    import peft

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    adapter = adapt_backbone(net, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match='composition="fusion"'):
        mixture(adapter, adapter.initial.expand(2, -1), torch.ones(2) / 2)


def test_retrieval_by_cosine() -> None:
    keys = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 1.0]])
    assert nearest(keys, torch.tensor([0.2, 0.1]), 2).tolist() == [1, 0]
    assert sorted(nearest(keys, torch.tensor([1.0, 1.0]), None).tolist()) == [0, 1, 2]


def test_a_task_retrieves_its_own_lora_and_a_composition_of_one_is_it() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(4)
    library = train_library(adapter, tasks, SMALL)
    assert library.thetas.shape == (4, adapter.dim)
    assert library.meta_steps == SMALL.warm_up + SMALL.visits
    for composition in ("mixture", "fusion"):
        method = LoRARetriever(adapter, SMALL, composition, 1, library)  # type: ignore[arg-type]
        assert method.meta_train(tasks) is library
        for i, task in enumerate(tasks):
            assert int(nearest(library.keys, task_key(adapter, task), 1)) == i
            x = task.test.inputs[""]  # type: ignore[union-attr]
            torch.testing.assert_close(
                adapter(x, theta=method.compose(library, task)), adapter(x, theta=library.thetas[i])
            )
    everything = LoRARetriever(adapter, SMALL, "fusion", components=None, library=library).compose(library, tasks[0])
    torch.testing.assert_close(everything, library.thetas.mean(0))


def grouped(dim: int = 40) -> Tensor:
    """Nine adapters in three groups."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return centres.repeat_interleave(3, 0) + 0.05 * torch.randn(9, dim, generator=generator, dtype=torch.float64)


def test_clusters_are_found_and_follow_a_permutation_of_the_tasks() -> None:
    thetas = grouped()
    found = cluster(thetas, 3, 0.5, 64, seed=0)
    assert found == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = cluster(thetas[order], 3, 0.5, 64, seed=0)
    for i in range(9):
        for j in range(9):
            assert (moved[i] == moved[j]) == (found[int(order[i])] == found[int(order[j])])


def test_mbc_trains_one_lora_a_cluster_and_starts_from_their_mean() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(4)
    library = train_library(adapter, tasks, SMALL)
    state = MBC(adapter, SMALL, components=4, library=library).meta_train(tasks)
    assert sorted(state.clusters) == [0, 1, 2, 3]
    assert state.meta_steps == 2 * library.meta_steps
    alone = union_train(adapter, tasks[:1], SMALL, steps=4, learning_rate=SMALL.meta_learning_rate)
    torch.testing.assert_close(state.thetas[0], alone)
    torch.testing.assert_close(state.phi, state.thetas.mean(0))
    one = MBC(adapter, SMALL, components=1, library=library).meta_train(tasks)
    assert isinstance(one, MBCState) and set(one.clusters) == {0}
    with pytest.raises(ValueError, match="sparsity"):
        MBC(adapter, SMALL, sparsity=1.0)


@pytest.mark.parametrize(("update", "scale"), [("gibbs", "N"), ("single", "N"), ("single", "1")])
def test_the_chain_over_phi_has_its_posteriors_moments(update: str, scale: str) -> None:
    beta, sigma, N, D = 0.3, 0.5, 6, 200
    thetas = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = FixedThetaPosterior(thetas, torch.ones(D, dtype=torch.float64), beta, sigma, scale)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    if update == "gibbs":
        chain = exact_draws(posterior, generator)
    else:
        chain = phi_chain(posterior, random_order(N, generator), 0.02 * posterior.step_limit, generator)
    draws = torch.stack(list(islice(chain, 6000)))[1000:]
    c = N if scale == "N" else 1
    precision = sigma**-2 + c / beta**2
    mean = (sigma**-2 + c / beta**2 * thetas.mean(0)) / precision
    # One chain a coordinate, all alike: their own spread is the standard error of what is averaged over them.
    gap = draws.mean(0) - mean
    assert abs(float(gap.mean())) < 4.0 * float(gap.std()) / D**0.5
    share = float(draws.var(0).mean()) * precision
    if update == "gibbs":
        assert share == pytest.approx(1.0, abs=0.02)
    else:  # c = N: the noise of choosing tasks inflates a little; c = 1: task by task, another target
        eta = 0.02 * 4.0 / precision
        chosen = (c / beta**2) ** 2 * float(thetas.var(0, unbiased=False).mean())
        a = 0.5 * eta * precision
        expected = (eta + 0.25 * eta**2 * chosen) / (1.0 - (1.0 - a) ** 2) * precision
        assert share == pytest.approx(expected, rel=0.05)


def test_fixed_theta_never_calls_the_network_in_its_chain() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    library = train_library(adapter, tasks, SMALL)
    calls = []
    handle = adapter.backbone.register_forward_hook(lambda *_: calls.append(1))
    state = FixedTheta(adapter, SMALL, library=library, update="gibbs", chain_steps=400).meta_train(tasks)
    handle.remove()
    assert not calls
    s = state.prior.settings
    beta, sigma = one_width(s.beta), one_width(s.sigma)
    v = 1.0 / (sigma**-2 + 3 / beta**2)
    mean = v * (adapter.initial / sigma**2 + library.thetas.sum(0) / beta**2)
    v *= s.temperature or 0.0
    component = state.prior.mixture.get().component_distribution
    assert float((component.mean[0] - mean).abs().max()) < 5.0 * (v / 200) ** 0.5
    assert float(component.variance[0].mean()) == pytest.approx(v, rel=0.1)


def test_shared_peft_without_noise_and_prior_is_preconditioned_joint_training() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    cold = SharedPEFT(adapter, replace(SMALL, visits=60), sigma=1e6, temperature=0.0).meta_train(tasks)
    warm = SharedPEFT(adapter, replace(SMALL, visits=60)).meta_train(tasks)
    assert cold.draws == warm.draws == 40
    assert float(warm.variance.mean()) > 10.0 * float(cold.variance.mean())
    assert torch.isfinite(warm.mean).all()


def test_taskwise_peft_stays_near_its_prior_as_that_narrows() -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(1)
    spreads = []
    for sigma in (1e-4, 1e-1):
        method = TaskwisePEFT(adapter, SMALL, sigma=sigma)
        found = method.adapt(method.meta_train(tasks), tasks[0])
        spreads.append(float((found.thetas - adapter.initial).std()))
    assert spreads[0] < 2e-4 < spreads[1]


@pytest.mark.parametrize("accumulator", ["exact", "table", "single"])
def test_lift_moves_phi_by_any_accumulator(accumulator: str) -> None:
    adapter, tasks = tiny_adapter(), tiny_tasks(3)
    options = {"phi_update": "langevin", "accumulator": accumulator, "phi_step_fraction": 0.2}
    lift = LiFT(adapter, sgd_steps=4, burn_in=4, samples=8, seed=0, **options)  # type: ignore[arg-type]
    program = lift.program(tasks)
    kernel = lift.kernel(program)
    s = resolved(lift.settings, adapter)
    N, beta, sigma = 3, one_width(s.beta), one_width(s.sigma)
    limit = 4.0 / (N / beta**2 + sigma**-2) if accumulator == "exact" else torch.pi**2 * beta**2 / N**2
    assert kernel.settings.accumulator == accumulator
    assert kernel.settings.phi_eta(0) == pytest.approx(0.2 * limit)
    phi = lift.meta_train(tasks, progress=False).mixture.get().mean
    assert torch.isfinite(phi).all()
