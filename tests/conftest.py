"""Shared by all tests: where real data lies, and one thread per test process (two cores, several workers)."""

import signal
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore Ctrl-C


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real crystals and the reference's numbers; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the development data folder {SHARED.name}/ beside the checkout")
    return SHARED
