"""The Tab key: in a real bash, and offering only what the commands accept."""

import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import get_type_hints

import pytest

from cfrl import config
from cfrl.settings import choices


@pytest.fixture
def type_in(tmp_path):
    """Install the completion in an empty home folder, then type into an interactive bash: type_in(keys, wanted)."""
    bash, cfrl = shutil.which("bash"), Path(sys.executable).parent / "cfrl"
    if not bash or not cfrl.exists():
        pytest.skip("needs bash, and cfrl installed as a command")
    env = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{cfrl.parent}:{os.environ['PATH']}",
        "PS1": "> ",
        "SHELL": bash,
        "TERM": "xterm",  # a dumb one scrolls the line sideways and writes half of it again
    }
    install = "cfrl --install-completion; exit $?"  # the shell is told by the parent process
    subprocess.run([bash, "--norc", "-c", install], env=env, check=True, capture_output=True)
    keyboard, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    shell = subprocess.Popen([bash, "-i"], stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=tmp_path)
    screen = b""

    def type_and_wait(keys: str, wanted: str) -> None:
        nonlocal screen
        screen, end = b"", time.monotonic() + 60
        os.write(keyboard, keys.encode())
        while wanted.encode() not in screen:
            assert select.select([keyboard], [], [], max(0, end - time.monotonic()))[0], f"no {wanted!r} in {screen}"
            screen += os.read(keyboard, 4096)

    yield type_and_wait
    shell.kill()
    shell.wait()
    os.close(keyboard)
    os.close(terminal)


def test_bash(type_in, tmp_path):
    """Commands, values of settings, run folders, and file names where no value fits."""
    (tmp_path / "crystals_of_mine.h5").touch()
    run = tmp_path / "runs/20260131-142507-finetune-ehull"
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    type_in("cfrl fine\t", "finetune ")
    type_in("--algorithm gr\t", "grpo ")
    type_in("--reward dielectric_b\t", "dielectric_bandgap ")
    type_in("--dataset crystals\t", "crystals_of_mine.h5 ")
    type_in("--model runs/\t", "runs/20260131-142507-finetune-ehull ")


def test_only_what_the_commands_accept():
    from cfrl.io.catalogue import GROWN, PROTOTYPES, STRUCTURE_TYPES
    from cfrl.io.fetch import SOURCES
    from cfrl.io.storage import SPLITS
    from cfrl.model.options import PRESETS
    from cfrl.rewards import all_rewards
    from cfrl.rewards.predictors import BUILT_IN
    from cfrl.rl.policy import ALGORITHMS
    from cfrl.screening.dft import KINDS
    from cfrl.screening.retrieval import RANKINGS
    from cfrl.stability.flags import FLAGS

    def offered(section: str, name: str) -> set[str]:
        cls = config.SECTIONS[section]
        closed = choices(get_type_hints(cls)[name])
        return set(closed or cls.__dataclass_fields__[name].metadata["choices"])

    assert offered("pretrain", "preset") == set(PRESETS)
    always = {PROTOTYPES, STRUCTURE_TYPES, GROWN}
    assert always < offered("pretrain", "dataset") <= {*always, *SOURCES}
    assert offered("finetune", "algorithm") == set(ALGORITHMS)
    assert offered("finetune", "reward") == {r.name for r in all_rewards() if r.function.__module__.startswith("cfrl.")}
    assert offered("screen", "properties") - {"all"} == set(BUILT_IN)
    assert offered("screen", "allow") == set(FLAGS)
    assert offered("screen", "dft") == set(KINDS)
    assert offered("retrieve", "rank") == set(RANKINGS)
    assert offered("retrieve", "split") == set(SPLITS)
