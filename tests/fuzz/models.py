"""Weights: safetensors of ours, published pickles, predictors, checkpoints. The oracle reads with safetensors."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cfrl.model.published import _load
from cfrl.rewards.predictors import BUILT_IN, load_predictor
from tests.fuzz.cases import NUMBERS, WORDS, Case, damaged
from tests.fuzz.seeds import Seeds
from tests.fuzz.structures import stored_problem

ASSETS = Path(__file__).parents[2] / "cfrl" / "assets"
LEAST = 14  # bytes of a header and a tensor


def case(rng: random.Random, seeds: Seeds) -> Case:
    """A damaged file of weights for a command that takes it."""
    return rng.choice((_model, _model, _published, _published, _hostile, _predictor))(rng, seeds)


def _model(rng: random.Random, seeds: Seeds) -> Case:
    wrong = _damage_tensors(rng, seeds.model, Path("x.safetensors"))
    command = rng.choice(("info", "pack", "sample", "sample", "retrieve"))
    if command == "info":
        return Case(["model", "info", "x.safetensors"], ["x.safetensors"], wrong=wrong)
    if command == "pack":
        return Case(
            ["model", "pack", "x.safetensors", "-o", "y.safetensors"],
            ["x.safetensors", "y.safetensors"],
            wrong,
            check=lambda: _fault(Path("y.safetensors")),
        )
    if command == "retrieve":
        words = ["retrieve", "--run", "x.safetensors", "--base", str(seeds.model), "--dataset", "missing.h5"]
        return Case(words, ["x.safetensors", "missing.h5"], wrong)
    words = ["sample", "--model", "x.safetensors", "-n", "2", "--keep-invalid", "-o", "out.h5", "--max-atoms", "30"]
    return Case(
        [*words, "--device", "cpu"],
        ["x.safetensors", "weights", "--max-atoms"],
        wrong,
        check=lambda: stored_problem(Path("out.h5"), drawn=True),
    )


def _predictor(rng: random.Random, seeds: Seeds) -> Case:
    small = Path("small.safetensors")
    shutil.copyfile(ASSETS / f"{rng.choice(BUILT_IN)}.safetensors", small)
    wrong = _damage_tensors(rng, small, Path("p.safetensors"))

    def use() -> None:
        predictor = load_predictor("p.safetensors")
        mean, spread = predictor.from_descriptors(np.zeros((2, len(predictor.mean)), np.float32))
        found.extend([*mean, *spread])

    found: list[float] = []
    return Case(use, ["p.safetensors"], wrong, check=lambda: "" if np.isfinite(found).all() else f"predicts {found}")


def _fault(path: Path) -> str:
    for name, values in load_file(path).items():
        if name != "space_group_log_prob" and not np.isfinite(values).all():
            return f"{path}: {name} is not finite"
    return ""


def _damage_tensors(rng: random.Random, source: Path, target: Path) -> str:
    """Write a damaged copy; why it must be refused, if that is certain."""
    data = source.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    wrong = ""
    match rng.randrange(7):
        case 0:
            target.write_bytes(damaged(rng, data))
            return ""
        case 1:  # a number of the weights
            name = rng.choice([name for name in header if name != "__metadata__"])
            start, end = header[name]["data_offsets"]
            kind = {"F32": "<f4", "F16": "<f2"}[header[name]["dtype"]]
            value = rng.choice((np.nan, np.inf, -np.inf, 3e38, 6e4))
            where = start + np.dtype(kind).itemsize * rng.randrange((end - start) // np.dtype(kind).itemsize)
            with np.errstate(all="ignore"):
                number = np.array(value).astype(kind)
            body[where : where + number.nbytes] = number.tobytes()
            shares = name == "space_group_log_prob" and number == -np.inf
            wrong = f"{value} in {name}" if not np.isfinite(number) and not shares else ""
        case 2:
            _swap(rng, header)
        case 3:
            metadata = header["__metadata__"]
            key = rng.choice(list(metadata))
            try:
                inner = json.loads(metadata[key])
                inner[rng.choice(list(inner))] = rng.choice((*NUMBERS, *WORDS[:20], None, True, [], {}))
                metadata[key] = json.dumps(inner)
            except (ValueError, TypeError):
                metadata[key] = rng.choice(WORDS)
        case 4:
            size_told = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1))
            target.write_bytes(struct.pack("<Q", size_told) + data[8:])
            return "" if size_told == size else "a header of another length"
        case 5:
            header[rng.choice([*list(header), "more"])] = rng.choice(
                (
                    None,
                    [],
                    {},
                    {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
                    {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
                )
            )
        case 6:
            body = body[: rng.randrange(len(body))]
            wrong = "its numbers are cut off"
    text = json.dumps(header).encode("utf-8", "surrogateescape")
    target.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return wrong


def _swap(rng: random.Random, document: Any) -> None:
    while isinstance(document, dict | list) and document:
        key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        if not (isinstance(document[key], dict | list) and document[key]) or rng.random() < 0.2:
            document[key] = rng.choice((*NUMBERS, "F64", "I64", "BF16", "BOOL", None, [], {}, [-1], [2**62, 2**62]))
            return
        document = document[key]


# ---- pickles -----------------------------------------------------------------------------------------------------


def _published(rng: random.Random, seeds: Seeds) -> Case:
    data, flags = seeds.published.read_bytes(), ["--num-heads", "2", "--coord-components", "4"]
    wrong = ""
    if rng.random() < 0.5:
        data = damaged(rng, data)
    else:
        content = pickle.loads(data)
        module = content["params"][rng.choice(list(content["params"]))]
        name = rng.choice(list(module))
        value = rng.choice((np.nan, np.inf, 1e300, "more", "kind", "object", "text", "strides", "none", "shape"))
        wrong = "" if value == "kind" else f"{value} in {name}"
        if isinstance(value, float):
            module[name] = module[name].astype(np.float64)
            module[name].flat[0] = value
        else:
            array = module[name]
            module[name] = {
                "more": np.concatenate([array, array]),
                "kind": array.astype(rng.choice(("f2", "f8", ">f4", "i4", "c8", "?", "M8[s]", "S4"))),
                "object": array.astype(object),
                "text": "text",
                "strides": np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), array.shape, (0,) * array.ndim)[..., :-1],
                "none": None,
                "shape": array[None],
            }[value]
        if rng.random() < 0.1:
            del content["params"][rng.choice(list(content["params"]))]
            wrong = "a module is missing"
        data = pickle.dumps(content, protocol=rng.choice((2, 4, 5)))
    Path("epoch_1.pkl").write_bytes(data)
    words = ["model", "import", "epoch_1.pkl", "-o", "y.safetensors", *flags[: rng.choice((0, 2, 4, 4, 4, 4))]]
    names = ["epoch_1.pkl", "checkpoint", "--num-heads"]
    return Case(words, names, wrong, check=lambda: _fault(Path("y.safetensors")))


def _hostile(rng: random.Random, seeds: Seeds) -> Case:
    """Opcodes that call, count or repeat what no checkpoint does."""
    array = b"cnumpy._core.multiarray\n_reconstruct\n"
    programs = (
        b"cos\nsystem\n(S'touch gone'\ntR.",
        b'cbuiltins\neval\n(S\'open("gone","w")\'\ntR.',
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\ntouch gone\x85R.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"cnumpy\ndtype\n(S'f4'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb.",
        b"cnumpy\ndtype\n(S'f4'\ntR(I3\nS'<'\n(I1\nI2\ntNNI8\nI1\nI0\ntb.",
        array + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I99999999999\ntcnumpy\ndtype\n(S'f4'\ntRI00\nS'xxxx'\ntb.",
        array + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I-1\nI-1\ntcnumpy\ndtype\n(S'f4'\ntRI00\nS'xxxx'\ntb.",
        b"\x80\x04r\xff\xff\xff\x7f.",
        b"\x80\x04]r\xff\xff\xff\xff.",
        b"(p9999999999\n.",
        b"\x80\x04]" + b"]a" * 10 + b"\x94" * 100 + b".",
        b"\x80\x04B\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"]" * 200_000 + b"a" * 199_999 + b".",
        b"}(S'params'\n}S'a'\n}S'w'\nF1.5\nsss.",
        b"}S'params'\n}S'linear'\n}S'w'\nNsss.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x04Nb.",
        b"(i__main__\nx\n.",
        b"\x80\x02U\x01a\x81.",
        b"Pabc\n.",
    )
    data = rng.choice(programs)
    data = damaged(rng, data) if rng.random() < 0.3 else data
    Path("epoch_1.pkl").write_bytes(data)
    wrong = "" if data not in programs else "no checkpoint"
    if rng.random() < 0.1:
        return Case(lambda: _refused(data), ["pickle"], check=_gone)
    return Case(["model", "import", "epoch_1.pkl", "-o", "y.safetensors"], ["epoch_1.pkl"], wrong, check=_gone)


def _refused(data: bytes) -> None:
    from cfrl.errors import UserError

    try:
        _load(data)
    except Exception as error:
        raise UserError(f"pickle: {type(error).__name__}") from error


def _gone() -> str:
    return "code in a pickle was run" if Path("gone").exists() else ""
