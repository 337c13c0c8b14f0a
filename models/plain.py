"""Numbers in forms that NumPy and PyTorch would misread: tables, masked arrays, sparse matrices, loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

__all__ = ["is_sparse_matrix", "is_table", "plain", "refuse_items"]

#: Kinds of NumPy's types that are numbers.
NUMBERS = "biuf"


def plain(value: Any, where: str) -> Any:
    """Return a table of numbers and an array without masked values as arrays; everything else as it is.

    Args:
        value: inputs or targets in any form.
        where: begins the error messages.

    Raises:
        TypeError: a table with columns that are no numbers; a sparse or nested tensor or matrix; one without values.
        ValueError: an array of which a value is masked.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            raise TypeError(
                f"{where}: a nested tensor, of rows of unequal length; give x.to_padded_tensor(0.0), with a mask "
                "beside it if the network reads one."
            )
        if value.is_meta:
            raise TypeError(f"{where}: a tensor on the meta device, which has a shape and no values.")
        if value.layout is not torch.strided:
            raise TypeError(f"{where}: a sparse tensor ({value.layout}); give x.to_dense().")
        return value
    if is_sparse_matrix(value):
        raise TypeError(f"{where}: a sparse matrix ({type(value).__name__}); give x.toarray().")
    if isinstance(value, np.ma.MaskedArray):
        return _unmasked(value, where)
    return _numbers_of(value, where) if is_table(value) else value


def is_table(value: Any) -> bool:
    """Tell whether this is a table with named columns, as pandas and polars have them: it counts as its names."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("columns", "dtypes", "to_numpy"))


def is_sparse_matrix(value: Any) -> bool:
    """Tell whether this is one of SciPy's sparse matrices, which have no length."""
    return not isinstance(value, type) and hasattr(value, "toarray") and hasattr(value, "nnz")


def refuse_items(value: Any, where: str) -> None:
    """Refuse a data set or a loader, whose items may have targets beside the inputs.

    Raises:
        TypeError: says how to get the inputs out of it.
    """
    if isinstance(value, TensorDataset):
        way_out = "data.tensors[0]"
    elif isinstance(value, DataLoader):
        way_out = "torch.cat([batch[0] for batch in loader]), of a loader that does not shuffle"
    elif isinstance(value, Dataset):
        way_out = "torch.stack([data[i][0] for i in range(len(data))])"
    else:
        return
    raise TypeError(
        f"{where}: a {type(value).__name__}; predictions take the inputs without the targets, in one tensor. Where "
        f"an item is (input, target) give {way_out}."
    )


def _unmasked(value: Any, where: str) -> Any:
    masked = np.argwhere(np.ma.getmaskarray(value))
    if len(masked):
        place = f"row {masked[0][0]}" if masked.shape[1] else "the number"
        raise ValueError(
            f"{where}: a masked array with {len(masked)} values masked ({place}), which a network would read all the "
            "same. Fill them in as in training, x.filled(0.0) say, or leave their rows out."
        )
    return np.ma.getdata(value)


def _numbers_of(table: Any, where: str) -> Any:
    kinds = {str(name): getattr(kind, "kind", None) for name, kind in zip(table.columns, table.dtypes, strict=True)}
    others = [name for name, kind in kinds.items() if kind is not None and kind not in NUMBERS]
    array = None if others else table.to_numpy()
    if array is not None and array.dtype.kind not in NUMBERS:  # true or false beside numbers, or pandas' missing ones
        try:
            array = np.asarray(table.to_numpy(dtype=np.float64, na_value=np.nan))
        except (TypeError, ValueError):  # polars' strings, say
            others = [str(name) for name in table.columns if table[name].to_numpy().dtype.kind not in NUMBERS]
    if others:
        listed = ", ".join(map(repr, others[:5])) + (", ..." if len(others) > 5 else "")
        raise TypeError(
            f"{where}: a table whose column{'s' if len(others) > 1 else ''} {listed} "
            f"{'are' if len(others) > 1 else 'is'} no numbers. Give the columns that are, as in training: "
            f"table[[...]]; texts are a list of strings: table[{others[0]!r}].tolist()."
        )
    return array
