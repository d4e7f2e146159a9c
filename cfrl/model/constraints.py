"""What is asked of letters and elements, as weights on the next choice, 0 where nothing can end as asked any more.

A choice is open if and only if some way to go on from it meets the demand. So no draw is thrown away, and the
log-probability under the weights is that of the sampler. What can be reached is tabulated once for each space group,
from the end of a crystal backwards (`Composition._tables`), as WyckoffTransformer's masks are (arXiv 2503.02407).

Masks alone are short-sighted: where a formula is asked for, many choices are open that only twenty more sites can make
good. The model conditioned on the demand would weigh each choice by the probability that the rest meets it. A weight is
that probability under a simple process (all letters alike, all elements alike), tabulated in the same way: a twist, as
sequential Monte Carlo calls it, that need not be exact, for the log-probability counts it too.

A constraint keeps a state for each crystal, a row of integers: how many sites there are, what they hold. B: crystals.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.wyckoff import NUM_LETTERS, NUM_SPACE_GROUPS, arrays
from cfrl.errors import UserError

MOST_ATOMS = 40  # of a formula of which nothing is said: in units of what the positions of a group hold at least
MOST_VECTORS = 10_000  # of a group's table: beyond, larger cells are left out, unless formula units or atoms are given
MOST_ENTRIES = 50_000_000  # of the tables
NAMED, ANONYMOUS = math.exp(-2), math.exp(-1)  # how likely the element of a site is the one that it must be, about
Bounds = tuple[int, int]  # least and most


class Constraint(ABC):
    """Log-weights of letters and elements, -inf where closed. All methods take tensors of any leading shape (...)."""

    @abstractmethod
    def feasible(self) -> Tensor:
        """(231,) bool: the space groups in which the demand can be met at all."""

    @abstractmethod
    def why_not(self, groups: Sequence[int]) -> str:
        """Why none of these groups can meet it, and what is nearest: the message of an error."""

    @abstractmethod
    def start(self, n: int, device: torch.device) -> Tensor:
        """(n, k) int64: the state of crystals without a site."""

    @abstractmethod
    def letters(self, state: Tensor, group: Tensor) -> Tensor:
        """(..., 28) of letters of the next site, 0 for the stop; which may follow which is not looked at."""

    @abstractmethod
    def species(self, state: Tensor, group: Tensor, letter: Tensor) -> Tensor:
        """(..., 119) of elements of a next site with this letter."""

    @abstractmethod
    def after(self, state: Tensor, group: Tensor, letter: Tensor, species: Tensor) -> Tensor:
        """(..., k): the state with one more site."""

    def along(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """The weights along B crystals of S sites: "first" (B, 28), "wyckoff" (B, S, 28) after each site, "species"
        (B, S, 119).
        """
        group, state = crystals.space_group, self.start(len(crystals), crystals.device)
        first, letters, species = self.letters(state, group), [], []
        for letter, element in zip(crystals.wyckoff.T, crystals.species.T, strict=True):
            species.append(self.species(state, group, letter))
            state = torch.where((letter > 0)[:, None], self.after(state, group, letter, element), state)
            letters.append(self.letters(state, group))
        return {"first": first, "wyckoff": torch.stack(letters, 1), "species": torch.stack(species, 1)}

    def met_by(self, crystals: CrystalBatch) -> Tensor:
        """(B,) bool: which crystals, of possible space groups, could have been drawn so."""
        if not len(crystals):
            return torch.zeros(0, dtype=torch.bool)
        along, letters, there = self.along(crystals), crystals.wyckoff, crystals.wyckoff > 0
        following = F.pad(letters[:, 1:], (0, 1))
        first = along["first"].gather(1, letters[:, :1])[:, 0]
        later = along["wyckoff"].gather(2, following[..., None])[..., 0].masked_fill(~there, 0)
        species = along["species"].gather(2, crystals.species[..., None])[..., 0].masked_fill(~there, 0)
        return first.isfinite() & (later + species).isfinite().all(1)


@dataclass(frozen=True)
class Demand:
    """What a composition should be.

    named: atomic numbers of elements that are counted or must be there.
    anonymous: how many more elements there are, whichever.
    amounts: formulas, atoms of each of the named and anonymous elements in any one of them; None: at least one each.
    others: whether there may be more elements.
    units, atoms, sites: bounds of the formula units and atoms in the conventional cell, and of its sites; None: any.
    elements: atomic numbers that may occur; None: all.
    """

    named: tuple[int, ...] = ()
    anonymous: int = 0
    amounts: tuple[tuple[int, ...], ...] | None = None
    others: bool = False
    units: Bounds | None = None
    atoms: Bounds | None = None
    sites: Bounds | None = None
    elements: tuple[int, ...] | None = None


class Composition(Constraint):
    """A composition as asked, whatever letters hold it.

    What a crystal holds is a vector u with an entry for each named and anonymous element: its atoms, in units of what
    all positions of the group are multiples of, or 1 where it need only be there; and one for all atoms where their
    number is bounded. Anonymous elements take their entries in the order in which they first occur; what is asked is
    the same under their permutations, so that this order does not matter.

    Args:
        demand: what is asked.
        groups: space groups to tabulate.
        max_sites: sites at most.

    Raises:
        UserError: the tables would be too large.
    """

    def __init__(self, demand: Demand, groups: Iterable[int], max_sites: int) -> None:
        self.demand = demand
        self.low, self.high = demand.sites or (1, max_sites)
        self.high = min(self.high, max_sites)
        elements, atoms = len(demand.named) + demand.anonymous, demand.amounts is None and demand.atoms is not None
        self.size = elements + atoms
        # (moves, size): what a site of each element touches
        touch = np.eye(elements, self.size, dtype=np.int64)
        if demand.others:
            touch = np.concatenate([touch, np.zeros((1, self.size), dtype=np.int64)])
        if atoms:
            touch[:, -1] = 1
        counted = np.full(self.size, demand.amounts is not None)
        if atoms:
            counted[-1] = True
        self._touch, self._counted = touch, counted
        # How likely an element is one that is named, or the anonymous one that it should be, or any other.
        chance = [NAMED] * len(demand.named) + [ANONYMOUS] * demand.anonymous + [1.0] * demand.others
        self._chance = np.array(chance)
        slot = np.full(NUM_ELEMENTS, -1)
        slot[list(demand.named)] = np.arange(len(demand.named))
        windows = [sum(1 << s for s in range(max(self.low - k, 0), self.high - k + 1)) for k in range(max_sites + 2)]
        allowed = np.zeros(NUM_ELEMENTS, dtype=bool)
        allowed[list(range(1, NUM_ELEMENTS) if demand.elements is None else demand.elements)] = True
        self._fields = {
            "touch": touch,
            "counted": counted,
            "log_chance": np.log(self._chance).astype(np.float32),
            "slot": slot,
            "windows": np.array(windows),
            "allowed": allowed,
            **self._tables(groups),
        }
        self._on: dict[torch.device, dict[str, Tensor]] = {}

    # ---- tables, once ----

    def _tables(self, groups: Iterable[int]) -> dict[str, np.ndarray]:
        """The tables of all groups one after the other in `reach`, and how to find one's way in them."""
        n, fixed = NUM_SPACE_GROUPS + 1, arrays()
        base, volume = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        cap, stride = np.full((n, self.size), -1), np.zeros((n, self.size), dtype=np.int64)
        unit, reach, value, total = np.ones(n, dtype=np.int64), [np.zeros(1, np.int32)], [np.zeros(1, np.float32)], 1
        for group in groups:
            multiplicity = fixed["multiplicity"][group, 1 : fixed["num_letters"][group] + 1]
            unit[group] = math.gcd(*multiplicity.tolist())
            goals = self._goals(int(unit[group]))
            if not goals.any():
                continue
            dof = fixed["dof"][group, 1 : len(multiplicity) + 1]
            sites, chances = self._table(goals, multiplicity // unit[group], dof)
            if not sites[1].flat[0] & self._window:
                continue
            base[group], volume[group] = total, goals.size
            cap[group] = np.array(goals.shape) - 1
            stride[group] = [math.prod(goals.shape[k + 1 :]) for k in range(self.size)]
            reach.append(sites.ravel())
            with np.errstate(divide="ignore"):
                value.append(np.log(chances.ravel()).astype(np.float32))
            total += sites.size
            if total > MOST_ENTRIES:
                raise UserError("too many ways to meet what is asked: narrow --z, --num-atoms or the space groups")
        following = np.arange(NUM_LETTERS) + (fixed["dof"] == 0)
        last, per_unit = fixed["num_letters"], fixed["multiplicity"] // unit[:, None]
        return {
            "reach": np.concatenate(reach),
            "log_value": np.concatenate(value),
            "base": base,
            "volume": volume,
            "cap": cap,
            "stride": stride,
            "following": following,
            "last": last,
            "amount": per_unit,
        }

    @property
    def _window(self) -> int:
        """Bits of the numbers of sites that a whole crystal may have."""
        return sum(1 << sites for sites in range(self.low, self.high + 1))

    def _goals(self, unit: int) -> np.ndarray:
        """Bool over the vectors u: what a finished crystal may hold."""
        demand, elements = self.demand, len(self.demand.named) + self.demand.anonymous
        if demand.amounts is None:
            low, high = demand.atoms or (1, unit)
            shape = (2,) * elements + ((high // unit + 1,) if demand.atoms else ())
            goals = np.zeros(shape, dtype=bool)
            goals[(1,) * elements + ((slice(-(-low // unit), None),) if demand.atoms else ())] = True
            return goals
        low, high = demand.atoms or (1, MOST_ATOMS * unit)
        least, most = demand.units or (1, high)
        points: set[tuple[int, ...]] = set()
        for amounts in demand.amounts:
            atoms = sum(amounts)
            fixed, free = amounts[: len(demand.named)], amounts[len(demand.named) :]
            for z in range(max(least, -(-low // atoms)), min(most, high // atoms) + 1):
                if all(z * amount % unit == 0 for amount in amounts):
                    points |= {tuple(z * a // unit for a in fixed + p) for p in set(itertools.permutations(free))}
        bounded = demand.units is not None or demand.atoms is not None
        shape, kept = (1,) * self.size, []
        for point in sorted(points, key=sum):
            wider = tuple(max(size, number + 1) for size, number in zip(shape, point, strict=True))
            if kept and math.prod(wider) > MOST_VECTORS and not bounded:
                break
            shape, kept = wider, [*kept, point]
        goals = np.zeros(shape, dtype=bool)
        goals[tuple(np.array(kept, dtype=np.int64).reshape(-1, self.size).T)] = True
        return goals

    def _table(self, goals: np.ndarray, amount: np.ndarray, dof: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What sites of this letter or later ones can do from u, (letters + 2, *u) each.

        Args:
            goals: bool over u.
            amount, dof: (letters,) of the positions of the group.

        Returns:
            int32: bit s is set where s more sites lead to a goal; float64: the probability to end in a goal, where each
            next letter has the same chance.
        """
        reach = np.zeros((len(amount) + 2, *goals.shape), dtype=np.int32)
        value = np.zeros(reach.shape)
        reach[-1] = value[-1] = goals
        every = (1 << self.high + 1) - 1
        for letter in range(len(amount), 0, -1):
            moved, worth = reach[letter + 1], value[letter + 1]
            while True:  # once more for each time that the letter may be taken
                more, gain = reach[letter + 1].copy(), value[letter + 1].copy()
                for touch, chance in zip(self._touch, self._chance, strict=True):
                    more |= self._from(moved, touch, int(amount[letter - 1])) << 1 & every
                    gain += chance / math.sqrt(1 + len(amount)) * self._from(worth, touch, int(amount[letter - 1]))
                if dof[letter - 1] == 0 or (more == moved).all():
                    break
                moved, worth = more, gain
            reach[letter], value[letter] = more, gain
        return reach, value

    def _from(self, reach: np.ndarray, touch: np.ndarray, amount: int) -> np.ndarray:
        """What `reach` has at the vector to which a site leads, over u."""
        for axis in np.flatnonzero(touch):
            step = amount if self._counted[axis] else 1
            rows = np.arange(reach.shape[axis]) + step
            if not self._counted[axis]:
                rows = np.minimum(rows, 1)
            inside = rows < reach.shape[axis]
            shape = [-1 if k == axis else 1 for k in range(reach.ndim)]
            reach = reach.take(np.where(inside, rows, 0), axis) * inside.reshape(shape)
        return reach

    # ---- masks, at each choice ----

    def _of(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._on:
            self._on[device] = {name: torch.from_numpy(np.asarray(x)).to(device) for name, x in self._fields.items()}
        return self._on[device]

    def feasible(self) -> Tensor:
        return torch.from_numpy(self._fields["base"] > 0)

    def why_not(self, groups: Sequence[int]) -> str:
        demand = self.demand
        anywhere = Composition(demand, range(1, NUM_SPACE_GROUPS + 1), self.high).feasible().nonzero()[:, 0].tolist()
        if anywhere:
            return f"no crystal of the space groups asked for can be so; those of {_few(anywhere)} can"
        if demand.amounts is None:
            return "no crystal can have these elements, so many sites and so many atoms; widen the ranges"
        for z in range(1, MOST_ATOMS + 1):
            possible = Composition(replace(demand, units=(z, z), atoms=None, sites=None), groups, self.high).feasible()
            if possible.any():
                atoms = z * min(map(sum, demand.amounts))
                return f"no cell as asked holds this formula; the smallest that can has {atoms} atoms (--z {z})"
        return (
            f"no cell holds this formula in {self.high} inequivalent sites and {MOST_ATOMS} atoms of a primitive cell"
        )

    def start(self, n: int, device: torch.device) -> Tensor:
        return torch.zeros(n, 1 + self.size + self.demand.anonymous, dtype=torch.int64, device=device)

    def letters(self, state: Tensor, group: Tensor) -> Tensor:
        t = self._of(state.device)
        letter = torch.arange(NUM_LETTERS, device=state.device)
        moves = self._weights(state.unsqueeze(-2), group.unsqueeze(-1), letter)  # (..., 28, moves)
        weights = (moves + t["log_chance"]).logsumexp(-1)
        held = state[..., 1 : 1 + self.size]
        end = t["base"][group] + (t["last"][group] + 1) * t["volume"][group] + (held * t["stride"][group]).sum(-1)
        fits = (held <= t["cap"][group]).all(-1)
        done = fits & (t["reach"][end.where(fits, 0)] & t["windows"][state[..., 0]] & 1 > 0)
        # Where the demand is out of reach, as in crystals that do not meet it, only to stop is left.
        done = done | weights[..., 1:].isneginf().all(-1)
        stop = torch.zeros_like(weights[..., :1]).masked_fill(~done.unsqueeze(-1), -torch.inf)
        return torch.cat([stop, weights[..., 1:]], -1)

    def species(self, state: Tensor, group: Tensor, letter: Tensor) -> Tensor:
        t, named = self._of(state.device), len(self.demand.named)
        moves = self._weights(state, group, letter)  # (..., moves)
        weights = moves.new_full((*moves.shape[:-1], NUM_ELEMENTS), -torch.inf)
        if anonymous := self.demand.anonymous:
            taken = state[..., 1 + self.size :]  # (..., anonymous)
            free = (taken > 0).sum(-1, keepdim=True)
            of_taken = moves[..., named : named + anonymous]
            new = of_taken.gather(-1, free.clamp(max=anonymous - 1)).masked_fill(free == anonymous, -torch.inf)
            weights = new.expand(weights.shape).scatter(-1, taken, of_taken)
        elif self.demand.others:
            weights = moves[..., -1:].expand(weights.shape).clone()
        if named:
            weights[..., list(self.demand.named)] = moves[..., :named]
        return weights.masked_fill(~t["allowed"], -torch.inf)

    def after(self, state: Tensor, group: Tensor, letter: Tensor, species: Tensor) -> Tensor:
        t, named, anonymous = self._of(state.device), len(self.demand.named), self.demand.anonymous
        move = t["slot"][species]  # (...), -1 for elements that are not named
        taken = state[..., 1 + self.size :]
        if anonymous:
            same = taken == species.unsqueeze(-1)
            free = (taken > 0).sum(-1).clamp(max=anonymous - 1)
            place = torch.where(same.any(-1), same.long().argmax(-1), free)
            taken = taken.scatter(-1, place.unsqueeze(-1), species.where(move < 0, 0).unsqueeze(-1)).where(
                (move < 0).unsqueeze(-1), taken
            )
            move = move.where(move >= 0, named + place)
        held = self._held(state, group, letter, t["touch"][move])
        return torch.cat([state[..., :1] + 1, held, taken], -1)

    def _held(self, state: Tensor, group: Tensor, letter: Tensor, touch: Tensor) -> Tensor:
        """What there is after a site that touches these entries: (..., size)."""
        t, before = self._of(state.device), state[..., 1 : 1 + self.size]
        added = before + touch * t["amount"][group, letter].unsqueeze(-1)
        return torch.where(t["counted"], added, torch.maximum(before, touch))

    def _weights(self, state: Tensor, group: Tensor, letter: Tensor) -> Tensor:
        """(..., moves) log of the probability to end in a goal after a site of each element with this letter."""
        t = self._of(state.device)
        group, letter = (x.unsqueeze(-1) for x in torch.broadcast_tensors(group, letter))
        held = self._held(state.unsqueeze(-2), group, letter, t["touch"])  # (..., moves, size)
        fits = (held <= t["cap"][group]).all(-1) & (letter <= t["last"][group]) & (t["base"][group] > 0)
        index = t["base"][group] + t["following"][group, letter] * t["volume"][group]
        index = (index + (held * t["stride"][group]).sum(-1)).where(fits, 0)
        opened = fits & (t["reach"][index] & t["windows"][state[..., :1] + 1] > 0)
        return t["log_value"][index].masked_fill(~opened, -torch.inf)


class Template(Constraint):
    """The letters of one crystal, and which of its sites share an element; or its elements too.

    Args:
        space_group: of the crystal.
        letters, species: of its sites.
        same_elements: whether the elements stay; else others, or the same by chance, take the places of each.
        elements: atomic numbers that may occur; None: all.
    """

    def __init__(
        self,
        space_group: int,
        letters: Sequence[int],
        species: Sequence[int],
        same_elements: bool,
        elements: Sequence[int] | None = None,
    ) -> None:
        self.space_group = space_group
        self._letters = torch.tensor([*letters, 0])
        kinds = sorted(set(species))
        self._kind = torch.tensor([*(kinds.index(number) for number in species), 0])
        self._given = torch.tensor(kinds if same_elements else [0] * len(kinds))
        self._allowed = torch.zeros(NUM_ELEMENTS, dtype=torch.bool)
        self._allowed[list(elements or range(1, NUM_ELEMENTS))] = True

    def feasible(self) -> Tensor:
        return torch.arange(NUM_SPACE_GROUPS + 1) == self.space_group

    def why_not(self, groups: Sequence[int]) -> str:
        return f"the crystal to be like has space group {self.space_group}, which --space-group leaves out"

    def start(self, n: int, device: torch.device) -> Tensor:
        given = self._given.to(device).expand(n, -1)
        return torch.cat([torch.zeros(n, 1, dtype=torch.int64, device=device), given], 1)

    def letters(self, state: Tensor, group: Tensor) -> Tensor:
        place = state[..., 0].clamp(max=len(self._letters) - 1)
        return F.one_hot(self._letters.to(state.device)[place], NUM_LETTERS).float().log()

    def species(self, state: Tensor, group: Tensor, letter: Tensor) -> Tensor:
        held, kind = state[..., 1:], self._kinds(state)
        here = held.gather(-1, kind.unsqueeze(-1))  # (..., 1), 0 where the kind has no element yet
        others = torch.ones(*held.shape[:-1], NUM_ELEMENTS, dtype=torch.bool, device=state.device)
        others = others.scatter(-1, held, False) & self._allowed.to(state.device)
        return torch.where(here > 0, F.one_hot(here[..., 0], NUM_ELEMENTS).bool(), others).float().log()

    def after(self, state: Tensor, group: Tensor, letter: Tensor, species: Tensor) -> Tensor:
        held = state[..., 1:].scatter(-1, self._kinds(state).unsqueeze(-1), species.unsqueeze(-1))
        return torch.cat([state[..., :1] + 1, held], -1)

    def _kinds(self, state: Tensor) -> Tensor:
        return self._kind.to(state.device)[state[..., 0].clamp(max=len(self._kind) - 1)]


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
