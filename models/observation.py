"""The observation model of a task: network output, optional per-task head, observed site."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor, nn

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.door import check_rows
from pyro_lift.models.doubts import parts_of
from pyro_lift.models.factors import factor, normal
from pyro_lift.models.features import all_features
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.likelihoods import among_classes, log_likelihood
from pyro_lift.models.row_outputs import ACROSS_ROWS, needs_several_rows, note_alone
from pyro_lift.models.task import Rows, Task, head_outputs
from pyro_lift.models.vocabulary import check_targets_known

__all__ = [
    "AUTOMATIC_SCALE",
    "WHOLE",
    "batch_of",
    "check_width",
    "first_output",
    "has_head",
    "head_features_of",
    "head_inputs_of",
    "is_narrower",
    "naming_inputs",
    "network_output",
    "observe",
    "outputs",
    "own_head_scale",
    "sample_head",
    "shapes_of",
    "zero_head",
]

log = logging.getLogger("pyro_lift")

#: Rows that are one minibatch where a task is to be taken whole.
WHOLE = 256
#: Prior sd of the heads that tasks are given unasked; they are solved, and each chooses its own.
AUTOMATIC_SCALE = 1.0
#: Rows of the first task that show whether every adapter weight has an effect.
TRIAL_ROWS = 16


def batch_of(task: Task, batch_size: int | None) -> int:
    """Limit the rows of a minibatch to those that the task has; None takes all, 0 all of at most :data:`WHOLE`."""
    return len(task.train) if batch_size is None else min(batch_size or WHOLE, len(task.train))


def has_head(task: Task, scale: float | None) -> bool:
    """Whether a task has a linear head of its own, where heads have prior sd ``scale`` (None: they are shared)."""
    return scale is not None and head_outputs(task) is not None and task.kind != "matching"


@torch.no_grad()
def own_head_scale(
    adapter: RandomAdapter, tasks: Sequence[Task], scale: float | None, *, solve: bool, by_width: bool = True
) -> float | None:
    """Return the scale of the tasks' own heads: the given one; without one, what the network's output calls for.

    Features call for heads of the tasks' own. So does an output that is wider than every task's classes: it is features
    too, or another data set's classes. Where one task has as many classes as the output is wide, all share its head.
    Regressions have heads of their own on features, and on an output wider than their values; on none else.

    Args:
        adapter: the network as a function of theta.
        tasks: of which a classification or a regression, if there is one, is looked at.
        scale: None leaves it to the network.
        solve: whether heads are solved; heads that take steps are given only where they are asked for.
        by_width: whether the width counts. It does not for new tasks of a prior, whose meta-training has decided: they
            may be fewer, or narrower, than those that it saw.
    """
    if tasks and tasks[0].kind == "regression":
        return _scale_of_regressions(adapter, tasks[0], scale, solve=solve)
    classes = [task for task in tasks if task.kind == "classification"]
    if scale is not None or not solve or not classes:
        return scale
    adapter.check_use()
    output = first_output(adapter, classes[0])
    width = output.shape[-1]
    if adapter.gives_features:
        log.info(
            "the network's output is %d features: every task has a linear head of its own, solved on its rows.", width
        )
        return AUTOMATIC_SCALE
    widest = max(task.num_classes or 0 for task in classes)
    if not by_width or output.dim() != 2 or len(classes) < len(tasks) or widest >= width:
        return None
    log.info(
        "the network's output is %d wide, and no task has more than %d classes: it ends in features, or in another "
        "data set's classes. Every task has a linear head of its own on that output, solved on its rows. "
        'head="shared" keeps the output as the tasks\' classes, as does num_classes=%d of a task.',
        width,
        widest,
        width,
    )
    return AUTOMATIC_SCALE


def _scale_of_regressions(adapter: RandomAdapter, task: Task, scale: float | None, *, solve: bool) -> float | None:
    """Return the scale of the heads of regressions, which an output that is their values already has no room for."""
    adapter.check_use()
    shape, values = first_output(adapter, task).shape, head_outputs(task)
    assert values is not None
    wider = len(shape) == 2 and shape[-1] > values and task.train.target.dim() <= 2
    if not (adapter.gives_features or wider):
        if scale is not None:
            log.info("the network's output is the regressions' values: head_scale=%g has nothing to stand on.", scale)
        return None
    if scale is None and solve:
        log.info(
            "the network's output is %d features: every task has a linear head of its own, solved on its rows.",
            shape[-1],
        )
        return AUTOMATIC_SCALE
    return scale


@torch.no_grad()
def is_narrower(adapter: RandomAdapter, tasks: Sequence[Task]) -> bool:
    """Whether some classification has fewer classes than the network's output is wide.

    Where one is, a part of the tasks may call for other heads than all of them (:func:`own_head_scale`).
    """
    classes = [task for task in tasks if task.kind == "classification"]
    if not classes:
        return False
    adapter.check_use()
    width = first_output(adapter, classes[0]).shape[-1]
    return any((task.num_classes or 0) < width for task in classes)


def zero_head(task: Task, width: int, scale: float | None, like: Tensor) -> Tensor | None:
    """Make a head of zeros ``[C, width + 1]``; None where the task has none of its own."""
    count = head_outputs(task)
    return like.new_zeros(count, width + 1) if has_head(task, scale) and count is not None else None


def sample_head(name: str, task: Task, width: int, scale: float | None, like: Tensor) -> Tensor | None:
    """Sample the linear head of one task, ``[C, width + 1]`` with the bias last; None where it has none of its own."""
    zero = zero_head(task, width, scale, like)
    if zero is None or scale is None:
        return None
    return torch.as_tensor(pyro.sample(name, normal(zero, scale).to_event(2)))


def outputs(adapter: RandomAdapter, rows: Rows, theta: Tensor, head: Tensor | None) -> Tensor:
    r"""Compute the network's output on some rows, through the task's own head where it has one.

    Outputs of a shared head that are no classes of a task that declares fewer get no probability.

    .. math:: o(x) = f_\theta(x), \qquad\text{or}\qquad o(x) = W f_\theta(x) + b \quad\text{with head } [W\; b]
    """
    if head is None:
        output: Tensor = adapter(*rows.positional, theta=theta, **rows.named)
        return among_classes(output, rows.classes)
    return apply_head(network_output(adapter, rows, theta), head)


def network_output(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    """The features of a task's own head ``[n, E]``: the network's output; under label matching see its head inputs."""
    output: Tensor = adapter(*rows.positional, theta=theta, **rows.named, **head_inputs_of(rows))
    return output


def head_inputs_of(rows: Rows) -> dict[str, bool]:
    """Keywords of an adapter's call for a head's features; none where features and output are one."""
    return {"head_inputs": True} if rows.named.keys() & {"label_input_ids", "option_input_ids"} else {}


def observe(
    name: str,
    adapter: RandomAdapter,
    task: Task,
    rows: Rows,
    theta: Tensor,
    head: Tensor | None,
    noise_scale: float,
) -> None:
    """Observe some rows as one site: one log probability a row, inside the minibatch plate."""
    log_prob = log_likelihood(task.kind, outputs(adapter, rows, theta, head), rows.target, noise_scale)
    factor(name, log_prob)


@torch.no_grad()
def check_width(
    adapter: RandomAdapter, tasks: Sequence[Task], head_scale: float | None, *, admitted: bool = False
) -> int:
    """Return the width of the network's output; the door of every run.

    Matching tasks have as many logits as texts to match, whatever the network. The network is called with the first row
    of every task, and of its other parts, whose inputs have other names, shapes or types than those before, so that
    what it cannot read, or what cannot be scored, is refused before the chain.

    Args:
        adapter: the network as a function of theta.
        tasks: at least one.
        head_scale: standard deviation of the tasks' own heads; None where they share the network's.
        admitted: whether the rows have come through :func:`~pyro_lift.models.door.check_rows` already.

    Raises:
        ValueError: a network that does not use the adapter, or is no longer what it was made on; rows that it would
            misread (:func:`~pyro_lift.models.door.check_rows`), or cannot be called with; features without a head to
            stand on; a head of a task's own for a single class; a shared head that is too narrow for a task's labels;
            an output whose shape does not go with the targets.
    """
    adapter.check_use()
    if not admitted:
        check_rows(adapter, tasks)
    shapes = _output_shapes(adapter, tasks)
    tasks = [task for task in tasks if task.kind != "matching"] or tasks[:1]
    width = shapes[_signature(tasks[0].train)][-1]
    trial = tasks[0].train.take(slice(0, TRIAL_ROWS))
    adapter.check_reach(*trial.positional, **trial.named)
    for task in tasks:
        own_head = has_head(task, head_scale)
        if own_head and task.num_classes == 1:
            raise ValueError(
                f"task {task.name!r} has one class, of which a head of its own is certain whatever the input. Pass "
                "num_classes=2 or more to the task if others may come; else leave it out."
            )
        if adapter.gives_features and not own_head and task.kind != "matching":
            raise ValueError(
                f"task {task.name!r}: the network's output is {width} features, not answers: it has no head. "
                + (
                    "Give the tasks heads of their own (head_scale=0.5, say), or load the network with a head."
                    if head_outputs(task) is not None
                    else f"Load the network with a head for {task.kind}."
                )
            )
    classes = max((task.num_classes or 0 for task in tasks), default=0)
    if head_scale is None and tasks[0].kind == "classification" and classes < width:
        log.info(
            "the network's head gives %d classes, and no task has more than %d: they share it; head_scale= "
            "gives the tasks heads of their own.",
            width,
            classes,
        )
    if head_scale is None:
        _check_outputs(tasks, [shapes[_signature(task.train)] for task in tasks])
        for task in tasks:
            if task.num_classes is not None and task.num_classes > width:
                raise ValueError(
                    f"task {task.name!r}: {_classes_of(task, width)} outside the range of the network's "
                    f"head, 0 .. {width - 1}. {_way_into_range(task, width)}"
                )
    return width


def _classes_of(task: Task, width: int) -> str:
    """Say how many classes a task has: by its largest label, or where it has fewer labels, by what was declared."""
    assert task.num_classes is not None
    largest = int(task.train.target.max())
    if largest >= width:
        return f"labels up to {largest} are"
    return f"it has {task.num_classes} classes (labels up to {largest} occur), the last of which are"


def _way_into_range(task: Task, width: int) -> str:
    """Say what is likely meant where a task has more classes than the network has outputs."""
    if width == 1:
        return (
            'The network has one output: numbers to predict take kind="regression", and two classes a network of two '
            "outputs."
        )
    wider = "give the tasks heads of their own (head_scale=...), or a wider network, and meta-train again."
    if task.num_classes == width + 1 and task.labels is None and int(task.train.target.min()) == 1:
        return f"No label is 0: if they begin at 1, take 1 off. Otherwise {wider}"
    return wider[0].upper() + wider[1:]


#: Name, shape of a row (of shared inputs, of all of them) and type of each input.
Signature = frozenset[tuple[str, torch.Size, torch.dtype]]


def _signature(rows: Rows) -> Signature:
    """What the rows of two tasks have alike that the network reads in one way."""
    of_rows = {(name, x.shape[1:], x.dtype) for name, x in rows.inputs.items()}
    return frozenset(of_rows | {(name, x.shape, x.dtype) for name, x in rows.shared.items()})


def _output_shapes(adapter: RandomAdapter, tasks: Sequence[Task]) -> dict[Signature, torch.Size]:
    """Call the network with one row of each sort there is; the shape of its output by sort."""
    shapes: dict[Signature, torch.Size] = {}
    for task in tasks:
        for part, rows in parts_of(task):
            signature = _signature(rows)
            if signature in shapes:
                continue
            output = first_output(adapter, task, None if rows is task.train else (part, rows))
            shapes[signature] = output.shape
            if rows is tasks[0].train:
                note_alone(adapter, rows, output)
    return shapes


def _check_outputs(tasks: Sequence[Task], shapes: Sequence[torch.Size]) -> None:
    tried = set()
    for task, shape in zip(tasks, shapes, strict=True):
        if task.kind == "tokens":
            check_targets_known(task, shape[-1])
        row = task.train.target[:1]
        pair = (task.kind, shape, row.shape)
        if pair in tried or task.kind == "matching":
            continue
        tried.add(pair)
        try:  # of zeros: only the shapes are in question, and labels are looked at elsewhere
            log_likelihood(task.kind, torch.zeros(shape), torch.zeros(row.shape, dtype=row.dtype))
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error}{_way_to_values(task, shape)}") from error


def _way_to_values(task: Task, shape: torch.Size) -> str:
    """Say what gives a network as many outputs as a regression has values; nothing where that is not what is wrong."""
    values = head_outputs(task) or 1
    if task.kind != "regression" or len(shape) != 2 or shape[-1] <= values:
        return ""
    if task.train.target.dim() > 2:
        return f" If the {shape[-1]} outputs are features, give targets as rows of {values} values: y.flatten(1)."
    layer = f"torch.nn.Sequential(network, torch.nn.Linear({shape[-1]}, {values}))"
    return (
        f" If the {shape[-1]} outputs are features, leave head open: each task then has a linear head of its own on "
        'them (head="langevin" has one with head_scale=1.0, say). Or put a layer on them that all tasks share: '
        f"{layer}, the layer among the adapter's target_modules."
    )


def first_output(adapter: RandomAdapter, task: Task, part: tuple[str, Rows] | None = None) -> Tensor:
    """Compute the output on the first row, of training or a part's; the network's own errors then name it."""
    whose, rows = part or (f"task {task.name!r}", task.train)
    row = rows.take(slice(0, 1)).to(adapter.initial.device)
    hint = "" if part is None else f" The train data's rows are {shapes_of(task.train.take(slice(0, 1)))}."
    with naming_inputs(f"{whose}: the network cannot be called with its first row", row, adapter, hint):
        output: Tensor = adapter(*row.positional, theta=adapter.initial, **row.named)
    if len(rows) > 1 and any(x.dim() == 1 for x in row.inputs.values()):  # one such row alone may pass for a vector
        two = rows.take(slice(0, 2)).to(adapter.initial.device)
        hint = " Its rows are single numbers: a network of vectors takes them as a column, x[:, None]."
        with naming_inputs(f"{whose}: the network cannot be called with its first two rows", two, adapter, hint):
            adapter(*two.positional, theta=adapter.initial, **two.named)
    return output


def head_features_of(adapter: RandomAdapter, task: Task, rows: Rows, theta: Tensor) -> Tensor:
    """Compute what a head of a task's own stands on, ``[n, E]``, without a graph; what is raised names the task.

    Raises:
        ValueError: rows that the network cannot be called with, or an output that is no vector for a row.
    """
    with naming_inputs(f"task {task.name!r}: the network cannot be called with its rows", rows, adapter):
        found = all_features(adapter, rows, theta, network_output)
    if found.dim() != 2:
        raise ValueError(
            f"task {task.name!r}: the network's output for its rows ({shapes_of(rows)}) has shape {list(found.shape)}; "
            "a head of the task's own stands on one vector a row, [n, E]. Give the rows as those of other tasks."
        )
    return found


@contextmanager
def naming_inputs(saying: str, rows: Rows, adapter: RandomAdapter, hint: str = "") -> Iterator[None]:
    """Turn what a network raises into a ValueError that says which inputs it was given.

    Args:
        saying: begins the message.
        rows: that the network is called with.
        adapter: the network that is called; its types stand in the message where these are what is wrong.
        hint: what was expected, if that is known.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # says nothing of the inputs, and callers look for it
        raise
    except ValueError as error:
        if not needs_several_rows(error):
            raise
        reason = "the network mixes the rows of a batch, and cannot be called with a row alone"
        raise ValueError(f"{saying} ({shapes_of(rows)}): {reason}. {ACROSS_ROWS}") from error
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = _layer_of_another_width(error, adapter) or reason
        types = _way_out_of_types(reason, rows, adapter)
        stop = "." if hint and not types and not reason.endswith((".", "!", "?")) else ""
        raise ValueError(f"{saying} ({shapes_of(rows)}): {reason}{types}{stop}{hint}") from error


def _layer_of_another_width(error: BaseException, adapter: RandomAdapter) -> str:
    """Say which linear layer was given rows of another width, by the calls that the error came through; or nothing."""
    found, trace = "", error.__traceback__
    while trace is not None:
        told = trace.tb_frame.f_locals
        layer, given = told.get("self"), next(iter(told.get("args") or ()), None)
        linear = getattr(layer, "base_layer", layer)  # PEFT's convolutions and tables have in_features too
        if isinstance(layer, nn.Module) and isinstance(linear, nn.Linear) and isinstance(given, Tensor) and given.dim():
            found, width = "", linear.in_features
            if given.shape[-1] != width:
                names = [name for name, module in adapter.backbone.named_modules() if module is layer]
                name = names[0] if names else type(layer).__name__
                name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                found = f"its layer {name!r} takes {width} numbers a row, and is given {given.shape[-1]}."
        trace = trace.tb_next
    return found


def _way_out_of_types(reason: str, rows: Rows, adapter: RandomAdapter) -> str:
    """Say which type inputs have to be of, where PyTorch's reason is that they are of another than the weights."""
    if not re.search(r"dtype|scalar types?|type \(.*should be the same", reason):
        return ""
    own = {entry.name for entry in adapter.layout}  # float32 beside any network
    frozen = [p for name, p in adapter.backbone.named_parameters() if name not in own]
    weights = {p.dtype for p in frozen if p.is_floating_point()}
    given = {x.dtype for x in rows.inputs.values()}
    if "Long" in reason.split("but got")[0] and all(dtype.is_floating_point for dtype in given):
        return ". It looks its inputs up, by whole numbers: give x.long()."
    if not weights or given <= weights:
        return ""
    floats = min(weights, key=str)
    types = f". Its weights are {', '.join(sorted(map(str, weights)))}, and such inputs go in as they are"
    if all(dtype.is_floating_point for dtype in given):
        return f"{types}: give x.to({floats}), or load the network in float32: network.float()."
    return f"{types}: give numbers with a point, x.to({floats}); pictures of 0 to 255 in the scale of pretraining."


def shapes_of(rows: Rows) -> str:
    """Say the type and the shape of each input."""
    return ", ".join(f"{key or 'inputs'} {x.dtype} {list(x.shape)}" for key, x in rows.inputs.items())
