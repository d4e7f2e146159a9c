"""A very small model, fine-tuned for three steps: real run folders for the tests of what reads them."""

from pathlib import Path

import torch

from cfrl.config import FinetuneConfig
from cfrl.finetune import finetune
from cfrl.model import CrystalTransformer, ModelConfig, save_model
from cfrl.runs import RunFolder

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
)


def base_model(path: Path) -> Path:
    """Untrained weights, the same each time, that say they were trained on the prototypes."""
    torch.manual_seed(0)
    save_model(CrystalTransformer(SIZES), path, {"dataset": "prototypes"})
    return path


def tuned_run(folder: Path) -> RunFolder:
    """`folder/runs/<date>-finetune-density`, tuned towards dense crystals."""
    config = FinetuneConfig(
        reward="density",
        model=str(base_model(folder / "base.safetensors")),
        steps=3,
        batch_size=24,
        minibatch=8,
        lr=1e-2,
        min_distance=0.0,
        evaluate=24,
        space_group="2,139,221,225",
        device="cpu",
    )
    return finetune(config, root=folder / "runs", quiet=True)
