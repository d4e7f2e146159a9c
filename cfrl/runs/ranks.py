"""The processes that `torchrun` started for one run, and how they share its work.

All of them go through the same program with the same crystals and the same random numbers. Where work is heavy each
does its share of the rows, and all get the whole: so the state of a run is the same everywhere, and one process can
write it down for all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cfrl.errors import UserError
from cfrl.runs.devices import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and the device that is its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this one writes, and speaks."""
        return self.rank == 0

    def share(self, n: int, rank: int | None = None) -> slice:
        """Which of n rows are this one's (or another's): as many in a row as everyone's, the last fewer."""
        each, rank = math.ceil(n / self.size), self.rank if rank is None else rank
        return slice(min(rank * each, n), min((rank + 1) * each, n))

    def gather(self, value: T) -> list[T]:
        """Everyone's, in order of rank. Tensors should lie on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def shared(self, work: Callable[[slice], T], n: int) -> list[T]:
        """`work` on n rows, a share by each: the parts in order, for all. Parts without rows are left out, but for one.

        Raises:
            Exception: what it raised anywhere, for all alike: none is left waiting for the others.
        """
        if self.size == 1:
            return [work(slice(0, n))]
        part, error = None, None
        if self._has(n, self.rank):
            try:
                part = work(self.share(n))
            except UserError as raised:
                error = raised
            except Exception as raised:  # whatever it is, the others wait for this one's answer
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
        answers = self.gather((part, error))
        for _, error in answers:
            if error is not None:
                raise error
        return [part for rank, (part, _) in enumerate(answers) if self._has(n, rank)]

    def _has(self, n: int, rank: int) -> bool:
        share = self.share(n, rank)
        return share.stop > share.start or not (n or rank)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all in place of each tensor; all of one type and device."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Ranks()


@contextmanager
def processes(device: str = "auto") -> Iterator[Ranks]:
    """This process among those of `torchrun`, or alone.

    NCCL where the processes have a CUDA device each, else gloo.

    Raises:
        UserError: no such device on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(device=choose_device(device))
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, local)
    finally:
        dist.destroy_process_group()
