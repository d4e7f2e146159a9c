"""Where tensors live: the device that a setting names."""

from __future__ import annotations

import torch

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
