"""Several processes are one process with the same block, in numbers; rows stay with their process; what ends a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_lift import MCMC, DivergedError, LiFT, SGLDGibbs, Task
from pyro_lift.inference.checkpoint.signals import RunStopped
from pyro_lift.inference.gibbs import long_vectors
from pyro_lift.inference.gibbs.shared_visit import check_alike, generator_of
from pyro_lift.models.linear_gaussian import LinearGaussian, fit, gaussian_kl
from pyro_lift.support.distributed import ProcessLostError, add_up, collected, from_first, in_step

N, D = 7, 5


class Program:
    """Tasks with rows, and for some of them a site of their own; ``subsample`` tasks a pass."""

    def __init__(self, subsample: int = 1, own: bool = False, bad: int | None = None, tasks: int = N) -> None:
        self.subsample, self.own, self.bad, self.tasks = subsample, own, bad, tasks
        self.y = torch.linspace(-1.0, 2.0, tasks * 6 * D, dtype=torch.float64).view(tasks, 6, D).sin()

    def __call__(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
        for i in pyro.plate("tasks", self.tasks, subsample_size=self.subsample):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
            mean = theta
            if self.own and i % 3 == 2:
                mean = theta + pyro.sample(f"shift_{i}", dist.Normal(torch.zeros(D).double(), 0.1).to_event(1))
            if i == self.bad:
                mean = mean * torch.nan
            with pyro.plate(f"data_{i}", 6, subsample_size=3) as rows:
                pyro.sample(f"obs_{i}", dist.Normal(mean, 0.7, validate_args=False).to_event(1), obs=self.y[i, rows])


class Scaled(Program):
    """Tasks around a mean, with a scale of its own for each coordinate."""

    def __call__(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(D, dtype=torch.float64)).to_event(1))
        for i in pyro.plate("tasks", self.tasks, subsample_size=self.subsample):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, tau).to_event(1))
            pyro.sample(f"obs_{i}", dist.Normal(theta.expand(6, D), 0.7).to_event(2), obs=self.y[i])


def chain(samples: int = 14, program: Program | None = None, **options: Any) -> MCMC:
    pyro.set_rng_seed(2)
    options = {"step_size": 0.02, "distributed": True, "block_size": 4, **options}
    kernel = SGLDGibbs(program or Program(), **options)
    return MCMC(kernel, samples, warmup_steps=10, disable_progbar=True)


def outcome(mcmc: MCMC) -> dict[str, Tensor]:
    kernel: Any = mcmc.kernel
    found = {"draws": mcmc.get_samples()["phi"].contiguous(), "S": kernel.state.sums["phi"]}
    found |= {f"Q.{name}": value for name, value in kernel.state.squares.items()}
    found |= {f"row{i}": kernel.theta(i)["theta"] for i in kernel.store.tasks()}
    found |= {f"moment.{family}": value for family, value in kernel.state.second_moment.items()}
    stats = kernel.diagnostics()["sample_stats"]
    return found | {name: torch.tensor(stats[name]) for name in ("log_likelihood", "grad_norm")}


def run(samples: int = 14, program: Program | None = None, saved: dict[str, Any] | None = None, **options: Any) -> Any:
    mcmc = chain(samples, program, **options)
    mcmc.run(**(saved or {}))
    return outcome(mcmc)


def together(folder: Path, work: Callable[[int], dict[str, Tensor] | None], count: int = 2) -> list[int]:
    """Fork ``count`` processes of one group; what each returns goes to ``RANK.safetensors``. Their exit codes."""
    folder.mkdir(exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                torch.distributed.init_process_group(
                    "gloo",
                    init_method=f"file://{folder / 'meeting'}",
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(seconds=60),
                )
                found = work(rank)
                if found is not None:
                    save_file(found, folder / f"{rank}.safetensors")
                code = 0
            except ProcessLostError as error:
                (folder / f"{rank}.txt").write_text(str(error))
                code = 3
            except RunStopped as stop:
                code = 100 + stop.signal_number
            except BaseException as error:
                (folder / f"{rank}.txt").write_text(repr(error))
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def found_by(folder: Path, count: int = 2) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{rank}.safetensors") for rank in range(count)]


def same(one: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> None:
    """Every number of the parts is the one's, and together they have all of its rows."""
    assert {name for part in parts for name in part} == set(one)
    for part in parts:
        for name, value in part.items():
            torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")  # type: ignore[misc]
        assert torch.equal(part["draws"], parts[0]["draws"])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"preconditioner": "rms"},
    "unknown scales": {"program": Scaled(), "step_size": 0.01},
    "unknown scales, translated": {"program": Scaled(), "step_size": 0.01, "translation": "saga"},
    "joint": {"preconditioner": "rms", "sgd_steps": 4, "program": Program(own=True)},
    "passes": {"program": Program(subsample=2, tasks=10), "preconditioner": "rms", "sgd_steps": 4},
    "clipped": {"max_grad_norm": 3.0, "thinning": 2},
    "translation": {"translation": "saga", "program": Program(own=True), "preconditioner": "rms"},
    "translation, passes": {"program": Program(subsample=2, tasks=10), "translation": "saga", "sgd_steps": 4},
    "translation, falling": {"translation": "falling"},
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(tmp_path: Path, name: str) -> None:
    assert together(tmp_path, lambda rank: run(**CASES[name])) == [0, 0]
    parts = found_by(tmp_path)
    same(run(**CASES[name]), parts)
    # Blocks 0-3, 4-7, 8-9: the first process has the first half of each whole one, and rows stay with their process.
    rows = [sorted(int(k[3:]) for k in part if k.startswith("row")) for part in parts]
    assert rows == ([[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]] if "passes" in name else [[0, 1, 4, 5], [2, 3, 6]])


def test_long_vectors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run()
    monkeypatch.setattr(long_vectors, "FLAT_FROM", D)
    assert together(tmp_path, lambda rank: run()) == [0, 0]
    same(run(), found_by(tmp_path))
    torch.testing.assert_close(run()["draws"], plain["draws"])


def test_a_block_is_the_chain_that_s_says(tmp_path: Path) -> None:
    found = run(20)
    torch.testing.assert_close(found["S"], torch.stack([found[f"row{i}"] for i in range(N)]).sum(0))


def kl_of_two(tmp_path: Path, visits: int, seed: int) -> float:
    def work(rank: int) -> dict[str, Tensor]:
        pyro.set_rng_seed(seed)
        with pyro.validation_enabled(False):
            kernel = SGLDGibbs(toy, step_size=0.005, distributed=True)
            mcmc = MCMC(kernel, visits, warmup_steps=0, disable_progbar=True)
            mcmc.run()
        return {"phi": mcmc.get_samples()["phi"]}

    toy = LinearGaussian(10, seed=seed)
    folder = tmp_path / str(seed)
    assert together(folder, work) == [0, 0]
    first, second = (found["phi"] for found in found_by(folder))
    assert torch.equal(first, second)
    return gaussian_kl(fit(first[visits // 10 :]), toy.posterior())


@pytest.mark.slow
def test_two_processes_reach_the_exact_posterior_of_several_toys(tmp_path: Path) -> None:
    found = np.array([kl_of_two(tmp_path, 4_000, seed) for seed in range(6)])
    error = found.std(ddof=1) / len(found) ** 0.5
    print(f"KL {found.mean():.4f} +- {error:.4f}")
    assert found.mean() + 2.0 * error <= 0.01, found


# ------------------------------------------------------------------------------------------------ what ends a run


class Killed(SGLDGibbs):
    """Process 1 dies in the middle of a visit."""

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.state.step == 18 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(params)


def test_a_killed_process_ends_the_run_and_two_or_one_go_on(tmp_path: Path) -> None:
    options = CASES["joint"]
    plain, saved = run(**options), tmp_path / "run"

    def cut(rank: int) -> dict[str, Tensor]:
        mcmc = chain(**options)
        mcmc.kernel.__class__ = Killed
        mcmc.run(checkpoint=saved, checkpoint_every=4)
        return outcome(mcmc)

    begin = time.monotonic()
    assert together(tmp_path, cut) == [3, -signal.SIGKILL]
    assert time.monotonic() - begin < 20.0
    message = (tmp_path / "0.txt").read_text()
    assert "process 0 of 2: another process of this run has ended" in message and "run(resume=folder)" in message
    kept = sorted(path.name for path in saved.glob("step-*"))
    assert kept == ["step-000000012", "step-000000016"]
    shutil.copytree(saved, tmp_path / "copy")

    again = {"saved": {"resume": saved, "checkpoint_every": 4}, **options}
    assert together(tmp_path, lambda rank: run(**again)) == [0, 0]
    same(plain, found_by(tmp_path))
    same(plain, [run(**{**again, "saved": {"resume": tmp_path / "copy"}})])
    same(plain, [run(**{**again, "saved": {"resume": saved}})])  # the end of two, read by one


def test_a_signal_to_one_process_saves_and_stops_both(tmp_path: Path) -> None:
    class Asked(SGLDGibbs):
        def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.state.step == 13 and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sample(params)

    saved = tmp_path / "run"

    def work(rank: int) -> None:
        mcmc = chain()
        mcmc.kernel.__class__ = Asked
        mcmc.run(checkpoint=saved)

    assert together(tmp_path, work) == [100 + signal.SIGTERM] * 2
    assert [path.name for path in saved.iterdir()] == ["step-000000014"]
    same(run(), [run(saved={"resume": saved})])


def test_a_process_that_cannot_write_ends_all_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    from pyro_lift.inference.checkpoint import folder, session

    write, saved = session.write_tensors, tmp_path / "run"  # type: ignore[attr-defined]

    def full(path: Path, tensors: Any) -> Any:
        if torch.distributed.get_rank() == 1 and "step-000000016" in path.parent.name:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    def work(rank: int) -> None:
        session.write_tensors = folder.write_tensors = full  # type: ignore[attr-defined]
        run(saved={"checkpoint": saved, "checkpoint_every": 8})

    assert together(tmp_path, work) == [1, 1]
    for rank in range(2):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "No space left on device, in process 1" in message and "intact: step-000000008" in message
    assert [path.name for path in saved.iterdir()] == ["step-000000008"]
    same(run(), [run(saved={"resume": saved})])


def test_a_task_that_diverges_ends_all_processes_and_nothing_of_the_visit_is_kept(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        mcmc = chain(program=Program(bad=6))
        with pytest.raises(DivergedError, match=r"task 6" if rank == 1 else "tasks of another process diverged"):
            mcmc.run()
        kernel: Any = mcmc.kernel
        assert kernel.state.step == 1
        return {f"row{i}": kernel.theta(i)["theta"] for i in kernel.store.tasks()}

    assert together(tmp_path, work) == [0, 0]
    assert [sorted(part) for part in found_by(tmp_path)] == [["row0", "row1"], ["row2", "row3"]]


# ------------------------------------------------------------------------------------------------ at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phi_update": "langevin", "step_size": 0.001}, 'only "gibbs"'),
        ({"scan": "random"}, "round_robin"),
        ({"program": Program(subsample=2), "block_size": 3}, "cannot be shared by 1 processes in passes of 2"),
        ({"program": Program(subsample=2)}, "7 tasks are no whole number of passes of 2"),
        ({"block_size": 8}, "block_size=8 is more than the 7 tasks"),
    ],
)
def test_what_cannot_be_shared_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_processes_with_different_models_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        program = Program()
        program.y = program.y + rank
        with pytest.raises(ValueError, match=r"process 1 begins with start_log_likelihood = .* Seed alike"):
            run(program=program)

    assert together(tmp_path, work) == [0, 0]


def test_another_block_is_another_run(tmp_path: Path) -> None:
    run(saved={"checkpoint": tmp_path})
    with pytest.raises(ValueError, match=r"saved with block_size = 4 and is now 2"):
        run(block_size=2, saved={"resume": tmp_path})


def test_streams_of_passes_are_their_own() -> None:
    first = [torch.randn(3, generator=generator_of(5, 7, task)) for task in range(4)]
    again = [torch.randn(3, generator=generator_of(5, 7, task)) for task in reversed(range(4))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    streams = torch.stack([torch.randn(2000, generator=generator_of(5, v, t)) for v in range(4) for t in range(4)])
    assert float((torch.corrcoef(streams) - torch.eye(16)).abs().max()) < 5.0 / 2000**0.5


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        assert collected({"rank": rank, "text": "é" * (1 + 3 * rank)}) == [
            {"rank": 0, "text": "é"},
            {"rank": 1, "text": "éééé"},
        ]
        assert from_first(rank + 5) == 5
        return {"sum": add_up(torch.tensor([1.0 + rank]))}

    assert together(tmp_path, work) == [0, 0]
    assert [float(found["sum"]) for found in found_by(tmp_path)] == [3.0, 3.0]
    assert collected("alone") == ["alone"] and in_step(lambda: 3) == [3]
    check_alike({"x": 1})


SCRIPT = """
import sys, pyro, torch
from pathlib import Path
from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.models.linear_gaussian import LinearGaussian
from pyro_lift.support.distributed import is_first, process

pyro.set_rng_seed(0)
kernel = SGLDGibbs(LinearGaussian(6, seed=0), step_size=0.005, distributed=True, block_size=2)
mcmc = MCMC(kernel, 40, disable_progbar=True)
mcmc.run(resume=sys.argv[1])
if is_first():
    Path(sys.argv[2]).write_text(f"{process()[1]} {float(mcmc.get_samples()['phi'].double().sum())!r}")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The same script alone and under torchrun, and the end of one resumed by the other."""
    (tmp_path / "script.py").write_text(SCRIPT)
    plain = [sys.executable, "-W", "ignore"]
    torchrun = [*plain, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for k, command in enumerate((plain, torchrun)):
        out = tmp_path / f"out{k}"
        line = [*command, str(tmp_path / "script.py"), str(tmp_path / f"run{k}"), str(out)]
        subprocess.run(line, check=True, capture_output=True, timeout=300)
        count, value = out.read_text().split()
        assert int(count) == k + 1
        found.append(float(value))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# ------------------------------------------------------------------------------------------------ the front door


def lift_of(**settings: Any) -> tuple[LiFT, list[Task]]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    tasks = [Task(f"t{i}", (torch.randn(8, 4), torch.arange(8) % 3)) for i in range(6)]
    defaults: dict[str, Any] = {"sgd_steps": 4, "burn_in": 4, "samples": 12, "batch_size": 4, "components": 2}
    return LiFT(net, peft.LoraConfig(r=1, target_modules=["0"]), seed=0, **{**defaults, **settings}), tasks


@pytest.mark.parametrize("block", [1, 2])
def test_the_front_door_shares_too(tmp_path: Path, block: int) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        lift, tasks = lift_of(ranks_block_size=4, block_size=block)
        return lift.meta_train(tasks, progress=False).mixture.state_dict()

    assert together(tmp_path, work) == [0, 0]
    alone = work(0)
    for found in found_by(tmp_path):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_chains_of_their_own_are_merged() -> None:
    """One process each needs no group: priors of one model and other seeds count as one chain's draws."""
    lift, tasks = lift_of()
    priors = [
        LiFT(lift.adapter, settings=lift.settings, seed=seed).meta_train(tasks, progress=False) for seed in (1, 2)
    ]
    merged = priors[0].merge(priors[1])
    assert merged.mixture.seen == 24 and merged.tasks == priors[0].tasks
    both = [prior.mixture.moments for prior in (*priors, merged)]
    overall = [(m.weight.unsqueeze(-1) * m.mean).sum(0) for m in both]
    torch.testing.assert_close(overall[2], (overall[0] + overall[1]) / 2)
    torch.testing.assert_close(
        merged.second_moment["theta"], (priors[0].second_moment["theta"] + priors[1].second_moment["theta"]) / 2
    )
    assert merged.adapt(tasks[0], steps=4, draws=2, seed=0).thetas.shape == (2, lift.adapter.dim)
    with pytest.raises(ValueError, match="settings differ"):
        priors[0].merge(lift_of(beta=0.1)[0].meta_train(tasks, progress=False))
    other = lift_of()[0]
    other.adapter.initial.add_(1.0)
    with pytest.raises(ValueError, match="adapters begin at other weights"):
        priors[0].merge(other.meta_train(tasks, progress=False))
