"""Where tensors live: the device a setting names, and the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cfrl.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device of a setting: "auto" is CUDA where there is one.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here; try auto or cpu ({error})") from error
    return device


@contextmanager
def processes(device: str = "auto") -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes, and device of this one: (0, 1, device), or what `torchrun` says.

    NCCL where the processes have a CUDA device each, else gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, choose_device(device)
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), world, local
    finally:
        dist.destroy_process_group()
