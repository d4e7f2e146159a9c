"""cfrl.toml: files that are no TOML, and settings of wrong types or out of their ranges. tomllib is the oracle."""

from __future__ import annotations

import random
import tomllib
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from cfrl import config
from cfrl.settings import set_kind, to_toml
from tests.fuzz.cases import NUMBERS, WORDS, Case, garbled
from tests.fuzz.seeds import Seeds
from tests.fuzz.structures import stored_problem

MISSING = "missing.h5"
# what takes the settings of a section and then ends at a file that is not there
QUICK = {
    "data": ["data", "import", "missing.cif", "-o", "out.h5"],
    "hull": ["data", "hull", MISSING, "-o", "out.h5"],
    "grow": ["data", "grow", "--model", MISSING, "-o", "out.h5"],
    "pretrain": ["pretrain", "--dataset", MISSING],
    "sample": ["sample", "--model", MISSING, "-o", "out.csv"],
    "finetune": ["finetune", "--model", MISSING],
    "retrieve": ["retrieve", "--run", MISSING],
    "screen": ["screen", "missing.cif", "-o", "table"],
    "predictor": ["rewards", "train", "missing.csv", "-o", "out.safetensors"],
}
TEMPLATE = to_toml({name: cls() for name, cls in config.SECTIONS.items()}, comments=True)
LITERALS = (
    *(
        "nan",
        "inf",
        "-inf",
        "+inf",
        "1e400",
        "-1",
        "0",
        "-0.0",
        "1e30",
        "0.5",
        "2",
        "1_0",
        "9" * 25,
        "9" * 5000,
        "0xff",
    ),
    *(
        "true",
        '""',
        '"nan"',
        '"1"',
        "[]",
        "{}",
        '["a"]',
        "[1]",
        "1979-05-27",
        "07:32:00",
        "'''x'''",
        '"\\u0000"',
        "'x'",
    ),
    *("{ a = 1 }", "[[1]]", '"last"', '"auto"', '"uniform"', '"cpu"', '"é"', "-9223372036854775809"),
)


def case(rng: random.Random, seeds_: Seeds) -> Case:
    """A file of settings, for a command that reads it; one in eight for a command that then does its work."""
    if rng.random() < 0.125:
        return _at_work(rng, seeds_)
    section = rng.choice(list(QUICK))
    text = _text(rng, section)
    Path("cfrl.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    if "a." * 1000 in text:  # tomllib would read it for minutes
        return Case(QUICK[section], ["cfrl.toml"], wrong="a key of 1,000 parts")
    try:
        document = tomllib.loads(Path("cfrl.toml").read_text("utf-8-sig"))
    except Exception:
        return Case(QUICK[section], ["cfrl.toml"], wrong="cfrl.toml is no TOML")
    wrong = _faults(document, section)
    if wrong:
        return Case(QUICK[section], wrong, wrong=f"{' and '.join(wrong)[:200]} cannot be")
    return Case(QUICK[section], [*_words(document, section), "missing", "out.", "target"])


def _text(rng: random.Random, section: str) -> str:
    if rng.random() < 0.5:
        known = fields(config.SECTIONS[section])
        lines = [f"{rng.choice(known).name} = {rng.choice(LITERALS)}" for _ in range(rng.choice((1, 1, 2)))]
        return "\n".join([f"[{section}]", *lines])
    if rng.random() < 0.6:
        return garbled(rng, TEMPLATE, (*WORDS, *LITERALS))
    depth = rng.choice((50, 3000, 100_000))
    return rng.choice(
        (
            f"[{section}]\nseed = " + "[" * depth + "]" * depth,
            f"[{section}]\nseed = " + "{ a = " * depth + "1" + "}" * depth,
            "a." * depth + "b = 1",
            "[" + "a." * depth + "b]",
            f"[[{section}]]\nseed = 1",
            f"{section} = 3",
            f"[{section}.seed]\nx = 1",
            f"[{section}]\nseed = 1\nseed = 2",
            "[rewards.mine]\nexpression = 3",
            "[rewards.mine]\nexpression = 'density'\nx = nan",
            "rewards = 1",
            "\udcff\udcfe",
            "\ufeff[" + section + "]\nseed = 5",
            "x" * 300_000,
        )
    )


def _faults(document: dict[str, Any], section: str) -> list[str]:
    """Names of which a refusal has to hold one: sections and settings that cannot be used."""
    values = document.get(section, {})
    if not isinstance(values, dict):
        return [section]
    unknown = [name for name in document if name not in (*config.SECTIONS, "rewards")]
    kinds = get_type_hints(config.SECTIONS[section], include_extras=True)
    known = {name for name in kinds if f"--{name}" not in QUICK[section]}  # a flag wins over the file
    return unknown + [
        name
        for name in values
        if name not in kinds or (name in known and not fits(values[name], kinds[name], unset(section, name)))
    ]


def unset(section: str, name: str) -> Any:
    """How a file writes that this setting is not set."""
    return next(f.metadata["unset"] for f in fields(config.SECTIONS[section]) if f.name == name)


def fits(value: Any, kind: Any, none: Any = None) -> bool:
    """Whether a setting may have this value, said a second time; `none` stands for None."""
    if NoneType in get_args(kind):
        if value == none and not isinstance(value, bool):
            return True
        kind = set_kind(kind)
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        number, limits = get_args(kind)
        if isinstance(value, bool) or not isinstance(value, Integral if number is int else Real):
            return False
        above = limits.least < value if limits.open_below else limits.least <= value
        return bool(above and (value < limits.most if limits.open_above else value <= limits.most))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, get_origin(kind) or kind)


def _words(document: dict[str, Any], section: str) -> list[str]:
    """Texts can be refused later, each with its own name or value."""
    values = document.get(section, {})
    return [name for name in values] + [str(value) for value in values.values() if isinstance(value, str) and value]


# ---- settings that are allowed, and work with them ---------------------------------------------------------------


def _at_work(rng: random.Random, seeds_: Seeds) -> Case:
    """Numbers at the ends of their ranges: the work ends well, or is refused, and leaves nothing that is not finite."""
    section, words, left, check = rng.choice(_WORK)
    words = [
        str(seeds_.model) if word == "MODEL" else str(seeds_.dataset) if word == "DATASET" else word for word in words
    ]
    kinds, values = get_type_hints(config.SECTIONS[section], include_extras=True), {}
    for name in rng.sample(left, rng.choice((1, 2, 3))):
        kind = set_kind(kinds[name])
        number, limits = get_args(kind)
        ends = (limits.least, limits.most, limits.least + 1e-9, limits.most - 1e-9, *NUMBERS)
        good = [v for v in ends if fits(number(v) if number is int and v == v and abs(v) < 1e300 else v, kind)]
        values[name] = number(rng.choice(good))
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    Path("cfrl.toml").write_text("\n".join([f"[{section}]", *lines]))
    return Case(words, [*values, "runs/"], check=check)


def _finite_models() -> str:
    from safetensors.numpy import load_file

    paths = list(Path("runs").glob("*/model.safetensors"))
    for path in paths:
        for name, values in load_file(path).items():
            if not np.isfinite(values).all() and "space_group_log_prob" not in name:
                return f"{path}: {name} is not finite"
    return "" if paths else "there is no model"


_WORK = [
    (
        "pretrain",
        ["pretrain", "--dataset", "DATASET", "--init", "MODEL", "--epochs", "1", "--device", "cpu"],
        ["lr", "lr_final", "warmup", "weight_decay", "clip", "dropout", "ema", "patience", "validate_every", "seed"],
        _finite_models,
    ),
    (
        "sample",
        ["sample", "--model", "MODEL", "-n", "2", "--keep-invalid", "-o", "out.h5", "--device", "cpu"],
        ["max_atoms", "temperature", "top_p", "min_distance", "seed", "draw_size"],
        lambda: stored_problem(Path("out.h5"), drawn=True),
    ),
    (
        "finetune",
        [
            "finetune",
            "--model",
            "MODEL",
            "--reward",
            "density",
            "--steps",
            "1",
            "-n",
            "4",
            "--evaluate",
            "0",
            "--no-plots",
            "--device",
            "cpu",
            "--scale-crystals",
            "4",
            "--epochs",
            "1",
            "--max-atoms",
            "8",
            "--elements",
            "Na,Cl,O",
            "--min-distance",
            "0",
        ],
        [
            "lr",
            "lr_final",
            "warmup",
            "clip_gradient",
            "clip_ratio",
            "clip_advantage",
            "baseline_decay",
            "beta",
            "max_kl",
            "target_kl",
            "max_step_kl",
            "entropy_wyckoff",
            "entropy_lattice",
            "diversity",
            "replay",
            "replay_size",
            "seed",
            *("replay_clip", "temperature", "top_p", "batch_size", "micro_batch"),
            *("draw_size", "group_size", "diversity_window"),
        ],
        _finite_models,
    ),
]
