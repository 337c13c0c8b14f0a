"""Cells of a sweep: each once, whoever runs them, and again only where nothing was finished."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyro_lift.bench.sweep import Cell, grid, map_cells, read_manifest, results, run_cells, submit, write_manifest


def square(x: int, log: str) -> dict[str, Any]:
    with open(log, "a") as file:
        file.write(f"{x}\n")
    return {"x": x, "square": x * x}


def _worker(folder: str) -> None:
    run_cells(Path(folder), square)


def test_a_folder_without_cells_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for read in (read_manifest, results, lambda folder: run_cells(folder, print)):
        with pytest.raises(ValueError, match=r"holds no cells: manifest\.json is not there\. Give the folder"):
            read(tmp_path)


def test_each_cell_is_run_once_by_several_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_manifest(tmp_path, grid(x=list(range(12)), log=[str(log)]))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(str(tmp_path),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sorted(map(int, log.read_text().split())) == list(range(12))
    assert [r["square"] for r in results(tmp_path).values()] == [x * x for x in range(12)]
    assert run_cells(tmp_path, square) == [] and not list(tmp_path.glob("*.claim"))


def test_a_pool_shares_the_cells(tmp_path: Path) -> None:
    write_manifest(tmp_path, grid(x=list(range(8)), log=[str(tmp_path / "log")]))
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        ran = [name for job in submit(pool, tmp_path, square, 2) for name in job.result()]
    assert sorted(ran) == sorted(results(tmp_path)) and len(ran) == 8


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # submitit does not wait for its children
def test_submitits_jobs_share_the_cells(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="needs submitit: pip install 'pyro-lift[cluster]'")
    write_manifest(tmp_path, grid(x=[1, 2]))
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    ran = [name for job in submit(executor, tmp_path, dict, 2) for name in job.result()]
    assert sorted(ran) == ["1", "2"] and results(tmp_path) == {"1": {"x": 1}, "2": {"x": 2}}


def test_a_cell_that_fails_is_free_again_and_the_others_stay_done(tmp_path: Path) -> None:
    write_manifest(tmp_path, grid(x=[1, 2, 3]))

    def fails_at_two(x: int) -> int:
        if x == 2:
            raise RuntimeError("two")
        return x

    with pytest.raises(RuntimeError, match="two"):
        run_cells(tmp_path, fails_at_two)
    assert results(tmp_path) == {"1": 1}
    assert run_cells(tmp_path, lambda x: x) == ["2", "3"]


def test_what_a_dead_process_claimed_is_taken_on_request_only(tmp_path: Path) -> None:
    write_manifest(tmp_path, grid(x=[1, 2]))
    (tmp_path / "1.claim").write_text("999999")
    assert run_cells(tmp_path, lambda x: x) == ["2"]
    assert run_cells(tmp_path, lambda x: x, retry=True) == ["1"]


def test_names_are_files_and_unique(tmp_path: Path) -> None:
    assert [cell.name for cell in grid(split=["a/b"], rate=[1e-3])] == ["a_b-0.001"]
    with pytest.raises(ValueError, match="two cells are named 'a'"):
        write_manifest(tmp_path, [Cell("a", {}), Cell("a", {"x": 1})])


def reciprocal(x: int, on_step: Callable[[int], object] | None = None) -> tuple[float, int]:
    if on_step is not None:
        for _ in range(3):
            on_step(2)
    return 1 / x, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_are_mapped_in_their_order_with_all_steps_told(workers: int) -> None:
    told: list[int] = []
    cells = [Cell(str(x), {"x": x}) for x in (1, 2, 4)]
    mapped = list(map_cells(reciprocal, cells, workers=workers, on_step=told.append))
    assert [value for value, _ in mapped] == [1.0, 0.5, 0.25]
    assert sum(told) == 18
    assert ({process for _, process in mapped} == {os.getpid()}) == (workers == 1)


def test_a_cell_that_raises_does_so_at_its_turn() -> None:
    mapped = map_cells(reciprocal, [Cell(str(x), {"x": x}) for x in (1, 0, 2)], workers=2)
    assert next(mapped)[0] == 1.0
    with pytest.raises(ZeroDivisionError):
        next(mapped)
