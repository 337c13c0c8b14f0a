"""The command line, ``pyro-lift demo | compare | train | ...``. Each command imports what it needs itself."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["app", "main"]

app = typer.Typer(name="pyro-lift", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measure: a JSON list of records, and a figure beside it.")


def _is_finished(config: Path, *, tuned: bool = False) -> bool:
    """Tell whether the run of a TOML file, which is to go on, has finished already."""
    from pyro_lift.config import read_config
    from pyro_lift.saving.finished import is_finished

    return is_finished(config, Path(read_config(config).output.folder), tuned=tuned)


def _new_folder(path: Path) -> Path:
    """Make a folder that results are to go into, before they are computed."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written.")
    return path


def _device(name: str | None) -> str | None:
    """Refuse a device that this machine lacks, before anything is computed."""
    if name not in (None, "cpu"):
        from pyro_lift.wiring import device_of

        try:
            device_of(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("pyro-lift"))
        except PackageNotFoundError:
            print("unknown: pyro-lift is not installed")
        raise typer.Exit


Names = Annotated[list[str] | None, typer.Option(help="names with commas, or repeat; by default all")]
Out = Annotated[
    Path, typer.Option("--out", help="folder for records and figures", file_okay=False, callback=_new_folder)
]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of minutes; the numbers mean nothing")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda", callback=_device)]
OtherDevice = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda, in place of the TOML file's", callback=_device)
]


def _logs(names: list[str] | None) -> list[str] | None:
    """Refuse a log that nobody knows, before anything is computed."""
    from pyro_lift.watching.named import check_log

    try:
        for name in names or ():
            check_log(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return names


Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log", help="write steps to run.jsonl, tensorboard:FOLDER, wandb:PROJECT, mlflow; repeat", callback=_logs
    ),
]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Learn a prior over LoRA adapters from many tasks, and adapt to new ones by Bayesian inference."""


def _named(given: list[str] | None) -> tuple[str, ...] | None:
    """Return the names of an option that may be repeated, and have several with commas between; None of none."""
    return None if given is None else tuple(name.strip() for names in given for name in names.split(","))


def _with_options(options: type[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Let a command take the fields of a dataclass as its options."""
    hints = get_type_hints(options, include_extras=True)

    def of(function: Callable[[Any], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(options(**given))

        command.__name__, command.__doc__, command.__annotations__ = function.__name__, function.__doc__, hints
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if f.default is MISSING else f.default,
                    annotation=hints[f.name],
                )
                for f in fields(options)
            ]
        )
        return command

    return of


@app.command()
def demo(
    out: Out = Path("demo-output"),
    smoke: Smoke = False,
    device: Device = "cpu",
    seeds: Annotated[int, typer.Option(help="families of tasks", min=1)] = 5,
    workers: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    tune: Annotated[bool, typer.Option("--tune", help="choose every method's settings anew, and stop")] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="only the lead over Union Train with 5, 10, 25 and 50 labels a task")
    ] = False,
) -> None:
    """Compare five methods on handwriting tasks that come with scikit-learn; no network, about three minutes."""
    from pyro_lift.bench import demo as this

    settings = this.DemoSettings(seeds=seeds, workers=workers, device=device)
    if labels:
        from pyro_lift.bench import demo_labels

        demo_labels.run(this.DemoSettings.smoke(device) if smoke else settings, out)
        print(f"written: {out / 'labels.json'}, {out / 'labels.png'}")
        return
    if tune:
        for method, choice in this.tune(settings).items():
            print(f"{method}: {choice}")
        return
    this.run(this.DemoSettings.smoke(device) if smoke else settings, out)
    print(f"written: {', '.join(str(path) for path in sorted(out.iterdir()))}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file: backbone, adapter, tasks, sampler, output")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped or killed")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished prior")] = False,
    device: OtherDevice = None,
    log: Log = None,
) -> None:
    """Learn a prior from the tasks of a TOML file, and write its folder."""
    from pyro_lift import commands

    if resume and not overwrite and _is_finished(config):
        return
    commands.train(config, resume=resume, overwrite=overwrite, device=device, log_to=log or ())


@dataclass(frozen=True)
class CompareOptions:
    """Options of ``pyro-lift compare``."""

    config: Annotated[Path, typer.Argument(help="TOML file: backbone, adapter, tasks, sampler, as `train` takes it")]
    out: Out = Path("comparison")
    budget: Annotated[str, typer.Option(help="time that the whole may take")] = "10 min"
    seeds: Annotated[int, typer.Option(help="repetitions", min=1)] = 1
    methods: Annotated[list[str] | None, typer.Option(help="names with commas between, or repeat; by default five")] = (
        None
    )
    folds: Annotated[int, typer.Option(help="parts that the tasks are held out in, in turn", min=2)] = 3
    tune: Annotated[int, typer.Option(help="settings of each method to be tried; takes half of the time", min=0)] = 0
    overwrite: Annotated[bool, typer.Option("--overwrite", help="drop another comparison in the folder")] = False
    device: OtherDevice = None


@app.command("compare")
@_with_options(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Tell whether meta-learning pays on your tasks: probe, tuned LoRA, Union Train, Reptile and LiFT, in one table."""
    from pyro_lift.comparison.command import command
    from pyro_lift.comparison.settings import CompareSettings

    o = options
    settings = CompareSettings(o.budget, o.seeds, _named(o.methods), o.folds, trials=o.tune)
    command(o.config, o.out, settings, overwrite=o.overwrite, device=o.device)


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="TOML file, as `train` takes it")],
    budget: Annotated[str, typer.Option(help="time of the choice; meta-training comes on top")] = "10 min",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped or killed")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished prior")] = False,
    device: OtherDevice = None,
    log: Log = None,
) -> None:
    """Choose settings on tasks held out in turn, then learn the prior with them, and write its folder."""
    from pyro_lift import commands

    if resume and not overwrite and _is_finished(config, tuned=True):
        return
    commands.tune(config, budget, resume=resume, overwrite=overwrite, device=device, log_to=log or ())


@app.command()
def adapt(
    prior: Annotated[Path, typer.Argument(help="folder that `train` wrote")],
    task: Annotated[Path, typer.Option("--task", help="folder with train.* and perhaps test.*")],
    out: Annotated[Path, typer.Option("--out", help="folder for the draws and the PEFT adapter")] = Path("adapted"),
    seed: Annotated[int, typer.Option(help="of the chain", min=0)] = 0,
    device: OtherDevice = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="begin at the adapter as it was before training, to compare with")
    ] = False,
    log: Log = None,
) -> None:
    """Adapt a prior to one new task."""
    from pyro_lift import commands

    commands.adapt(prior, task, out, seed=seed, device=device, untrained=untrained, log_to=log or ())


@app.command()
def predict(
    adapted: Annotated[Path, typer.Argument(help="folder that `adapt` wrote")],
    task: Annotated[Path | None, typer.Option("--task", help="folder or file of rows; else the adapted one")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSONL file; by default in ADAPTED")] = None,
    device: OtherDevice = None,
    which: Annotated[str, typer.Option(help="adapter that writes text: mean, draws, or a draw's number")] = "mean",
    consensus: Annotated[str | None, typer.Option(help="of the draws: probabilities or mbr")] = None,
    beams: Annotated[int, typer.Option(help="of the search for a text", min=1)] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest text; 64 if nothing says", min=1)] = None,
) -> None:
    """Predict rows, labelled or not: classes averaged over the draws, or texts with their probability."""
    from pyro_lift import commands

    writing = commands.Writing(int(which) if which.isdecimal() else which, consensus, beams, max_new_tokens)
    commands.predict(adapted, task, out, device=device, writing=writing)


@app.command()
def keys() -> None:
    """Print every key of a TOML file, its default and its meaning."""
    from pyro_lift.config import reference

    print(reference())


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder that `bench paper` wrote into")],
    out: Annotated[Path | None, typer.Option("--out", help="folder of the page; by default FOLDER")] = None,
    scale: Annotated[str | None, typer.Option(help="small or paper, where FOLDER has cells of both")] = None,
) -> None:
    """Show the results of `bench paper` as one page, each table beside the paper's."""
    from pyro_lift.bench.page.command import command

    command(folder, out, scale)


@bench.command()
def workflow(
    out: Out = Path("bench"),
    smoke: Smoke = False,
    tasks: Annotated[list[int] | None, typer.Option(help="number of groups; repeatable", min=2)] = None,
    seconds: Annotated[float | None, typer.Option(help="processor time that a cell may take", min=0.1)] = None,
) -> None:
    """Effective draws a second of a hierarchy with an unknown scale, beside Pyro's NUTS."""
    from pyro_lift.bench import workflow as benchmark
    from pyro_lift.bench.records import write_records

    records = benchmark.run(smoke=smoke, tasks=tasks or (), seconds=seconds)
    write_records(records, out / "workflow.json")
    benchmark.plot(records, out / "workflow.png")
    print(f"\n{benchmark.table(records)}\n\nwritten: {out / 'workflow.json'}, {out / 'workflow.png'}")


@bench.command()
def sampler(out: Out = Path("bench"), smoke: Smoke = False, device: Device = "cpu") -> None:
    """Count visits and seconds until phi's draws have the toy's exact posterior: every update, full SGLD and NUTS."""
    from pyro_lift.bench import sampler as benchmark
    from pyro_lift.bench.records import write_records

    records = benchmark.run(smoke=smoke, device=device)
    write_records(records, out / "sampler.json")
    benchmark.plot(records, out / "sampler.png")
    print(f"\n{benchmark.table(records)}\n\nwritten: {out / 'sampler.json'}, {out / 'sampler.png'}")


@bench.command()
def speed(
    out: Out = Path("bench"),
    smoke: Smoke = False,
    device: Device = "cpu",
    backbone: Annotated[
        list[str] | None, typer.Option(help="bart-base, vit-b16, bart-small, vit-small; repeat")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(help="of the adapters; repeat", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="rounds of each method", min=1)] = 7,
    part: Annotated[list[str] | None, typer.Option(help="steps, em, blocks, curves, large, prefix or adapt")] = None,
    largest: Annotated[str | None, typer.Option(help="of the part large: t5-xl or t5-large")] = None,
) -> None:
    """Time a step beside a plain PEFT step, each part of it, and how it grows."""
    from dataclasses import replace

    from pyro_lift.bench import speed as benchmark

    chosen = {"backbones": backbone, "ranks": rank, "parts": part}
    given: dict[str, Any] = {name: tuple(value) for name, value in chosen.items() if value}
    if smoke:
        given = {"parts": given["parts"]} if part else {}
        benchmark.run(out, replace(benchmark.SpeedSettings.smoke(device), **given))
    else:
        benchmark.run(out, benchmark.SpeedSettings(device=device, repeats=repeats, largest=largest, **given))


@dataclass(frozen=True)
class MethodsOptions:
    """Options of ``pyro-lift bench methods``."""

    out: Out = Path("bench")
    family: Annotated[str, typer.Option(help="digits, the embedded family")] = "digits"
    tasks: Annotated[str | None, typer.Option(help="crossfit, vtab or shakespeare, in place of the family")] = None
    split: Annotated[str | None, typer.Option(help="of these tasks; by default their first")] = None
    root: Annotated[str | None, typer.Option(help="where these tasks' data lies")] = None
    backbone: Annotated[str | None, typer.Option(help="of these tasks: folder or name")] = None
    kind: Annotated[str | None, typer.Option(help="of that backbone")] = None
    methods: Names = None
    seeds: Annotated[int | None, typer.Option(help="families of tasks, or repetitions", min=1)] = None
    workers: Annotated[int | None, typer.Option(help="processes", min=1)] = None
    choose: Annotated[bool, typer.Option("--tune", help="choose settings again; write OUT/tuned.json")] = False
    trials: Annotated[int | None, typer.Option(help="settings of each method that --tune tries", min=1)] = None
    tuned: Annotated[Path | None, typer.Option(help="tuned.json, whose settings the methods get")] = None
    smoke: Smoke = False
    device: Device = "cpu"


@bench.command("methods")
@_with_options(MethodsOptions)
def bench_methods(options: MethodsOptions) -> None:
    """Compare every method of the paper's tables on the same tasks: scores, seconds, memory."""
    from dataclasses import replace

    from pyro_lift.bench import methods as bench_of_methods
    from pyro_lift.bench.experiments import DIGITS, MethodsSettings, on_tasks
    from pyro_lift.support.options import check_choice

    o = options
    check_choice("family", o.family, ["digits"])
    experiment = DIGITS if o.tasks is None else on_tasks(o.tasks, o.split, o.root, o.backbone, o.kind)
    sizes: dict[str, Any] = {
        name: value
        for name, value in (("seeds", o.seeds), ("workers", o.workers), ("trials", o.trials))
        if value is not None
    }
    settings = replace(MethodsSettings.smoke(o.device) if o.smoke else MethodsSettings(device=o.device), **sizes)
    bench_of_methods.command(o.out, experiment, settings, _named(o.methods), choose=o.choose, tuned=o.tuned)


@dataclass(frozen=True)
class PaperCommand:
    """Options of ``pyro-lift bench paper``."""

    out: Out = Path("paper-results")
    table: Annotated[list[int] | None, typer.Option(help="1 to 14; repeat; by default all")] = None
    figure: Annotated[list[int] | None, typer.Option(help="2, 3, 4 or 7; repeat")] = None
    family: Annotated[
        list[str] | None,
        typer.Option(help="ours: development, digits, scanners, shifts, novels, roles, regressions; repeat"),
    ] = None
    scale: Annotated[str, typer.Option(help="small: what can be had here; paper: the paper's, from the hub")] = "small"
    root: Annotated[Path | None, typer.Option(help="where the data lie")] = None
    smoke: Smoke = False
    seeds: Annotated[int | None, typer.Option(help="the first so many; by default the families'", min=1)] = None
    methods: Names = None
    splits: Names = None
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 1
    dry_run: Annotated[bool, typer.Option("--dry-run", help="configuration, shapes, memory and time; runs none")] = (
        False
    )
    retry: Annotated[bool, typer.Option("--retry", help="take cells that a process which is gone had begun")] = False
    cluster: Annotated[str | None, typer.Option(help="partition that submitit submits to; local: here")] = None
    again: Annotated[list[str] | None, typer.Option(help="cells to run a second time and compare; names")] = None


@bench.command("paper")
@_with_options(PaperCommand)
def bench_paper(options: PaperCommand) -> None:
    """Run the cells of the paper's tables and figures, at its scale or at a small one; `report` shows them."""
    from pyro_lift.bench.paper.command import PaperOptions, command

    o = options
    if o.again is not None:
        from pyro_lift.bench.paper.again import run_again

        if any(run_again(o.out, _named(o.again) or (), o.root).values()):
            raise typer.Exit(1)
        return
    chosen = PaperOptions(
        tables=tuple(o.table or ()),
        figures=tuple(o.figure or ()),
        families=tuple(o.family or ()),
        scale=o.scale,  # type: ignore[arg-type]
        root=o.root,
        smoke=o.smoke,
        seeds=o.seeds,
        methods=_named(o.methods),
        splits=_named(o.splits),
        jobs=o.jobs,
        dry=o.dry_run,
        retry=o.retry,
        cluster=o.cluster,
    )
    command(chosen, o.out)


@bench.command()
def store(
    out: Out = Path("bench"),
    smoke: Smoke = False,
    device: Device = "cpu",
    tasks: Annotated[list[int] | None, typer.Option(help="numbers of tasks; repeat", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="turns of each number of tasks", min=1)] = 20,
    folder: Annotated[Path | None, typer.Option(help="of the stores' files, 47 GB for the default")] = None,
) -> None:
    """Measure the time and memory of a step as the number of tasks grows, with theta on the disk."""
    from pyro_lift.bench import store as benchmark
    from pyro_lift.bench.records import write_records

    chosen = tuple(tasks) if tasks else benchmark.TASKS
    records = benchmark.run(tasks=chosen, rounds=rounds, smoke=smoke, device=device, folder=folder)
    write_records(records, out / "store.json")
    benchmark.plot(records, out / "store.png")
    print(f"\n{benchmark.table(records)}\n\nwritten: {out / 'store.json'}, {out / 'store.png'}")


@bench.command()
def cuda(
    out: Out = Path("bench-cuda"),
    part: Annotated[list[str] | None, typer.Option(help="one of the parts; repeat; by default all")] = None,
    smoke: Smoke = False,
    device: Device = "cuda",
) -> None:
    """Run what belongs into the first hour with a GPU: its tests, laws, speeds and memory; one table at the end."""
    from pyro_lift.bench import first_hour

    first_hour.run(out, first_hour.CudaSettings(tuple(part or ()), device, smoke))


def _let_threads_sleep() -> None:
    """Ask the threads of OpenMP to sleep while they wait for one another, unless the environment says how they wait.

    They spin otherwise, on cores that others may need: beside two busy processes on two cores a head was solved in 41 s
    in place of 6, on idle cores in 3.2 s in place of 2.3. It is read once, when torch is loaded.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2, not a traceback."""
    _let_threads_sleep()
    from pyro_lift.inference.checkpoint.signals import RunStopped
    from pyro_lift.inference.sgld import DivergedError
    from pyro_lift.support.distributed import ProcessLostError

    try:
        app()
    except RunStopped as stop:
        print(f"pyro-lift: {stop.message}", file=sys.stderr)
        raise SystemExit(128 + stop.signal_number) from stop
    except (ValueError, TypeError, OSError, ImportError, MemoryError, DivergedError, ProcessLostError) as error:
        print(f"pyro-lift: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
