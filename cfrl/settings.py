"""How settings are declared and checked: frozen dataclasses whose fields carry their help text, range and theme.

Every value is checked when the dataclass is made, whoever makes it, and stays as it is. Imports nothing heavy.
"""

from __future__ import annotations

import json
import reprlib
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from cfrl.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """What a number must keep to. Both ends are given, so that infinity and NaN keep to none.

    least, most: the ends. open_below, open_above: whether they are themselves excluded.
    """

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (
            (self.open_below and value == self.least) or (self.open_above and value == self.most)
        )

    def __str__(self) -> str:
        low, high = "above" if self.open_below else "at least", "below" if self.open_above else "at most"
        return f"{low} {self.least:,} and {high} {self.most:,}"


# What the Tab key offers for settings of several rooms.
POTENTIALS = ("chgnet", "mace", "sevennet", "orb", "mattersim", "fairchem", "nequip", "matgl", "grace")
POTENTIAL_HELP = (
    "chgnet, chgnet:0.2.0, mace:NAME or mace:PATH.model; PATH.model@mp-raw if trained on uncorrected MP energies; "
    "sevennet:7net-l3i5 and others once added (cfrl potentials)."
)
DEVICES = ("auto", "cpu", "cuda")
RUNS = "runs/*"  # the run folders that there are

# Wide enough for any sensible use, narrow enough for memory, torch and patience.
Count = Annotated[int, Range(1, 10**7)]
CountOrZero = Annotated[int, Range(0, 10**7)]
Workers = Annotated[int, Range(1, 4096)]
Seed = Annotated[int, Range(0, 2**62)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open_below=True)]
FractionBelowOne = Annotated[float, Range(0, 1, open_above=True)]
Weight = Annotated[float, Range(0, 10**6)]
PositiveWeight = Annotated[float, Range(0, 10**6, open_below=True)]
SignedWeight = Annotated[float, Range(-(10**6), 10**6)]
Minutes = Annotated[float, Range(0, 10**6)]
Seconds = Annotated[float, Range(0, 10**6)]
Temperature = Annotated[float, Range(0.01, 100)]
Gigabytes = Annotated[float, Range(0, 10**5, open_below=True)]
Ratio = Annotated[float, Range(1, 10**6)]
Distance = Annotated[float, Range(0, 10)]
Tolerance = Annotated[float, Range(0, 1, open_below=True)]


def option(
    default: Any, help: str, *, unset: Any = None, flags: tuple[str, ...] = (), choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field.

    Args:
        help: names the unit; it also ends the message about a value that cannot be.
        unset: how files and flags write None, for a field that may be None.
        flags: short forms such as ``-n``.
        choices: what the Tab key offers where other values are possible too; a `Literal` field has no others.
    """
    metadata = {"help": help, "unset": unset, "flags": flags, "choices": choices}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What the settings of all commands share.

    Raises:
        UserError: a value of the wrong type, or out of its range.
    """

    THEMES: ClassVar[dict[str, tuple[str, ...]]] = {}  # headings of the help, and the settings under them

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for f in fields(self):
            vars(self)[f.name] = _checked(f, kinds[f.name], getattr(self, f.name))

    def plain(self) -> dict[str, Any]:
        """Name -> value as files hold it: what is not set as the field's `unset`."""
        return {f.name: _plain(f, getattr(self, f.name)) for f in fields(self)}


def build(cls: type[T], values: Mapping[str, Any], source: str = "") -> T:
    """The settings made of `values`. Raises UserError: an unknown key, or a value that cannot be, after `source`."""
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"{source}unknown setting '{key:.60}' for {cls.__name__}{nearest(key, known)}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{source}{error}") from error


def to_toml(sections: Mapping[str, Any], comments: bool = False) -> str:
    """TOML text of `{section name: dataclass instance}`, with the help texts as comments if wanted."""
    blocks = []
    for name, config in sections.items():
        lines = [f"[{name}]"]
        for f in fields(config):
            if comments:
                lines += textwrap.wrap(f.metadata["help"], 100, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{f.name} = {_toml(_plain(f, getattr(config, f.name)))}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _checked(f: Field, kind: Any, value: Any) -> Any:
    """The value of a field as its kind has it (1 as 1.0). Raises UserError."""
    if NoneType in get_args(kind):
        if value is None or (value == f.metadata["unset"] and not isinstance(value, bool)):
            return None
        kind = set_kind(kind)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        known = choices(kind)
        raise UserError(f"{f.name} = {reprlib.repr(value)} is none of {', '.join(known)}{nearest(str(value), known)}")
    number, limits = get_args(kind) if get_origin(kind) is Annotated else (None, None)
    if number is None and _fits(value, kind):
        return value
    if number and _fits(value, number) and value in limits:
        return number(value)
    wanted = f"{_NAMES[number]} {limits}" if number else _NAMES[get_origin(kind) or kind]
    raise UserError(f"{f.name} = {reprlib.repr(value)} should be {wanted}. {f.metadata.get('help', '')}".rstrip())


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    list: "a list of texts",
    dict: "a table",
}


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, get_origin(kind) or kind)


def set_kind(kind: Any) -> Any:
    """The type of a field where it is set: `int` of `int | None`."""
    return next(k for k in get_args(kind) if k is not NoneType) if NoneType in get_args(kind) else kind


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal` type."""
    return get_args(set_kind(kind)) if get_origin(set_kind(kind)) is Literal else ()


def _plain(f: Field, value: Any) -> Any:
    return f.metadata["unset"] if value is None else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # TOML's basic strings have JSON's escapes
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return repr(value)


def parse_names(text: str | None, known: Collection[str], setting: str, kind: str) -> tuple[str, ...]:
    """Names of a list such as "element,known", in their order.

    Args:
        known: the names that there are.
        setting, kind: of what this is the value, and what the names stand for: "hold size: no such kind".

    Raises:
        UserError: a name that is none of them.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in known:
            raise UserError(f"{setting} {name}: no such {kind}{nearest(name, known)}; there are: {', '.join(known)}")
    return names
