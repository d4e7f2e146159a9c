"""Flags of every command, with values of other types and out of their ranges, on files that are missing or small."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from cfrl import config
from cfrl.settings import set_kind
from tests.fuzz import seeds
from tests.fuzz.cases import WORDS, Case
from tests.fuzz.settings import QUICK, fits, unset

PATHS = (
    "missing",
    "/dev/null",
    "/dev/zero",
    ".",
    "sound.cif",
    "no/such/folder/x.h5",
    "x" * 300,
    "é.csv",
    "sound.cif/x.csv",
)
PLAIN = [word for word in WORDS if "\0" not in word and "\udcff" not in word]
OTHER = (
    ["model", "info"],
    ["data", "info"],
    ["report"],
    ["model", "import", "missing.pkl", "-o"],
    ["model", "pack", "missing.safetensors", "-o"],
    ["data", "import", "sound.cif", "-o"],
    ["data", "fetch"],
    ["data", "hull", "missing.h5", "-o"],
    ["screen", "sound.cif", "--known"],
    ["screen"],
    ["nonsense"],
    [],
)


def case(rng: random.Random) -> Case:
    """A command with one to three flags."""
    Path("sound.cif").write_text(seeds.cif(seeds.structures()[0]))
    if rng.random() < 0.15:
        value = rng.choice((*PATHS[:2], *PATHS[3:], *PLAIN))
        words = [*rng.choice(OTHER), value]
        return Case(words, [*words, *_shown(value), "argument", "option", "Usage", "model", "--known"])
    section = rng.choice(list(QUICK))
    kinds = get_type_hints(config.SECTIONS[section], include_extras=True)
    words, wrong = list(QUICK[section]), []
    flags = [f.name for f in fields(config.SECTIONS[section]) if get_origin(kinds[f.name]) is not dict]
    values = []
    for name in rng.sample(flags, rng.choice((1, 1, 1, 2, 3))):
        kind, flag = kinds[name], f"--{name.replace('_', '-')}"
        if kind is bool:
            words.append(rng.choice((flag, flag.replace("--", "--no-"), f"{flag}=3")))
            wrong += [flag] if words[-1].endswith("=3") else []
            continue
        value = (
            rng.choice((*PLAIN, *PATHS))
            if rng.random() < 0.7
            else rng.choice(("0", "1", "2", "0.5", "100", "-0.5", "1e-3"))
        )
        words.append(f"{flag}={value}")
        values.append(value)
        if not _possible(value, kind, unset(section, name)):
            wrong += [flag, name]
    names = [
        n
        for word in words
        if word.startswith("--")
        for n in (word.split("=")[0], word.split("=")[0][2:].replace("-", "_"))
    ]
    if wrong:
        return Case(words, ["missing", "target", *wrong, *names], wrong=f"{' and '.join(wrong)} cannot be so")
    return Case(words, ["missing", "out", "target", *names, *(shown for value in values for shown in _shown(value))])


def _shown(value: str) -> list[str]:
    return [part for part in (value, repr(value)[1:-1], " ".join(value.split()), value[:60]) if part.strip()]


def _possible(text: str, kind: object, none: object) -> bool:
    """Whether this text is a value of such a flag; `none` stands for None."""
    kind, may_be_none = set_kind(kind), kind != set_kind(kind)
    if get_origin(kind) is Literal:
        return text in get_args(kind) or (may_be_none and text == none)
    if get_origin(kind) is not Annotated:
        return True
    number = get_args(kind)[0]
    try:
        value = number(text)
    except (ValueError, OverflowError):
        return False
    if may_be_none and value == none:
        return True
    return not (isinstance(value, float) and math.isnan(value)) and fits(value, kind)
