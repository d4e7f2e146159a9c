"""Property predictors: ensembles of small networks on a potential's features, with a mean and an honest spread.

A crystal is described by the pooled features of a potential (which know its atoms' surroundings), statistics of its
elements, its energy and its volume. Each member predicts a value and how far off it will be (deep ensembles,
Lakshminarayanan et al. 2017, arXiv 1612.01474); mean and variance are those of the mixture of members, times one
factor fitted in cross-validation. How predictors are trained: predictor_training.py.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cfrl.assets import ASSETS
from cfrl.crystals.compositions import fractions
from cfrl.crystals.descriptors import element_descriptors
from cfrl.errors import UserError
from cfrl.files import atomic_file
from cfrl.untrusted import fitting, read_tensors

if TYPE_CHECKING:
    from cfrl.potentials import Evaluation, Potential

BUILT_IN = ("band_gap", "eps_electronic", "eps_total", "bulk_modulus")
FORMAT = "cfrl-predictor"
NUMBER = int | float
HEADER = dict.fromkeys(("target", "unit", "potential", "feature_version", "composition"), str)
HEADER |= {"log": bool, "zero": NUMBER | None} | dict.fromkeys(("scale", "shift", "low", "high", "calibration"), NUMBER)
CLIP = 6.0  # standard deviations; features beyond are of crystals unlike any in training


class Ensemble(nn.Module):
    """m networks of two hidden layers side by side: (m, b, d) -> (m, b, outputs)."""

    def __init__(self, members: int, inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [inputs, hidden, hidden, outputs]
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(members, a, b) / math.sqrt(a) for a, b in pairs])
        self.biases = nn.ParameterList([torch.zeros(members, 1, b) for _, b in pairs])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.dropout(F.silu(torch.baddbmm(bias, x, weight)), self.dropout, self.training)
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])

    @torch.no_grad()
    def on_all(self, x: Tensor, rows: int = 2048) -> Tensor:
        """(n, d) -> (m, n, outputs): every member on every crystal."""
        members = len(self.biases[0])
        return torch.cat([self(part[None].expand(members, -1, -1)) for part in x.split(rows)], 1)


class Predictor:
    """An ensemble and what turns a crystal into its inputs and its outputs into a quantity.

    header: target, unit, log, zero, potential, feature_version, calibration, shift, scale, low, high, report, ...;
    corrects: the embedded predictor that its outputs are added to (of logarithms: multiplied), absent for none
    """

    def __init__(self, ensemble: Ensemble, mean: Tensor, std: Tensor, header: dict[str, Any]) -> None:
        self.ensemble, self.mean, self.std, self.header = ensemble.eval(), mean, std, header

    @property
    def target(self) -> str:
        return self.header["target"]

    @property
    def potential(self) -> str:
        """Name for `load_potential`."""
        return self.header["potential"]

    @property
    def feature_version(self) -> str:
        return self.header["feature_version"]

    def check(self, potential: Potential) -> None:
        """Raises UserError if the potential's features are not those of the training."""
        if potential.feature_version != self.feature_version or self.header["composition"] != composition_version():
            raise UserError(
                f"the predictor of '{self.target}' was trained on other features ({self.feature_version}) than "
                f"{potential.name} gives here ({potential.feature_version}); train it again: `cfrl rewards train`"
            )

    def predict(self, structures: Sequence[Any], evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
        """Mean and calibrated standard deviation, (n,) float64 each; NaN where the potential failed.

        structures: pymatgen structures; evaluation: of them, with features.
        """
        return self.from_descriptors(describe(structures, evaluation))

    def from_descriptors(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same from rows of `describe`."""
        h = self.header
        out = self.ensemble.on_all(standardise(x, self.mean, self.std)).double()
        mean, spread = mixture(out, h["zero"] is not None)
        mean, spread = mean.numpy() * h["scale"] + h["shift"], spread.numpy() * h["scale"] * h["calibration"]
        mean, spread = to_quantity(np.clip(mean, h["low"], h["high"]), spread, h["log"])
        if "corrects" not in h:
            return mean, spread
        base, _ = load_predictor(h["corrects"]).from_descriptors(x)
        return (base * mean, base * spread) if h["log"] else (base + mean, spread)

    def errors(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What a predictor that `corrects` this one has to learn, (n,): values less predictions; of logarithms, over.

        values: (n,) as they should be; x: rows of `describe`.
        """
        mean, _ = self.from_descriptors(x)
        return values / mean if self.header["log"] else values - mean

    def save(self, path: str | Path) -> None:
        tensors = {f"weight_{i}": w.detach().half() for i, w in enumerate(self.ensemble.weights)}
        tensors |= {f"bias_{i}": b.detach().half() for i, b in enumerate(self.ensemble.biases)}
        tensors |= {"mean": self.mean, "std": self.std}
        with atomic_file(path) as temp:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temp, {FORMAT: json.dumps(self.header)})


def load_predictor(name: str) -> Predictor:
    """An embedded predictor (one of `BUILT_IN`) or a file of `cfrl rewards train`.

    Raises UserError: no such file, or not a predictor.
    """
    path = ASSETS / f"{name}.safetensors" if name in BUILT_IN else Path(name)
    if not path.is_file():
        raise UserError(f"no predictor file {path} (`cfrl rewards train` makes one)")
    metadata, tensors = read_tensors(path, "not a predictor of `cfrl rewards train`")
    if FORMAT not in metadata:
        raise UserError(f"{path}: not a predictor of `cfrl rewards train`")
    with fitting(path):
        header = json.loads(metadata[FORMAT])
        _check_header(header)
        members, inputs, hidden = tensors["weight_0"].shape
        outputs = tensors["weight_2"].shape[2]
        if hidden * hidden * members > tensors["weight_1"].numel():  # before room is made for what is not there
            raise ValueError("weights of other sizes")
        if not tensors["mean"].shape == tensors["std"].shape == (inputs,) or not (tensors["std"] > 0).all():
            raise ValueError("a feature without mean or spread")
        if outputs != (2 if header["zero"] is None else 3):
            raise ValueError(f"{outputs} outputs")
        ensemble = Ensemble(members, inputs, hidden, outputs)
        names = [("weights", "weight"), ("biases", "bias")]
        ensemble.load_state_dict({f"{ours}.{i}": tensors[f"{stored}_{i}"] for ours, stored in names for i in range(3)})
    return Predictor(ensemble, tensors["mean"], tensors["std"], header)


def _check_header(header: dict[str, Any]) -> None:
    """Raises KeyError, ValueError for a header that `predict` cannot work with."""
    for name, kind in HEADER.items():
        if not isinstance(header[name], kind):
            raise ValueError(f"{name} = {header[name]!r:.40} in its header")
    for name, value in header.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} = {value} in its header")
    if "corrects" in header and header["corrects"] not in BUILT_IN:
        raise ValueError(f"corrects = {header['corrects']!r:.40} in its header")
    if min(header["scale"], header["calibration"]) <= 0 or header["low"] > header["high"]:
        raise ValueError("its header has a scale or a range that is none")


# ---- what a network sees -----------------------------------------------------------------------------------------


def describe(structures: Sequence[Any], evaluation: Evaluation) -> np.ndarray:
    """(n, d) float32: features of the potential, of the composition, energy (eV/atom), log volume per atom (A^3)."""
    volume = np.array([s.volume / len(s) for s in structures]).reshape(-1, 1)
    with np.errstate(all="ignore"):
        parts = [evaluation.features, composition(structures), evaluation.uncorrected[:, None], np.log(volume)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def composition(structures: Sequence[Any]) -> np.ndarray:
    """(n, k): mean, deviation, least and largest of the descriptors of a crystal's elements, by atomic fraction."""
    table = element_descriptors().numpy().astype(np.float64)
    share, _ = fractions(structures)
    mean = share @ table
    deviation = np.sqrt(np.maximum(share @ table**2 - mean**2, 0.0))
    least, largest = np.zeros_like(mean), np.zeros_like(mean)
    for i, row in enumerate(share):
        present = table[row > 0]
        if len(present):
            least[i], largest[i] = present.min(0), present.max(0)
    count = (share > 0).sum(1, keepdims=True)
    return np.concatenate([mean, deviation, least, largest, count], axis=1)


@cache
def composition_version() -> str:
    """Changes when the descriptors of elements do."""
    return f"elements-{zlib.crc32(element_descriptors().numpy().round(4).tobytes()):08x}"


def standardise(x: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    return ((torch.from_numpy(np.asarray(x, dtype=np.float32)) - mean) / std).clamp(-CLIP, CLIP)


# ---- what its answers mean -----------------------------------------------------------------------------------------


def mixture(out: Tensor, has_zero: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n,) of the mixture of members' predictions (m, n, outputs)."""
    value, error = out[..., 0], math.sqrt(2) * out[..., 1].clamp(-6.0, 4.0).exp()  # of a Laplace distribution
    if not has_zero:
        return value.mean(0), (value.var(0, correction=0) + (error**2).mean(0)).sqrt()
    value, positive = F.relu(value), torch.sigmoid(out[..., 2])
    mean = (positive * value).mean(0)
    square = (positive * (value**2 + error**2)).mean(0)
    return mean, (square - mean**2).clamp(min=1e-12).sqrt()


def to_quantity(mean: np.ndarray, spread: np.ndarray, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread in units of the target; those of a logarithm to first order."""
    return (10**mean, 10**mean * math.log(10) * spread) if log else (mean, spread)
