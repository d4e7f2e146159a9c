"""Files from anywhere: whatever is in them, reading ends in data or in one line that names the file.

Readers of this package open model files, HDF5 and JSON here. What a format allows and we never need is refused:
devices and pipes in place of files, HDF5 that leads to other files, more data than the bytes of a file can hold,
numbers that are none among weights. Structure files, which come in many forms, have `readers.py`.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrl.errors import UserError

if sys.version_info >= (3, 15):
    import tomllib
else:  # TOML 1.1: a table of a source to fetch may stand on several lines
    import tomli as tomllib

if TYPE_CHECKING:
    import h5py
    from torch import Tensor

MODEL_BYTES = 16 << 30  # of a file of weights
_TEXT_BYTES = 4 << 30  # of a file that is read into memory as one text
_DEFLATE = 1100  # the most that gzip makes of a byte
_SMALL = 1 << 20  # bytes; so little may be claimed by any file
_CHUNK_BYTES = 1 << 28  # HDF5 takes a whole chunk into memory to give one number of it
_DEPTH = 8  # of groups in HDF5


def check_file(path: str | Path, most: int = MODEL_BYTES) -> Path:
    """The path, if it is a file of at most `most` bytes.

    Raises:
        UserError: nothing there, a folder, a device or pipe, or too large a file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "is a device or pipe, not a file"
            raise UserError(f"{path}: {what if path.exists() else 'no such file'}")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise UserError(f"{str(path)[:200]}: cannot be read ({error})") from error
    if size > most:
        raise UserError(f"{path}: {size / 2**30:.1f} GB; such a file has at most {most >> 30} GB")
    return path


def read_bytes(path: str | Path, most: int = MODEL_BYTES) -> bytes:
    """The whole file. Raises UserError where it cannot be read, as `check_file`."""
    try:
        return check_file(path, most).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path) -> str:
    """The whole file as UTF-8. Raises UserError where it cannot be read, or is no text."""
    try:
        return read_bytes(path, _TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text ({error})") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises UserError for anything else, too deeply nested JSON too."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON ({error})") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError for anything else."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: numbers and dates, too
        raise UserError(f"{path}: cannot be read as TOML: {one_line(error)}") from error


# ---- weights ----


def read_tensors(path: str | Path, otherwise: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, float32 but for integers; `otherwise` says what a file is that is none.

    Raises:
        UserError: not such a file, or one with NaN or infinity among its numbers.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: {otherwise} ({one_line(error)})") from error
    check_weights(tensors, path)
    return header, tensors


def check_weights(weights: Any, source: str | Path) -> None:
    """Refuse NaN and infinity among tensors, however deep in dicts and lists.

    The log-probability of a space group that is never drawn is -inf, and may be.

    Raises:
        UserError: naming the tensor.
    """
    import torch

    for name, tensor in _tensors(weights, ""):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            shares = name.endswith("space_group_log_prob")
            if not shares or (tensor.isnan() | (tensor == torch.inf)).any() or not tensor.isfinite().any():
                raise UserError(f"{source}: {name} holds NaN or infinity: its training had failed; use another file")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors on the CPU and plain values, nothing that runs code.

    Raises:
        UserError: damaged, holding anything else, or NaN among its numbers.
    """
    import torch

    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything
        raise UserError(f"{path}: is not a checkpoint that can be read: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: is not a checkpoint that can be read: it holds a {type(state).__name__}")
    return state


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Around the code that takes a file's content apart: what is missing or of another shape is the file's fault.

    Raises:
        UserError: naming the file.
    """
    try:
        yield
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        csv.Error,
    ) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: what it holds does not fit together ({reason})") from error


# ---- HDF5 ----


@contextmanager
def open_hdf5(path: str | Path) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading; what is wrong with it, also later inside the block, names the file.

    Raises:
        UserError: not HDF5, damaged, leading to other files, or claiming more data than its bytes can hold.
    """
    import h5py

    check_file(path, most=1 << 50)
    try:
        with h5py.File(path, "r") as file:
            _check_group(file, path, file.id.get_filesize(), set())
            yield file
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = "is damaged or cut off" if h5py.is_hdf5(path) else "is not an HDF5 file"
        raise UserError(f"{path}: {reason} ({one_line(error)})") from error


def _check_group(group: h5py.Group, path: str | Path, size: int, seen: set[Any]) -> None:
    import h5py

    for name in group:
        place = f"{group.name.rstrip('/')}/{name}"
        if type(group.get(name, getlink=True)) is not h5py.HardLink:
            raise UserError(f"{path}: {place} is a link; a file of cfrl holds its data itself")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen or place.count("/") > _DEPTH:
            raise UserError(f"{path}: {place} stands in it twice")
        seen.add(address)
        if isinstance(item, h5py.Group):
            _check_group(item, path, size, seen)
        elif isinstance(item, h5py.Dataset):
            _check_dataset(item, path, size)
        else:
            raise UserError(f"{path}: {place} is neither a group nor a dataset")


def _check_dataset(data: h5py.Dataset, path: str | Path, size: int) -> None:
    import h5py

    if data.external or data.is_virtual:
        raise UserError(f"{path}: {data.name} is kept in another file; a file of cfrl holds its data itself")
    filters = data.id.get_create_plist()
    codes = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
    compressing = [code for code in codes if code not in (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)]
    stored = min(data.id.get_storage_size(), size) * (_DEFLATE if compressing else 1)
    chunk = math.prod(data.chunks or ()) * data.dtype.itemsize
    if data.shape is None or len(compressing) > 1 or chunk > _CHUNK_BYTES or data.nbytes > stored + _SMALL:
        raise UserError(f"{path}: {data.name} claims more data ({data.shape} {data.dtype}) than the file can hold")


def one_line(error: BaseException) -> str:
    """What an error says, fit for a message of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
