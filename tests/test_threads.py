"""Pieces of work side by side: in order, without gradients, the same whatever the number of threads."""

import threading
import time

import pytest
import torch

import cfrl
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
