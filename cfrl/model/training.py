"""Training by maximum likelihood.

What happens at a step depends on the options and the step's number alone (data order, dropout and augmentation are
seeded by it), so a resumed run continues exactly as if it had never stopped. Under `torchrun` every process takes its
share of each batch (DDP).
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.packed import PackedCrystals
from cfrl.crystals.substitution import substitute, substitution_table
from cfrl.errors import NotFinite
from cfrl.model.network import space_group_shares
from cfrl.model.options import PRESETS, TrainingOptions
from cfrl.model.transformer import FACTORS, CrystalTransformer, chunk_size
from cfrl.runs.interrupt import stop_on_signal

BUCKET = 50  # batches among which crystals are sorted by length
LOOK = 10  # steps between two looks at what the device has summed up, for which it must have come so far
EXCHANGED_LAST = 1 / 3  # of the share of crystals with other elements is left at the end; without, letters overfit


class Watcher:
    """Who is told how a training goes, and keeps what is to be kept. This one does neither."""

    def begin(self, trainer: Trainer) -> None:
        """The first step comes now."""

    def step(self, done: int, loss: float) -> None:
        """So many steps are done; `loss`: mean since the last epoch, up to the last look, nats per crystal."""

    def epoch(self, trainer: Trainer, metrics: dict[str, float], better: bool) -> None:
        """An epoch is over; comes before any checkpoint that knows of it."""

    def checkpoint(self, state: dict[str, Any]) -> None:
        """What `Trainer.restore` goes on from."""


class Trainer:
    """State and steps of one training; `fit` is the whole of it."""

    def __init__(
        self,
        options: TrainingOptions,
        train: CrystalBatch | PackedCrystals,
        validation: CrystalBatch,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        init: CrystalTransformer | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """`weights`: (n,) how often an epoch shows each training crystal, on average; None: once."""
        self.options, self.device, self.rank, self.world = options, device, rank, world
        self.train, self.validation, self.weights = PackedCrystals.of(train), validation, weights
        torch.manual_seed(options.seed)
        self.model = initial_model(options, self.train.space_group, init, weights).to(device)
        self.tokens = torch.cat([self.model.num_tokens(part) for part in self.train.batches()])  # (n,)
        self.network = nn.parallel.DistributedDataParallel(self.model) if world > 1 else self.model
        self.average = AveragedModel(self.model, multi_avg_fn=self._average_weights) if options.ema else None
        self.optimizer = _optimizer(self.model, options)
        self.exchanges = substitution_table() if options.exchange else None
        shown = len(train) if weights is None else round(float(weights.sum()))
        self.batches_per_epoch = math.ceil(shown / options.batch_size)
        self.total_steps = options.epochs * self.batches_per_epoch
        self.step = 0
        self.best, self.best_epoch = math.inf, 0
        self.sums: dict[str, float] = defaultdict(float)  # of the losses since they were last logged
        self.loss = math.nan  # this epoch's so far, up to the last look, of all processes' crystals
        self._unread = torch.zeros(len(FACTORS) + 1, dtype=torch.float64, device=device)  # and of the gradient's norm

    # ---- the loop ----------------------------------------------------------------------------------------------

    def fit(self, watcher: Watcher | None = None) -> None:
        """Trains to the last epoch or an early stop.

        Raises:
            KeyboardInterrupt: after Ctrl-C, which lets a step end and leaves a checkpoint.
        """
        watcher, saved = watcher or Watcher(), time.monotonic()
        watcher.begin(self)
        with stop_on_signal() as stop:
            self._end_epoch(watcher)  # of a checkpoint by an older version, which was written before it
            while self.step < self.total_steps and not self._out_of_patience():
                epoch, first = divmod(self.step, self.batches_per_epoch)
                order = (self.options.batch_size, self.options.seed, epoch, self.weights)
                batches = epoch_batches(self.tokens, *order)
                for rows in batches[first:]:
                    self._train_step(rows)
                    if self.step % LOOK == 1:
                        self._look()
                    watcher.step(self.step, self.loss)
                    self._end_epoch(watcher)
                    if stop.requested:
                        watcher.checkpoint(self.state_dict())
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > 60 * self.options.checkpoint_minutes:
                        watcher.checkpoint(self.state_dict())
                        saved = time.monotonic()
        watcher.checkpoint(self.state_dict())

    def _train_step(self, rows: Tensor) -> None:
        """Nothing in it waits for the device; `_look` does."""
        began = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.options)
        # A function of the step alone: nothing about randomness needs to be saved.
        torch.manual_seed(hash((self.options.seed, self.step, self.rank)) % 2**63)
        mine = self._exchanged(self.train[rows[self.rank :: self.world]])
        if self.options.augment:
            mine = mine.described_as((torch.rand(len(mine)) * mine.num_descriptions()).long())
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.model.num_tokens(mine).argsort().split(chunk_size(self.device, self._half))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last or self.world == 1 else self.network.no_sync():
                self._accumulate(mine[part].trim().to(self.device), len(rows))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._unread[-1] += norm * len(rows)
        self.sums["crystals"] += len(rows)
        self.sums["seconds"] += time.monotonic() - began

    def _exchanged(self, crystals: CrystalBatch) -> CrystalBatch:
        """Some of the crystals with other elements; the fewer the later."""
        if self.exchanges is None:
            return crystals
        share = self.options.exchange * (1 - (1 - EXCHANGED_LAST) * self.step / self.total_steps)
        rng = np.random.default_rng([self.options.seed, self.step, self.rank])
        chosen = torch.from_numpy(rng.random(len(crystals)) < share)
        others = substitute(crystals[chosen], self.exchanges, rng)
        return CrystalBatch.cat([crystals[~chosen], others.canonical()])

    def _accumulate(self, crystals: CrystalBatch, batch_size: int) -> None:
        """Adds the gradient of some crystals of a batch of `batch_size`, over all processes."""
        with self._autocast():
            scores = self.network(crystals)
        losses = torch.stack([-scores[name].sum() for name in FACTORS])
        # DDP averages over processes; this makes it the mean over the whole batch, however it was shared out.
        (losses.sum() * self.world / batch_size).backward()
        self._unread[:-1] += losses.detach()

    def _look(self) -> None:
        """Reads what the device has summed up. Raises NotFinite, before such weights are written over better ones."""
        if not self.sums:  # no step since they were logged
            return
        began = time.monotonic()
        *losses, norm = self._unread.tolist()
        self._unread.zero_()
        self._require_finite("gradient", norm)
        for name, value in zip(FACTORS, losses, strict=True):
            self.sums[f"train/{name}"] += value
        self.sums["gradient_norm"] += norm
        total = sum(self.sums[f"train/{name}"] for name in FACTORS)
        self.loss = total * self.world / self.sums["crystals"]
        self.sums["seconds"] += time.monotonic() - began

    def _end_epoch(self, watcher: Watcher) -> None:
        """Where an epoch ends: validation, and what the watcher keeps of it; before any checkpoint.

        A kill on the way leaves a checkpoint of an earlier step, from which all of this comes again. A checkpoint of
        this step knows that it is done: the sums are empty.
        """
        epoch, inside = divmod(self.step, self.batches_per_epoch)
        if inside or not self.sums or (epoch % self.options.validate_every and self.step < self.total_steps):
            return
        self._look()
        metrics = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"], **self._training_metrics()}
        if len(self.validation):
            metrics |= self._validate()
        judged = metrics.get("validation/loss", metrics["train/loss"])
        self._require_finite("loss", judged)
        better = judged < self.best
        if better:
            self.best, self.best_epoch = judged, epoch
        watcher.epoch(self, metrics, better)

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
        means = {
            name: value / crystals for name, value in self.sums.items() if name not in ("crystals", "seen", "seconds")
        }
        metrics = {"train/loss": sum(means[f"train/{name}"] for name in FACTORS), **means}
        metrics["crystals_per_second"] = crystals / max(self.sums["seconds"], 1e-9)
        self.sums.clear()
        return metrics

    def _require_finite(self, name: str, value: float) -> None:
        """Raises NotFinite, before such weights are written over better ones."""
        if not math.isfinite(value):
            raise NotFinite(
                f"the {name} is {value} after {self.step} steps: go on from the last checkpoint with --resume and a "
                f"lower --lr than {self.options.lr:g}, or start again"
            )

    def _out_of_patience(self) -> bool:
        epoch = self.step // self.batches_per_epoch
        return bool(self.options.patience) and epoch - self.best_epoch >= self.options.patience

    # ---- what is kept ------------------------------------------------------------------------------------------

    def averaged_model(self) -> CrystalTransformer:
        """The weights that are validated and shipped."""
        return self.average.module if self.average is not None else self.model

    def _average_weights(self, averaged: list[Tensor], current: list[Tensor], _count: Tensor | int) -> None:
        # The average is short at first, so that it does not remember the random start.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. Raises NotFinite as `_look`."""
        self._look()
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "sums": dict(self.sums),
            **{name: getattr(self, name) for name in ("step", "best", "best_epoch")},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self.model.load_state_dict(state["model"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):  # the setting counts
            group["weight_decay"] = decay
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.sums = defaultdict(float, state["sums"])
        self.step, self.best, self.best_epoch = state["step"], state["best"], state["best_epoch"]

    # ---- odds and ends -----------------------------------------------------------------------------------------

    @property
    def _half(self) -> bool:
        """Whether products are in bfloat16."""
        wanted = self.options.precision
        return wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self._half else nullcontext()


def initial_model(
    options: TrainingOptions,
    space_group: Tensor,
    init: CrystalTransformer | None = None,
    weights: Tensor | None = None,
) -> CrystalTransformer:
    """Random or given parameters, and the shares of the groups of the training crystals, (n,), weighted."""
    architecture = PRESETS[options.preset] if init is None else init.config
    if options.dropout is not None:
        architecture = replace(architecture, dropout=options.dropout)
    network = CrystalTransformer(architecture)
    if init is not None:
        network.load_state_dict(init.state_dict())
    network.space_group_log_prob.copy_(space_group_shares(space_group.long(), weights))
    return network


def epoch_batches(
    length: Tensor, batch_size: int, seed: int, epoch: int, weights: Tensor | None = None
) -> list[Tensor]:
    """Row numbers of each batch of an epoch: shuffled, but crystals of like length together.

    With weights (n,) a crystal comes so many times on average, and never one time more or less than the whole numbers
    beside its weight (systematic sampling of the shuffled crystals); all epochs are as long as the weights add up to.
    The shuffled crystals are sorted by length within stretches of `BUCKET` batches, so that padding is rare and the
    order stays random; the batches are then shuffled again.
    """
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    order = torch.randperm(len(length), generator=generator)
    if weights is not None:
        ends = weights[order].double().cumsum(0)
        shown = round(float(weights.sum()))
        marks = (torch.arange(shown) + torch.rand((), generator=generator, dtype=torch.double)) * (ends[-1] / shown)
        order = order[torch.searchsorted(ends, marks, right=True).clamp(max=len(order) - 1)]
        order = order[torch.randperm(shown, generator=generator)]  # one that comes twice is not beside itself
    stretches = [rows[length[rows].argsort(stable=True)] for rows in order.split(BUCKET * batch_size)]
    batches = [batch for rows in stretches for batch in rows.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def learning_rate(step: int, total: int, options: TrainingOptions) -> float:
    """Linear warm-up, then a cosine down to `lr_final` of the peak."""
    warmup = min(options.warmup, max(total // 10, 1))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return options.lr * (options.lr_final + (1 - options.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW; weight decay acts on the matrices of linear layers, not on biases, norms and embeddings."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.dim() < 2 or "embedding.weight" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)


class _Kept(Watcher):
    """Keeps the weights of the best epoch, or of the last one, in memory."""

    def epoch(self, trainer: Trainer, metrics: dict[str, float], better: bool) -> None:
        if better or trainer.options.keep == "last":
            self.model = copy.deepcopy(trainer.averaged_model())


def pretrain(
    crystals: CrystalBatch,
    validation: CrystalBatch | None = None,
    *,
    device: str | torch.device = "cpu",
    init: CrystalTransformer | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> CrystalTransformer:
    """A model trained on crystals, in evaluation mode.

    Args:
        crystals: what to learn; those with more sites than the preset has room for are left out.
        validation: what decides which epoch's weights are kept; None: the loss of training.
        init: start from the weights of this model.
        weights: (n,) how often an epoch shows each crystal, on average; None: once.
        options: fields of `TrainingOptions`, such as epochs=20, preset="tiny".
    """
    settings = TrainingOptions(**options)
    limit = PRESETS[settings.preset].max_sites - 1
    parts = [crystals, crystals[:0] if validation is None else validation]
    train, held = (part[part.num_sites <= limit].canonical() for part in parts)
    weights = None if weights is None else weights[crystals.num_sites <= limit]
    kept = _Kept()
    Trainer(settings, train, held, torch.device(device), init=init, weights=weights).fit(kept)
    return kept.model.eval().requires_grad_(False)
