"""Training: exact continuation, data-parallel equality, a model that learns real crystals, and what goes wrong."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cfrl.commands.pretrain import pretrain
from cfrl.config import PretrainConfig, read_run_config
from cfrl.errors import NotFinite, UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import write_crystals
from cfrl.model.files import load_extras, load_model
from cfrl.model.options import PRESETS
from cfrl.model.sampler import sample
from cfrl.model.training import Trainer, epoch_batches, learning_rate
from cfrl.runs.folder import RunFolder
from tests.test_model import TINY
from tests.tiny import unchecked

FACTORS = ("wyckoff", "species", "coords", "lattice")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "alex-20", TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prototypes.h5"
    crystals = load_dataset("prototypes")
    crystals = crystals[crystals.num_sites <= 8][:120]
    write_crystals(path, crystals, split=[int(i % 10 == 0) for i in range(len(crystals))])
    return path


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return run.load_checkpoint()["model"]


def settings(data: Path, **changes) -> PretrainConfig:
    return PretrainConfig(**{"dataset": str(data), "preset": "tiny", "epochs": 3, "batch_size": 16, **changes})


def test_an_interrupted_run_continues_exactly(dataset, monkeypatch):
    config = settings(dataset, augment=True)
    straight = pretrain(config, root="straight")

    accumulate = Trainer._accumulate

    def interrupted(self, crystals, batch_size):
        accumulate(self, crystals, batch_size)
        if self.step == 11:  # in the middle of a step, in the middle of the second epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, root="halved")
    monkeypatch.setattr(Trainer, "_accumulate", accumulate)
    folder = next(Path("halved").iterdir())
    assert not RunFolder.open(folder).finished
    resumed = pretrain(resume=folder)

    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    a, b = straight.metrics(), resumed.metrics()
    assert a["step"] == b["step"]
    assert a["validation/loss"] == b["validation/loss"]
    assert a["train/loss"] == b["train/loss"]


def rows(run: RunFolder) -> dict[str, list[float]]:
    """What metrics.csv says, but for the clock's part."""
    return {name: values for name, values in run.metrics().items() if name != "crystals_per_second"}


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("older", [False, True])
def test_a_kill_at_the_end_of_an_epoch_loses_neither_row_nor_model(dataset, monkeypatch, epochs, older):
    """Older versions wrote their checkpoint before the epoch's row and model; such runs go on as well."""
    config = settings(dataset, preset="alex-20", epochs=epochs, checkpoint_minutes=0.0)
    straight = pretrain(config, root="straight")

    def killed(self):
        if older:
            RunFolder(next(Path("killed").iterdir())).save_checkpoint(self.state_dict())
        raise SystemExit

    training_metrics = Trainer._training_metrics
    monkeypatch.setattr(Trainer, "_training_metrics", killed)
    with pytest.raises(SystemExit):
        pretrain(config, root="killed")
    monkeypatch.setattr(Trainer, "_training_metrics", training_metrics)
    folder = next(Path("killed").iterdir())
    assert (folder / "checkpoint.pt").exists()
    resumed = pretrain(resume=folder)
    assert resumed.finished
    assert rows(resumed) == rows(straight)
    one, two = (load_model(run.path).state_dict() for run in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ctrl_c_in_the_last_step_of_an_epoch_keeps_its_row(dataset, monkeypatch):
    config = settings(dataset, preset="alex-20", epochs=2)
    straight = pretrain(config, root="straight")
    accumulate = Trainer._accumulate

    def interrupted(self, crystals, batch_size):
        accumulate(self, crystals, batch_size)
        if self.step == self.batches_per_epoch - 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, root="halved")
    monkeypatch.setattr(Trainer, "_accumulate", accumulate)
    run = RunFolder.open(next(Path("halved").iterdir()))
    assert run.metrics()["epoch"] == [1]
    load_model(run.path)
    assert rows(pretrain(resume=run.path)) == rows(straight)


def test_weights_that_run_away_stop_the_run_and_are_not_saved(dataset):
    good = pretrain(settings(dataset, preset="alex-20", epochs=2), root="good")
    before = [(good.path / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt")]
    with pytest.raises(NotFinite, match=r"is (nan|-?inf) after \d+ steps.*--lr than 1e\+30"):
        pretrain(unchecked(settings(dataset, preset="alex-20", epochs=4, ema=0.0, warmup=0), lr=1e30), resume=good.path)
    assert [(good.path / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt")] == before
    one_step = settings(dataset, preset="alex-20", epochs=1, batch_size=1000, ema=0.0)
    with pytest.raises(NotFinite):  # its weights are huge and yet finite
        pretrain(unchecked(one_step, lr=1e30), root="bad")
    assert not list(Path("bad").glob("*/model.safetensors"))


def test_settings_beside_resume_win(dataset):
    run = pretrain(settings(dataset, preset="alex-20", epochs=1, weight_decay=0.05), root="runs")
    config = settings(dataset, preset="alex-20", epochs=2, weight_decay=0.3)
    trainer = Trainer(config, load_dataset(dataset), load_dataset(dataset), torch.device("cpu"))
    trainer.restore(run.load_checkpoint())
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    pretrain(config, resume=run.path)
    assert read_run_config(PretrainConfig, run.path / "config.toml") == config, "they count from now on"
    with run.locked(), pytest.raises(UserError, match="another process is at work"):
        pretrain(config, resume=run.path)


def test_kill_9_leaves_a_run_that_resumes(dataset, tmp_path):
    command = [sys.executable, "-m", "cfrl.cli", "pretrain", "--dataset", str(dataset), "--preset", "tiny"]
    command += ["--epochs", "5000", "--batch-size", "16", "--checkpoint-minutes", "0.01"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) or not list(tmp_path.glob("runs/*/metrics.csv")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(0.37)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = RunFolder.open(next((tmp_path / "runs").iterdir()))
    state = run.load_checkpoint()
    assert state["step"] > 0
    # The run goes on from its checkpoint to an end that comes soon after.
    text = (run.path / "config.toml").read_text()
    epochs = state["step"] // 7 + 2
    (run.path / "config.toml").write_text(text.replace("epochs = 5000", f"epochs = {epochs}"))
    finished = pretrain(resume=run.path)
    assert finished.finished
    assert finished.metrics()["epoch"] == [float(i + 1) for i in range(epochs)]
    load_model(finished.path)


WORKER = """
import torch
from cfrl.config import PretrainConfig
from cfrl.commands.pretrain import pretrain
torch.set_num_threads(1)
pretrain(PretrainConfig(dataset={dataset!r}, preset="tiny", epochs=2, batch_size=16, dropout=0.0, device="cpu"))
"""


def test_two_processes_train_as_one_with_the_same_batch(dataset, tmp_path):
    """DDP over gloo: half a batch each, the same weights as the whole batch in one process."""
    script = tmp_path / "train.py"
    script.write_text(WORKER.format(dataset=str(dataset)))
    results = []
    for processes in (1, 2):
        folder = tmp_path / f"with-{processes}"
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [*launch, str(script)],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**_environment(), "PYTHONPATH": root},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(RunFolder.open(next((folder / "runs").iterdir())))
    one, two = map(weights, results)
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    losses = [run.metrics()["train/loss"] for run in results]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}


def test_a_small_model_learns_50_real_crystals_by_heart():
    """Overfits prototypes, samples them back, and StructureMatcher says that they are the same crystals."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    crystals = load_dataset("prototypes")
    crystals = crystals[crystals.num_sites <= 3]
    crystals = crystals[torch.linspace(0, len(crystals) - 1, 50).long()]
    write_crystals("fifty.h5", crystals)
    training = {"epochs": 400, "batch_size": 50, "lr": 4e-3, "warmup": 20, "ema": 0.98, "validate_every": 100}
    config = PretrainConfig(dataset="fifty.h5", preset="tiny", dropout=0.0, weight_decay=0.0, **training)
    run = pretrain(config)
    model = load_model(run.path)
    drawn = sample(model, 150, seed=0)
    known = {}
    for structure in crystals.to_structures():
        known.setdefault(structure.composition.reduced_formula, []).append(structure)
    matcher = StructureMatcher()
    met = set()
    for structure in drawn.to_structures():
        for i, other in enumerate(known.get(structure.composition.reduced_formula, [])):
            if matcher.fit(structure, other):
                met.add((structure.composition.reduced_formula, i))
    assert len(met) >= 25  # half of them, in three draws per crystal


def test_batches_hold_every_crystal_once_and_lengths_together():
    lengths = torch.randint(1, 21, (5000,), generator=torch.Generator().manual_seed(0))
    batches = epoch_batches(lengths, 32, seed=3, epoch=5)
    assert torch.cat(batches).sort().values.tolist() == list(range(5000))
    padding = sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)
    assert padding < 0.1 * int(lengths.sum())
    again, other = epoch_batches(lengths, 32, 3, 5), epoch_batches(lengths, 32, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(batches, other, strict=True))


def test_crystals_come_as_often_as_their_weights_say():
    """Never more or less than the whole numbers beside the weight, on average exactly; every epoch is as long."""
    lengths = torch.randint(1, 21, (900,), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 2.25]).repeat_interleave(300)
    counts = torch.zeros(400, 900)
    for epoch in range(400):
        rows = torch.cat(epoch_batches(lengths, 32, 3, epoch, weights))
        assert len(rows) == round(300 * 3.75)
        counts[epoch] = torch.bincount(rows, minlength=900)
    assert set(counts[:, :300].unique().tolist()) == {1.0}
    assert set(counts[:, 300:600].unique().tolist()) == {0.0, 1.0}
    assert set(counts[:, 600:].unique().tolist()) == {2.0, 3.0}
    assert counts[:, 300:600].mean(0) == pytest.approx(torch.full((300,), 0.5), abs=0.12)  # 4.8 sigma
    assert counts[:, 600:].mean() == pytest.approx(2.25, abs=0.01)
    together = counts[:, 300:600] - 0.5
    correlation = (together.T @ together / 400 / 0.25).fill_diagonal_(0)
    assert correlation.abs().max() < 0.3, "which of them come is drawn anew for each epoch"


def test_several_datasets_with_weights(dataset, tmp_path):
    """The second adds its crystals, but neither decides on its own what is kept nor how often groups are drawn."""
    crystals = load_dataset("prototypes")
    other = crystals[(crystals.space_group == 225) & (crystals.num_sites <= 8)]
    write_crystals(tmp_path / "other.h5", other)
    own = load_dataset(dataset, "train")
    both = f"{dataset},{tmp_path}/other.h5"
    run = pretrain(settings(both, preset="alex-20", epochs=2, weights="1,0.25"), root="both")
    expected = torch.bincount(own.space_group, minlength=231).double()
    expected[225] += 0.25 * len(other)
    shares = load_model(run.path).space_group_log_prob.exp().double()
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=1e-4, atol=1e-6)
    steps = 2 * -(-round(len(own) + 0.25 * len(other)) // 16)
    assert run.metrics()["step"][-1] == steps
    assert load_extras(run.path / "model.safetensors").header["dataset"] == str(dataset)
    assert load_extras(run.path / "model.safetensors").header["beside"] == "other.h5"
    assert run.path.name.endswith("pretrain-prototypes")
    unseen = pretrain(settings(both, preset="alex-20", epochs=2, weights="1,0"), root="unseen")
    shares = load_model(unseen.path).space_group_log_prob.exp()
    torch.testing.assert_close(shares, torch.bincount(own.space_group, minlength=231) / len(own))
    assert unseen.metrics()["step"][-1] == 2 * -(-len(own) // 16)


def test_a_weighted_run_that_was_interrupted_continues_exactly(dataset, tmp_path, monkeypatch):
    write_crystals(tmp_path / "other.h5", load_dataset("prototypes")[150:200])
    config = settings(f"{dataset},{tmp_path}/other.h5", preset="alex-20", weights="1,0.5")
    straight = pretrain(config, root="straight")
    accumulate = Trainer._accumulate

    def interrupted(self, crystals, batch_size):
        accumulate(self, crystals, batch_size)
        if self.step == 11:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, root="halved")
    monkeypatch.setattr(Trainer, "_accumulate", accumulate)
    resumed = pretrain(resume=next(Path("halved").iterdir()))
    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_elements_are_exchanged_ever_more_rarely(dataset):
    train = load_dataset(str(dataset), "train").canonical()
    trainer = Trainer(
        settings(dataset, exchange=1.0, batch_size=len(train), epochs=90), train, train[:0], torch.device("cpu")
    )

    def changed(step: int) -> float:
        trainer.step = step
        shown = trainer._exchanged(train)
        assert torch.equal(shown.canonical().species, shown.species)
        again = trainer._exchanged(train)
        assert shown.formulas() == again.formulas(), "what is shown depends on the step alone"
        return 1 - sum(name in known for name in shown.formulas()) / len(train)

    known = set(train.formulas())
    assert changed(0) > 0.8  # a few cannot be changed, or become another of these
    assert 0.45 < changed(45) < 0.8  # two thirds, less these
    assert 0.2 < changed(89) < 0.45  # a third
    assert changed(0) > changed(45) > changed(89)


def test_learning_rate_warms_up_and_decays():
    config = PretrainConfig(lr=1.0, lr_final=0.1, warmup=10)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_last_weights_can_be_kept_instead_of_the_best(dataset):
    """A learning rate that grows until it ruins the model: the best epoch is not the last."""
    runs = [
        pretrain(unchecked(settings(dataset, preset="alex-20", epochs=3, lr=0.01, ema=0.0, keep=keep), lr_final=100.0))
        for keep in ("best", "last")
    ]
    losses = runs[0].metrics()["validation/loss"]
    assert min(losses) < losses[-1]
    validation = load_dataset(str(dataset), "validation")
    with torch.no_grad():
        found = [-float(sum(load_model(run.path).log_prob(validation).values()).mean()) for run in runs]
    assert found == pytest.approx([min(losses), losses[-1]], rel=1e-4)


def test_early_stopping(dataset):
    run = pretrain(settings(dataset, preset="alex-20", epochs=50, patience=2, lr=1e-12))
    assert max(run.metrics()["epoch"]) == 3  # nothing can get better after the first


def test_models_know_their_space_groups(dataset):
    run = pretrain(settings(dataset, preset="alex-20", epochs=1))
    train = load_dataset(dataset, "train")
    shares = load_model(run.path).space_group_log_prob.exp()
    expected = torch.bincount(train.space_group, minlength=231) / len(train)
    torch.testing.assert_close(shares, expected.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "alex20"}, "did you mean 'alex-20'"),
        ({"dataset": "nowhere.h5"}, "nowhere"),
        ({"precision": "float8"}, "none of auto, float32, bfloat16"),
        ({"device": "cuda:77"}, "cannot be used"),
        ({"init": "no.safetensors"}, "no such model"),
        ({"weights": "1,2"}, "2 numbers for 1 datasets"),
        ({"weights": "much"}, "give numbers such as 1,0.5"),
        ({"weights": "nan"}, "at least 0 and at most"),
        ({"weights": "-1"}, "at least 0 and at most"),
        ({"weights": "0"}, "would show no crystal"),
        ({"dataset": "prototypes,nowhere.h5"}, "nowhere"),
    ],
)
def test_bad_settings(dataset, changes, message):
    with pytest.raises(UserError, match=message):
        pretrain(settings(dataset, **{"epochs": 1, **changes}))
    assert not Path("runs").exists()
