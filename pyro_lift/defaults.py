r"""Settings that are left to the network and the tasks, filled in.

Temperature, power and the prior's widths are one knob. With power :math:`\kappa` on the likelihood and temperature T
the draws follow

.. math:: \Big(p(\theta \mid \phi, \beta)\; p(D \mid \theta)^{\kappa}\Big)^{1/T},

so that :math:`(\beta, \sigma, \kappa, T = 1)` and
:math:`(\beta \sqrt\kappa, \sigma \sqrt\kappa, 1, T = 1/\kappa)` are one law: where the data say nothing, a weight
varies by :math:`\beta \sqrt T` around phi, and the data pull with :math:`\kappa / T`. What is not given is filled in
from that (:func:`resolved`): :math:`\beta \sqrt T` as wide as leaves the network working
(:mod:`~pyro_lift.models.weight_scales`), and :math:`\kappa / T = 10`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.chance import targets_scale
from pyro_lift.models.out_of_proportion import large_columns, tasks_of_large_inputs
from pyro_lift.models.prior_loss import PriorLoss, prior_loss
from pyro_lift.models.row_outputs import ACROSS_ROWS
from pyro_lift.models.target_families import Families, families_of
from pyro_lift.models.task import Task
from pyro_lift.models.weight_scales import by_weight, harmless_scales, typical_size
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.options import check_choice

__all__ = [
    "MOST",
    "fitted",
    "for_targets",
    "inherited",
    "longest_move",
    "loosened",
    "one_width",
    "resolved",
    "resolved_adaptation",
    "say_loosened",
    "warn_of_adaptation",
    "warn_of_rates",
    "widened",
    "with_translation",
]

from pyro_lift.support.wording import some_tasks

log = logging.getLogger("pyro_lift")

#: Temperature where neither it nor the power is given.
TEMPERATURE = 0.1
#: sigma over beta.
SIGMA_OVER_BETA = 2.0
#: A step over the typical size of the adapter's own weights.
RELATIVE_STEP = 0.05
#: A step of adaptation over one of the chain: a new task is given a hundred steps, phi a thousand.
ADAPTATION_OVER_CHAIN = 2.0
#: Of adaptation where the prior lets a task's rows move less than one weight: its rate over the chain's, the power on
#: the likelihood, and the rows that a task has to have.
LOOSE_RATE, LOOSE_POWER, LOOSE_ROWS = 0.2, 100.0, 48
#: A step without a preconditioner.
PLAIN_RATE = 2e-3
#: Learning rates that data move a weight by in a visit, or in a step of adaptation, at most (:func:`longest_move`).
MOST = 3.0
#: Of :data:`MOST`, what is left of it at rates that are far too large.
LEAST_SHARE = 1.0 / 8.0
#: Of the size of the adapter's weights, what an adaptation has to be able to move one by in all.
LEAST_MOVE = 1e-3
#: Times the size of the adapter's weights that a temperature lets them vary by before it is warned of.
HOTTEST = 10.0
#: Power on the likelihood, over the temperature, above which it is warned of.
STRONGEST = 1e5
#: Times that widths are halved at most.
HALVINGS = 5
#: Visits to each task from which on control variates say more than a step that falls, and the rows of the largest task
#: over those of the mean up to which they are safe.
ROUNDS, LARGEST = 2, 1.5


def resolved(settings: LiFTSettings, adapter: RandomAdapter) -> LiFTSettings:
    """Fill in what was left to the network: the prior's widths, power and temperature, and the rates.

    Widths are one number an adapter tensor where phi is drawn exactly, else one for all: the geometric mean.
    """
    s = settings
    learned = s.learns_beta
    # A beta that is learned asks for temperature 1: the law of the default is stated in its own widths and power.
    power = s.n_inflate if s.n_inflate is not None else 1.0 / TEMPERATURE if learned else 1.0
    # A model that is stated is sampled as it is stated; only one that is left to the network is cold.
    stated = any(value is not None for value in (s.n_inflate, s.beta, s.sigma))
    temperature = s.temperature if s.temperature is not None else 1.0 if stated else TEMPERATURE
    # Without a preconditioner a rate has another unit: it multiplies the gradient, and no size of weights tells it.
    rate = RELATIVE_STEP * typical_size(adapter) if s.preconditioner == "rms" else PLAIN_RATE
    beta = None if isinstance(s.beta, str) else s.beta
    if beta is None:
        # At temperature zero, where nothing varies, the widths of the default remain.
        warmth = math.sqrt(temperature or TEMPERATURE)
        beta = _agreed([scale / warmth for scale in harmless_scales(adapter)], one_number=s.phi_update == "langevin")
    sigma = s.sigma
    if sigma is None:
        sigma = [SIGMA_OVER_BETA * b for b in beta] if isinstance(beta, (list, tuple)) else SIGMA_OVER_BETA * beta
    translation = s.translation or ("saga" if s.phi_update == "gibbs" else "none")
    return replace(
        s,
        translation=translation,
        beta=beta,
        sigma=sigma,
        n_inflate=power,
        temperature=temperature,
        learning_rate=rate if s.learning_rate is None else s.learning_rate,
        sgd_learning_rate=rate if s.sgd_learning_rate is None else s.sgd_learning_rate,
        sgd_weights=s.sgd_weights or "tasks",
        task_steps=s.task_steps or "tasks",
        max_move=s.max_move if s.max_move is not None else MOST if s.preconditioner == "rms" else 0.0,
        noise_scale=s.noise_sd,
    )


def for_targets(settings: LiFTSettings, tasks: Sequence[Task]) -> LiFTSettings:
    """Fill in the noise of regressions where it was left open: the spread of targets within tasks, to begin with."""
    if settings.noise_scale is not None or all(task.kind != "regression" for task in tasks):
        return settings
    scale = targets_scale(tasks)
    log.info("targets vary within tasks with a standard deviation of %.3g: the noise is that to begin with.", scale)
    return replace(settings, noise_scale=scale)


def with_translation(settings: LiFTSettings, tasks: Sequence[Task], *, by_rounds: bool = True) -> LiFTSettings:
    """Fill in the translation where it was left open: with control variates, where they fit, else the falling step.

    With control variates unseen tasks are predicted better (docs/results/defaults.md, "LiFT's translation"). In the
    first round of the tasks there are none, and both kinds take the same steps; a chain that is hardly longer does
    without their memory. Nor do they fit where one task has far more rows than the mean: its pull is as many times
    stronger and so is its curvature, which only the falling step makes up for by a factor.

    Args:
        settings: of meta-training.
        tasks: of the run.
        by_rounds: whether the length of the chain counts; a run that an earlier version began takes the falling step.
    """
    if not tasks or settings.translation is not None or settings.phi_update != "gibbs":
        return settings
    rows = [len(task.train) for task in tasks]
    visits = settings.burn_in + settings.samples * settings.thinning
    rounds = visits * (settings.ranks_block_size or settings.block_size) / len(tasks)
    fits = rounds >= ROUNDS and max(rows) <= LARGEST * sum(rows) / len(rows)
    return replace(settings, translation="saga" if by_rounds and fits else "falling")


def resolved_adaptation(
    adapt: AdaptSettings, settings: LiFTSettings, filled: LiFTSettings, solved: bool
) -> AdaptSettings:
    """Fill in the rate of adaptation where neither it nor the chain's was given: twice the chain's.

    Where heads are solved it is the chain's: what a task is about is in its head, and the weights have less to do.

    Args:
        adapt: as given; a rate of its own is kept.
        settings: of meta-training as given; a rate of theirs is inherited as it is.
        filled: the same, filled in.
        solved: whether the tasks' heads are solved.
    """
    given = adapt.learning_rate is not None or settings.learning_rate is not None
    if given or solved or settings.preconditioner != "rms":
        return adapt
    assert filled.learning_rate is not None
    return replace(adapt, learning_rate=ADAPTATION_OVER_CHAIN * filled.learning_rate)


def loosened(
    adapt: AdaptSettings, settings: LiFTSettings, filled: LiFTSettings, moved: float, rows: float
) -> AdaptSettings:
    """Give adaptation a larger power and a smaller rate where heads are solved and the prior holds all else.

    The prior's widths are what leaves the network working, over all layers at once; in a network of many layers that
    may hold every weight, so that a new task is its head's and nothing more. Where a task's rows move less than one
    weight and are many enough to learn features from, each counts :data:`LOOSE_POWER` times, and the path is short: a
    hundred steps of a fifth of the chain's rate. Of fewer rows the same was a little worse. Where they would move less
    than one weight at that power too, the network says nothing of these tasks.

    Args:
        adapt: as it stands.
        settings: of meta-training as given; what the user chose stays.
        filled: the same, filled in.
        moved: weights that a task's data move.
        rows: of a task, on average.
    """
    names = ("learning_rate", "n_inflate", "beta", "sigma", "temperature")
    given = any(getattr(settings, name) is not None for name in names)
    given = given or any(getattr(adapt, name) is not None for name in ("learning_rate", "n_inflate", "temperature"))
    if given or not 1.0 <= LOOSE_POWER * moved < LOOSE_POWER or rows < LOOSE_ROWS or settings.preconditioner != "rms":
        return adapt
    assert filled.learning_rate is not None
    power = LOOSE_POWER * (filled.n_inflate or 1.0)
    return replace(adapt, learning_rate=LOOSE_RATE * filled.learning_rate, n_inflate=power)


def say_loosened(moved: float, rows: float) -> None:
    """Log that adaptation was :func:`loosened`, of tasks of so many rows that move so many weights."""
    log.info(
        "the prior holds the weights: the data of a task of %.0f rows move %.2g of them. In adaptation each row counts "
        "%g times, at %g of the chain's rate, so that a new task has features of its own.",
        rows, moved, LOOSE_POWER, LOOSE_RATE,
    )  # fmt: skip


def widened(sigma: float | Sequence[float] | None, widths: Sequence[float]) -> Any:
    r"""Return the widths of phi's prior, no narrower than joint training moves phi.

    Widths that leave the network working hold phi where it began: in a small GPT-2 they were a fifth of what joint
    training moves it by, and the chain took back half of what that had gained on tasks that it had not seen (3.66 nats
    a token; Union Train 3.42, the untouched network 3.90). Where unseen tasks have shown that this vector is common to
    them, a prior under which it is next to impossible is wrong, and the width that makes it most likely is the root
    mean square of its parts, by type-II maximum likelihood.

    Args:
        sigma: filled in: one number, or one for each adapter tensor.
        widths: by tensor (:meth:`~pyro_lift.tuning.halves.Joint.widths`); none leaves sigma as it is.
    """
    if not widths or sigma is None:
        return sigma
    each = [sigma] * len(widths) if isinstance(sigma, (int, float)) else list(sigma)
    wide = [max(pair) for pair in zip(each, widths, strict=True)]
    return sigma if wide == each else wide


def longest_move(rate: float, adapter: RandomAdapter) -> float:
    r"""Return the most that data move a weight in a step of adaptation, over its rate.

    .. math:: 3 \max(\tfrac18, \min(1, 2\,\ell_0 / \ell))

    with :math:`\ell_0` the network's own rate, which the chain has by default. A new task's gradients may be many times
    those that the preconditioner knows. Adam's steps are about one rate long. With three rates of four times
    :math:`\ell_0` one task in eight of written answers was lost, with one and a half none of twenty-four.
    A rate that is out of all proportion keeps an eighth of the limit, so that most chains diverge there and say so.

    Args:
        rate: :math:`\ell`, of adaptation.
        adapter: the network.
    """
    own = ADAPTATION_OVER_CHAIN * RELATIVE_STEP * typical_size(adapter)
    return MOST * max(min(1.0, own / rate), LEAST_SHARE)


def inherited(adapt: AdaptSettings, settings: LiFTSettings, options: Mapping[str, Any]) -> AdaptSettings:
    """Change settings of adaptation, and take from meta-training what they leave open.

    Args:
        adapt: of all tasks.
        settings: of meta-training, filled in.
        options: fields of :class:`AdaptSettings` to change for one; None leaves them as they were found.

    Raises:
        ValueError: no such field.
    """
    for name in options:
        check_choice("setting", name, [f.name for f in fields(AdaptSettings)])
    found = {name: getattr(adapt, name) for name in ("many_rows", "unmoved_few") if options.get(name) is None}
    a = replace(adapt, **{**options, **found})
    names = [name for name in ("temperature", "n_inflate", "learning_rate") if getattr(a, name) is None]
    return replace(a, **{name: getattr(settings, name) for name in names})


def warn_of_adaptation(a: AdaptSettings, settings: LiFTSettings, adapter: RandomAdapter, tasks: Sequence[Task]) -> None:
    """Warn of settings of an adaptation that do nothing, or nothing of use, with the tasks and the way out.

    With the preconditioner a rate is about what a step moves a weight by. At one above the size of the weights the
    prior's pull is complete in every step and the data's is cut off (:func:`longest_move`): what is left is the prior.
    At one far below, no draw leaves its start.

    Args:
        a: filled in.
        settings: of meta-training, filled in.
        adapter: the network.
        tasks: that are adapted to.
    """
    names = [task.name for task in tasks]
    if a.dev_every:
        names_without = [task.name for task in tasks if task.dev is None]
        if names_without:
            log.warning(
                "%s: dev_every=%d, and no development rows to look at: all steps are taken, and the last draws kept. "
                "Give the task dev=(inputs, targets), or leave dev_every out.",
                some_tasks(names_without), a.dev_every,
            )  # fmt: skip
    elif a.patience != AdaptSettings.patience:
        log.warning(
            "%s: patience=%d does nothing without dev_every: no development rows are looked at. Give dev_every=10, "
            "say, beside it.", some_tasks(names), a.patience,
        )  # fmt: skip
    size, width = typical_size(adapter), one_width(settings.beta)
    _warn_of_strengths(some_tasks(names), a, width * math.sqrt(a.temperature or 0.0), size)
    if settings.preconditioner != "rms" or a.learning_rate is None:
        return
    rate, wide = a.learning_rate, _widest(settings, adapter)
    advice = f"Leave learning_rate open, or give about {0.1 * size:.2g}."
    if rate > wide:
        log.warning(
            "%s: learning_rate=%g moves a weight %.3g times as far as it is large (%.2g) in every step. What the data "
            "say is cut off at such a rate, and the draws are little more than the prior's. %s",
            some_tasks(names), rate, rate / size, size, advice,
        )  # fmt: skip
    elif rate * a.steps < LEAST_MOVE * size:
        log.warning(
            "%s: learning_rate=%g moves no weight by a thousandth of its size (%.2g) in %d steps: the draws stay at "
            "their start, as the prior left it. %s",
            some_tasks(names), rate, size, a.steps, advice,
        )  # fmt: skip


def _warn_of_strengths(whose: str, a: AdaptSettings, spread: float, size: float) -> None:
    """Warn of a temperature or a power that leaves nothing of the posterior: noise, or rows learned by heart.

    Args:
        whose: the tasks.
        a: filled in.
        spread: what the prior and the temperature let a weight vary by.
        size: of the weights.
    """
    heat, power = a.temperature or 0.0, a.n_inflate or 1.0
    if spread > HOTTEST * size:
        log.warning(
            "%s: temperature=%g lets a weight vary by %.3g times its size (%.2g) where the data do not hold it: "
            "predictions are those of noise. Leave temperature open, or give 1 or less.",
            whose, heat, spread / size, size,
        )  # fmt: skip
    if power > STRONGEST * max(heat, 1.0):
        log.warning(
            "%s: n_inflate=%g counts each row so many times: nothing is left of the prior, and predictions of rows "
            "that were not seen will be far too sure. Leave n_inflate open, or give 1 to 1000.", whose, power,
        )  # fmt: skip


def warn_of_rates(s: LiFTSettings, adapter: RandomAdapter) -> None:
    """Warn of rates of meta-training with which no chain learns anything: above the size of the weights themselves.

    Args:
        s: settings of meta-training, filled in.
        adapter: the network.
    """
    size, wide = typical_size(adapter), _widest(s, adapter)
    rates = {"learning_rate": s.learning_rate if s.preconditioner == "rms" else None}
    rates |= {"sgd_learning_rate": s.sgd_learning_rate if s.sgd_steps else None}
    for name, rate in rates.items():
        if rate is not None and rate > wide:
            log.warning(
                "%s=%g moves a weight %.3g times as far as it is large (%.2g) in every visit: at such a rate the tasks "
                "teach next to nothing. Leave %s open, or give about %.2g.",
                name, rate, rate / size, size, name, RELATIVE_STEP * size,
            )  # fmt: skip


def _widest(s: LiFTSettings, adapter: RandomAdapter) -> float:
    """Return how far a weight may sensibly move at once: its size, or what the prior lets it vary by."""
    return max(typical_size(adapter), one_width(s.beta) * math.sqrt(s.temperature or 0.0))


def fitted(
    settings: LiFTSettings, adapter: RandomAdapter, tasks: Sequence[Task], leave_out: bool = True
) -> LiFTSettings:
    """Fill in what was left open (:func:`resolved`) and look at what the prior does to the tasks' loss.

    Widths that were left open are halved while draws from the prior cost more than a tenth of the way to chance;
    widths that were given are kept, with a warning. Heads that take steps say nothing before training: then nothing is
    looked at. A task out of all proportion to the others is warned of by name, and counts in no width.

    Args:
        settings: of meta-training, as given.
        adapter: the network.
        tasks: all of the run.
        leave_out: False for a run of a version that left none out, which goes on.
    """
    s = resolved(settings, adapter)
    large = tasks_of_large_inputs(tasks)
    if large:
        log.warning(
            "%s: inputs %.3g times as large as those of most tasks (the median), out of all proportion: such a task "
            "drowns the others in what all share. Scale its inputs as theirs, or leave it out.",
            some_tasks(list(large)), max(large.values()),
        )  # fmt: skip
    for key, (place, times) in large_columns(tasks).items():
        log.warning(
            "%scolumn %d of the inputs is %.3g times as large as most (the median): unless the network was trained on "
            "such columns, it hears nothing else. Bring all columns to one scale, alike in all tasks.",
            f"{key!r}: " if key else "", place, times,
        )  # fmt: skip
    if s.temperature == 0.0 or (s.head_scale is not None and s.head == "langevin"):
        return s
    unlike = families_of(tasks) if all(task.kind == "regression" for task in tasks) else Families()
    said = {*large, *(tasks[k].name for k in (*unlike.units, *unlike.offsets))}  # of these it is known why
    for _ in range(HALVINGS):
        measured = _prior_loss(s, adapter, tasks, leave_out)
        _warn_of_outputs(measured)
        if new := {name: factor for name, factor in measured.outliers.items() if name not in said}:
            said |= set(new)
            log.warning(
                "%s: before training the loss is %.3g times that of most tasks (the median), out of all proportion: "
                "the prior's widths are found without it, but what all tasks share is not. Look at its data: scale its "
                "inputs or targets as theirs, or leave it out.",
                some_tasks(list(new)), max(new.values()),
            )  # fmt: skip
        if measured.harmless:
            return s
        open_beta = settings.beta is None or settings.learns_beta
        if not open_beta and settings.sigma is not None:
            break
        beta = _times(0.5, s.beta) if open_beta else s.beta
        s = replace(s, beta=beta, sigma=s.sigma if settings.sigma is not None else _times(0.5, s.sigma))
        log.info("draws from the prior raise the mean loss from %.3f to %.3f: its widths are halved", *measured[:2])
    given = [name for name in ("beta", "sigma", "temperature") if getattr(settings, name) is not None]
    way = f"Leave {' and '.join(given)} open, or make beta, sigma or the temperature smaller."
    if not given:
        way = "However narrow, it is the tasks' data: look at the size of their inputs, column by column, and targets."
    log.warning(
        "draws from the prior (beta %.3g, sigma %.3g, temperature %.3g) raise the mean loss of the tasks from %.3f to "
        "%.3f a row (chance: %.3f): under them the network says little. %s",
        one_width(s.beta),
        one_width(s.sigma),
        s.temperature,
        *measured[:3],
        way,
    )
    return s


def _warn_of_outputs(measured: PriorLoss) -> None:
    """Warn of outputs that are no scores of a row alone."""
    if measured.probabilities:
        log.warning(
            "the network's outputs are probabilities: none is negative, and those of a row sum to 1. They are taken "
            "for scores, of which the softmax is taken here: predictions can never be sure, and gradients are small. "
            "Take the softmax off the network's end, or give adapt_backbone(network, config, postprocess=lambda p: "
            "p.clamp_min(1e-9).log()) in its place.",
        )  # fmt: skip
    if measured.mixing:
        log.warning(
            "the network mixes the rows of a batch: with other rows beside it the output of a row is off by %.1f%%. %s",
            100.0 * measured.mixing, ACROSS_ROWS,
        )  # fmt: skip


def _prior_loss(s: LiFTSettings, adapter: RandomAdapter, tasks: Sequence[Task], leave_out: bool) -> PriorLoss:
    assert s.temperature is not None
    square = sum(torch.as_tensor(by_weight(adapter, width)).square() for width in (s.beta, s.sigma))
    spread = (s.temperature * torch.as_tensor(square)).sqrt().to(adapter.initial)
    centre = adapter.initial  # where phi's prior is the paper's, around zero, its widths are meant to reach this far
    solve = s.head != "langevin"
    options: dict[str, Any] = {"head_scale": s.head_scale, "solve": solve, "noise_scale": s.noise_sd}
    return prior_loss(adapter, tasks, centre, spread, leave_out=leave_out, **options)


def _times(factor: float, width: float | Sequence[float] | str | None) -> float | list[float]:
    assert width is not None and not isinstance(width, str)
    return [factor * x for x in width] if isinstance(width, (list, tuple)) else factor * float(width)  # type: ignore[arg-type]


def one_width(width: float | Sequence[float] | str | None) -> float:
    """Return a width as one number: itself, or the geometric mean of one for each adapter tensor."""
    assert width is not None and not isinstance(width, str), "resolve the settings first"
    if not isinstance(width, (list, tuple)):
        return float(width)  # type: ignore[arg-type]
    return math.exp(sum(map(math.log, width)) / len(width))


def _agreed(scales: list[float], one_number: bool) -> float | list[float]:
    return one_width(scales) if one_number or max(scales) == min(scales) else scales
