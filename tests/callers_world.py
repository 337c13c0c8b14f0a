"""A photograph of all that belongs to the caller of a library: modes, streams, settings, handlers, files, modules."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn


def settings() -> dict[str, Any]:
    """Process-wide settings that a library could leave changed."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "validation of torch": torch.distributions.Distribution._validate_args,
        "validation of pyro": (pyro.poutine.util.is_validation_enabled(), pyro.infer.util.is_validation_enabled()),
        "handlers of pyro": list(map(id, _PYRO_STACK)),
        "settings of pyro": dict(pyro.settings.get()),
        "parameters of pyro": {k: v.tolist() for k, v in pyro.get_param_store().items()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": sorted(map(str, Path.cwd().rglob("*"))),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "warnings": list(warnings.filters),
        "logging": {name: _logger(name) for name in ("", "pyro_lift", "pyro", "pyro.infer.mcmc", "py.warnings")},
        "disabled logging": logging.root.manager.disable,
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
        "errors of numpy": np.geterr(),
        "print options": (np.get_printoptions()["precision"], torch._tensor_str.PRINT_OPTS.precision),
        "garbage": gc.isenabled(),
        "hook": sys.excepthook,
        "torch stream": torch.get_rng_state().tolist(),
        "numpy stream": [np.asarray(x).tolist() for x in np.random.get_state()],  # noqa: NPY002
        "python stream": random.getstate(),
    }


def _logger(name: str) -> tuple[Any, ...]:
    logger = logging.getLogger(name)
    return list(map(id, logger.handlers)), logger.level, logger.propagate, logger.disabled


def module(net: nn.Module) -> dict[str, Any]:
    """All that a module's owner can see of it."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {
        "modules": {name: (type(m), m.training, m.forward.__func__) for name, m in net.named_modules()},  # type: ignore[attr-defined]
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in net.named_modules()},
        "tensors": {name: _tensor(x) for name, x in tensors.items()},
    }


def tensors(values: Iterable[Tensor]) -> list[Any]:
    """Each tensor's place, type and values."""
    return [_tensor(x) for x in values]


def _tensor(x: Tensor) -> tuple[Any, ...]:
    grad = None if x.grad is None else x.grad.tolist()
    return id(x), x.data_ptr(), x.dtype, x.device, x.requires_grad, x._version, x.detach().tolist(), grad
