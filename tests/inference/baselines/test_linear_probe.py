"""The linear probe: scikit-learn used by hand, whatever the classes, and the features that each kind of task has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import LeaveOneOut
from sklearn.preprocessing import StandardScaler
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch.nn.functional import normalize

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.linear_probe import FOLDS, fit_logistic, fit_ridge
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.features import all_features
from pyro_lift.models.heads import BIAS_SD, HeadModel, choose_prior_sd, folds, solve_head, standard_widths
from pyro_lift.models.observation import outputs
from pyro_lift.models.task import Task


def data(n: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = 3.0 + rng.normal(size=(n, features)) * np.linspace(0.1, 10.0, features)
    z = (x - x.mean(0)) / x.std(0)
    return x, (z[:, :classes] + rng.normal(size=(n, classes))).argmax(1)


def probabilities(x: np.ndarray, head: torch.Tensor) -> torch.Tensor:
    return (torch.from_numpy(x) @ head[:, :-1].T + head[:, -1]).softmax(-1)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_is_scikit_learn_with_the_strength_that_cross_validation_chooses(classes: int) -> None:
    x, y = data(40, 12, classes)
    head, sd = fit_logistic(x, y, classes)
    z = np.concatenate([StandardScaler().fit_transform(x), np.ones((40, 1))], 1)

    def fitted(rows: np.ndarray, width: float) -> LogisticRegression:
        scale = np.append(np.full(12, width), BIAS_SD) * (2**0.5 if classes == 2 else 1.0)
        model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-9, max_iter=10_000)
        return model.fit((z * scale)[rows], y[rows]), z * scale

    fold = folds(torch.from_numpy(y), FOLDS, stratified=True).numpy()
    losses = []
    for width in standard_widths(12):
        loss = 0.0
        for k in range(FOLDS):
            model, inputs = fitted(fold != k, width)
            left = np.flatnonzero(fold == k)
            loss -= model.predict_log_proba(inputs[left])[np.arange(len(left)), y[left]].sum()
        losses.append(loss)
    assert sd == standard_widths(12)[int(np.argmin(losses))]
    model, inputs = fitted(np.full(40, True), sd)
    expected = torch.from_numpy(model.predict_proba(inputs))
    torch.testing.assert_close(probabilities(x, head), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "classes"), [(40, 3), (9, 2), (12, 4)])
def test_the_solved_head_is_the_probe(n: int, classes: int) -> None:
    x, y = data(n, 12, classes)
    head, sd = fit_logistic(x, y, classes)
    features, target = torch.from_numpy(x), torch.from_numpy(y)
    assert choose_prior_sd(features, target, HeadModel(classes)).sd == sd
    solved = solve_head(features, target, HeadModel(classes), prior_sd=sd).head
    torch.testing.assert_close(probabilities(x, head), probabilities(x, solved), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(15,), (15, 2)], ids=["one", "two"])
def test_regression_is_ridge_with_the_strength_that_leaving_each_row_out_chooses(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(15, 8)) * 5.0 + 2.0
    y = (x[:, 0] + rng.normal(size=15)).reshape(-1, 1) * np.ones(shape[1] if len(shape) > 1 else 1)
    y = (y + rng.normal(size=y.shape)).reshape(shape)
    z = StandardScaler().fit_transform(x)
    errors = []
    for width in standard_widths(8):
        error = 0.0
        for kept, left in LeaveOneOut().split(z):
            error += np.square(Ridge(alpha=width**-2).fit(z[kept], y[kept]).predict(z[left]) - y[left]).sum()
        errors.append(error)
    head, sd, _ = fit_ridge(x, y)
    assert sd == pytest.approx(standard_widths(8)[int(np.argmin(errors))])
    expected = Ridge(alpha=sd**-2).fit(z, y).predict(z)
    ours = (torch.from_numpy(x) @ head[:, :-1].T + head[:, -1]).reshape(expected.shape)
    torch.testing.assert_close(ours, torch.from_numpy(expected))


def test_absent_classes_a_single_class_and_a_single_row_have_probabilities() -> None:
    x, y = data(12, 6, 2)
    absent = probabilities(x, fit_logistic(x, y, 4)[0])
    assert absent.shape == (12, 4) and 0.001 < float(absent[:, 2:].max()) < 0.2
    one = probabilities(x, fit_logistic(x, np.zeros(12, dtype=np.int64), 2)[0])
    assert (one[:, 0] > 0.8).all() and (one[:, 1] > 0).all()
    assert (probabilities(x, fit_logistic(x, np.zeros(12, dtype=np.int64), 1)[0]) == 1.0).all()
    row = probabilities(x[:1], fit_logistic(x[:1], y[:1], 3)[0])
    assert int(row.argmax()) == y[0] and float(row.min()) > 0.01
    head, _, _ = fit_ridge(x[:1], np.array([2.5]))
    torch.testing.assert_close(torch.from_numpy(x[:1]) @ head[:, :-1].T + head[:, -1], torch.tensor([[2.5]]).double())


def test_the_probe_is_deterministic_and_uses_the_output_where_tasks_have_heads() -> None:
    adapter, task = tiny_adapter(), tiny_tasks(1)[0]
    method = BASELINES["linear-probe"](adapter, replace(SMALL, heads=HeadPolicy(scale=1.0)))
    state = method.meta_train([task])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first: Any = method.adapt(state, task, seed=0)
    again = method.adapt(state, task, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.predict(task.test), again.predict(task.test), rtol=0, atol=0)
    found = outputs(adapter, task.train, adapter.initial, None).detach().numpy()
    head, sd = fit_logistic(found, task.train.target.numpy(), 3)
    assert first.prior_sd == sd
    torch.testing.assert_close(first.head, head)


def test_label_matching_is_probed_on_the_pooled_text_and_text_without_classes_refused() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    network = BertModel(config).eval()
    adapter = adapt_backbone(network, recipe(network, rank=1))
    ids = torch.randint(3, 20, (9, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(9) % 3}
    texts = {"input_ids": ids[:3], "attention_mask": torch.ones_like(ids[:3])}
    task = Task("texts", inputs, "matching", label_texts=texts)
    method = BASELINES["linear-probe"](adapter, SMALL)
    posterior = method.adapt(method.meta_train([task]), task)
    found = normalize(all_features(adapter, task.train, adapter.initial), dim=-1)
    assert found.shape == (9, 16)
    head, _ = fit_logistic(found.double().numpy(), task.train.target.numpy(), 3)
    torch.testing.assert_close(posterior.predict(task.train), probabilities(found.double().numpy(), head).float())
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ValueError, match=r"'tokens'.*linear probe needs classes"):
        method.meta_train([Task("tokens", rows, "tokens")])
    options = {"option_input_ids": ids.unsqueeze(1), "option_attention_mask": torch.ones_like(ids).unsqueeze(1)}
    with pytest.raises(ValueError, match="linear probe needs classes"):
        method.meta_train([Task("own options", {**rows, **options, "labels": torch.zeros(9).long()}, "matching")])


def test_regression_tasks_are_probed_for_their_values() -> None:
    adapter = tiny_adapter()
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Task("values", (x, x[:, 0]), "regression")
    method = BASELINES["linear-probe"](adapter, SMALL)
    values = method.adapt(method.meta_train([task]), task).predict(x)
    assert values.shape == (10,)
    assert float((values - x[:, 0]).square().mean()) < float(x[:, 0].var())
