"""A very small model: untrained, shown real crystals for a few seconds, or fine-tuned for three steps."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from cfrl.commands.finetune import finetune
from cfrl.config import FinetuneConfig, Settings
from cfrl.io.datasets import load_dataset
from cfrl.model.files import Extras, save_model
from cfrl.model.options import ModelConfig
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import RunFolder

Config = TypeVar("Config", bound=Settings)
SIZES = ModelConfig(
    embed_size=8,
    h0_size=16,
    model_size=16,
    num_layers=1,
    num_heads=2,
    key_size=8,
    coord_components=2,
    lattice_components=2,
    max_sites=7,
    dropout=0.5,  # so that a test fails where it is not switched off
)


def unchecked(config: Config, **values: float) -> Config:
    """Settings with values that they would refuse: to see what happens when weights run away nevertheless."""
    config = replace(config)
    vars(config).update(values)
    return config


def base_model(path: Path) -> Path:
    """Untrained weights, the same each time, that say they were trained on the prototypes."""
    torch.manual_seed(0)
    save_model(CrystalTransformer(SIZES), path, Extras({"dataset": "prototypes"}))
    return path


def trained_model(path: Path) -> Path:
    """The same, shown the small prototypes for 60 steps; it draws their space groups."""
    torch.manual_seed(0)
    crystals = load_dataset("prototypes")
    crystals = crystals[crystals.num_sites <= 5]
    model = CrystalTransformer(SIZES).eval()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        rows = torch.randint(len(crystals), (24,))
        loss = -sum(model(crystals[rows].trim()).values()).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    counts = torch.bincount(crystals.space_group, minlength=231).float()
    model.space_group_log_prob.copy_((counts / counts.sum()).log())
    save_model(model, path)
    return path


def tuned_run(folder: Path) -> RunFolder:
    """`folder/runs/<date>-finetune-density`, tuned towards dense crystals."""
    config = FinetuneConfig(
        reward="density",
        model=str(base_model(folder / "base.safetensors")),
        steps=3,
        n=24,
        batch_size=8,
        lr=1e-2,
        min_distance=0.0,
        evaluate=24,
        space_group="2,139,221,225",
        device="cpu",
        allow="all",  # of 24 crystals of a tiny model hardly one would be left
    )
    return finetune(config, root=folder / "runs", quiet=True)
