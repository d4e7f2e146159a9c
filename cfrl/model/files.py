"""Model files: safetensors with a header that tells sizes, training data and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
from cfrl.model.implied import GROUPS, IMPLIED, KINDS, ImpliedReward
from cfrl.model.options import ModelConfig
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import newest_run
from cfrl.untrusted import fitting, one_line, read_tensors

DEFAULT, SMALL, STABLE = "default", "small", "stable"
EMBEDDED = {name: ASSETS / f"{name}.safetensors" for name in (DEFAULT, SMALL, STABLE)}
REFUSES = "refuses"  # of the header
KNOWN_FORMULAS = "known_formulas"  # a tensor beside the weights: hashes of what the model should not draw again
CRITIC = "critic."  # how the names of a critic's tensors begin
BESIDE = (KNOWN_FORMULAS, GROUPS, KINDS)


@dataclass
class Extras:
    """What stands in a model's file beside the weights.

    header: strings (provenance, dataset, figures); of a file that was read, all that its header tells.
    refusal: what the model's crystals should not be; nothing in particular, unless a tuning said so.
    implied: what a tuned model says that any crystal earns; None where its file does not tell.
    critic: tensors of the critic that it was tuned by (`rl/critic.py`); none where its file keeps none.
    """

    header: Mapping[str, str] = field(default_factory=dict)
    refusal: Refusal = field(default_factory=lambda: Refusal(()))
    implied: ImpliedReward | None = None
    critic: Mapping[str, Tensor] = field(default_factory=dict)


def save_model(
    model: CrystalTransformer, path: str | Path, extras: Extras | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes weights, configuration and space-group distribution as safetensors, atomically.

    Args:
        extras: what to keep beside them; `load_extras` gives it back.
        dtype: store the weights so (float16 halves the file); the space-group distribution stays float32.
    """
    from safetensors.torch import save_file

    extras = extras or Extras()
    refusal, implied = extras.refusal, extras.implied
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if dtype is not None:
        tensors = {name: t if name == "space_group_log_prob" else t.to(dtype) for name, t in tensors.items()}
    header = {name: told for name, told in extras.header.items() if name not in (REFUSES, IMPLIED)}
    header |= {"format": "cfrl-model-1", "config": json.dumps(asdict(model.config))}
    if refusal.names:
        header[REFUSES] = ",".join(refusal.names)
        if refusal.known is not None:
            tensors[KNOWN_FORMULAS] = torch.from_numpy(refusal.known.hashes.view(np.int64))
    if implied is not None:
        header |= implied.header()
        tensors |= {name: t.contiguous() for name, t in implied.tensors().items()}
    tensors |= {name: t.contiguous() for name, t in extras.critic.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_model(model: str | Path | None = None, device: str | torch.device = "cpu") -> CrystalTransformer:
    """A model, ready to use: in evaluation mode, float32, its weights not watched by autograd.

    Args:
        model: None or "" or "default": the embedded model; "small": a smaller one, quicker and further from real
            crystals; "stable": the small one tuned by `sun`, for crystals that last; a weights file; a run folder (its
            model.safetensors); "last": the newest run of finetune or pretrain under runs/.

    Raises:
        UserError: there is no such model, the file is not one, or there is NaN or infinity in it.
    """
    path = model_path(model)
    header, weights = _read_model(path)
    with fitting(path):
        config = settings.build(ModelConfig, json.loads(header["config"]), source=f"{path}: ")
    own = {name: t for name, t in weights.items() if name not in BESIDE and not name.startswith(CRITIC)}
    return build_model(config, own, path).to(device)


def load_extras(model: str | Path | None = None) -> Extras:
    """What stands beside a model's weights.

    Args:
        model: as for `load_model`.

    Raises:
        UserError: there is no such model, or its file is damaged.
    """
    path = model_path(model)
    header, tensors = _read_model(path)
    hashes = tensors.get(KNOWN_FORMULAS)
    if hashes is not None and hashes.dtype != torch.int64:
        raise UserError(f"{path}: its {KNOWN_FORMULAS} are no hashes")
    with fitting(path):
        known = None if hashes is None else KnownFormulas(hashes.numpy().view(np.uint64))
        refusal = Refusal(filter(None, header.get(REFUSES, "").split(",")), known)
        critic = {name: t for name, t in tensors.items() if name.startswith(CRITIC)}
        return Extras(header, refusal, ImpliedReward.of_file(header, tensors), critic)


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
    if not model or str(model) in EMBEDDED:
        return EMBEDDED[str(model or DEFAULT)]
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
