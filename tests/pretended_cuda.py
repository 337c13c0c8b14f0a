"""A CUDA device that is pretended: real numbers on the CPU, in tensors that say ``cuda:0`` and behave as such ones do.

A GPU is not at hand where these tests run, and fake tensors have no values, which a chain's loop needs. So every
tensor that the library puts on ``"cuda"`` is a wrapper (:class:`OnCuda`) around one on the CPU, and each operation is
looked at under PyTorch's dispatcher before it is computed:

- operations on tensors of both devices are refused, but for those that CUDA has too (scalars, copies, index tensors);
- so is a generator of the other device, a look at pinned memory that a copy is still on its way to, and NumPy;
- everything that makes the host wait for the device is counted with the place that asked for it
  (:attr:`PretendedCUDA.waits`): ``item``, ``bool``, ``tolist``, ``cpu``, copies that block, shapes that depend on data.

What it cannot tell: the device's own arithmetic, its memory, and what is computed of the device's name in C++, where
the wrapper is on the CPU. The tests marked ``gpu`` ask a real device.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CUDA", "MixedDevicesError", "OnCuda", "PretendedCUDA", "pretended_cuda"]

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FREE_BYTES = 80 * 2**30
#: Operations whose result's shape, or whose very result, is on the host: a real device is waited for.
WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
    "unique_consecutive", "_linalg_check_errors", "repeat_interleave", "histc",
}  # fmt: skip
RESHAPES = {"squeeze_", "unsqueeze_", "t_", "transpose_", "resize_"}
#: Operations of which CUDA takes tensors of both devices; they are looked at one by one.
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevicesError(RuntimeError):
    """An operation that a CUDA device refuses."""


class OnCuda(Tensor):
    """A tensor that says it is on ``cuda:0``, around one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,  # autograd has no thread for a device that is not there
        )
        wrapper.held = inner
        return wrapper  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a pretended tensor outlived the pretended device.")

    def __array__(self, *args: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    __str__ = __repr__


class _Generator(torch.Generator):
    """A generator that says which device it is of."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        new = super().__new__(cls)
        new.pretended = torch.device(device).type
        return new

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    pretended: str

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.pretended == "cuda" else CPU


class PretendedCUDA(TorchDispatchMode):
    """The device: what is computed on it, refused and waited for.

    Attributes:
        waits: places in the code that waited for the device, in order, as ``file:line what``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """Give the list of the places that wait meanwhile."""
        begin: list[str] = []
        before, self.waits = self.waits, begin
        try:
            yield begin
        finally:
            self.waits = before + begin

    def wait(self, what: str) -> None:
        """Note that the host waits; every copy on its way has then arrived."""
        self.waits.append(f"{_place()} {what}")
        self.arrived()

    def arrived(self) -> None:
        """Take every copy on its way for done."""
        for storage in list(self.pinned):
            self.pinned[storage] = False

    def pin(self, x: Tensor) -> Tensor:
        """Take a tensor on the CPU for pinned."""
        self.pinned[x.untyped_storage()] = False
        return x

    def is_pinned(self, x: Tensor) -> bool:
        """Whether a tensor on the CPU is in pinned memory."""
        return x.untyped_storage() in self.pinned

    def to_cpu(self, x: OnCuda) -> Tensor:
        """Copy to fresh memory of the host, which is waited for."""
        self.wait("copy to the host")
        return x.held.clone()

    def to_cuda(self, x: Tensor, non_blocking: bool = False) -> OnCuda:
        """Copy to the device."""
        if not non_blocking:
            self.wait("blocking copy to the device")
        with torch.utils._python_dispatch._disable_current_modes():
            return OnCuda(x.detach().clone())

    # ------------------------------------------------------------------------------------------- the dispatcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnCuda) for x in tensors)
        wanted = kwargs.get("device")
        if name in RESHAPES and here:
            raise NotImplementedError(f"{func}: a wrapper cannot change its shape.")
        if name in COPIES:
            here = self._copy(name, args, kwargs)
        elif wanted is not None and not tensors:
            here = torch.device(wanted).type == "cuda"
        elif here:
            self._check(func, name, args, tensors)
        else:
            self._check_arrived(name, tensors)
        if "device" in kwargs:
            kwargs["device"] = CPU
        back = {id(x.held): x for x in tensors if isinstance(x, OnCuda)}
        inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, OnCuda) else x, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        if not here:
            return result
        return tree_map(lambda x: back.get(id(x), OnCuda(x)) if isinstance(x, Tensor) else x, result)

    def _copy(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Look at a copy; return whether its result is on the device."""
        source = args[1] if name == "copy_" else args[0]
        onto = isinstance(args[0], OnCuda)
        if name == "_to_copy" and kwargs.get("device") is not None:
            onto = torch.device(kwargs["device"]).type == "cuda"
        if isinstance(source, OnCuda) == onto:
            return onto
        non_blocking = bool(kwargs.get("non_blocking")) or (name == "copy_" and len(args) > 2 and bool(args[2]))
        if onto and not non_blocking:
            self.wait("blocking copy to the device")
        elif not onto and not (non_blocking and name == "copy_" and self.is_pinned(args[0])):
            self.wait("copy to the host")
        elif not onto:
            self.pinned[args[0].untyped_storage()] = True  # on its way: nobody may look before something waits
        return onto

    def _check(self, func: Any, name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        if name in WAITS:
            self.wait(name)
        strangers = [x for x in tensors if not isinstance(x, OnCuda)]
        if name in INDEXING and isinstance(args[0], OnCuda):
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.wait("indexing by a mask")
            elif any(not isinstance(x, OnCuda) for x in indices):
                self.wait("indexing by a tensor on the host")
            strangers = [x for x in strangers if not any(x is index for index in indices)]
        # A number on the host goes along with an operation's arguments.
        strangers = [x for x in strangers if x.dim() > 0]
        if strangers or (name not in INDEXING and not isinstance(_first(args), OnCuda) and _writes_first(func)):
            shapes = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
            raise MixedDevicesError(f"{func}: expected all tensors to be on the same device, but got {shapes}.")

    def _check_arrived(self, name: str, tensors: Sequence[Tensor]) -> None:
        if name in {"detach", "view", "alias", "split_with_sizes", "slice", "select", "as_strided", "_unsafe_view"}:
            return
        if self.pinned and any(self.pinned.get(x.untyped_storage(), False) for x in tensors):
            raise MixedDevicesError(f"{name}: a look at pinned memory that a copy is still on its way to.")


def _first(args: Sequence[Any]) -> Any:
    return next((x for x in tree_leaves(list(args)) if isinstance(x, Tensor)), None)


def _writes_first(func: Any) -> bool:
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _place() -> str:
    """Return the line of the library or of a test that the host waits at."""
    ours = ("inference", "models", "pyro_lift", "tests")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "site-packages" not in path and any(f"/{part}/" in path for part in ours):
            return f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Event:
    """An event behind the copies of its stream: after it they have arrived."""

    def __init__(self, device: PretendedCUDA) -> None:
        self.cuda = device

    def record(self, stream: Any = None) -> None:
        """All copies begun so far are before it."""

    def synchronize(self) -> None:
        """Wait, in the thread that asks."""
        self.cuda.arrived()
        if threading.current_thread() is threading.main_thread():
            self.cuda.wait("event")


# ------------------------------------------------------------------------------------------------- Python's side


class _Calls(TorchFunctionMode):
    """What has to be seen before the dispatcher: conversions, pinned memory, generators."""

    def __init__(self, device: PretendedCUDA) -> None:
        super().__init__()
        self.cuda = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = CONVERSIONS.get(func)
        if own is not None:
            return own(self.cuda, func, args, kwargs)
        self._check_generator(func, args, kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        result = func(*args, **kwargs)
        return self.cuda.pin(result) if pinned else result

    def _check_generator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if generator is None:
            return
        first = _first(args)
        on = kwargs.get("device", first.device if first is not None else CPU)
        if torch.device(on if on is not None else CPU).type != generator.device.type:
            raise MixedDevicesError(f"{func}: expected a {on} generator, found one of {generator.device}.")


def _to(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, *rest = args
    wanted = kwargs.pop("device", None)
    kept: list[Any] = []
    for argument in rest:
        if isinstance(argument, Tensor):
            wanted, kwargs["dtype"] = argument.device, argument.dtype
        elif isinstance(argument, (str, torch.device, int)) and not isinstance(argument, bool):
            wanted = torch.device("cuda" if isinstance(argument, int) else argument)
        elif isinstance(argument, torch.dtype):
            kwargs["dtype"] = argument
        elif argument is not None:
            kept.append(argument)
    other = kwargs.pop("other", None)
    if other is not None:
        wanted, kwargs["dtype"] = other.device, other.dtype
    non_blocking = bool(kwargs.pop("non_blocking", False) or (kept and kept[0]))
    dtype = kwargs.pop("dtype", None) or x.dtype
    there = isinstance(x, OnCuda)
    onto = there if wanted is None else torch.device(wanted).type == "cuda"
    if onto != there:
        return _Move.apply(cuda, x, onto, dtype, non_blocking)  # type: ignore[no-untyped-call]
    return func(x, dtype, **kwargs)


class _Move(torch.autograd.Function):
    """A copy between host and device, with its gradient."""

    @staticmethod
    def forward(ctx: Any, cuda: PretendedCUDA, x: Tensor, onto: bool, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        ctx.cuda, ctx.onto, ctx.dtype = cuda, onto, x.dtype
        moved = cuda.to_cuda(x, non_blocking) if onto else cuda.to_cpu(x)  # type: ignore[arg-type]
        return moved.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        back = ctx.cuda.to_cpu(g) if ctx.onto else ctx.cuda.to_cuda(g)
        return None, back.to(ctx.dtype), None, None, None


def _cpu(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _to(cuda, torch.Tensor.to, (args[0], "cpu"), {})


def _cuda(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _to(cuda, torch.Tensor.to, (args[0], "cuda"), {})


def _tolist(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    return func(cuda.to_cpu(x)) if isinstance(x, OnCuda) else func(*args, **kwargs)


def _numpy(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], OnCuda):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    return func(*args, **kwargs)


def _made(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``torch.tensor`` and ``as_tensor``, which are made on the host and copied."""
    device = kwargs.pop("device", None)
    source = args[0] if args else kwargs["data"]
    if isinstance(source, Tensor):
        dtype = kwargs.pop("dtype", None) or source.dtype
        return _to(cuda, torch.Tensor.to, (source, device or source.device, dtype), {})
    result = func(*args, **kwargs)
    return cuda.to_cuda(result) if device is not None and torch.device(device).type == "cuda" else result


def _pin(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], OnCuda):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    return cuda.pin(args[0].clone())


def _is_pinned(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    return not isinstance(args[0], OnCuda) and cuda.is_pinned(args[0])


def _one_hot(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's own makes a range on the device that the wrapper has for autograd."""
    x, classes = args[0], kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    if not isinstance(x, OnCuda) or classes == -1:
        return func(*args, **kwargs)
    return (x.unsqueeze(-1) == torch.arange(classes, device=x.device)).long()


def _matmul(cuda: PretendedCUDA, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's own changes a product's shape in place where one factor is a vector."""
    a, b = reversed(args) if func is torch.Tensor.__rmatmul__ else args
    if not (isinstance(a, OnCuda) or isinstance(b, OnCuda)) or min(a.dim(), b.dim()) > 1:
        return func(*args, **kwargs)
    product = torch.matmul(a.unsqueeze(0) if a.dim() == 1 else a, b.unsqueeze(-1) if b.dim() == 1 else b)
    product = product.squeeze(-1) if b.dim() == 1 else product
    return product.squeeze(-2 if b.dim() > 1 else -1) if a.dim() == 1 else product


CONVERSIONS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.tensor: _made,
    torch.as_tensor: _made,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: _is_pinned,
    torch.nn.functional.one_hot: _one_hot,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _matmul,
}


@contextmanager
def pretended_cuda() -> Iterator[PretendedCUDA]:
    """Let ``"cuda"`` mean the pretended device; tensors on it must not be used afterwards."""
    device = PretendedCUDA()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for name, pretended in {
            "_lazy_init": mock.Mock(return_value=None),
            "mem_get_info": mock.Mock(return_value=(FREE_BYTES, FREE_BYTES)),
            "default_generators": (_Generator("cuda"),),
            "current_stream": mock.Mock(),
            "Event": partial(_Event, device),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, pretended))
        stack.enter_context(device)
        stack.enter_context(_Calls(device))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        yield device
