"""The processes of one run under ``torch.distributed``: which one this is, and what they tell each other.

Everything works in a process alone too, where it costs nothing. Plain data travels as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessLostError", "add_up", "collected", "from_first", "in_step", "is_first", "join", "process"]

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Another process of the run ended, or did not answer within the group's timeout."""


def join() -> None:
    """Begin to speak with the other processes that ``torchrun`` started, where there are any and none has begun yet.

    The group has gloo for what is on the CPU and NCCL for what is on GPUs, and ``"cuda"`` is then the GPU of the
    process's number on its machine. For other choices, and another timeout, call
    ``torch.distributed.init_process_group`` first.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def process() -> tuple[int, int]:
    """Return the number of this process and how many there are; (0, 1) outside ``torch.distributed``."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is process 0, which is the one to write files."""
    return process()[0] == 0


def add_up(value: Tensor) -> Tensor:
    """Add up over processes, in place; every process gets the sum to the bit.

    Raises:
        ProcessLostError: another process is gone.
    """
    if process()[1] > 1:
        with _speaking():
            dist.all_reduce(value)
    return value


def collected(value: Any) -> list[Any]:
    """Collect the plain data of every process, by number.

    Raises:
        ProcessLostError: another process is gone.
    """
    count = process()[1]
    if count == 1:
        return [value]
    home = _home()
    encoded = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=home)
    with _speaking():
        sizes = [torch.zeros(1, dtype=torch.int64, device=home) for _ in range(count)]
        dist.all_gather(sizes, torch.tensor([len(encoded)], device=home))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8, device=home) for _ in range(count)]
        dist.all_gather(texts, torch.nn.functional.pad(encoded, (0, longest - len(encoded))))
    return [json.loads(bytes(x[: int(n)].tolist())) for x, n in zip(texts, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Get the plain data of process 0."""
    return collected(value)[0]


def in_step(work: Callable[[], T]) -> list[T]:
    """Do a piece of work in every process; return the results of all, once all are done.

    Raises:
        OSError: in every process, where the work failed in one for want of room or of a right.
        ProcessLostError: another process is gone.
    """
    if process()[1] == 1:
        return [work()]
    try:
        outcome: dict[str, Any] = {"value": work()}
    except OSError as error:
        outcome = {"errno": error.errno, "text": error.strerror or str(error)}
    outcomes = collected(outcome)
    for number, answer in enumerate(outcomes):
        if "errno" in answer:
            raise OSError(answer["errno"], f"{answer['text']}, in process {number}")
    return [answer["value"] for answer in outcomes]


def _home() -> torch.device:
    """Return the device of small messages: a group of NCCL alone takes nothing from the CPU."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@contextmanager
def _speaking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        number, count = process()
        reason = str(error).splitlines()[0].split(". This is")[0]
        raise ProcessLostError(
            f"process {number} of {count}: another process of this run has ended, or has not answered in time "
            f"({reason}). Its own message says why. The last checkpoint is intact: go on from it "
            "with run(resume=folder), meta_train(..., resume=folder) or --resume, by as many processes or "
            "another number of them."
        ) from error
