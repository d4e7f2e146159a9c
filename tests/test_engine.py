"""Worker processes: every item is computed once, and a worker that dies loses only what killed it."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cfrl.errors import UserError
from cfrl.runs.engine import Engine, LocalEngine, RayEngine, Task, _Worker


def squares(items: list[int]) -> list[int]:
    return [item**2 for item in items]


def die_on(items: list[int], bad: int) -> list[int]:
    if bad in items:
        os.kill(os.getpid(), signal.SIGKILL)
    return squares(items)


def die_once(items: list[int], marker: str) -> list[int]:
    if 3 in items and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return squares(items)


def hang_on(items: list[int], bad: int) -> list[int]:
    if bad in items:
        time.sleep(600)
    return squares(items)


def complain(items: list[int]) -> list[int]:
    raise UserError("no such potential")


def fail(items: list[int]) -> list[int]:
    raise ZeroDivisionError("a fault")


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Two workers; those of Ray belong to a real cluster on this machine."""
    if request.param == "ray":
        pytest.importorskip("ray", reason="needs pip install 'cfrl[ray]'")
    with (RayEngine if request.param == "ray" else LocalEngine)(2) as engine:
        yield engine


CHUNKS = [[1, 2], [3, 4], [5], [6, 7, 8]]
EXPECTED = {0: [1, 4], 1: [9, 16], 2: [25], 3: [36, 49, 64]}


def test_every_chunk_once(engine: Engine) -> None:
    results = list(engine.map(squares, CHUNKS))
    assert len(results) == len(CHUNKS)
    assert dict(results) == EXPECTED


def test_a_killed_worker_is_replaced_and_its_chunk_computed_again(engine: Engine, tmp_path: Path) -> None:
    function = partial(die_once, marker=str(tmp_path / "died"))
    assert dict(engine.map(function, CHUNKS)) == EXPECTED
    assert (tmp_path / "died").exists()


def test_only_the_item_that_kills_is_lost(engine: Engine) -> None:
    assert dict(engine.map(partial(die_on, bad=7), CHUNKS)) == EXPECTED | {3: [36, None, 64]}


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_ctrl_c_does_not_reach_a_worker_that_still_imports() -> None:
    """Its traceback would be the last that the user sees."""
    worker = _Worker()
    os.kill(worker.process.pid, signal.SIGINT)
    worker.start(squares, Task(0, [1, 2], [0, 1]))
    assert worker.result() == [1, 4]
    worker.stop()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "this process hears Ctrl-C again"


def test_errors_come_back(engine: Engine) -> None:
    with pytest.raises(UserError, match="no such potential"):
        list(engine.map(complain, CHUNKS))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault"):
        list(engine.map(fail, CHUNKS))
    assert dict(engine.map(squares, CHUNKS)) == EXPECTED, "the engine can still be used"


def test_stopping_early_leaves_no_work_behind(engine: Engine) -> None:
    results = engine.map(squares, CHUNKS)
    next(results)
    results.close()
    assert dict(engine.map(squares, CHUNKS)) == EXPECTED


def test_what_hangs_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "patience", 2.0)
    monkeypatch.setattr(engine, "attempts", 1)
    assert dict(engine.map(partial(hang_on, bad=3), CHUNKS)) == EXPECTED | {1: [None, 16]}
