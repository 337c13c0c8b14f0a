"""Forms of inputs to predict that would be misread are read or refused, by a loaded posterior as by the adapted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_lift import Task, TaskPosterior
from pyro_lift.generation.inputs import are_strings
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.saving.names import CONFIG
from pyro_lift.support.archive import DamagedError, sealed, write_json

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def adapted() -> TaskPosterior:
    adapter = adapt_backbone(network(), peft.LoraConfig(r=1, target_modules=["0", "2"]), seed=0)
    return TaskPosterior(adapter, Task("digits", (X, torch.arange(5) % 3)), adapter.initial[None])


@pytest.fixture(scope="module")
def loaded(adapted: TaskPosterior, tmp_path_factory: pytest.TempPathFactory) -> TaskPosterior:
    return TaskPosterior.from_pretrained(adapted.save_pretrained(tmp_path_factory.mktemp("saved") / "p"), network())


class Pairs(Dataset[tuple[Tensor, int]]):
    """Rows with a target each."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return X[place], 0


def test_tables_of_numbers_are_read_whatever_their_columns_are_called(adapted: TaskPosterior) -> None:
    pandas = pytest.importorskip("pandas")
    expected = adapted.predict(X)
    for names in (range(4), list("abcd")):
        assert torch.equal(adapted.predict(pandas.DataFrame(X.numpy(), columns=names)), expected)
    mixed = pandas.DataFrame({"a": [1.5], "b": [True], "c": pandas.array([2], dtype="Int64"), "d": [3]})
    assert torch.equal(adapted.predict(mixed), adapted.predict(torch.tensor([[1.5, 1.0, 2.0, 3.0]])))


def test_tables_with_other_columns_name_them(adapted: TaskPosterior) -> None:
    pandas = pytest.importorskip("pandas")
    texts = pandas.DataFrame({"a": [1.0], "text": ["x"], "when": pandas.to_datetime(["2020-01-01"])})
    with pytest.raises(TypeError, match=r"columns 'text', 'when' are no numbers.*table\['text'\].tolist\(\)"):
        adapted.predict(texts)
    assert not are_strings(texts) and are_strings(texts["text"])  # its names are no texts
    missing = pandas.DataFrame({"a": [1.0], "b": pandas.array([None], dtype="Int64"), "c": [1.0], "d": [1.0]})
    with pytest.raises(ValueError, match="not finite"):
        adapted.predict(missing)


def test_masked_values_are_not_read(adapted: TaskPosterior) -> None:
    whole = np.ma.masked_array(X.numpy(), mask=False)
    assert torch.equal(adapted.predict(whole), adapted.predict(X))
    mask = np.zeros((5, 4), dtype=bool)
    mask[2, 1] = True
    masked = np.ma.masked_array(X.numpy(), mask=mask)
    with pytest.raises(ValueError, match=r"1 values masked \(row 2\).*x.filled"):
        adapted.predict(masked)
    with pytest.raises(ValueError, match=r"masked \(row 2\)"):
        Task("t", (masked, torch.arange(5) % 3))


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        (DataLoader(TensorDataset(X, torch.zeros(5)), 2), "a DataLoader; .*torch.cat"),
        (TensorDataset(X), r"a TensorDataset; .*data.tensors\[0\]"),
        (Pairs(), "a Pairs; .*torch.stack"),
        (X.to_sparse(), r"a sparse tensor .*x.to_dense\(\)"),
        (torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged), "a nested tensor.*to_padded_tensor"),
    ],
)
def test_forms_that_are_no_rows_say_the_way_out(adapted: TaskPosterior, given: Any, way_out: str) -> None:
    with pytest.raises(TypeError, match=way_out):
        adapted.predict(given)
    with pytest.raises(TypeError, match=way_out):
        adapted.predict({"": given})


def test_a_sparse_matrix_says_the_way_out(adapted: TaskPosterior) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"a sparse matrix .*x.toarray\(\)"):
        adapted.predict(sparse.csr_matrix(X.numpy()))


@pytest.mark.parametrize("given", [X, X.double(), X.half(), torch.ones(5, 4).long(), torch.ones(5, 4).bool()])
def test_a_loaded_posterior_reads_the_types_that_the_adapted_one_reads(
    adapted: TaskPosterior, loaded: TaskPosterior, given: Tensor
) -> None:
    assert torch.equal(loaded.predict(given), adapted.predict(given))


@pytest.mark.parametrize("given", [X[0], X[:, None], X[None, None], {"x": X}])
def test_a_loaded_posterior_refuses_what_the_adapted_one_refuses(
    adapted: TaskPosterior, loaded: TaskPosterior, given: Any
) -> None:
    said = []
    for posterior in (adapted, loaded):
        with pytest.raises(ValueError) as caught:
            posterior.predict(given)
        said.append(str(caught.value).replace("[1, 4]", "[n, 4]").replace("[5, 4]", "[n, 4]"))
    assert said[0] == said[1]


def test_forms_go_from_folder_to_folder_and_older_folders_lack_them(
    adapted: TaskPosterior, loaded: TaskPosterior, tmp_path: Path
) -> None:
    path = loaded.save_pretrained(tmp_path / "again") / CONFIG
    config = json.loads(path.read_text())
    assert config["task"]["inputs"] == {"": {"shape": [4], "dtype": "float32"}}
    again = TaskPosterior.from_pretrained(path.parent, network())
    with pytest.raises(ValueError, match="expected n rows"):
        again.predict(X[0])

    def altered(inputs: Any) -> TaskPosterior:
        task = {name: value for name, value in config["task"].items() if name != "inputs"}
        task |= {} if inputs is None else {"inputs": inputs}
        write_json(path, sealed({name: value for name, value in config.items() if name != "seal"} | {"task": task}))
        return TaskPosterior.from_pretrained(path.parent, network())

    assert altered(None).predict(X[0]).shape == (3,)
    for broken in ({"shape": [-1], "dtype": "float32"}, {"shape": [4], "dtype": "nn"}, {"shape": "x", "dtype": "int8"}):
        with pytest.raises(DamagedError, match="expected a row's shape and type"):
            altered({"": broken})
