"""Pieces of work side by side: in order, without gradients, the same whatever the number of threads or processes."""

import os
import signal
import sys
import threading
import time

import pytest
import torch

import cfrl
from cfrl.errors import NotFinite, UserError
from cfrl.model.threads import side_by_side
from tests.test_model import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_threads_are_left_as_they_were():
    def work(piece: int) -> tuple[int, int, bool, int]:
        time.sleep(0.02 * (5 - piece))  # the first take longest
        return piece, torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    with torch.no_grad():
        done = list(side_by_side(work, range(5), CPU))
    assert [piece for piece, *_ in done] == [0, 1, 2, 3, 4]
    assert {(threads, grad) for _, threads, grad, _ in done} == {(1, False)}
    assert len({thread for *_, thread in done}) == 3
    assert torch.get_num_threads() == 3


def test_what_fails_is_raised_and_threads_are_left_as_they_were():
    def work(piece: int) -> int:
        if piece == 2:
            raise ValueError("no such piece")
        return piece

    with torch.no_grad(), pytest.raises(ValueError, match="no such piece"):
        list(side_by_side(work, range(5), CPU))
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked elsewhere")
class TestProcesses:
    def test_results_come_in_order_from_processes_that_end(self):
        factor = torch.tensor(3)  # inherited, not pickled: `work` is a closure

        def work(piece: int) -> tuple[torch.Tensor, int, int]:
            time.sleep(0.02 * (5 - piece))
            return piece * factor, torch.get_num_threads(), os.getpid()

        with torch.no_grad():
            done = list(side_by_side(work, range(5), CPU, processes=True))
        assert [int(piece) for piece, *_ in done] == [0, 3, 6, 9, 12]
        assert {threads for _, threads, _ in done} == {1}
        assert torch.get_num_threads() == 3
        workers = {process for *_, process in done}
        assert 1 < len(workers) <= 3
        assert os.getpid() not in workers
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)

    def test_what_fails_is_raised_as_it_is(self):
        def work(piece: int) -> int:
            if piece == 2:
                raise NotFinite("damaged")
            return piece

        with torch.no_grad(), pytest.raises(NotFinite, match="damaged"):
            list(side_by_side(work, range(5), CPU, processes=True))

    def test_a_killed_process_is_told_and_one_killed_once_is_not(self, tmp_path):
        def work(piece: int) -> int:
            if piece == 2 and (always or not (tmp_path / "killed").exists()):
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return piece

        always = False
        with torch.no_grad():
            assert list(side_by_side(work, range(5), CPU, processes=True)) == [0, 1, 2, 3, 4]
            always = True
            with pytest.raises(UserError, match="killed, twice"):
                list(side_by_side(work, range(5), CPU, processes=True))


def test_gradients_are_recorded_where_they_are_wanted():
    x = torch.ones(4, requires_grad=True)
    parts = list(side_by_side(lambda row: 2 * x[row], range(4), CPU))
    sum(parts).backward()
    assert x.grad.tolist() == [2, 2, 2, 2]


def test_draws_and_likelihoods_do_not_depend_on_the_number_of_threads():
    model, found = tiny_model(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        crystals = cfrl.sample(model, n=40, draw_size=8, seed=0)
        with torch.no_grad():
            scores = model.log_prob(crystals, chunk=8)
        found.append((crystals, scores))
    (one, one_scores), (three, three_scores) = found
    assert torch.equal(one.species, three.species)
    assert torch.equal(one.frac_coords, three.frac_coords)
    assert all(torch.equal(one_scores[name], three_scores[name]) for name in one_scores)
