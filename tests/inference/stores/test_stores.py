"""Stores of theta: the same chain from each, rows of any size, a full disk, what is chosen, and the benchmark."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from resumed_runs import Program, gibbs, outcome, run, same, table
from typer.testing import CliRunner

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.cli import app
from pyro_lift.inference.stores import store as stores
from pyro_lift.inference.stores.disk import DiskStore, _close
from pyro_lift.inference.stores.memory import DeviceStore, HostStore
from pyro_lift.inference.stores.store import make_store
from pyro_lift.support.memory import free_bytes

KINDS = {"device": DeviceStore, "host": HostStore, "disk": DiskStore}


@pytest.fixture(params=sorted(KINDS))
def empty(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param](5)


def test_a_row_read_is_the_last_one_written(empty: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    expected: dict[int, torch.Tensor] = {}
    for step in range(200):
        tasks = torch.randperm(5, generator=generator)[:2].tolist()
        if hasattr(empty, "prefetch") and step % 3:
            empty.prefetch(tasks)
        if step > 20 and step % 2:
            known = [task for task in tasks if task in expected]
            for task, row in zip(known, empty.read(known), strict=True):
                assert torch.equal(row, expected[task])
        else:
            # A row of another length or dtype may follow: a head that grew.
            size, dtype = (3000, torch.float32) if step % 7 else (11, torch.float64)
            rows = [torch.randn(size, dtype=dtype, generator=generator) for _ in tasks]
            empty.write(tasks, rows)
            expected |= dict(zip(tasks, rows, strict=True))
    assert list(empty.tasks()) == sorted(expected) and all(empty.has(task) for task in expected)
    assert len(empty) == 5 and "num_tasks=5" in repr(empty)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_store_keeps_copies(kind: str) -> None:
    store, row = KINDS[kind](2), torch.ones(4)
    store.write([0], [row])
    row.zero_()
    store.read([0])[0].mul_(7.0)
    assert store.read([0])[0].tolist() == [1.0] * 4


def test_a_row_never_written_is_an_error(empty: Any) -> None:
    assert not empty.has(3)
    with pytest.raises(KeyError, match="task 3 has no row yet"):
        empty.read([3])


@pytest.mark.parametrize("kind", ["host", "disk", "auto"])
@pytest.mark.parametrize("make", [gibbs, table])
def test_the_chain_does_not_depend_on_its_store(kind: str, make: Any) -> None:
    found = []
    for store in ("device", kind):
        pyro.set_rng_seed(3)
        mcmc = MCMC(make(store=store) if make is gibbs else _table(store), 30, warmup_steps=12, disable_progbar=True)
        mcmc.run()
        found.append(outcome(mcmc))
    same(*found)


def _table(store: str) -> SGLDGibbs:
    kernel = table()
    kernel._request = dataclasses.replace(kernel._request, store=store)
    return kernel


def test_a_run_on_the_disk_is_saved_and_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("streaming")
    monkeypatch.setattr("resumed_runs.gibbs", lambda: gibbs(store=DiskStore(6, tmp_path / "store")))
    same(plain, run("streaming", checkpoint=tmp_path / "run", checkpoint_every=7))
    import shutil

    shutil.rmtree(tmp_path / "run" / "step-000000060")
    same(plain, run("streaming", resume=tmp_path / "run"))


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    store = DiskStore(3, tmp_path)
    store.write([0, 1], [torch.ones(10), torch.ones(10)])
    store.flush()
    assert list(tmp_path.iterdir()) == [] and store.nbytes == 80


def test_the_collector_may_close_a_store_in_the_store_s_own_thread(tmp_path: Path) -> None:
    store = DiskStore(3, tmp_path)
    store.write([1], [torch.ones(4)])
    store._thread.submit(_close, store._thread, store._file).result(timeout=10)
    store._thread.shutdown(wait=True)
    assert store._file.closed


def test_the_collector_may_close_a_store_in_the_midst_of_anothers_write(tmp_path: Path) -> None:
    """The lock that an executor takes in ``submit`` is every executor's, and the collector comes when it likes."""
    from concurrent.futures.thread import _global_shutdown_lock  # type: ignore[attr-defined]

    store = DiskStore(1, tmp_path)
    store.write([0], [torch.ones(3)])
    store.flush()
    file = store._file
    closed = threading.Thread(target=lambda: _close(store._thread, file), daemon=True)
    with _global_shutdown_lock:
        closed.start()
        closed.join(10.0)
        assert not closed.is_alive() and file.closed


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(3, tmp_path)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)

    def written() -> None:  # the write itself may find out already, or what comes after it
        store.write([1], [torch.ones(10)])
        store.flush()

    with pytest.raises(OSError, match=r"disk store in .*: the row of task 1 could not be written \(No space left") as e:
        written()
    assert e.value.errno == errno.ENOSPC


def test_what_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "free_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert isinstance(make_store("auto", 10, 40, cpu), DeviceStore)
    assert isinstance(make_store("auto", 10, 60, cpu), DiskStore)
    monkeypatch.setattr(stores, "free_bytes", lambda device: 10_000 if device.type == "cpu" else 1000)
    cuda = torch.device("cuda", 0)
    assert isinstance(make_store("auto", 10, 40, cuda), DeviceStore)
    assert isinstance(make_store("auto", 10, 60, cuda), HostStore)
    assert isinstance(make_store("auto", 10, 600, cuda), DiskStore)
    for kind, cls in KINDS.items():
        assert type(make_store(kind, 4)) is cls
    own = DeviceStore(2)
    assert make_store(own, 4) is own
    monkeypatch.undo()
    assert free_bytes(cpu) > 2**20
    with pytest.raises(ValueError, match="did you mean 'disk'"):
        SGLDGibbs(Program(), store="dsik")


def test_a_store_on_the_disk_stays_with_its_process() -> None:
    kernel = gibbs(store="disk")
    MCMC(kernel, 3, warmup_steps=7, disable_progbar=True).run()
    assert isinstance(kernel.store, DiskStore) and kernel.__getstate__()["_plan"] is None


def test_the_benchmark_writes_its_records(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "store", "--smoke", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    import json

    records = json.loads((tmp_path / "store.json").read_text())
    assert [r["tasks"] for r in records] == [4, 12] and records[0]["ratio"] == 1.0
    assert all(r["seconds_per_step"] > 0 and r["peak_bytes"] >= 0 for r in records)
    assert (tmp_path / "store.png").stat().st_size > 1000


def test_the_benchmark_asks_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_lift.bench import store as benchmark

    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"has 0\.0 GB free\. Give a folder with room"):
        benchmark.run(smoke=True)
