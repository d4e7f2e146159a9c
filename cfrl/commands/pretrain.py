"""`cfrl pretrain`: maximum likelihood on a dataset of crystals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cfrl.config import PretrainConfig, read_run_config
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.packed import PackedCrystals
from cfrl.errors import UserError
from cfrl.files import atomic_file, provenance
from cfrl.io.datasets import Dataset
from cfrl.model.files import Extras, load_model, save_model
from cfrl.model.options import PRESETS
from cfrl.model.training import Trainer, Watcher
from cfrl.model.transformer import FACTORS
from cfrl.runs.folder import RunFolder
from cfrl.runs.progress import progress_bar
from cfrl.runs.ranks import processes
from cfrl.untrusted import fitting

MAX_WEIGHT = 1000


def pretrain(config: PretrainConfig | None = None, resume: Path | None = None, root: str = "runs") -> RunFolder | None:
    """Trains a model; returns the run folder, whose `model.safetensors` is the best or the last one, as `keep` says.

    Of several processes (`torchrun`) the first one writes; the others get None.

    Args:
        config: settings; None: the defaults or, with `resume`, those of the run.
        resume: an interrupted run to go on with.
        root: where the new run folder goes.

    Raises:
        UserError: bad settings, dataset or device.
        KeyboardInterrupt: after a checkpoint was written.
    """
    if resume is not None:
        run = RunFolder.open(resume)
        config = config or read_run_config(PretrainConfig, run.path / "config.toml")
    config = config or PretrainConfig()
    with processes(config.device) as ranks:
        train, validation, weights = _datasets(config)
        init = load_model(config.init) if config.init else None
        trainer = Trainer(config, train, validation, ranks.device, ranks.rank, ranks.size, init, weights)
        if not ranks.first:
            _restore(trainer, run if resume is not None else None)
            trainer.fit()
            return None
        if resume is None:
            run = RunFolder.create("pretrain", Path(_names(config)[0]).stem, config, root)
        with run.locked(), Recorder(run, config) as recorder:
            _restore(trainer, run if resume is not None else None)
            run.truncate(trainer.step)
            if resume is not None:
                run.write_config("pretrain", config)
            trainer.fit(recorder)
            recorder.finish(trainer)
    return run


def _restore(trainer: Trainer, run: RunFolder | None) -> None:
    state = run.load_checkpoint() if run is not None else None
    if state is not None:
        with fitting(run.path / "checkpoint.pt"):
            trainer.restore(state)


class Recorder(Watcher):
    """Shows how a training goes, and writes it down: metrics, model file, checkpoints."""

    def __init__(self, run: RunFolder, config: PretrainConfig) -> None:
        self.run, self.config, self.console, self._bar = run, config, Console(), ExitStack()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            self.console.print(f"Stopped. Go on: cfrl pretrain --resume {self.run.path}", soft_wrap=True)

    def begin(self, trainer: Trainer) -> None:
        size, total = sum(p.numel() for p in trainer.model.parameters()), trainer.total_steps
        self.console.print(
            f"{len(trainer.train)} crystals to train on, {len(trainer.validation)} to validate; {size:,} parameters "
            f"({self.config.preset}) on {trainer.device}; step {trainer.step} of {total}; run {self.run.path}"
        )
        self._advance = self._bar.enter_context(progress_bar("training", total, self.console))
        self._advance(trainer.step)

    def step(self, done: int, loss: float) -> None:
        self._advance(done, note=f"step {done:,}, loss {loss:.2f}")

    def epoch(self, trainer: Trainer, metrics: dict[str, float], better: bool) -> None:
        """Model file, then the row of metrics: a kill between them leaves no row without its model."""
        if better or self.config.keep == "last":
            self._write_model(trainer, metrics)
        self.run.log(trainer.step, metrics)
        self.console.print(_epoch_line(metrics, best=trainer.best_epoch == metrics["epoch"]))

    def checkpoint(self, state: dict[str, Any]) -> None:
        self.run.save_checkpoint(state)

    def finish(self, trainer: Trainer) -> None:
        """The plot, and where everything is."""
        plot = plot_losses(self.run)
        self.run.finish()
        self.console.print(f"Best epoch {trainer.best_epoch}: {trainer.best:.3f} nats per crystal.")
        for path in filter(None, (self.run.path / "model.safetensors", self.run.path / "metrics.csv", plot)):
            self.console.print(f"  {path}", highlight=False)

    def _write_model(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        names = _names(self.config)
        dataset = Path(names[0])
        info = {
            "dataset": str(dataset.resolve()) if dataset.exists() else names[0],
            **({"beside": ",".join(Path(name).name for name in names[1:])} if len(names) > 1 else {}),
            "preset": self.config.preset,
            "training_crystals": str(len(trainer.train)),
            "metrics": json.dumps({name: round(value, 5) for name, value in metrics.items()}),
            "provenance": json.dumps(provenance()),
        }
        save_model(trainer.averaged_model(), self.run.path / "model.safetensors", Extras(info))


def _epoch_line(metrics: dict[str, float], best: bool) -> str:
    line = f"epoch {metrics['epoch']:4d}  train {metrics['train/loss']:7.3f}"
    if "validation/loss" in metrics:
        parts = "  ".join(f"{name} {metrics[f'validation/{name}']:.3f}" for name in FACTORS)
        line += f"  validation {metrics['validation/loss']:7.3f} ({parts})"
    return line + f"  {metrics['crystals_per_second']:.0f} crystals/s" + ("  best" if best else "")


def plot_losses(run: RunFolder) -> Path | None:
    """Loss curves, total and by factor, as `loss.png`; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = run.metrics()
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.2), constrained_layout=True)
    for axis, name in zip(axes, ("loss", *FACTORS), strict=True):
        for split in ("train", "validation"):
            if f"{split}/{name}" in metrics:
                axis.plot(metrics["epoch"], metrics[f"{split}/{name}"], label=split)
        axis.set(title=name, xlabel="epoch")
    axes[0].set_ylabel("nats per crystal")
    axes[0].legend()
    path = run.path / "loss.png"
    with atomic_file(path) as temp:
        figure.savefig(temp, format="png", dpi=150)
    plt.close(figure)
    return path


def _datasets(config: PretrainConfig) -> tuple[PackedCrystals, CrystalBatch, Tensor | None]:
    """Crystals to train on and to validate, and how often an epoch shows each of the former, (n,)."""
    names, shown = _names(config), _weights(config)
    limit = PRESETS[config.preset].max_sites - 1
    parts = [PackedCrystals(_usable(name, "train", limit)) for name in names]
    train = PackedCrystals(batch for part in parts for batch in part.batches()) if len(parts) > 1 else parts[0]
    validation = CrystalBatch.cat(batch for name in names for batch in _usable(name, "validation", limit))
    if shown is None:
        return train, validation, None
    weights = torch.tensor(shown).repeat_interleave(torch.tensor([len(part) for part in parts]))
    if round(float(weights.sum())) < 1:
        raise UserError(f"weights = {config.weights}: an epoch would show no crystal")
    return train, validation, weights


def _usable(name: str, split: str, limit: int) -> Iterator[CrystalBatch]:
    """The crystals of a dataset, some thousands at a time, but for those of more sites."""
    dataset = Dataset(name, split)
    if split == "train" and not dataset.size:
        raise UserError(f"{name}: no crystals to train on")
    for batch in dataset.batches():
        _refuse_impossible_cells(name, batch)
        yield batch[batch.num_sites <= limit].canonical()


def _names(config: PretrainConfig) -> list[str]:
    """The datasets of `a.h5,b.h5`; a path that exists is one, whatever its name."""
    if Path(config.dataset).exists():
        return [config.dataset]
    return [name.strip() for name in config.dataset.split(",")]


def _weights(config: PretrainConfig) -> list[float] | None:
    """Numbers of `1,0.5`, one for each dataset. Raises UserError."""
    if config.weights is None:
        return None
    try:
        weights = [float(word) for word in config.weights.split(",")]
    except ValueError:
        raise UserError(f"weights = {config.weights}: give numbers such as 1,0.5") from None
    if len(weights) != len(_names(config)):
        raise UserError(f"weights = {config.weights}: {len(weights)} numbers for {len(_names(config))} datasets")
    if not all(0 <= weight <= MAX_WEIGHT for weight in weights):
        raise UserError(f"weights = {config.weights}: each should be at least 0 and at most {MAX_WEIGHT}")
    return weights


def _refuse_impossible_cells(name: str, crystals: CrystalBatch) -> None:
    """No sampler drew these, and nothing is to be learned from them."""
    bad = (~crystals.possible_cells()).nonzero()[:, 0].tolist()
    if bad:
        which = f"crystal {crystals.ids[bad[0]]}" if crystals.ids else "a crystal"
        cell = ", ".join(f"{v:.4g}" for v in crystals.lattice[bad[0]].tolist())
        raise UserError(
            f"{name}: {which} has an impossible cell ({cell}; {len(bad):,} such); import it anew: cfrl data import"
        )
