"""Checkpoints: a run that is killed, stopped or out of disk goes on to the bit; damage and other runs are refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from command_files import prepare
from pyro.ops.streaming import (
    CountMeanStats,
    CountMeanVarianceStats,
    CountStats,
    StackStats,
    StatsOfDict,
    StreamingStats,
)
from resumed_runs import Both, D, Program, gibbs, run, same, table
from safetensors.torch import load_file, save_file
from tiny_backbones import FAMILIES
from torch import Tensor

from pyro_lift import MCMC, SGLD, LiFT, SGLDGibbs, StreamingMCMC
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.checkpoint.signals import RunStopped
from pyro_lift.models.backbones import recipe


def one_site() -> None:
    pyro.sample("phi", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def child(work: Callable[[], object]) -> int:
    """Fork: a process of its own, that need not import torch again."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work()
            os._exit(0)
        except RunStopped as stop:
            os._exit(100 + stop.signal_number)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kind", ["streaming", "mcmc"])
def test_saving_changes_nothing_and_a_finished_run_comes_back_at_once(kind: str, tmp_path: Path) -> None:
    plain = run(kind)
    same(plain, run(kind, checkpoint=tmp_path, checkpoint_every=7))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000056", "step-000000060"]
    again = run(kind, resume=tmp_path)
    same(plain, again)


@pytest.mark.parametrize("kind", ["streaming", "mcmc"])
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_the_run_is_the_same_to_the_bit(
    kind: str, kills: int, tmp_path: Path
) -> None:
    plain = run(kind)
    folder, out = tmp_path / "run", tmp_path / "out.safetensors"
    moments, seen, starts = random.Random(3 if kind == "mcmc" else 4), 0, set()

    def work() -> None:
        save_file(run(kind, resume=folder, checkpoint_every=1), out)

    while seen < kills:
        pid = child(work)
        # From the moment that this life has begun to write, or right away.
        before = sorted(folder.glob("step-*"))
        patient = moments.random() < 0.9
        while patient and sorted(folder.glob("step-*"))[-1:] == before[-1:] and not out.exists():
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            break
        seen += 1
        starts.add(len(before) and before[-1].name)
        (folder / ".step-000000001.new").mkdir(exist_ok=True, parents=True)  # what a kill in a write leaves
    if not out.exists():
        work()
    assert seen == kills and len(starts) >= kills // 2, f"{seen} kills between {len(starts)} checkpoints"
    same(plain, load_file(out))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    plain = run("streaming")

    class Stop(SGLDGibbs):
        def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.state.step == 13:
                os.kill(os.getpid(), number)
            return super().sample(params)

    pyro.set_rng_seed(7)
    random.seed(7)
    kernel = Stop(Program(), step_size=0.01, preconditioner="rms", sgd_steps=6, thinning=2)
    mcmc = StreamingMCMC(kernel, 40, 20, statistics=StatsOfDict(default=Both), disable_progbar=True)
    before = signal.getsignal(number)
    with pytest.raises(RunStopped, match=rf"stopped by {number.name} after 14 transitions; saved in .*run\(resume='"):
        mcmc.run(checkpoint=tmp_path)
    assert signal.getsignal(number) is before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000014"]
    same(plain, run("streaming", resume=tmp_path))


def test_a_script_that_is_stopped_exits_with_the_message() -> None:
    with pytest.raises(SystemExit) as stopped:
        raise RunStopped("saved; go on with ...", signal.SIGTERM)
    assert str(stopped.value.code) == "saved; go on with ..."


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_lift.support import archive

    plain, write, calls = run("mcmc"), archive.write_file, [0]

    def full(path: Path, content: bytes) -> None:
        calls[0] += 1
        if calls[0] == 18:  # in the middle of a checkpoint
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(archive, "write_file", full)
    message = r"checkpoint at transition \d+ could not be written \(No space left on device\)\. .* intact: step-0000000"
    with pytest.raises(OSError, match=message) as raised:
        run("mcmc", checkpoint=tmp_path, checkpoint_every=9)
    assert raised.value.errno == errno.ENOSPC and "run(resume=" in str(raised.value)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept and all(name.startswith("step-") for name in kept), "half a checkpoint was left"
    monkeypatch.undo()
    same(plain, run("mcmc", resume=tmp_path))


def test_a_folder_that_is_taken_away_is_not_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_lift.support import archive

    write, calls, folder = archive.write_file, [0], tmp_path / "run"

    def gone(path: Path, content: bytes) -> None:
        calls[0] += 1
        if calls[0] == 18:
            shutil.rmtree(folder)
        write(path, content)

    monkeypatch.setattr(archive, "write_file", gone)
    with pytest.raises(OSError, match="taken away while the run wrote into it, as another run") as raised:
        run("mcmc", checkpoint=folder, checkpoint_every=9)
    assert raised.value.errno == errno.ENOENT and "Make room" not in str(raised.value)


def test_a_limit_on_files_ends_the_run_in_the_same_way(tmp_path: Path) -> None:
    plain = run("mcmc")
    run("mcmc", checkpoint=tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "step-000000060").iterdir())

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The files grow with the draws' diagnostics: the first checkpoints fit, the last does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 64, largest - 64))
        with pytest.raises(OSError, match="could not be written") as raised:
            run("mcmc", checkpoint=tmp_path / "run", checkpoint_every=9)
        os._exit(42 if raised.value.errno == errno.EFBIG else 43)

    assert wait(child(limited)) == 42
    assert [path.name for path in sorted((tmp_path / "run").iterdir())][-1] >= "step-000000009"
    same(plain, run("mcmc", resume=tmp_path / "run"))


def test_a_run_that_is_complete_is_not_lost_for_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pyro_lift.support import archive

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = run("streaming")
    monkeypatch.setattr(archive, "write_file", full)
    same(plain, run("streaming", checkpoint=tmp_path / "run"))
    said = [record.getMessage() for record in caplog.records if "last transition" in record.getMessage()]
    assert said == [
        f"{tmp_path / 'run'}: the checkpoint after the last transition could not be written (No space left on device). "
        "The run is complete, and its result in memory."
    ]


def damaged(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run("mcmc", checkpoint=tmp_path, checkpoint_every=25)
    new, old = tmp_path / "step-000000060", tmp_path / "step-000000050"
    damaged(new / "state.safetensors")
    same(plain, run("mcmc", resume=tmp_path))
    assert "step-000000060/state.safetensors: altered since it was written.; trying" in caplog.text
    shutil.rmtree(new)
    damaged(old / "state.safetensors")
    with pytest.raises(ValueError, match="none of its 1 checkpoints is intact"):
        run("mcmc", resume=tmp_path)


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "state.json").unlink(), r"no state\.json here"),
    (lambda f: (f / "state.json").write_text("{"), r"state\.json: not JSON"),
    (lambda f: (f / "state.safetensors").unlink(), r"no state\.safetensors here"),
    (lambda f: damaged(f / "store-000000.safetensors"), r"store-000000\.safetensors: altered since"),
    (lambda f: damaged(f / "table-000000.safetensors"), r"table-000000\.safetensors: altered since"),
    (lambda f: next(f.glob("draws-*")).write_bytes(b""), r"draws-\d+\.safetensors: truncated: 0 of \d+ bytes"),
    (lambda f: edit(f, format="x"), r"state\.json: format 'x'; expected 'pyro_lift\.checkpoint'"),
    (lambda f: edit(f, draws=3), r"state\.json: altered since it was written"),
]


def edit(folder: Path, **values: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damage_is_named(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    run("mcmc", checkpoint=tmp_path)
    damage(tmp_path / "step-000000060")
    with pytest.raises(ValueError, match=message):
        run("mcmc", resume=tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    run("mcmc", checkpoint=tmp_path)
    edit(tmp_path / "step-000000060", format_version=9)
    with pytest.raises(ValueError, match=r"format 9, written by .* reads up to 1\. Upgrade"):
        run("mcmc", resume=tmp_path)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda: gibbs(step_size=0.02), r"saved with options\.step_size = \[0\.01, .* and is now \[0\.02"),
        (lambda: gibbs(temperature=0.5), r"options\.temperature = 1\.0 and is now 0\.5"),
        (lambda: gibbs(thinning=1), r"options\.thinning = 2 and is now 1"),
        (lambda: SGLD(one_site, 0.001), r"kernel = 'SGLDGibbs' and is now 'SGLD'"),
        (
            lambda: SGLDGibbs(Program(9.0), step_size=0.01, preconditioner="rms", sgd_steps=6, thinning=2),
            "log likelihood at the chain's start is .* the data or the backbone have changed",
        ),
    ],
)
def test_another_run_is_refused_with_the_difference(kernel: Any, message: str, tmp_path: Path) -> None:
    MCMC(gibbs(), 10, warmup_steps=10, disable_progbar=True).run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=message):
        MCMC(kernel(), 20, warmup_steps=10, disable_progbar=True).run(resume=tmp_path)


def test_a_folder_is_not_begun_twice_and_more_draws_can_be_asked_for(tmp_path: Path) -> None:
    def chain(samples: int) -> MCMC:
        pyro.set_rng_seed(2)
        return MCMC(gibbs(), samples, warmup_steps=10, disable_progbar=True)

    long = chain(25)
    long.run()
    short = chain(10)
    short.run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"holds a run already, saved at step-000000020\. Go on with run\(resume="):
        chain(10).run(checkpoint=tmp_path)
    longer = chain(25)
    longer.run(resume=tmp_path)
    assert torch.equal(longer.get_samples()["phi"], long.get_samples()["phi"])
    with pytest.raises(ValueError, match="holds 25 draws already, and num_samples=10 is fewer"):
        chain(10).run(resume=tmp_path)
    with pytest.raises(ValueError, match="not both"):
        chain(10).run(checkpoint=tmp_path, resume=tmp_path)
    with pytest.raises(ValueError, match="num_chains=2: checkpoints are of one chain"):
        StreamingMCMC(gibbs(), 5, num_chains=2).run(checkpoint=tmp_path / "two")
    with pytest.raises(ValueError, match="NUTS cannot be saved"):
        MCMC(pyro.infer.NUTS(Program()), 5).run(checkpoint=tmp_path / "nuts")


def test_many_checkpoints_share_their_draws_and_become_one_file(tmp_path: Path) -> None:
    pyro.set_rng_seed(2)
    MCMC(table(), 90, warmup_steps=2, disable_progbar=True).run(checkpoint=tmp_path, checkpoint_every=1)
    newest = max(tmp_path.glob("step-*"))
    files = sorted(newest.glob("draws-*"))
    assert len(files) <= 33 and len(list(tmp_path.glob("step-*"))) == 2
    assert sum(len(load_file(file)["draws"]) for file in files) == 90
    assert files[0].stat().st_nlink == 2, "the checkpoint before holds the same file"


@pytest.mark.parametrize("kind", [CountStats, CountMeanStats, CountMeanVarianceStats, StackStats])
def test_pyros_own_statistics_go_on(kind: Any, tmp_path: Path) -> None:
    def chain() -> StreamingMCMC:
        pyro.set_rng_seed(2)
        return StreamingMCMC(gibbs(), 12, 8, statistics=StatsOfDict(default=kind), disable_progbar=True)

    plain = chain()
    plain.run()

    class Stop(SGLDGibbs):
        def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.state.step == 20:
                raise KeyboardInterrupt
            return super().sample(params)

    cut = chain()
    cut.kernel.__class__ = Stop
    with pytest.raises(KeyboardInterrupt):
        cut.run(checkpoint=tmp_path, checkpoint_every=3)
    resumed = chain()
    resumed.run(resume=tmp_path)
    first, second = (m.get_statistics()[(0, "phi")] for m in (plain, resumed))
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


def test_statistics_that_cannot_be_saved_are_refused_before_the_run(tmp_path: Path) -> None:
    class Odd(StreamingStats):
        def update(self, sample: Any) -> None: ...
        def merge(self, other: Any) -> Any: ...
        def get(self) -> Any: ...

    mcmc = StreamingMCMC(gibbs(), 5, 20, statistics=Odd(), disable_progbar=True)
    with pytest.raises(ValueError, match=r"statistics of the kind Odd cannot be saved: give it state_dict"):
        mcmc.run(checkpoint=tmp_path)


def test_sgld_alone_goes_on_too(tmp_path: Path) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(1.0))

    def chain(samples: int) -> MCMC:
        pyro.set_rng_seed(5)
        return MCMC(SGLD(model, 0.05, preconditioner="rms"), samples, warmup_steps=5, disable_progbar=True)

    plain = chain(30)
    plain.run()
    chain(11).run(checkpoint=tmp_path)
    whole = chain(30)
    torch.manual_seed(99)  # where the global stream stands does not matter
    whole.run(resume=tmp_path)
    for name, draws in plain.get_samples().items():
        assert torch.equal(draws, whole.get_samples()[name])


def lift_of() -> tuple[LiFT, list[Any]]:
    torch.manual_seed(0)
    family = FAMILIES["bert"]
    model = family.make()
    tasks = [family.task(f"t{i}") for i in range(3)]
    settings: dict[str, Any] = {"sgd_steps": 6, "burn_in": 5, "samples": 20, "batch_size": 4, "components": 2}
    return LiFT(model, recipe(model, rank=2), seed=0, **settings), tasks


def test_a_stop_names_the_call_that_was_made(tmp_path: Path) -> None:
    lift, tasks = lift_of()
    steps = iter(range(100))

    def stop() -> None:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match=rf"Go on with meta_train\(tasks, resume='{tmp_path}'\)\."):
        lift.meta_train(tasks, progress=False, checkpoint=tmp_path, on_step=stop)
    with pytest.raises(ValueError, match=r"holds a run already, .* Go on with meta_train\(tasks, resume="):
        lift_of()[0].meta_train(tasks, progress=False, checkpoint=tmp_path)


def test_the_front_door_goes_on_to_the_same_prior(tmp_path: Path) -> None:
    lift, tasks = lift_of()
    plain = lift.meta_train(tasks, progress=False)
    lift, tasks = lift_of()
    lift.meta_train(tasks, progress=False, checkpoint=tmp_path, checkpoint_every=9)
    shutil.rmtree(tmp_path / "step-000000031")
    lift, tasks = lift_of()
    resumed = lift.meta_train(tasks, progress=False, resume=tmp_path)
    for name, value in plain.mixture.state_dict().items():
        assert torch.equal(value, resumed.mixture.state_dict()[name]), name
    for i in range(3):
        assert torch.equal(plain.mcmc.kernel.theta(i)["theta"], resumed.mcmc.kernel.theta(i)["theta"])
    assert torch.equal(plain.adapt(tasks[0], steps=4, draws=2).thetas, resumed.adapt(tasks[0], steps=4, draws=2).thetas)
    lift, tasks = lift_of()
    with pytest.raises(ValueError, match=r"saved with tasks = \[\['t0', 'matching', 8\], .* and is now"):
        lift.meta_train(tasks[:2], resume=tmp_path)


@pytest.mark.slow
def test_the_command_line_is_stopped_by_sigterm_killed_and_resumed(tmp_path: Path) -> None:
    config = prepare("bert", tmp_path)
    config.write_text(config.read_text().replace("samples = 6", "samples = 400") + "checkpoint_every = 20\n")
    prior, command = tmp_path / "prior", [sys.executable, "-W", "ignore", "-m", "pyro_lift.cli"]
    command = [sys.executable, "-W", "ignore", "-c", "from pyro_lift.cli import main; main()", "train", str(config)]
    subprocess.run(command, check=True, capture_output=True)
    plain = load_file(prior / "prior.safetensors")
    assert not (prior / "checkpoints").exists()
    shutil.rmtree(prior)

    for number in (signal.SIGTERM, signal.SIGKILL):
        go = subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True)
        start = len(list((prior / "checkpoints").glob("step-*"))) and max((prior / "checkpoints").glob("step-*"))
        while max((prior / "checkpoints").glob("step-*"), default=0) == start and go.poll() is None:
            time.sleep(0.01)
        go.send_signal(number)
        error = go.communicate()[1]
        if number is signal.SIGTERM:
            assert go.returncode == 128 + 15
            assert "stopped by SIGTERM after" in error and f"Go on with pyro-lift train {config} --resume" in error
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    for name, value in load_file(prior / "prior.safetensors").items():
        assert torch.equal(value, plain[name]), name
    assert not math.isnan(float(plain["initial"].sum()))


def test_a_session_names_its_own_limits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        Session(tmp_path, every=0)
