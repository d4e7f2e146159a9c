"""`cfrl runs`: what there is, and what differs."""

from io import StringIO

import pytest
from rich.console import Console

from cfrl.commands.runs import figures_of, find_runs, show_runs, status_of
from cfrl.config import FinetuneConfig, PretrainConfig
from cfrl.errors import UserError
from cfrl.runs.folder import RunFolder


@pytest.fixture
def root(tmp_path):
    for beta, reward in ((0.1, 1.5), (1.0, 0.5)):
        run = RunFolder.create("finetune", "ehull", FinetuneConfig(reward="ehull", beta=beta), tmp_path)
        run.log(1, {"reward/mean": 0.25, "kl": 0.0})
        run.log(2, {"reward/mean": reward, "kl": 3.0})
        run.finish()
    run = RunFolder.create("pretrain", "mine", PretrainConfig(dataset="mine.h5"), tmp_path)
    run.log(7, {"train/loss": 12.5})
    run.close()
    return tmp_path


def in_order(root):
    """Both tunings, and the training, which may have the time stamp of the first."""
    return sorted(find_runs(root), key=lambda run: (run.command, run.path.name))


def shown(names, root):
    said = StringIO()
    show_runs(names, Console(file=said, width=200), root)
    return said.getvalue()


def test_list(root):
    first, second, third = in_order(root)
    assert [status_of(run) for run in (first, second, third)] == ["finished", "finished", "stopped"]
    with third.locked():
        assert status_of(RunFolder(third.path)) == "at work"
    assert figures_of(second) == {"step": 2.0, "reward/mean": 0.5, "kl": 3.0}
    text = shown([], root)
    lines = {line.split()[1]: line for line in text.splitlines() if "-finetune-" in line or "-pretrain-" in line}
    assert list(lines) == [run.path.name for run in find_runs(root)]
    assert "reward/mean 1.5" in lines[first.path.name]
    assert "mine.h5" in lines[third.path.name]
    assert "train/loss 12.5" in lines[third.path.name]


def test_compare(root):
    first, second, _ = in_order(root)
    text = shown([first.path.name, str(second.path)], root)
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in text.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["beta"]] == ["0.1", "1"]
    assert [cell.strip() for cell in rows["reward/mean"]] == ["1.5", "0.5"]
    assert "steps" not in rows  # it is the same


def test_faults(root, tmp_path):
    with pytest.raises(UserError, match="name no run, to list them all, or two"):
        show_runs(["one"], Console(), root)
    with pytest.raises(UserError, match="there is no run yet"):
        show_runs([], Console(), tmp_path / "none")
    in_order(root)[0].path.joinpath("config.toml").write_text("[finetune")
    assert "finetune" in shown([], root)  # a damaged file costs its row's reward only
