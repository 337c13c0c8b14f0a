"""A block of tasks in one pass is the same density, gradient and chain as its tasks one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pyro
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import Tensor, nn

from pyro_lift import LiFT, SGLDGibbs, Task
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.inference.baselines.finetune import finetune, finetune_each
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.likelihoods import probabilities
from pyro_lift.models.observation import outputs

B = 3


def picture_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 12))


def picture_tasks(rows: tuple[int, ...] = (9, 4, 7, 6, 5, 8), classes: int = 3) -> list[Task]:
    return [
        Task(f"t{i}", (torch.randn(n, 4), torch.arange(n) % classes), num_classes=classes) for i, n in enumerate(rows)
    ]


def text_adapter() -> RandomAdapter:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, dropout=0.0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    targets = ["q_proj", "v_proj"]
    return RandomAdapter(
        peft.get_peft_model(BartForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules=targets))
    )


def text_tasks() -> list[Task]:
    tasks = []
    for i, (n, length, out) in enumerate([(5, 6, 3), (4, 8, 2), (6, 5, 4), (5, 7, 3)]):
        x, y = torch.randint(4, 40, (n, length)), torch.randint(4, 40, (n, out))
        inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "decoder_input_ids": y.roll(1, -1)}
        tasks.append(Task(f"t{i}", (inputs, y), "tokens"))
    return tasks


def picture_adapter() -> RandomAdapter:
    return RandomAdapter(peft.get_peft_model(picture_net(), peft.LoraConfig(r=2, target_modules=["0", "2"])))


def chain(
    adapter: RandomAdapter, tasks: list[Task], block: int, visits: int, vectorised: bool, **options: Any
) -> list[Tensor]:
    program_options = {k: options.pop(k) for k in ("head_scale", "batch_size") if k in options}
    program = AdapterHierarchy(
        adapter,
        tasks,
        beta=0.3,
        sigma=0.5,
        prior_mean=adapter.initial,
        block_size=block,
        **program_options,
    )
    assert program.one_pass
    program.one_pass = vectorised
    pyro.set_rng_seed(5)
    start = init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean)
    # Past the limit of some task at this start; for one step it does not matter.
    kernel = SGLDGibbs(program, step_size=1e-3, check_stability=False, init_strategy=start, **options)
    kernel.setup(0)
    params, draws = kernel.initial_params, []
    for _ in range(visits):
        params = kernel.sample(params)
        draws.append(params["phi"])
    return draws


CASES: dict[str, tuple[Callable[[], RandomAdapter], Callable[[], list[Task]], dict[str, Any]]] = {
    "ragged rows": (picture_adapter, picture_tasks, {"batch_size": 6}),
    "all rows": (picture_adapter, picture_tasks, {}),
    "own heads, cold": (picture_adapter, picture_tasks, {"head_scale": 0.5, "temperature": 0.0}),
    "texts of several lengths": (text_adapter, text_tasks, {"batch_size": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_chain_of_a_block_in_one_pass_is_that_of_its_tasks_in_turn(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    make_adapter, make_tasks, options = CASES[name]
    adapter, tasks = make_adapter(), make_tasks()
    assert adapter.dim % 16 == 0  # then the noise of a block, drawn at once, is that of its tasks, drawn in turn
    block = 2 if len(tasks) == 4 else B
    together = chain(adapter, tasks, block, 9, True, **options)
    apart = chain(adapter, tasks, block, 9, False, **options)
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), rtol=1e-9, atol=1e-11)
    assert adapter._block.one_pass is True


def test_the_noise_of_a_block_is_each_tasks_own() -> None:
    adapter = picture_adapter()
    program = AdapterHierarchy(adapter, picture_tasks(), beta=0.3, sigma=0.5, block_size=B)
    # Past the limit of some task at this start; for one step it does not matter.
    kernel = SGLDGibbs(
        program, step_size=1e-3, check_stability=False, init_strategy=init_to_value(values={"phi": adapter.initial})
    )
    kernel.setup(0)
    kernel.sample(kernel.initial_params)
    thetas = torch.stack([kernel.theta(i)["theta"] for i in range(B)])
    moves = thetas - adapter.initial
    spread = moves.std(-1)
    assert bool((torch.corrcoef(moves) - torch.eye(B)).abs().max() < 6.0 / adapter.dim**0.5)
    # sqrt(eta) of noise a coordinate, to five standard errors of a standard deviation.
    assert bool(((spread / 1e-3**0.5 - 1.0).abs() < 5.0 / (2 * adapter.dim) ** 0.5 + 0.1).all())


@pytest.mark.parametrize("what", ["kind", "num_classes"])
def test_tasks_that_differ_go_one_after_the_other(what: str) -> None:
    tasks = picture_tasks()
    options: dict[str, Any] = {"head_scale": 1.0} if what == "num_classes" else {}
    if what == "kind":
        tasks[1] = Task("other", (torch.randn(4, 4), torch.randn(4, 12)), "regression")
    else:
        tasks[1] = Task("other", (torch.randn(4, 4), torch.arange(4) % 2), num_classes=2)
    program = AdapterHierarchy(picture_adapter(), tasks, beta=0.1, sigma=0.1, block_size=2, **options)
    assert program.one_pass is False
    kernel = SGLDGibbs(program, step_size=1e-5, init_strategy=init_to_value(values={"phi": program.adapter.initial}))
    kernel.setup(0)
    kernel.sample(kernel.initial_params)
    assert kernel.structure is not None and kernel.structure.sequential and kernel.structure.block_size == 2


def test_shapes_that_no_mask_explains_are_refused() -> None:
    from pyro_lift.models.block_likelihood import stack_rows

    wide = [Task("a", (torch.randn(4, 4), torch.arange(4) % 2)), Task("b", (torch.randn(4, 6), torch.arange(4) % 2))]
    with pytest.raises(ValueError, match="differ in the shape of ''"):
        stack_rows([task.train for task in wide], [4, 4], "classification")
    with pytest.raises(ValueError, match="more than the 6 tasks"):
        AdapterHierarchy(picture_adapter(), picture_tasks(), beta=0.1, sigma=0.1, block_size=7)


@pytest.mark.parametrize("head_scale", [None, 0.5])
def test_the_front_door_takes_blocks(head_scale: float | None) -> None:
    lift = LiFT(
        picture_adapter(), block_size=B, sgd_steps=4, burn_in=4, samples=8, batch_size=4, head_scale=head_scale, seed=0
    )
    tasks = picture_tasks()
    prior = lift.meta_train(tasks, progress=False)
    posterior = prior.adapt(tasks[0], steps=6, draws=3)
    p = posterior.predict(torch.randn(4, 4))
    torch.testing.assert_close(p.sum(-1), torch.ones(4))


def _prior(head_scale: float | None, **options: Any) -> tuple[Any, list[Task]]:
    lift = LiFT(
        picture_adapter(),
        sgd_steps=4,
        burn_in=4,
        samples=8,
        batch_size=4,
        head_scale=head_scale,
        components=2,
        seed=0,
        **options,
    )
    tasks = picture_tasks()
    return lift.meta_train(tasks, progress=False), tasks


@pytest.mark.parametrize(
    ("head_scale", "head", "close"),
    [
        (None, "solve", {"rtol": 1e-8, "atol": 1e-10}),  # on features: solved to a gradient of 1e-8 too
        (0.5, "langevin", {"rtol": 1e-9, "atol": 1e-11}),
        (0.5, "solve", {"rtol": 1e-6, "atol": 1e-8}),  # solved to a gradient of 1e-8 in prior units, at every step
    ],
)
def test_adapting_to_a_block_without_noise_is_adapting_to_each(
    head_scale: float | None, head: str, close: dict[str, Any]
) -> None:
    torch.set_default_dtype(torch.float64)
    prior, tasks = _prior(head_scale, preconditioner="none", head=head, beta=0.03, sigma=0.3)
    options: dict[str, Any] = {"steps": 8, "draws": 3, "temperature": 0.0, "learning_rate": 5e-4, "batch_size": 100}
    together = prior.adapt_many(tasks, block_size=4, **options)
    assert [posterior.task.name for posterior in together] == [task.name for task in tasks]
    for task, posterior in zip(tasks, together, strict=True):
        alone = prior.adapt(task, **options)
        assert posterior.component == alone.component
        torch.testing.assert_close(posterior.thetas, alone.thetas, **close)
        if head_scale is not None:
            torch.testing.assert_close(posterior.heads, alone.heads, **close)


@pytest.mark.parametrize("head_scale", [None, 0.5])
def test_fine_tuning_a_block_is_fine_tuning_each(head_scale: float | None) -> None:
    torch.set_default_dtype(torch.float64)
    adapter, tasks = picture_adapter(), picture_tasks()
    budget = Budget(
        steps=9, draws=3, learning_rate=3e-3, batch_size=6, seed=4, heads=HeadPolicy(head_scale, update="step")
    )
    together = finetune_each(adapter, tasks, adapter.initial, budget)
    assert len({float(one.thetas.sum()) for one in together}) == len(tasks)
    for task, one in zip(tasks, together, strict=True):
        alone = finetune(adapter, task, adapter.initial, budget)
        torch.testing.assert_close(one.thetas, alone.thetas, rtol=1e-8, atol=1e-10)
        if head_scale is not None:
            torch.testing.assert_close(one.heads, alone.heads, rtol=1e-8, atol=1e-10)


def test_one_task_several_times_gives_independent_chains() -> None:
    prior, tasks = _prior(None)
    first, second = prior.adapt_many([tasks[0], tasks[0]], steps=6, draws=3)
    assert first.thetas.shape == second.thetas.shape == (3, prior.adapter.dim)
    assert (first.thetas - second.thetas).norm() > 1e-3


def test_one_task_several_times_gives_independent_chains_one_by_one_too() -> None:
    prior, tasks = _prior(None)
    options = {"steps": 6, "draws": 3, "seed": 3}
    first, other, second = prior.adapt_many([tasks[0], tasks[1], tasks[0]], block_size=1, **options)
    assert (first.thetas - second.thetas).norm() > 1e-3
    for found, task in ((first, tasks[0]), (other, tasks[1])):
        assert torch.equal(found.thetas, prior.adapt(task, **options).thetas)


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("batch_size", [3, 1000])
def test_draws_that_repeat_share_a_pass_and_count_as_often_as_they_come(
    batch_size: int, with_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float64)
    adapter, rows = picture_adapter(), picture_tasks()[0].train
    order = [0, 0, 0, 1, 2, 2, 0]  # the last equals none beside it
    thetas = (adapter.initial + 0.3 * torch.randn(3, adapter.dim))[order]
    heads = torch.randn(3, 3, 13)[order] if with_heads else None
    wanted = torch.stack([predict(adapter, t[None], rows, heads=None if heads is None else heads[s][None])
                          for s, t in enumerate(thetas)]).mean(0)  # fmt: skip
    passed = 0

    def counted(one: Any, of: Any, theta: Any, *more: Any) -> Any:
        nonlocal passed
        passed += 1
        return outputs(one, of, theta, *more)

    monkeypatch.setattr("pyro_lift.inference.adaptation.predict.outputs", counted)
    torch.testing.assert_close(predict(adapter, thetas, rows, heads=heads, batch_size=batch_size), wanted)
    monkeypatch.setattr("pyro_lift.inference.adaptation.predict.STACKED_ON_CPU", 1)
    passed = 0
    predict(adapter, thetas, rows, heads=heads, batch_size=len(rows))
    assert passed == 4
    if heads is not None:  # the same weights under other heads are other draws
        other = torch.randn(7, 3, 13)
        found = predict(adapter, thetas[:1].expand(7, -1), rows, heads=other)
        each = [predict(adapter, thetas[:1], rows, heads=head[None]) for head in other]
        torch.testing.assert_close(found, torch.stack(each).mean(0))


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("batch_size", [3, 14, 1000])
def test_predicting_over_draws_in_one_pass_is_predicting_over_each(batch_size: int, with_heads: bool) -> None:
    torch.set_default_dtype(torch.float64)
    adapter, rows = picture_adapter(), picture_tasks()[0].train
    thetas = adapter.initial + 0.3 * torch.randn(5, adapter.dim)
    heads = torch.randn(5, 3, 13) if with_heads else None
    found = predict(adapter, thetas, rows, heads=heads, batch_size=batch_size)
    one_by_one = [
        probabilities("classification", outputs(adapter, rows, theta, None if heads is None else heads[s]))
        for s, theta in enumerate(thetas)
    ]
    torch.testing.assert_close(found, torch.stack(one_by_one).mean(0), rtol=1e-10, atol=1e-12)
