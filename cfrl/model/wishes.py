"""What a user asks for, in words, read: a formula, a system, elements, sizes, a crystal to resemble.

What comes out are `SamplerOptions`. How often to draw each space group then: `sampler.space_group_shares`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS, NUM_ELEMENTS, SYMBOLS, atomic_number
from cfrl.crystals.refusal import NOBLE_GASES, RADIOACTIVE
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS
from cfrl.errors import UserError, nearest
from cfrl.model.constraints import Bounds, Composition, Demand, Template
from cfrl.model.distributions import SamplerOptions
from cfrl.model.options import ElementWishes, Wishes

UNIFORM = "uniform"
Wanted = Callable[[CrystalBatch], np.ndarray]  # of n crystals, which to keep: (n,) bool
SpaceGroups = int | str | Iterable[int] | None  # as wished: see `space_group_numbers`
ELEMENT_SETS = {"radioactive": RADIOACTIVE, "noble_gas": NOBLE_GASES}
TOKEN = re.compile(r"(\[[A-Z][a-z]?\]|[A-Z][a-z]?)(\d+(?:\.\d+)?(?:-\d+)?)?")
BRACKETS = re.compile(r"\(([^()]*)\)(\d*)")
ANY = "?"  # before the letter of an element that may be any
MOST_FORMULAS = 10_000  # that a range of amounts may stand for


# ---- words ---------------------------------------------------------------------------------------------------------


def sampler_options(wishes: Wishes, max_sites: int, temperature: float = 1.0, top_p: float = 1.0) -> SamplerOptions:
    """How to draw so that every crystal is as wished.

    Args:
        max_sites: that the model can hold.

    Raises:
        UserError: what cannot be read, or contradicts itself.
    """
    allowed = allowed_elements(wishes)
    elements = None if len(allowed) == NUM_ELEMENTS - 1 else tuple(sorted(allowed))
    options = SamplerOptions(temperature, top_p, elements, wishes.max_atoms, _favoured(wishes.favour))
    if wishes.like:
        return _like(wishes, options, max_sites)
    demand = _demand(wishes, allowed)
    if demand is None:
        return options
    groups = tuple(space_group_numbers(wishes.space_group))
    return replace(options, constraint=_composition(demand, groups, max_sites))


def wishes_of(**words: Any) -> Wishes:
    """Wishes as callers write them: elements=["Ba", 22] or space_group=225 beside "Ba,Ti" and "225"."""

    def plain(value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value

    texts = ("space_group", "elements", "require", "exclude")
    written = {name: plain(value) for name, value in words.items()}
    return Wishes(**{k: str(v) if k in texts and v is not None else v for k, v in written.items()})


def parse_elements(elements: str | Iterable[str | int] | None) -> tuple[int, ...] | None:
    """Atomic numbers of "Ba,Ti,O", or of symbols or numbers. Raises UserError for what is no element."""
    if elements is None:
        return None
    elements = elements.split(",") if isinstance(elements, str) else elements
    words = [str(word).strip() for word in elements]
    numbers = sorted({int(word) if word.isdigit() else atomic_number(word) for word in words})
    if not numbers or not all(1 <= number < NUM_ELEMENTS for number in numbers):
        raise UserError("elements: give symbols such as Ba,Ti,O")
    return tuple(numbers)


def parse_formula(text: str) -> tuple[tuple[int, ...], int, tuple[tuple[int, ...], ...]]:
    """Elements of a formula, how many others it has, and the amounts of both, least whole numbers.

    "LiMn2O4"; "A2BO4", where letters that are no element stand for any, and with A so do B and C ("[B]" is boron);
    "Li1-2MnO3" for a range. Raises UserError.
    """
    flat = text.replace(" ", "")
    while match := BRACKETS.search(flat):
        times = Fraction(match[2] or 1)
        inside = "".join(f"{symbol}{Fraction(amount or 1) * times}" for symbol, amount in _tokens(match[1], text))
        flat = flat[: match.start()] + inside + flat[match.end() :]
    tokens = _tokens(flat, text)
    strange = {symbol for symbol, _ in tokens} - set(ATOMIC_NUMBERS)
    wild = {symbol for symbol in strange if len(symbol) == 1}
    wild |= {"B", "C"} if "A" in wild else set()
    spans: dict[str, list[Fraction]] = {}
    for symbol, amount in tokens:
        name = ANY + symbol if symbol in wild else symbol.strip("[]")
        if name[0] != ANY and name not in ATOMIC_NUMBERS:
            raise UserError(f"formula {text}: no element {name}{nearest(name, ATOMIC_NUMBERS)}")
        low, _, high = amount.partition("-") if amount else ("1", "", "")
        span = [Fraction(low)] if not high else [Fraction(k) for k in range(int(Fraction(low)), int(high) + 1)]
        spans[name] = [a + b for a in spans.get(name, [Fraction(0)]) for b in span]
    if math.prod(len(span) for span in spans.values()) > MOST_FORMULAS:
        raise UserError(f"formula {text}: its ranges stand for too many formulas; narrow them")
    named = sorted((name for name in spans if name[0] != ANY), key=ATOMIC_NUMBERS.__getitem__)
    order = [*named, *(name for name in spans if name[0] == ANY)]
    formulas = {_whole(amounts) for amounts in itertools.product(*(spans[name] for name in order))} - {None}
    if not formulas:
        raise UserError(f"formula {text}: amounts must be above 0, and no more than 1000 atoms in all")
    return tuple(ATOMIC_NUMBERS[name] for name in named), len(order) - len(named), tuple(sorted(formulas))


def _tokens(text: str, whole: str) -> list[tuple[str, str]]:
    tokens = TOKEN.findall(text)
    if not tokens or "".join(symbol + amount for symbol, amount in tokens) != text:
        raise UserError(f"formula {whole}: cannot be read; write it like LiMn2O4, A2BO4 or Li1-2MnO3")
    return tokens


def _whole(amounts: Iterable[Fraction]) -> tuple[int, ...] | None:
    """The least whole numbers in this ratio."""
    amounts = [amount.limit_denominator(1000) for amount in amounts]
    if not all(amount > 0 for amount in amounts):
        return None
    times = math.lcm(*(amount.denominator for amount in amounts))
    numbers = [int(amount * times) for amount in amounts]
    least = tuple(number // math.gcd(*numbers) for number in numbers)
    return least if sum(least) <= 1000 else None


def has_elements(crystals: CrystalBatch, wishes: ElementWishes) -> np.ndarray:
    """(n,) bool: which crystals hold what they must, and nothing that is not allowed."""
    allowed = torch.tensor([0, *allowed_elements(wishes)])
    kept = torch.isin(crystals.species, allowed).all(1)
    for number in parse_elements(wishes.require or None) or ():
        kept &= (crystals.species == number).any(1)
    return kept.numpy()


def allowed_elements(wishes: ElementWishes) -> set[int]:
    """Atomic numbers. Raises UserError where none is left."""
    allowed = set(parse_elements(wishes.elements) or range(1, NUM_ELEMENTS))
    for word in wishes.exclude.split(",") if wishes.exclude else ():
        allowed -= ELEMENT_SETS.get(word.strip()) or {atomic_number(word.strip())}
    if not allowed:
        raise UserError("--elements and --exclude leave no element")
    return allowed


def _favoured(text: str | None) -> tuple[tuple[int, float], ...]:
    """ "O=2,Pb=-3" -> ((8, 2.0), (82, -3.0))."""
    pairs = [word.partition("=") for word in text.split(",")] if text else []
    try:
        return tuple((atomic_number(symbol.strip()), float(value)) for symbol, _, value in pairs)
    except ValueError as error:
        raise UserError(f"favour {text}: give elements and numbers, such as O=2,Pb=-3") from error


def _bounds(name: str, text: str | None) -> Bounds | None:
    """ "4" -> (4, 4), "4-20" -> (4, 20)."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"{name} {text}: give a number above 0, or a range such as 4-20")
    return low, high


def _demand(wishes: Wishes, allowed: set[int]) -> Demand | None:
    """What letters and elements must come to; None where nothing is asked that needs looking ahead."""
    system = parse_elements(wishes.system.replace("-", ",")) if wishes.system else None
    required = set(parse_elements(wishes.require) or ()) | set(system or ())
    units, atoms, sites = (_bounds(n, getattr(wishes, n)) for n in ("z", "num_atoms", "num_sites"))
    if wishes.max_atoms and (atoms or wishes.formula):
        atoms = (atoms[0] if atoms else 1, min(wishes.max_atoms, atoms[1] if atoms else wishes.max_atoms))
    if missing := required - allowed:
        _contradiction(f"{_listed(missing)} must be there", "--elements or --exclude leave them out")
    if wishes.formula is None:
        if units:
            raise UserError("--z counts formula units: it needs a --formula")
        if not required and atoms is None and sites is None:
            return None
        named, others = tuple(sorted(required)), system is None and bool(allowed - required)
        if atoms is None and wishes.max_atoms:
            atoms = (1, wishes.max_atoms)
        elements = system if system is not None else tuple(sorted(allowed))
        return Demand(named, 0, None, others, None, atoms, sites, elements)
    named, anonymous, formulas = parse_formula(wishes.formula)
    if missing := set(named) - allowed:
        _contradiction(f"--formula {wishes.formula}", f"--elements or --exclude leave out {_listed(missing)}")
    more = tuple(sorted(required - set(named)))
    strange = set(named) - set(system) if system is not None else set()
    if len(more) > anonymous or strange or (system is not None and len(system) < len(named) + anonymous):
        _contradiction(f"--formula {wishes.formula}", f"{_listed(required)} (--system, --require)")
    if len(allowed - set(named)) < anonymous:
        _contradiction(f"--formula {wishes.formula}", "--elements and --exclude leave too few elements")
    # Elements that must be there take the place of any of the anonymous ones.
    formulas = (
        {fixed[: len(named)] + free for fixed in formulas for free in set(itertools.permutations(fixed[len(named) :]))}
        if more
        else set(formulas)
    )
    scale = _scale(wishes.formula) if units else 1
    if scale > 1:  # units as they are written: Li2O2, not LiO
        formulas = {tuple(scale * amount for amount in formula) for formula in formulas}
    return Demand(
        named + more, anonymous - len(more), tuple(sorted(formulas)), False, units, atoms, sites, tuple(sorted(allowed))
    )


def _scale(formula: str) -> int:
    """How many of its least formulas one as written is; 1 where it has a range, a fraction or brackets."""
    amounts = [amount or "1" for _, amount in TOKEN.findall(formula)]
    plain = all(amount.isdigit() for amount in amounts) and "(" not in formula
    return math.gcd(*map(int, amounts)) if plain else 1


@dataclass(frozen=True)
class InRange:
    """Whether crystals have the density (g/cm^3) and volume per atom (A^3) that are wished: (n,) bool.

    Which they have the model decides last of all, with the cell: those that are off are to be drawn anew.
    """

    density: tuple[float, float] | None
    volume_per_atom: tuple[float, float] | None

    @classmethod
    def of(cls, wishes: Wishes) -> InRange | None:
        """None where nothing is wished. Raises UserError for what is no range."""
        spans = [_span(name, getattr(wishes, name)) for name in ("density", "volume_per_atom")]
        return cls(*spans) if any(spans) else None

    def __call__(self, crystals: CrystalBatch) -> np.ndarray:
        fits = np.ones(len(crystals), dtype=bool)
        volumes = crystals.volumes() / crystals.num_atoms
        for span, values in ((self.density, crystals.densities()), (self.volume_per_atom, volumes)):
            if span is not None:
                fits &= ((values >= span[0]) & (values <= span[1])).cpu().numpy()
        return fits

    def __str__(self) -> str:
        return "--density, --volume-per-atom"


@dataclass(frozen=True)
class AllOf:
    """Whether crystals pass each of several tests: (n,) bool. `AllOf.of` leaves out those that are None."""

    tests: tuple[Wanted, ...]

    @classmethod
    def of(cls, *tests: Wanted | None) -> Wanted | None:
        given = tuple(test for test in tests if test is not None)
        return cls(given) if len(given) > 1 else given[0] if given else None

    def __call__(self, crystals: CrystalBatch) -> np.ndarray:
        return np.logical_and.reduce([test(crystals) for test in self.tests])

    def __str__(self) -> str:
        return "; ".join(map(str, self.tests))


def _span(name: str, text: str | None) -> tuple[float, float] | None:
    """ "4-6.5" -> (4.0, 6.5)."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", text)
    if not match or float(match[1]) > float(match[2]):
        raise UserError(f"{name} {text}: give a range such as 4-6.5")
    return float(match[1]), float(match[2])


def _contradiction(one: str, other: str) -> None:
    raise UserError(f"{one}, but {other}: no crystal can be both")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(SYMBOLS[number] for number in sorted(numbers))


@lru_cache(8)
def _composition(demand: Demand, groups: tuple[int, ...], max_sites: int) -> Composition:
    return Composition(demand, groups, max_sites)


def _like(wishes: Wishes, options: SamplerOptions, max_sites: int) -> SamplerOptions:
    """As a crystal in a file."""
    from cfrl.io.datasets import load_dataset

    asked = [name for name in ("formula", "system", "require", "z", "num_sites", "num_atoms") if getattr(wishes, name)]
    if asked:
        raise UserError(f"--like says what --{asked[0].replace('_', '-')} says: give one of them")
    crystals = load_dataset(wishes.like).canonical()
    if len(crystals) > 1:
        raise UserError(f"{wishes.like} holds {len(crystals)} crystals; give a file with the one to be like")
    if wishes.vary == "space_group":
        wishes = replace(wishes, formula=crystals.formulas()[0], like=None)
        return sampler_options(wishes, max_sites, options.temperature, options.top_p)
    sites = int(crystals.num_sites)
    if sites > max_sites:
        raise UserError(f"{wishes.like} has {sites} inequivalent sites; this model holds at most {max_sites}")
    letters, species = crystals.wyckoff[0, :sites].tolist(), crystals.species[0, :sites].tolist()
    same = wishes.vary == "coordinates"
    template = Template(int(crystals.space_group), letters, species, same, options.elements)
    return replace(options, constraint=template)


def space_group_numbers(wanted: SpaceGroups) -> list[int]:
    """The groups that "", "uniform" or None (all), 225, [221, 225] or "221,225" name. Raises UserError."""
    if wanted is None or (isinstance(wanted, str) and wanted in ("", UNIFORM)):
        return list(range(1, NUM_SPACE_GROUPS + 1))
    words = wanted.split(",") if isinstance(wanted, str) else [wanted] if isinstance(wanted, int) else wanted
    try:
        numbers = [int(word) for word in words]
    except ValueError as error:
        raise UserError(
            f"space group '{wanted}': give numbers from 1 to 230, such as 225 or 221,225, or {UNIFORM}"
        ) from error
    for number in numbers:
        if not 1 <= number <= NUM_SPACE_GROUPS:
            raise UserError(f"space group {number}: the numbers go from 1 to 230")
    return numbers
