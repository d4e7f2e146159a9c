"""What a worker of a growing dataset does: a lot of candidates, from the first draw to the relaxed crystal.

A lot depends on the plan and its own number alone. What costs least is asked first: the balance of kinds,
then the composition, then near-copies and overlaps; a relaxation costs more than all of these. Which of the relaxed
crystals are kept is decided in `growth.py`, which knows the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.analysis import MAX_SITES
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.distances import closest_contact, contacts
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.kinds import without_lanthanide_swaps
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import Refusal
from cfrl.crystals.substitution import substitute
from cfrl.io.datasets import load_dataset
from cfrl.model.files import load_model
from cfrl.model.options import ElementWishes, Wishes
from cfrl.model.sampler import sample, space_group_shares
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import allowed_elements, has_elements, sampler_options
from cfrl.potentials.relax import GIVEN_UP
from cfrl.runs.devices import choose_device
from cfrl.runs.journal import Record
from cfrl.screening import balance, stages
from cfrl.screening.options import GrowthOptions
from cfrl.screening.pipeline import restore
from cfrl.stability.flags import APART, OVERLAP, relaxation_flags
from cfrl.stability.hull import ReferenceHull

MODEL, SUBSTITUTION = SOURCES = ("model", "substitution")
_LEAST, _AT_ONCE = 64, 256  # candidates made in one go
_BATCHES = 200  # for a lot at most; where guards leave next to nothing, it is smaller than wanted
_FIELDS = ("space_group", "wyckoff", "species", "frac_coords", "lattice")


@dataclass(frozen=True)
class Plan:
    """What lots between two updates have in common.

    round: its number, part of the seed.
    model: weights that are drawn from. prototypes: names of datasets whose elements are exchanged.
    table: (119, 119), see `substitution_table`.
    accept: for each of `SOURCES` the probability that a candidate passes, `balance.SHAPE`.
    refusal: the guards of a composition. seen: keys (`near_copies`) of what there is already.
    exploded: whether crystals are kept that came apart.
    hull: the reference, as `ReferenceHull.load` takes it.
    """

    options: GrowthOptions
    round: int
    model: str
    prototypes: tuple[str, ...]
    table: np.ndarray
    accept: dict[str, np.ndarray]
    refusal: Refusal
    seen: KnownFormulas
    exploded: bool
    hull: str | None


def source_of(lot: int, substituted: float) -> str:
    """Where the candidates of a lot (1, 2, ...) come from; the shares come out as evenly as they can."""
    return SUBSTITUTION if int(lot * substituted) > int((lot - 1) * substituted) else MODEL


def wishes_for(options: GrowthOptions) -> Wishes:
    """What draws should be."""
    elements = {each.name: getattr(options, each.name) for each in fields(ElementWishes)}
    return Wishes(max_atoms=options.max_atoms, **elements)


def near_copies(crystals: CrystalBatch) -> list[str]:
    """A key of each crystal that near-copies share: fingerprints, neighbouring lanthanides taken for one."""
    return fingerprints(without_lanthanide_swaps(crystals))


def run_lots(lots: Sequence[int], plan: Plan) -> list[Record]:
    """What became of the candidates of each lot.

    Records: `source`; `counts`, how many candidates met what; `proposed` and `passed`, sparse tables of
    `balance.SHAPE`; and of the relaxed crystals `crystals`, `energy_per_atom` (eV), `parent` and `place`, a row of the
    flat table, of the candidate.
    """
    return [_run_lot(lot, plan) for lot in lots]


def _run_lot(lot: int, plan: Plan) -> Record:
    options, source = plan.options, source_of(lot, plan.options.substitute)
    picker = _Picker(plan, source, np.random.default_rng([options.seed, plan.round, lot]))
    crystals = picker.pick()
    structures = crystals.to_structures()
    how = stages.Relaxation(options.fmax, options.steps, keep_symmetry=True)
    ceiling = _ceiling(crystals, plan)
    relaxed = stages.relax(structures, options.potential, options.device, how, ceiling) if structures else []
    picker.counts["relaxed"] = len(relaxed)
    sound = [row for row, record in enumerate(relaxed) if picker.passes(_fault(record, plan.exploded))]
    dropped: dict[int, str] = {}
    found = CrystalBatch.from_structures(
        [restore(relaxed[row]["structure"]) for row in sound], options.symprec, errors="skip", dropped=dropped
    )
    picker.counts["symmetry"] = len(dropped)
    rows = [row for place, row in enumerate(sound) if place not in dropped]
    kinds = np.ravel_multi_index(balance.places(crystals), balance.SHAPE)
    return {
        "source": source,
        "counts": dict(picker.counts),
        "proposed": _sparse(picker.proposed),
        "passed": _sparse(picker.passed),
        "crystals": as_record(found),
        "energy_per_atom": [relaxed[row]["energy_per_atom"] for row in rows],
        "parent": [crystals.ids[row] if crystals.ids else "" for row in rows],
        "place": kinds[rows].tolist(),
    }


class _Picker:
    """Candidates of one lot, and how many of them met what."""

    def __init__(self, plan: Plan, source: str, rng: np.random.Generator) -> None:
        self.plan, self.source, self.rng = plan, source, rng
        self.counts: Counter[str] = Counter()
        self.proposed, self.passed = (np.zeros(balance.SHAPE, dtype=np.int64) for _ in range(2))
        self._keys: set[str] = set()

    def pick(self) -> CrystalBatch:
        """Those that are to be relaxed."""
        picked, room = [], self.plan.options.lot
        size = _AT_ONCE
        for _ in range(_BATCHES):
            picked.append(self._sift(self._propose(size), room))
            room -= len(picked[-1])
            if not room:
                break
            found = self.plan.options.lot - room
            size = min(_AT_ONCE, max(_LEAST, room * self.counts["candidates"] // max(found, 1)))
        return CrystalBatch.cat(picked)

    def passes(self, reason: str) -> bool:
        """Whether there is no reason against a crystal; else it is counted."""
        if reason:
            self.counts[reason] += 1
        return not reason

    def _propose(self, n: int) -> CrystalBatch:
        options = self.plan.options
        if self.source == MODEL:
            model, seed = _model(self.plan.model, options.device), int(self.rng.integers(2**62))
            wishes = wishes_for(options)
            shares = _shares(self.plan.model, options.device, wishes, options.temperature)
            return sample(model, n, seed=seed, temperature=options.temperature, shares=shares, **asdict(wishes))
        parents = load_prototypes(self.plan.prototypes, options.max_atoms)
        table = np.where(np.isin(np.arange(NUM_ELEMENTS), list(allowed_elements(options))), self.plan.table, 0)
        made = substitute(parents[self.rng.integers(len(parents), size=n)].trim(), table, self.rng)
        return made[np.flatnonzero(has_elements(made, options))]

    def _sift(self, crystals: CrystalBatch, room: int) -> CrystalBatch:
        """At most `room` of some candidates; those after the last that is taken count as never made."""
        chance, places = self.rng.random(len(crystals)), balance.places(crystals)
        lucky = chance < self.plan.accept[self.source][places]
        rows = []
        end = len(crystals)
        for row in np.flatnonzero(lucky):
            if self.passes(self._reason(crystals[int(row)])):
                rows.append(int(row))
            if len(rows) == room:
                end = row + 1
                break
        self.counts["candidates"] += int(end)
        self.counts["balance"] += int((~lucky[:end]).sum())
        self.proposed += balance.count(crystals[:end])
        self.passed += balance.count(crystals[:end][lucky[:end]])
        return crystals[rows]

    def _reason(self, crystal: CrystalBatch) -> str:
        """Why a candidate, a batch of one, is not relaxed, or ""."""
        guard = self.plan.refusal.reasons(crystal.formulas())[0]
        if guard:
            return guard
        key = near_copies(crystal)[0]
        if key in self._keys or self.plan.seen.holds([key])[0]:
            return "copy"
        if closest_contact(crystal.to_structures()[0], OVERLAP) < OVERLAP:
            return "overlap"
        self._keys.add(key)
        return ""


def _ceiling(crystals: CrystalBatch, plan: Plan) -> np.ndarray | None:
    """(n,) eV/atom, above which a relaxation is given up; NaN, above which nothing is, where the hull is not known."""
    if plan.options.give_up is None:
        return None
    below = _hull(plan.hull).e_above_hull(crystals, np.zeros(len(crystals))).e_above_hull
    return plan.options.within + plan.options.give_up - below


def _fault(record: Record, exploded: bool) -> str:
    """What is wrong with a relaxation, or ""."""
    if record["status"] == GIVEN_UP:
        return "given_up"
    if record["status"] or "structure" not in record:
        return "failed"
    if not record["converged"]:
        return "not_converged"
    near = contacts(restore(record["structure"]), APART)
    if near.min() < OVERLAP:
        return "overlap_relaxed"
    flags = relaxation_flags(*(np.array([value]) for value in (record["volume_change"], record["rmsd"], near.max())))
    return "exploded" if flags["exploded"][0] and not exploded else ""


def as_record(crystals: CrystalBatch) -> dict[str, Any]:
    """Crystals as JSON holds them, every digit kept; `from_record` is the way back."""
    return {name: getattr(crystals, name).tolist() for name in _FIELDS}


def from_record(record: dict[str, Any]) -> CrystalBatch:
    n = len(record["space_group"])
    if not n:
        return CrystalBatch.empty()
    whole, real = torch.long, torch.float32
    kinds = (whole, whole, whole, real, real)
    return CrystalBatch(*(torch.tensor(record[name], dtype=kind) for name, kind in zip(_FIELDS, kinds, strict=True)))


def _sparse(table: np.ndarray) -> list[list[int]]:
    """Rows of the flat table that are not zero, and what they are."""
    rows = np.flatnonzero(table)
    return [rows.tolist(), table.ravel()[rows].tolist()]


def dense(sparse: list[list[int]]) -> np.ndarray:
    """The inverse of `_sparse`."""
    table = np.zeros(balance.SHAPE, dtype=np.int64)
    table.ravel()[sparse[0]] = sparse[1]
    return table


@cache
def _model(path: str, device: str) -> CrystalTransformer:
    """Loaded once in a worker process."""
    return load_model(path, choose_device(device))


@cache
def _shares(path: str, device: str, wishes: Wishes, temperature: float) -> Tensor:
    """Of space groups, asked once in a worker process: what must hold some elements takes many draws to tell."""
    model = _model(path, device)
    return space_group_shares(model, wishes, sampler_options(wishes, model.config.max_sites - 1, temperature))


@cache
def _hull(path: str | None) -> ReferenceHull:
    """Loaded once in a worker process."""
    return ReferenceHull.load(path)


@cache
def load_prototypes(names: tuple[str, ...], max_atoms: int | None) -> CrystalBatch:
    """Crystals of datasets that are small enough, loaded once in a process. Raises UserError as `load_dataset`."""
    crystals = CrystalBatch.cat(load_dataset(name) for name in names)
    fits = crystals.num_sites <= MAX_SITES
    return crystals[fits & (crystals.num_atoms <= max_atoms)] if max_atoms else crystals[fits]
