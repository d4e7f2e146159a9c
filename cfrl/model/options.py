"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfrl.settings import (
    Count,
    CountOrZero,
    Fraction,
    FractionBelowOne,
    Minutes,
    PositiveFraction,
    PositiveWeight,
    Seed,
    Settings,
    Weight,
    option,
)

# The names of transformer.PRESETS, here so that the command line needs no torch to offer them.
PRESET_NAMES = ("default", "small", "alex-20")


@dataclass(frozen=True)
class TrainingOptions(Settings):
    """Maximum likelihood on crystals."""

    preset: Literal[*PRESET_NAMES] = option("default", "Architecture: default, small, alex-20 (the published one).")
    epochs: Count = option(100, "Passes over the training split.")
    batch_size: Count = option(128, "Crystals per optimiser step, over all processes.")
    lr: PositiveFraction = option(1e-3, "Peak learning rate of AdamW, per optimiser step.")
    lr_final: Fraction = option(0.02, "Learning rate at the end, as a fraction of the peak (cosine decay).")
    warmup: CountOrZero = option(300, "Steps of linear learning-rate warm-up.")
    weight_decay: Weight = option(0.05, "AdamW weight decay, on matrices only.")
    clip: PositiveWeight = option(1.0, "Largest norm of the gradient; longer ones are shortened to it.")
    dropout: FractionBelowOne | None = option(
        None, "Probability of dropout, 0 to 1; negative: the preset's own.", unset=-1.0
    )
    ema: FractionBelowOne | None = option(
        0.999, "Decay of the moving average of the weights that is validated and shipped; 0: none.", unset=0.0
    )
    augment: bool = option(False, "Show each crystal in a random equivalent description (Euclidean normaliser).")
    keep: Literal["best", "last"] = option("best", "Weights that become the model: best (by validation loss) or last.")
    patience: Count | None = option(
        None, "Stop after so many epochs without a better validation loss; 0: never.", unset=0
    )
    validate_every: Count = option(1, "Epochs between validations.")
    checkpoint_minutes: Minutes = option(2.0, "Minutes between checkpoints (one is also written at the end).")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16."
    )
    seed: Seed = option(0, "Seed of weights, data order and dropout.")
