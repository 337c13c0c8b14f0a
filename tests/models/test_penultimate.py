"""What a network's own last linear layer sees, against a hook; and the linear probe on it, against scikit-learn."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from sklearn.linear_model import LogisticRegressionCV, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pyro_lift import Task
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.linear_probe import LinearProbe, fit_ridge
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.features import head_features
from pyro_lift.models.heads import standard_widths
from pyro_lift.models.task import Rows


class Squeezed(nn.Module):
    """A network of one number a row, without a dimension for it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x).squeeze(-1)}


def network(width: int, *after: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, width), *after)


def adapted(net: nn.Module, *layers: str) -> RandomAdapter:
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=list(layers)), seed=0)


def rows_of(x: Tensor) -> Rows:
    return Task("t", (x, torch.zeros(len(x))), "regression").train


def hidden(net: nn.Module, x: Tensor) -> Tensor:
    """What a forward hook on the last linear layer sees."""
    seen: list[Tensor] = []
    layer = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    handle = layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach()))
    net(x)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("layers", [("0", "2"), ("0",), ("2",)], ids=str)
@pytest.mark.parametrize("squeezed", [False, True])
def test_the_input_of_the_last_linear_layer_is_what_a_hook_sees(layers: tuple[str, ...], squeezed: bool) -> None:
    net, x = network(1), torch.randn(6, 4)
    adapter = adapted(Squeezed(net) if squeezed else net, *(f"body.{k}" if squeezed else k for k in layers))
    for theta in (adapter.initial, torch.randn(adapter.dim)):
        expected = hidden(net, x)
        if "0" in layers:  # the first layer moves with theta
            with adapter.bound(theta):
                first = net[0](x)
                for name, module in adapter.backbone.named_modules():
                    if name.endswith("0") and hasattr(module, "base_layer"):
                        first = module(x)
            expected = first.tanh()
        assert torch.allclose(head_features(adapter, rows_of(x), theta), expected, atol=1e-6)
    assert not any("forward" in vars(m) for m in adapter.backbone.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.ReLU(), nn.Softmax(-1), nn.LayerNorm(3)], ids=str)
def test_the_output_is_taken_where_another_layer_ends_the_network(after: nn.Module) -> None:
    adapter, x = adapted(network(3, after), "0"), torch.randn(6, 4)
    output = adapter(x, theta=adapter.initial)
    assert torch.allclose(head_features(adapter, rows_of(x), adapter.initial), output, atol=1e-6)


def test_the_probe_of_numbers_is_ridge_regression_on_the_hidden_layer() -> None:
    net, x = network(1), torch.randn(40, 4)
    y = 3.0 + hidden(net, x) @ torch.randn(12) + 0.1 * torch.randn(40)
    task = Task("t", (x[:20], y[:20]), "regression", test=(x[20:], y[20:]))
    probe = LinearProbe(adapted(Squeezed(net), "body.0"))
    predicted = probe.adapt(probe.meta_train([task]), task).predict(x[20:])
    scaler = StandardScaler().fit(hidden(net, x[:20]).double().numpy())
    ridge = RidgeCV([width**-2 for width in standard_widths(12)])
    ridge.fit(scaler.transform(hidden(net, x[:20]).double().numpy()), y[:20].double().numpy())
    expected = ridge.predict(scaler.transform(hidden(net, x[20:]).double().numpy()))
    assert np.allclose(predicted.numpy(), expected, atol=1e-4)
    assert float((predicted - y[20:]).square().mean() / y[20:].var()) < 0.5  # the network's one output says far less


@pytest.mark.parametrize("update", ["shared", "solve"])
def test_the_probe_of_classes_is_level_with_logistic_regression_on_the_hidden_layer(update: str) -> None:
    net, x = network(3), torch.randn(160, 4)
    y = (hidden(net, x) @ torch.randn(12, 3)).argmax(-1)
    task = Task("t", (x[:60], y[:60]), num_classes=3)
    probe = LinearProbe(adapted(net, "0"), Budget(heads=HeadPolicy(update=update)))  # type: ignore[arg-type]
    posterior = probe.adapt(probe.meta_train([task]), task)
    assert posterior.head.shape == (3, 13)
    loss = -posterior.predict(x[60:]).log()[torch.arange(100), y[60:]].mean()
    model = LogisticRegressionCV(
        Cs=5, cv=3, l1_ratios=(0.0,), scoring="neg_log_loss", max_iter=500, use_legacy_attributes=False
    )
    model.fit(hidden(net, x[:60]).numpy(), y[:60].numpy())
    p = model.predict_proba(hidden(net, x[60:]).numpy())
    assert float(loss) < -np.log(p[np.arange(100), y[60:].numpy()]).mean() + 0.05


def test_features_that_say_nothing_leave_the_mean() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(12, 1)), generator.normal(size=12)
    y = y - x[:, 0] * (x[:, 0] - x.mean()) @ y / ((x[:, 0] - x.mean()) @ x[:, 0])  # uncorrelated with x
    head, sd, _ = fit_ridge(x, y)
    assert sd == 0.0 and torch.allclose(head, torch.tensor([[0.0, y.mean()]], dtype=torch.float64))


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 3.0])
def test_the_strength_is_what_leaving_out_each_row_by_hand_says(signal: float) -> None:
    for seed in range(3):
        generator = np.random.default_rng(seed)
        x = generator.normal(size=(10, 3))
        y = 5.0 + signal * x[:, 0] + generator.normal(size=10)
        z = StandardScaler().fit_transform(x)
        others = [np.delete(np.arange(10), k) for k in range(10)]
        losses = {0.0: np.mean([(y[k] - y[kept].mean()) ** 2 for k, kept in enumerate(others)])}
        for width in standard_widths(3):
            fits = [Ridge(width**-2).fit(z[kept], y[kept]) for kept in others]
            losses[width] = np.mean([(y[k] - fit.predict(z[k : k + 1])[0]) ** 2 for k, fit in enumerate(fits)])
        assert fit_ridge(x, y)[1] == pytest.approx(min(losses, key=lambda width: losses[width]))


def test_a_network_that_answers_already_is_the_feature_that_few_rows_fit() -> None:
    torch.manual_seed(4)
    net = network(1)
    adapter = adapted(net, "0")
    x = torch.randn(60, 4)
    with torch.no_grad():
        y = 2.0 * net(x) + 0.5 + 0.02 * torch.randn(60, 1)
    method = LinearProbe(adapter)
    posterior = method.adapt(method.meta_train([]), Task("few", (x[:8], y[:8]), "regression"))
    assert posterior.head.shape == (1, 2)  # a slope on the answer, and a bias
    assert float((posterior.predict(x[8:]) - y[8:]).square().mean()) < 0.01 * float(y.var())
