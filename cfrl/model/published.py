"""Reads checkpoints of the published JAX/Haiku code (CrystalFormer) into our model, without jax.

Pickles can run code, so only what such a checkpoint is made of is let through: numpy arrays, the wrapper that jax
arrays unpickle through, and optimiser states, which are read as inert tuples and dropped.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS
from cfrl.errors import UserError
from cfrl.model.files import build_model
from cfrl.model.network import space_group_shares
from cfrl.model.options import ModelConfig
from cfrl.model.transformer import CrystalTransformer
from cfrl.untrusted import check_weights, read_bytes

# heads x key size cannot be told apart from the shapes alone; these are the sizes that were published
HEADS_OF_WIDTH = {1024: 16, 256: 8, 32: 2}
NOT_ONE = "not a CrystalFormer checkpoint"
COORD_COMPONENTS_OF_WIDTH = {1024: 16, 256: 16, 32: 8}


class _Inert(tuple):
    """Stands for an optimiser state, or for a type that is only named: keeps nothing, runs nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forget it."""


class _Type:
    """Stands for numpy.dtype, whose own `__setstate__` can turn bytes of the file into pointers."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _CODES:
            raise pickle.UnpicklingError(f"it holds an array of type {code!r:.40}, not of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order, structure = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
            raise pickle.UnpicklingError("it holds an array of structures, not of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for a numpy array: its numbers are copied out of bytes that have to be exactly as many."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, data = state
        needed = math.prod(shape) * kind.dtype.itemsize
        if not isinstance(data, bytes) or len(data) != needed or min(shape, default=1) < 1:
            raise pickle.UnpicklingError(f"it holds an array of shape {shape!s:.40} that its bytes do not fill")
        self.values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_columns else "C")


class _JaxArray(_Array):
    """Stands for the wrapper that jax arrays unpickle through."""

    def __init__(self, _function: object, _arguments: tuple, state: tuple, _aval: object) -> None:
        self.__setstate__(state)


_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_ALLOWED: dict[tuple[str, str], type] = {  # classes of ours alone: whatever a pickle calls, it calls nothing of numpy's
    ("jax._src.array", "_reconstruct_array"): _JaxArray,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Type,
    ("optax._src.base", "EmptyState"): _Inert,
    ("optax._src.transform", "ScaleByAdamState"): _Inert,
    ("optax._src.transform", "ScaleByScheduleState"): _Inert,
    ("optax._src.transform", "ScaleByScheduleStates"): _Inert,
    ("optax._src.clipping", "ClipByGlobalNormState"): _Inert,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of arrays needs")
        return _ALLOWED[module, name]


def _content(path: str | Path, refused: str) -> object:
    """What is pickled in a file. Raises UserError with these words where it is damaged or hostile."""
    try:
        return _load(read_bytes(path))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path}: {refused}: {error}") from error


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickled dictionary, by name. Raises UserError: unreadable, or holding anything but arrays."""
    content = _content(path, "refused")
    if not isinstance(content, Mapping) or not all(isinstance(array, _Array) for array in content.values()):
        raise UserError(f"{path}: is no dictionary of arrays")
    return {str(name): array.values for name, array in content.items()}


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Parameters of a published checkpoint as `{"module/name": array}`.

    Raises:
        UserError: unreadable, or holding anything but arrays.
    """
    content = _content(path, "refused as a checkpoint")
    parameters = content.get("params") if isinstance(content, Mapping) else None
    if not isinstance(parameters, Mapping) or not all(isinstance(m, Mapping) for m in parameters.values()):
        raise UserError(f"{path}: no 'params' of modules in it; is it a CrystalFormer checkpoint (epoch_*.pkl)?")
    flat = {f"{module}/{name}": array for module, names in parameters.items() for name, array in names.items()}
    for name, array in flat.items():
        if not isinstance(array, _Array) or array.values.dtype.kind != "f":
            raise UserError(f"{path}: parameter {name} is not an array of numbers")
        if not np.isfinite(array.values).all():
            raise UserError(f"{path}: parameter {name} holds NaN or infinity: the training had failed; use another")
    return {name: array.values for name, array in flat.items()}


def _load(data: bytes) -> object:
    places = (place for code, place, _ in pickletools.genops(data) if code.name in ("PUT", "LONG_BINPUT"))
    if max(places, default=0) > len(data):  # the unpickler makes room for that many
        raise pickle.UnpicklingError("it counts more objects than it has bytes")
    return _Unpickler(io.BytesIO(data)).load()


def import_published(
    parameters: Mapping[str, np.ndarray], num_heads: int | None = None, coord_components: int | None = None
) -> CrystalTransformer:
    """The model with these parameters, its sizes read off their shapes, scored as the published code does.

    Args:
        parameters: "module/name" -> array, named as the published code names them.
        num_heads: attention heads; None: as published for this width (shapes show only heads x key size).
        coord_components: mixture size of a coordinate; None: as published for this width.

    Raises:
        UserError: parameters are missing, too many, or of shapes that do not fit together.
    """
    try:
        config = _config(parameters, num_heads, coord_components)
        weights = _translate(parameters, config.num_layers)
    except KeyError as error:
        raise UserError(f"{NOT_ONE}: parameter {error} is missing") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:  # arrays of other shapes
        raise UserError(f"{NOT_ONE}: {error}") from error
    weights["space_group_log_prob"] = space_group_shares(torch.arange(1, NUM_SPACE_GROUPS + 1))
    check_weights(weights, NOT_ONE)  # what fits into float64 need not fit into float32
    return build_model(config, weights, NOT_ONE)


def _config(p: Mapping[str, np.ndarray], num_heads: int | None, coord_components: int | None) -> ModelConfig:
    embed_size = p["~/a_embeddings"].shape[1]
    inner = p["multi_head_attention/query/w"].shape[1]
    num_heads = num_heads or HEADS_OF_WIDTH.get(inner)
    coord_components = coord_components or COORD_COMPONENTS_OF_WIDTH.get(inner)
    if num_heads is None or coord_components is None or inner % num_heads:
        raise UserError(f"heads x key size is {inner}; give --num-heads (a divisor) and --coord-components")
    num_layers = (sum(name.endswith("/scale") for name in p) - 1) // 2
    head = p[f"linear_{7 + 2 * num_layers}/w"]
    return ModelConfig(
        embed_size=embed_size,
        h0_size=p["linear/w"].shape[1],
        model_size=head.shape[0],
        num_layers=num_layers,
        num_heads=num_heads,
        key_size=inner // num_heads,
        fourier=(p["linear_4/w"].shape[0] - embed_size) // 2,
        coord_components=coord_components,
        lattice_components=(head.shape[1] - NUM_ELEMENTS) // 13,
        likelihood="published",
    )


def _translate(p: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Tensor]:
    """Our parameter names; the published code counts linear layers and norms in the order of their making."""
    weights: dict[str, Tensor] = {}

    def take(ours: str, theirs: str, weight: str = "w", bias: str = "b") -> None:
        weights[f"{ours}.weight"] = torch.from_numpy(p[f"{theirs}/{weight}"].astype(np.float32).T.copy())
        weights[f"{ours}.bias"] = torch.from_numpy(p[f"{theirs}/{bias}"].astype(np.float32))

    for ours, theirs in (("space_group", "g"), ("species", "a"), ("wyckoff", "w")):
        weights[f"{ours}_embedding.weight"] = torch.from_numpy(p[f"~/{theirs}_embeddings"].astype(np.float32))
    linears = ["first_hidden", "first_wyckoff", "wyckoff_in", "species_in", *(f"coords_in.{k}" for k in range(3))]
    linears += [f"blocks.{i}.mlp.{k}" for i in range(num_layers) for k in (0, 2)] + ["head"]
    norms = [f"blocks.{i}.{part}" for i in range(num_layers) for part in ("norm_attention", "norm_mlp")] + ["norm"]
    for i, ours in enumerate(linears):
        take(ours, _numbered("linear", i))
    for i, ours in enumerate(norms):
        take(ours, _numbered("layer_norm", i), "scale", "offset")
    for i in range(num_layers):
        for ours, theirs in (("query", "query"), ("key", "key"), ("value", "value"), ("out", "linear")):
            take(f"blocks.{i}.attention.{ours}", f"{_numbered('multi_head_attention', i)}/{theirs}")
    return weights


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name
