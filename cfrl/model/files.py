"""Model files: safetensors with a header that tells sizes, training data and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfrl import settings
from cfrl.assets import ASSETS
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import Refusal
from cfrl.errors import UserError
from cfrl.files import atomic_file
from cfrl.model.implied import GROUPS, KINDS, ImpliedReward
from cfrl.model.options import ModelConfig
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import newest_run
from cfrl.untrusted import fitting, one_line, read_tensors

DEFAULT_MODEL = ASSETS / "default.safetensors"
KNOWN_FORMULAS = "known_formulas"  # a tensor beside the weights: hashes of what the model should not draw again
CRITIC = "critic."  # how the names of a critic's tensors begin
BESIDE = (KNOWN_FORMULAS, GROUPS, KINDS)


def save_model(
    model: CrystalTransformer,
    path: str | Path,
    info: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    refusal: Refusal | None = None,
    implied: ImpliedReward | None = None,
    critic: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes weights, configuration and space-group distribution as safetensors, atomically.

    Args:
        info: strings to keep in the header (provenance, dataset, figures).
        refusal, implied: what the model's crystals should not be, and what it says that any crystal earns;
            `load_refusal` and `load_implied` give them back.
        critic: tensors of the critic that it was tuned by (`rl/critic.py`); `load_critic` gives them back.
        dtype: store the weights so (float16 halves the file); the space-group distribution stays float32.
    """
    from safetensors.torch import save_file

    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if dtype is not None:
        weights = {name: t if name == "space_group_log_prob" else t.to(dtype) for name, t in weights.items()}
    header = {"format": "cfrl-model-1", "config": json.dumps(asdict(model.config)), **(info or {})}
    if refusal is not None:
        header["refuses"] = ",".join(refusal.names)
        if refusal.known is not None:
            weights[KNOWN_FORMULAS] = torch.from_numpy(refusal.known.hashes.view(np.int64))
    if implied is not None:
        header |= implied.header()
        weights |= {name: t.contiguous() for name, t in implied.tensors().items()}
    weights |= {name: t.contiguous() for name, t in (critic or {}).items()}
    with atomic_file(path) as temporary:
        save_file(weights, temporary, metadata=header)


def read_header(path: str | Path) -> dict[str, str]:
    """The header of a model file: "config" (JSON) and whatever was put in.

    Raises:
        UserError: not a model file of ours.
    """
    return _read_model(Path(path))[0]


def load_model(model: str | Path | None = None, device: str | torch.device = "cpu") -> CrystalTransformer:
    """A model, ready to use: in evaluation mode, float32, its weights not watched by autograd.

    Args:
        model: None or "" or "default": the embedded model; a weights file; a run folder (its model.safetensors);
            "last": the newest run of finetune or pretrain under runs/.

    Raises:
        UserError: there is no such model, the file is not one, or there is NaN or infinity in it.
    """
    path = model_path(model)
    header, weights = _read_model(path)
    with fitting(path):
        config = settings.build(ModelConfig, json.loads(header["config"]), source=f"{path}: ")
    own = {name: t for name, t in weights.items() if name not in BESIDE and not name.startswith(CRITIC)}
    return build_model(config, own, path).to(device)


def load_refusal(model: str | Path | None = None) -> Refusal:
    """What a model's crystals should not be: nothing in particular, unless a tuning said so.

    Args:
        model: as for `load_model`.

    Raises:
        UserError: there is no such model.
    """
    path = model_path(model)
    header, weights = _read_model(path)
    hashes = weights.get(KNOWN_FORMULAS)
    if hashes is not None and hashes.dtype != torch.int64:
        raise UserError(f"{path}: its {KNOWN_FORMULAS} are no hashes")
    known = None if hashes is None else KnownFormulas(hashes.numpy().view(np.uint64))
    return Refusal(filter(None, header.get("refuses", "").split(",")), known)


def load_implied(model: str | Path | None = None) -> ImpliedReward | None:
    """What a tuned model says that any crystal earns; None where its file does not tell.

    Args:
        model: as for `load_model`.

    Raises:
        UserError: there is no such model, or its file is damaged.
    """
    path = model_path(model)
    with fitting(path):
        return ImpliedReward.of_file(*_read_model(path))


def load_critic(model: str | Path | None = None) -> dict[str, Tensor]:
    """The tensors of the critic that a model was tuned by; none where its file keeps none.

    Args:
        model: as for `load_model`.

    Raises:
        UserError: there is no such model.
    """
    return {name: t for name, t in _read_model(model_path(model))[1].items() if name.startswith(CRITIC)}


def build_model(config: ModelConfig, weights: dict[str, Tensor], source: str | Path) -> CrystalTransformer:
    """A model with these weights, in evaluation mode and not watched by autograd: training asks for that itself.

    Args:
        source: where the weights are from, to be named in errors.

    Raises:
        UserError: the weights are not of these sizes.
    """
    if config.num_weights > sum(t.numel() for t in weights.values()):  # before room is made for what is not there
        raise UserError(f"{source}: the weights do not fit their configuration (it asks for more of them)")
    network = CrystalTransformer(config)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source}: the weights do not fit their configuration ({one_line(error)})") from error
    return network.eval().requires_grad_(False)


def _read_model(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    header, weights = read_tensors(path, "not a readable safetensors file")
    if header.get("format") != "cfrl-model-1":
        raise UserError(f"{path}: not a cfrl model; published checkpoints come in by `cfrl model import FILE.pkl`")
    return header, weights


def model_path(model: str | Path | None) -> Path:
    """The weights file that a model's name stands for. Raises UserError where there is none."""
    if not model or str(model) == "default":
        return DEFAULT_MODEL
    if str(model) == "last":
        run = newest_run(("finetune", "pretrain"), holding="model.safetensors")
        if run is None:
            raise UserError("model 'last': there is no finished tuning or training under runs/ here yet")
        return run.path / "model.safetensors"
    path = Path(model)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such model; give a weights file, a run folder, or nothing for the default")
    return path
