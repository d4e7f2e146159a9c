"""Several processes at one run (torchrun, gloo): the same crystals and weights as one, stops, kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cfrl.io.storage import read_crystals
from cfrl.model.files import load_model
from cfrl.runs.folder import RunFolder
from cfrl.runs.ranks import ALONE, Ranks
from tests.tiny import trained_model

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TUNE = """
import sys, torch
from types import SimpleNamespace
from cfrl.commands.finetune import finetune
from cfrl.config import FinetuneConfig
from cfrl.runs import interrupt
torch.set_num_threads(1)

def oxygen(crystals):
    values = ((crystals.species == 8) * crystals.multiplicity).sum(1).double() / crystals.num_atoms
    return SimpleNamespace(total=values.numpy(), terms={"oxygen": values.numpy()}, status=[""] * len(crystals))

model, root, algorithm, steps, resume = sys.argv[1:]
config = FinetuneConfig(model=model, reward="toy", algorithm=algorithm, steps=int(steps), n=24, batch_size=16,
    micro_batch=4, draw_size=8, scale_crystals=32, evaluate=8, plots=False, device="cpu", lr=1e-3, lr_final=1.0,
    beta=0.1, min_distance=0.0, max_atoms=16, critic=CRITIC, unscored=16, checkpoint_minutes=0, diversity=2,
    dataset="prototypes", anchor=0.1 if algorithm == "ppo" else 0.0)
try:
    finetune(config, reward=oxygen, root=root, resume=resume or None, quiet=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return str(trained_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def launch(processes: int, arguments: list[str], **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **changes
    )


def done(process: subprocess.Popen) -> None:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-3000:]


def start(tmp_path: Path, model: str, processes: int, algorithm: str, steps: int, resume: str = "", critic="off"):
    script, folder = tmp_path / f"tune-{critic}.py", tmp_path / f"{algorithm}-{critic}-{processes}-{steps}"
    script.write_text(TUNE.replace("CRITIC", repr(critic)))
    process = launch(
        processes, [str(script), model, str(folder), algorithm, str(steps), resume], start_new_session=True
    )
    return process, folder


def run_in(folder: Path) -> RunFolder:
    (path,) = folder.iterdir()
    return RunFolder.open(path)


def same(one: RunFolder, other: RunFolder, model: str) -> None:
    """The same crystals; figures and weights within rounding, which Adam makes larger where a gradient is almost 0."""
    a, b = (read_crystals(run.path / "rollouts.h5") for run in (one, other))
    assert torch.equal(a.space_group, b.space_group)
    assert torch.equal(a.species, b.species)
    assert torch.allclose(a.frac_coords, b.frac_coords, atol=1e-3)
    first, second = one.metrics(), other.metrics()
    for name, values in first.items():
        if not name.startswith("seconds/"):
            np.testing.assert_allclose(values, second[name], rtol=0.02, atol=1e-3, err_msg=name)
    first, second, begun = (vector(path) for path in (one.path, other.path, model))
    assert (first - second).norm() < 0.1 * (first - begun).norm()


def vector(model: Path | str) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(load_model(model).parameters())


def test_every_row_is_somebodys_and_of_one_alone():
    for size in (1, 2, 3, 7):
        for n in (0, 1, 5, 7, 40):
            rows = [row for rank in range(size) for row in range(n)[Ranks(rank, size).share(n)]]
            assert rows == list(range(n))
    assert ALONE.shared(lambda rows: rows, 5) == [slice(0, 5)]
    assert ALONE.gather("me") == ["me"]


FAULTS = """
import torch
from cfrl.errors import UserError
from cfrl.runs.ranks import processes

def work(rows):
    if rows.start == 0 and fails:
        raise UserError("no such potential")
    return list(range(rows.start, rows.stop))

with processes("cpu") as ranks:
    fails = False
    for n in (0, 1, 2, 9):
        assert sum(ranks.shared(work, n), []) == list(range(n)), n
    numbers = [torch.full((2, 2), ranks.rank + 1.0), torch.ones(3)]
    ranks.add(numbers)
    assert numbers[0].eq(6).all() and numbers[1].eq(3).all()
    fails = True
    try:
        ranks.shared(work, 9)
    except UserError as error:
        assert str(error) == "no such potential"
    else:
        raise SystemExit("rank waits for ever, or knows of nothing")
"""


def test_all_learn_of_a_fault_of_one(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    done(launch(3, [str(tmp_path / "faults.py")]))


@pytest.mark.parametrize(("algorithm", "critic", "sizes"), [("vargrad", "on", (1, 2, 4)), ("ppo", "off", (1, 2))])
def test_many_processes_tune_as_one(tiny_model, tmp_path, algorithm, critic, sizes):
    runs = []
    for processes in sizes:
        process, folder = start(tmp_path, tiny_model, processes, algorithm, 2, critic=critic)
        done(process)
        runs.append(run_in(folder))
    for run in runs[1:]:
        same(runs[0], run, tiny_model)
    assert max(abs(kl) for kl in runs[0].metrics()["kl"]) > 1e-4  # it has moved
    fresh = [read_crystals(run.path / "after.h5") for run in runs]
    assert all(torch.equal(crystals.species, fresh[0].species) for crystals in fresh)


def test_a_potential_is_asked_by_all_and_answers_as_to_one(tiny_model, tmp_path):
    rewards = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = "--reward ehull --steps 1 -n 5 --scale-crystals 6 --evaluate 0 --no-plots --device cpu --max-atoms 12"
        done(launch(processes, ["-m", "cfrl", "finetune", "--model", tiny_model, *flags.split()], cwd=folder))
        crystals = read_crystals(run_in(folder / "runs").path / "rollouts.h5")
        rewards.append(crystals.properties["reward"].numpy())
    assert np.isfinite(rewards[0]).any()
    np.testing.assert_allclose(*rewards, rtol=1e-3, atol=1e-4)


def test_many_processes_draw_what_one_draws(tiny_model, tmp_path):
    drawn = []
    for processes in (1, 2, 4):
        out = tmp_path / f"{processes}.h5"
        flags = ["-n", "50", "--draw-size", "16", "--seed", "3", "--refuse", "element", "--device", "cpu"]
        done(launch(processes, ["-m", "cfrl", "sample", "--model", tiny_model, *flags, "-o", str(out)]))
        drawn.append(read_crystals(out))
    for crystals in drawn:
        assert len(crystals) == 50
        for name in ("space_group", "wyckoff", "species", "frac_coords", "lattice"):
            assert torch.equal(getattr(crystals, name), getattr(drawn[0], name)), name


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        tables = list(folder.glob("*/metrics.csv"))
        if tables and len(tables[0].read_text().splitlines()) > steps:
            return
        time.sleep(0.05)
    raise AssertionError("no step in time")


@pytest.mark.parametrize("how", ["ctrl-c", "a rank is killed"])
def test_stopped_or_killed_it_goes_on_as_it_would_have(tiny_model, tmp_path, how):
    process, folder = start(tmp_path, tiny_model, 2, "vargrad", 500)
    wait_for_steps(folder, 2, process)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    run = run_in(folder)
    step = run.load_checkpoint()["step"]
    assert 2 <= step < 500
    if how == "ctrl-c":
        assert len(run.metrics()["kl"]) == step  # no step is lost
    process, _ = start(tmp_path, tiny_model, 2, "vargrad", step + 1, resume=str(run.path))
    done(process)
    process, whole = start(tmp_path, tiny_model, 1, "vargrad", step + 1)
    done(process)
    same(run_in(whole), run, tiny_model)
