"""How a model is built and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.errors import UserError
from cfrl.settings import (
    Count,
    CountOrZero,
    Fraction,
    FractionBelowOne,
    Minutes,
    PositiveFraction,
    PositiveWeight,
    Range,
    Seed,
    Settings,
    Weight,
    option,
)

Size = Annotated[int, Range(1, 10**5)]  # of a layer, or how many of something


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Sizes and conventions of a model; stored in its file.

    fourier: number of frequencies Nf in which a coordinate enters.
    coord_components, lattice_components: mixture sizes Kx and Kl.
    max_sites: sites plus one stop; n_max of the papers.
    descriptors: physical descriptors of elements, space groups and Wyckoff positions beside the learned tables,
        and output weights shared through them.
    order: "site": one site after the other, its letter, element and coordinates, and the cell last, as published.
        "composition": letters and elements of all sites, then the cell, then all coordinates, each of which knows what
        stands around the places that it could take.
    likelihood: "exact": the density of the sampler. "published": lattice parameters scored by marginal mixtures
        and tied coordinates scored too, as the published code does.
    """

    embed_size: Size = 32
    h0_size: Size = 256
    model_size: Size = 64
    num_layers: Size = 16
    num_heads: Size = 16
    key_size: Size = 64
    fourier: Size = 5
    coord_components: Size = 16
    lattice_components: Size = 4
    max_sites: Size = 21
    dropout: FractionBelowOne = 0.1
    descriptors: bool = False
    order: Literal["site", "composition"] = "site"
    likelihood: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_size % 2:
            raise UserError(f"key_size = {self.key_size}: must be even, for rotary positions turn pairs")

    @property
    def num_weights(self) -> int:
        """About how many numbers the matrices of such a model hold; never more than there are."""
        inner, wide = self.num_heads * self.key_size, 3 * self.embed_size + 4 * self.fourier
        layer = 8 * self.model_size + 4 * inner
        return self.model_size * (self.num_layers * layer + wide + self.output_size) + self.embed_size * self.h0_size

    @property
    def output_size(self) -> int:
        """Width of the head: elements and lattice, or a coordinate; the 28 letters need less."""
        return max(NUM_ELEMENTS + 13 * self.lattice_components, 3 * self.coord_components)


@dataclass(frozen=True)
class CellWishes(Settings):
    """What the cells of the crystals should be."""

    space_group: str | None = option(
        None,
        "Only these, e.g. `221,225`, or `uniform`; empty: as the model was trained, or as a formula or system asks.",
        choices=("uniform",),
        unset="",
    )
    z: str | None = option(
        None, "Formula units in the conventional cell, e.g. `4` or `1-8`; empty: any number.", unset=""
    )
    num_atoms: str | None = option(
        None, "Atoms in the conventional cell, e.g. `8` or `4-20`; empty: any number.", unset=""
    )
    num_sites: str | None = option(None, "Inequivalent sites, e.g. `3` or `1-4`; empty: any number.", unset="")


@dataclass(frozen=True)
class ElementWishes(Settings):
    """Which elements crystals should hold."""

    elements: str | None = option(None, "Only these elements, e.g. `Ba,Ti,O`; empty: all.", unset="")
    require: str | None = option(None, "These elements must be there, e.g. `Li`; empty: none must.", unset="")
    exclude: str | None = option(
        None,
        "Not these elements, e.g. `Hg,Tl`; also `radioactive`, `noble_gas`; empty: none.",
        choices=("radioactive", "noble_gas"),
        unset="",
    )


@dataclass(frozen=True)
class Wishes(ElementWishes, CellWishes):
    """What the crystals that are drawn should be; all of it together holds for every one (`wishes.py`)."""

    formula: str | None = option(
        None,
        "Of this formula, e.g. `LiMn2O4`; `A2BO4` with any elements for A and B; `Li1-2MnO3` for a range; empty: any.",
        unset="",
    )
    system: str | None = option(
        None, "Of this chemical system: every one of its elements and no other, e.g. `Li-Mn-O`; empty: any.", unset=""
    )
    favour: str | None = option(
        None, "Favour elements by so much in their logit, e.g. `O=2,Pb=-3`; empty: as the model has them.", unset=""
    )
    max_atoms: Count | None = option(None, "At most so many atoms in the conventional cell; 0: no limit.", unset=0)
    density: str | None = option(
        None, "g/cm^3, e.g. `4-6.5`; others are drawn anew, space group and all; empty: any.", unset=""
    )
    volume_per_atom: str | None = option(None, "A^3 per atom, e.g. `10-20`; likewise; empty: any.", unset="")
    like: str | None = option(
        None, "Like the crystal in this file (CIF, ...): its Wyckoff letters; see --vary; empty: like none.", unset=""
    )
    vary: Literal["elements", "coordinates", "space_group"] = option(
        "elements",
        "What may differ from --like: elements (the same prototype), coordinates (and cell alone), or space_group (and "
        "all but the formula).",
    )


PRESETS = {
    "default": ModelConfig(
        embed_size=64,
        model_size=256,
        num_layers=4,
        num_heads=4,
        key_size=32,
        dropout=0.15,
        descriptors=True,
        order="composition",
    ),
    "small": ModelConfig(
        embed_size=64, model_size=128, num_layers=6, num_heads=4, key_size=32, dropout=0.15, descriptors=True
    ),
    "tiny": ModelConfig(embed_size=32, h0_size=128, model_size=96, num_layers=4, num_heads=4, key_size=24, dropout=0.2),
    "alex-20": ModelConfig(),
}


@dataclass(frozen=True)
class TrainingOptions(Settings):
    """Maximum likelihood on crystals."""

    preset: Literal[*PRESETS] = option(
        "default",
        "Architecture: default (cell before coordinates), small, tiny, alex-20 (the published one).",
    )
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
    exchange: Fraction = option(
        0.0,
        "Share of the crystals shown with elements exchanged for such as replace them in nature, cells scaled to their "
        "size; falls to a third of that at the end.",
    )
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
