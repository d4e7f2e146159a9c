"""`cfrl pretrain`: maximum likelihood on a dataset of crystals.

What happens at a step depends on the settings and the step's number alone (data order, dropout and augmentation are
seeded by it), so a resumed run continues exactly as if it had never stopped. Under `torchrun` every process takes its
share of each batch (DDP).
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cfrl.config import PretrainConfig, read_run_config
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import NotFinite, UserError
from cfrl.files import atomic_file, provenance
from cfrl.io.datasets import load_dataset
from cfrl.model.files import load_model, save_model
from cfrl.model.transformer import FACTORS, PRESETS, CrystalTransformer, chunk_size, space_group_shares
from cfrl.runs.devices import processes
from cfrl.runs.folder import RunFolder
from cfrl.runs.interrupt import stop_on_signal
from cfrl.untrusted import fitting

BUCKET = 50  # batches among which crystals are sorted by length


def pretrain(config: PretrainConfig | None = None, resume: Path | None = None, root: str = "runs") -> RunFolder:
    """Trains a model; returns the run folder, whose `model.safetensors` is the best or the last one, as `keep` says.

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
    with processes(config.device) as (rank, world, device):
        train, validation = _datasets(config)
        trainer = Trainer(config, train, validation, device, rank, world)
        if resume is None:
            run = RunFolder.create("pretrain", Path(config.dataset).stem, config, root) if rank == 0 else None
        with run.locked() if rank == 0 else nullcontext():
            # Every process reads the checkpoint; only the first one writes.
            trainer.run = run if rank == 0 else None
            if resume is not None:
                with fitting(run.path / "checkpoint.pt"):
                    trainer.restore(run.load_checkpoint())
                if rank == 0:
                    run.write_config("pretrain", config)
            trainer.fit()
    return run


class Trainer:
    """State and steps of one training; `fit` is the whole of it."""

    def __init__(
        self,
        config: PretrainConfig,
        train: CrystalBatch,
        validation: CrystalBatch,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.run: RunFolder | None = None  # where to write; the first process sets it
        self.train, self.validation = train, validation
        torch.manual_seed(config.seed)
        self.model = initial_model(config, train).to(device)
        self.network = nn.parallel.DistributedDataParallel(self.model) if world > 1 else self.model
        self.average = AveragedModel(self.model, multi_avg_fn=self._average_weights) if config.ema else None
        self.optimizer = _optimizer(self.model, config)
        self.batches_per_epoch = math.ceil(len(train) / config.batch_size)
        self.total_steps = config.epochs * self.batches_per_epoch
        self.step = 0
        self.best, self.best_epoch = math.inf, 0
        self.sums: dict[str, float] = defaultdict(float)  # of the losses since they were last logged
        self.console = Console(quiet=rank > 0)

    # ---- the loop ----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last epoch, an early stop, or Ctrl-C (which lets a step end and leaves a checkpoint)."""
        self._announce()
        saved = time.monotonic()
        with self._progress() as (progress, task), stop_on_signal() as stop:
            self._end_epoch()  # of a checkpoint by an older version, which was written before it
            while self.step < self.total_steps and not self._out_of_patience():
                epoch, first = divmod(self.step, self.batches_per_epoch)
                batches = epoch_batches(self.train.num_sites, self.config.batch_size, self.config.seed, epoch)
                for rows in batches[first:]:
                    self._train_step(rows)
                    progress.update(task, completed=self.step, loss=self._mean_loss())
                    self._end_epoch()
                    if stop.requested:
                        self._stop()
                    if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                        self.save()
                        saved = time.monotonic()
        self.save()
        self._finish()

    def _stop(self) -> None:
        self.save()
        if self.run is not None:
            self.console.print(f"Stopped at step {self.step}. Go on: cfrl pretrain --resume {self.run.path}")
        raise KeyboardInterrupt

    def _train_step(self, rows: Tensor) -> None:
        began = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)
        # A function of the step alone: nothing about randomness needs to be saved.
        torch.manual_seed(hash((self.config.seed, self.step, self.rank)) % 2**63)
        mine = self.train[rows[self.rank :: self.world]].trim().to(self.device)
        if self.config.augment:
            choice = torch.rand(len(mine), device=self.device) * mine.num_descriptions()
            mine = mine.described_as(choice.long())
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.arange(len(mine), device=self.device).split(chunk_size(self.device))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last or self.world == 1 else self.network.no_sync():
                self._accumulate(mine[part].trim(), len(rows))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._require_finite("gradient", float(norm))
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.sums["gradient_norm"] += float(norm) * len(rows)
        self.sums["crystals"] += len(rows)
        self.sums["seconds"] += time.monotonic() - began

    def _accumulate(self, crystals: CrystalBatch, batch_size: int) -> None:
        """Adds the gradient of some crystals of a batch of `batch_size`, over all processes."""
        with self._autocast():
            scores = self.network(crystals)
        losses = {name: -scores[name].sum() for name in FACTORS}
        # DDP averages over processes; this makes it the mean over the whole batch, however it was shared out.
        (sum(losses.values()) * self.world / batch_size).backward()
        for name in FACTORS:
            self.sums[f"train/{name}"] += losses[name].item()

    def _end_epoch(self) -> None:
        """Where an epoch ends: validation, model file, row of metrics; in this order, and before any checkpoint.

        A kill on the way leaves a checkpoint of an earlier step, from which all of this comes again. A checkpoint of
        this step knows that it is done: the sums are empty.
        """
        epoch, inside = divmod(self.step, self.batches_per_epoch)
        if inside or not self.sums or (epoch % self.config.validate_every and self.step < self.total_steps):
            return
        metrics = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"], **self._training_metrics()}
        if len(self.validation):
            metrics |= self._validate()
        judged = metrics.get("validation/loss", metrics["train/loss"])
        self._require_finite("loss", judged)
        better = judged < self.best
        if better:
            self.best, self.best_epoch = judged, epoch
        if self.run is not None and (better or self.config.keep == "last"):
            self._write_model(metrics)
        if self.run is not None:
            self.run.log(self.step, metrics)
            self.console.print(_epoch_line(metrics, best=self.best_epoch == epoch))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean negative log-probability of the validation crystals by the averaged weights, nats per crystal."""
        model = self.averaged_model().eval()
        with self._autocast():
            scores = model.log_prob(self.validation)
        means = {f"validation/{name}": -scores[name].double().mean().item() for name in FACTORS}
        return {"validation/loss": sum(means.values()), **means}

    def _training_metrics(self) -> dict[str, float]:
        if self.world > 1:  # every process has summed its own crystals
            sums = torch.tensor([self.sums[f"train/{name}"] for name in FACTORS], device=self.device)
            torch.distributed.all_reduce(sums)
            self.sums.update(zip((f"train/{name}" for name in FACTORS), sums.tolist(), strict=True))
        crystals = self.sums["crystals"]
        means = {name: value / crystals for name, value in self.sums.items() if name not in ("crystals", "seconds")}
        metrics = {"train/loss": sum(means[f"train/{name}"] for name in FACTORS), **means}
        metrics["crystals_per_second"] = crystals / max(self.sums["seconds"], 1e-9)
        self.sums.clear()
        return metrics

    def _require_finite(self, name: str, value: float) -> None:
        """Raises NotFinite, before such weights are written over better ones."""
        if not math.isfinite(value):
            raise NotFinite(
                f"the {name} is {value} after {self.step} steps: go on from the last checkpoint with --resume and a "
                f"lower --lr than {self.config.lr:g}, or start again"
            )

    def _mean_loss(self) -> float:
        """Of this process's crystals, scaled up to the whole batch: for the progress bar."""
        total = sum(self.sums[f"train/{name}"] for name in FACTORS)
        return total * self.world / max(self.sums["crystals"], 1)

    def _out_of_patience(self) -> bool:
        epoch = self.step // self.batches_per_epoch
        return bool(self.config.patience) and epoch - self.best_epoch >= self.config.patience

    # ---- what is kept ------------------------------------------------------------------------------------------

    def averaged_model(self) -> CrystalTransformer:
        """The weights that are validated and shipped."""
        return self.average.module if self.average is not None else self.model

    def _average_weights(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        # The average is short at first, so that it does not remember the random start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def save(self) -> None:
        """Writes the checkpoint (first process only)."""
        if self.run is not None:
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "sums": dict(self.sums),
                **{name: getattr(self, name) for name in ("step", "best", "best_epoch")},
            }
            self.run.save_checkpoint(state)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continues from a checkpoint; None: from the start."""
        if state is not None:
            self.model.load_state_dict(state["model"])
            decays = [group["weight_decay"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, decay in zip(self.optimizer.param_groups, decays, strict=True):  # the setting counts
                group["weight_decay"] = decay
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.sums = defaultdict(float, state["sums"])
            self.step, self.best, self.best_epoch = state["step"], state["best"], state["best_epoch"]
        if self.run is not None:
            self.run.truncate(self.step)

    def _write_model(self, metrics: dict[str, float]) -> None:
        dataset = Path(self.config.dataset)
        info = {
            "dataset": str(dataset.resolve()) if dataset.exists() else self.config.dataset,
            "preset": self.config.preset,
            "training_crystals": str(len(self.train)),
            "metrics": json.dumps({name: round(value, 5) for name, value in metrics.items()}),
            "provenance": json.dumps(provenance()),
        }
        save_model(self.averaged_model(), self.run.path / "model.safetensors", info)

    def _finish(self) -> None:
        if self.run is None:
            return
        plot = plot_losses(self.run)
        self.run.finish()
        self.console.print(f"Best epoch {self.best_epoch}: {self.best:.3f} nats per crystal.")
        for path in (self.run.path / "model.safetensors", self.run.path / "metrics.csv", plot):
            if path is not None:
                self.console.print(f"  {path}", highlight=False)

    # ---- odds and ends -----------------------------------------------------------------------------------------

    def _autocast(self):
        wanted = self.config.precision
        if wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _announce(self) -> None:
        size = sum(p.numel() for p in self.model.parameters())
        self.console.print(
            f"{len(self.train)} crystals to train on, {len(self.validation)} to validate; {size:,} parameters "
            f"({self.config.preset}) on {self.device}; step {self.step} of {self.total_steps}"
            + (f"; run {self.run.path}" if self.run is not None else "")
        )

    @contextmanager
    def _progress(self) -> Iterator[tuple[Progress, TaskID]]:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.2f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=self.rank > 0) as progress:
            yield progress, progress.add_task("", total=self.total_steps, completed=self.step, loss=math.nan)


def initial_model(config: PretrainConfig, train: CrystalBatch) -> CrystalTransformer:
    """Random or given weights, and the space-group distribution of the training crystals.

    Raises:
        UserError: weights that cannot be loaded.
    """
    if config.init:
        model = load_model(config.init)
        architecture = model.config
    else:
        model, architecture = None, PRESETS[config.preset]
    if config.dropout is not None:
        architecture = replace(architecture, dropout=config.dropout)
    network = CrystalTransformer(architecture)
    if model is not None:
        network.load_state_dict(model.state_dict())
    network.space_group_log_prob.copy_(space_group_shares(train.space_group))
    return network


def epoch_batches(num_sites: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Row numbers of each batch of an epoch: shuffled, but crystals of like length together.

    The shuffled crystals are sorted by length within stretches of `BUCKET` batches, so that padding is rare and the
    order stays random; the batches are then shuffled again.
    """
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    order = torch.randperm(len(num_sites), generator=generator)
    stretches = [rows[num_sites[rows].argsort(stable=True)] for rows in order.split(BUCKET * batch_size)]
    batches = [batch for rows in stretches for batch in rows.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def learning_rate(step: int, total: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine down to `lr_final` of the peak."""
    warmup = min(config.warmup, max(total // 10, 1))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))


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


def _optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on the matrices of linear layers, not on biases, norms and embeddings."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.dim() < 2 or "embedding.weight" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


def _datasets(config: PretrainConfig) -> tuple[CrystalBatch, CrystalBatch]:
    limit = PRESETS[config.preset].max_sites - 1
    train, validation = (load_dataset(config.dataset, split) for split in ("train", "validation"))
    if not len(train):
        raise UserError(f"{config.dataset}: no crystals to train on")
    for part in (train, validation):
        _refuse_impossible_cells(config.dataset, part)
    return tuple(part[part.num_sites <= limit].canonical() for part in (train, validation))


def _refuse_impossible_cells(name: str, crystals: CrystalBatch) -> None:
    """No sampler drew these, and nothing is to be learned from them."""
    bad = (~crystals.possible_cells()).nonzero()[:, 0].tolist()
    if bad:
        which = f"crystal {crystals.ids[bad[0]]}" if crystals.ids else "a crystal"
        cell = ", ".join(f"{v:.4g}" for v in crystals.lattice[bad[0]].tolist())
        raise UserError(
            f"{name}: {which} has an impossible cell ({cell}; {len(bad):,} such); import it anew: cfrl data import"
        )


def _epoch_line(metrics: dict[str, float], best: bool) -> str:
    line = f"epoch {metrics['epoch']:4d}  train {metrics['train/loss']:7.3f}"
    if "validation/loss" in metrics:
        parts = "  ".join(f"{name} {metrics[f'validation/{name}']:.3f}" for name in FACTORS)
        line += f"  validation {metrics['validation/loss']:7.3f} ({parts})"
    return line + f"  {metrics['crystals_per_second']:.0f} crystals/s" + ("  best" if best else "")
