"""Draws crystals from the transformer, one token at a time for a whole batch.

What comes out follows exactly the distribution that `log_prob` scores: nothing is rejected, unless `Given.min_contact`
asks for it, and nothing re-sorted. What users call is in `sampler.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import constrain_lattice, project_coords
from cfrl.crystals.wyckoff import tables
from cfrl.model.distributions import SamplerOptions
from cfrl.model.layers import KeyValueCache
from cfrl.model.network import LastCoordinates, unscale_lattice
from cfrl.model.transformer import AXES, FACTORS, CrystalTransformer, coordinate_slots, last_free_axis

PLACES = 8  # tried of a site whose atoms overlap with earlier ones


@dataclass
class Given:
    """What `draw` feeds to the model in place of drawing it: the first tokens of each kind of n given crystals.

    crystals: n.
    letters, species, coords: (n,) of how many sites; one letter more than there are sites is the stop.
    min_contact: coordinates are drawn up to `PLACES` times, until in the cell of the given crystal no atom of the site
        overlaps with an earlier one: is nearer than this, in sums of covalent radii. 0: once. A model that draws the
        cell before the coordinates looks at the one that it drew.
    """

    crystals: CrystalBatch
    letters: Tensor
    species: Tensor
    coords: Tensor
    min_contact: float = 0.0

    @classmethod
    def composition(cls, crystals: CrystalBatch, min_contact: float = 0.0) -> Given:
        """Letters, elements and where to stop; coordinates and cell are drawn."""
        sites = crystals.num_sites
        return cls(crystals, sites + 1, sites, torch.zeros_like(sites), min_contact)

    @classmethod
    def nothing(cls, space_group: Tensor, min_contact: float = 0.0) -> Given:
        """Nothing but the space groups (n,)."""
        none = torch.zeros_like(space_group)
        site = torch.zeros(len(none), 1, 3, device=none.device)
        crystals = CrystalBatch(space_group, none[:, None], none[:, None], site, site.new_zeros(len(none), 6))
        return cls(crystals, none, none, none, min_contact)

    def of(self, kind: str, value: Tensor, rows: Tensor, site: int, drawn: Tensor) -> Tensor:
        """(B,) what stands at a site of these rows: `value` (n, s) where it is given, else what was drawn."""
        fed = getattr(self, kind)[rows] > site
        return torch.where(fed, value[rows, site], drawn) if site < value.shape[1] else drawn.masked_fill(fed, 0)

    def angle(self, rows: Tensor, site: int | Tensor, axis: int | Tensor, drawn: Tensor) -> Tensor:
        """(B,) as `of`, of a coordinate, 2 pi (x - 1/2); site and axis one for all, or (B,)."""
        known = self.crystals.frac_coords.to(drawn.dtype)  # (n, s, 3)
        inside = torch.as_tensor(site, device=drawn.device).clamp(max=known.shape[1] - 1)
        return torch.where(self.coords[rows] > site, 2 * math.pi * (known[rows, inside, axis] - 0.5), drawn)


@torch.no_grad()
def draw(
    model: CrystalTransformer,
    space_group: Tensor,
    options: SamplerOptions | None = None,
    generator: torch.Generator | None = None,
    given: Given | None = None,
) -> CrystalBatch:
    """One crystal per entry of `space_group` (n,), as the model writes it.

    Args:
        generator: on the model's device; None: torch's global one, which other threads may draw from too.
        given: on the model's device, what is not drawn; the log-probability counts it all the same.

    Returns:
        Batch on the model's device, with properties "log_prob" (log P(C | G) under `options`, nats) and
        "log_prob/<factor>".

    Raises:
        NotFinite: the model's probabilities are not.
    """
    drawing = _CompositionFirst if model.config.order == "composition" else _SiteBySite
    return drawing(model, space_group, options or SamplerOptions(), generator, given).run()


class _Drawing:
    """n crystals, drawn as far as they are.

    Those that are finished leave the batch: `rows` (B,) says which ones are running, and `group`, `letter`, `atoms`,
    `state` (of the constraint), `features` (B, d) after the last token, and the cache are theirs.
    """

    def __init__(
        self,
        model: CrystalTransformer,
        space_group: Tensor,
        options: SamplerOptions,
        generator: torch.Generator | None,
        given: Given | None,
    ) -> None:
        self.model, self.options, self.generator, self.given = model, options, generator, given
        self.constraint, self.device = options.constraint, model.device
        n, self.room = len(space_group), model.config.max_sites - 1
        self.space_group = self.group = space_group.to(self.device)
        self.wyckoff = torch.zeros(n, self.room, dtype=torch.long, device=self.device)
        self.species = torch.zeros_like(self.wyckoff)
        self.frac_coords = torch.zeros(n, self.room, 3, dtype=model.dtype, device=self.device)
        self.lattice = torch.zeros(n, 6, dtype=model.dtype, device=self.device)
        self.log_prob = {name: torch.zeros(n, dtype=torch.float64, device=self.device) for name in FACTORS}
        self.rows = torch.arange(n, device=self.device)
        self.atoms = torch.zeros_like(self.rows)
        self.letter = self.features = None
        nothing = torch.zeros(n, 0, dtype=torch.long, device=self.device)
        self.state = self.constraint.start(n, self.device) if self.constraint else nothing
        self.cache = KeyValueCache(model.config.num_layers)
        self.tables = tables(self.device)

    def run(self) -> CrystalBatch:
        for site in range(self.room + 1):
            self._letters(site)
            self._cells()
            if not len(self.rows):
                break
            self._elements(site)
            self._coordinates(site)
        self._fill_cells()
        each = {f"log_prob/{name}": nats for name, nats in self.log_prob.items()}
        properties = {"log_prob": sum(self.log_prob.values()), **each}
        sites = (self.wyckoff, self.species, self.frac_coords)
        return CrystalBatch(self.space_group, *sites, self.lattice, properties=properties).trim()

    def _coordinates(self, site: int) -> None:
        """Those that come before the next letter; none."""

    def _leave(self, stopped: Tensor) -> None:
        """The batch goes on without these, (B,) bool."""

    def _fill_cells(self) -> None:
        """What comes after all cells; nothing."""

    def _step(self, name: str, site: int, token: Tensor, cache: KeyValueCache) -> Tensor:
        """(k, d) features after one more token (k, 1, d), of the same site of all crystals that the cache holds."""
        at = self.model.position(name, site)
        return self.model.transform(token, slice(at, at + 1), cache)[:, 0]

    def _letters(self, site: int) -> None:
        """The Wyckoff letter of the next site, or the stop."""
        if site == self.room:
            self.letter = torch.zeros_like(self.rows)  # no room for more: the stop is no choice
        else:
            if self.features is None:
                logits = self.model.first_wyckoff_logits(self.group)  # (B, 28)
            else:
                logits = self.model.wyckoff_logits(self.features.unsqueeze(1), self.group)[:, 0]
            wished = self.constraint.letters(self.state, self.group) if self.constraint else None
            so_far = (logits, self.group, self.letter, self.atoms)
            distribution = self.model.wyckoff_distribution(*so_far, self.options, wished=wished)
            letter = distribution.sample(self.generator)
            if self.given:
                letter = self.given.of("letters", self.given.crystals.wyckoff, self.rows, site, letter)
            self.letter = letter
            self.log_prob["wyckoff"][self.rows] += distribution.log_prob(letter)
        token = self.model.embed_wyckoff(self.group[:, None], self.letter[:, None])
        self.features = self._step("W", site, token, self.cache)

    def _cells(self) -> None:
        """The lattice of the crystals that have stopped, which leave the batch."""
        stopped = self.letter == 0
        if not stopped.any():
            return
        done = self.rows[stopped]
        distribution = self.model.lattice_distribution(self.features[stopped], self.group[stopped], self.options)
        scaled = distribution.sample(self.generator)  # (those that stopped, 6)
        self.log_prob["lattice"][done] = distribution.log_prob(scaled).double()
        lattice = unscale_lattice(scaled.to(self.model.dtype), self.atoms[stopped])
        self.lattice[done] = constrain_lattice(self.space_group[done], lattice)
        self._leave(stopped)
        running = self.cache.select(~stopped)
        for name in ("rows", "group", "letter", "atoms", "features", "state"):
            setattr(self, name, getattr(self, name)[running])

    def _elements(self, site: int) -> None:
        self.atoms = self.atoms + self.tables.multiplicity[self.group, self.letter]
        wished = self.constraint.species(self.state, self.group, self.letter) if self.constraint else None
        distribution = self.model.species_distribution(self.features, self.options, wished=wished)
        element = distribution.sample(self.generator)
        if self.given:
            element = self.given.of("species", self.given.crystals.species, self.rows, site, element)
        self.log_prob["species"][self.rows] += distribution.log_prob(element)
        if self.constraint:
            self.state = self.constraint.after(self.state, self.group, self.letter, element)
        self.wyckoff[self.rows, site], self.species[self.rows, site] = self.letter, element
        token = self.model.embed_species(self.group[:, None], element[:, None])
        self.features = self._step("A", site, token, self.cache)


class _SiteBySite(_Drawing):
    """Each site with its letter, element and coordinates; the cell last."""

    def _coordinates(self, site: int) -> None:
        begin, before, some = self.cache.length, self.features, torch.arange(len(self.rows), device=self.device)
        coords, nats, self.features = self._place(site, some, before, self.cache)
        self.frac_coords[self.rows, site] = coords
        if self.given and self.given.min_contact:
            free = self.tables.free[self.group, self.letter].any(1)
            some = some[self._overlap(site, some, coords) & free]
            if len(some):
                self._place_again(site, some, before, begin, nats)
        self.log_prob["coords"][self.rows] += nats

    def _place(self, site: int, some: Tensor, features: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates of a site, (k, 3), their log-probability (k,), and the features (k, d) after their three tokens.

        Args:
            some: (k,) which of the running crystals; the cache is theirs.
            features: (B, d) of the token before.
        """
        group, letter, rows, features = self.group[some], self.letter[some], self.rows[some], features[some]
        free = self.tables.free[group, letter]  # (k, 3)
        matrix = self.tables.project_matrix[group, letter].to(self.model.dtype)  # (k, 3, 3)
        shift = self.tables.project_shift[group, letter].to(self.model.dtype)  # (k, 3)
        coords = torch.zeros(len(some), 3, dtype=self.model.dtype, device=self.device)
        nats = torch.zeros(len(some), dtype=torch.float64, device=self.device)
        for axis, name in enumerate(AXES):
            if free[:, axis].any():
                distribution = self.model.coordinate_distribution(features, self.options)
                angle = distribution.sample(self.generator)  # (k,)
                angle = self.given.angle(rows, site, axis, angle) if self.given else angle
                nats += distribution.log_prob(angle).masked_fill(~free[:, axis], 0)
                coords[:, axis] = angle / (2 * math.pi) + 0.5
            # A tied coordinate follows from the free ones before it.
            tied = (matrix[:, axis] * coords).sum(-1) + shift[:, axis]
            coords[:, axis] = torch.where(free[:, axis], coords[:, axis], tied) % 1
            token = self.model.embed_coordinate(axis, group[:, None], coords[:, axis : axis + 1])
            features = self._step(name, site, token, cache)
        return coords, nats, features

    def _place_again(self, site: int, some: Tensor, before: Tensor, begin: int, nats: Tensor) -> None:
        """Other places of a site, of which the first without an overlap is taken; `nats` (B,) becomes theirs.

        Several are tried at once, each with a copy of the cache as it was before the site's three tokens.
        """
        tried = some.repeat_interleave(PLACES - 1)
        cache = self.cache.first(begin, tried, room=3)
        coords, theirs, features = self._place(site, tried, before, cache)
        clash = self._overlap(site, tried, coords).view(len(some), -1)
        taken = clash.int().argmin(1) + torch.arange(0, len(tried), PLACES - 1, device=self.device)
        self.frac_coords[self.rows[some], site] = coords[taken]
        nats[some], self.features[some] = theirs[taken], features[taken]
        self.cache.put(some, cache, taken, begin)

    def _overlap(self, site: int, some: Tensor, coords: Tensor) -> Tensor:
        """(k,) whether atoms of a site, at these coordinates (k, 3), are too near to each other or to earlier ones."""
        rows = self.rows[some]
        sites = [table[rows, : site + 1] for table in (self.wyckoff, self.species, self.frac_coords)]
        sites[-1][:, site] = coords
        cells = CrystalBatch(self.space_group[rows], *sites, self.given.crystals.lattice[rows])
        return cells.site_contacts(site) < self.given.min_contact


class _CompositionFirst(_Drawing):
    """Letters and elements of all sites, each crystal's cell with its stop, then all coordinates.

    kept: what the network said to the letters and elements of crystals that have stopped, (n, ..., up to 2 S + 1, ...).
    slots: (n, 4 S) which of S x y z, site after site, hold tokens, in their order; the first `count` (n,) do.

    Then each running crystal is at a token of its own, slots[at]. Of those: at (B,); seen (B, T) which tokens in the
    cache the next one knows of; nats (B,) of the site's coordinates so far, and how often they were tried (B,).
    """

    kept: KeyValueCache | None = None

    def _leave(self, stopped: Tensor) -> None:
        if self.kept is None:
            self.kept = self.cache.blank(len(self.space_group), 2 * self.room + 1)
        self.kept.length = self.cache.length
        self.kept.put(self.rows[stopped], self.cache, stopped.nonzero()[:, 0], 0)

    def _fill_cells(self) -> None:
        self._turn_to_coordinates()
        while len(self.rows):
            self._next_token()

    def _turn_to_coordinates(self) -> None:
        sites = (self.wyckoff > 0).sum(1)  # (n,)
        self.width = S = int((self.wyckoff > 0).any(0).sum())
        wyckoff, coords = self.wyckoff[:, :S], self.frac_coords[:, :S]
        coords[:] = project_coords(self.space_group, wyckoff, coords)  # what is fixed stays so
        cells = CrystalBatch(self.space_group, wyckoff, self.species[:, :S], coords, self.lattice)
        self.inputs = self.model.embed_sites(cells)  # (n, S, d)
        there = coordinate_slots(self.space_group, wyckoff)
        self.slots, self.count = (~there).int().argsort(dim=1, stable=True), there.sum(1)
        self.positions = self.model.slot_positions(S)[2 * S + 1 :]  # (4 S,)
        self.rows, self.cache = torch.arange(len(sites), device=self.device), self.kept
        self.seen = torch.arange(2 * S + 1, device=self.device) <= 2 * sites.unsqueeze(1)
        self.at, self.tried = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.nats = torch.zeros(len(self.rows), dtype=torch.float64, device=self.device)
        self._keep(self.count > 0)

    def _keep(self, running: Tensor) -> None:
        """The batch goes on with these, (B,) bool."""
        if running.all():
            return
        left = self.cache.select(running)
        for name in ("rows", "seen", "at", "tried", "nats"):
            setattr(self, name, getattr(self, name)[left])

    def _next_token(self) -> None:
        """One more of each crystal, and the coordinate that comes after it, if one does."""
        features = self._feed(self.slots[self.rows, self.at])
        self.at = self.at + 1
        slot = self.slots[self.rows, self.at]
        some = (slot % 4 > 0).nonzero()[:, 0]
        if len(some):
            self._choose(some, slot[some] // 4, slot[some] % 4 - 1, features[some])
        self._keep(self.at < self.count[self.rows] - 1)

    def _feed(self, slot: Tensor) -> Tensor:
        """(B, d) features after the tokens in these slots (B,)."""
        site, kind = slot // 4, slot % 4
        tokens = self.inputs[self.rows, site]  # (B, d)
        for axis in range(3):
            these = (kind == axis + 1).nonzero()[:, 0]
            rows = self.rows[these]
            value = self.frac_coords[rows, site[these], axis].unsqueeze(1)
            tokens[these] = self.model.embed_coordinate(axis, self.space_group[rows, None], value)[:, 0]
        self.seen = F.pad(self.seen, (0, 1), value=True)
        positions, seen = self.positions[slot].unsqueeze(1), self.seen[:, None, None]
        return self.model.transform(tokens.unsqueeze(1), positions, self.cache, seen)[:, 0]

    def _choose(self, some: Tensor, site: Tensor, axis: Tensor, features: Tensor) -> None:
        """A coordinate of each of some running crystals; all (k,), features (k, d)."""
        rows = self.rows[some]
        group, letter = self.space_group[rows], self.wyckoff[rows, site]
        free = self.tables.free[group, letter]  # (k, 3)
        last = (last_free_axis(free) == axis).nonzero()[:, 0]
        crystals, number = self._so_far(rows[last], site[last]), torch.arange(len(last), device=self.device)
        weighed = LastCoordinates(crystals, number, site[last], axis[last], (last,))
        distribution = self.model.coordinate_distribution(features, self.options, last=weighed)
        angle = distribution.sample(self.generator)  # (k,)
        angle = self.given.angle(rows, site, axis, angle) if self.given else angle
        self.nats[some] += distribution.log_prob(angle)
        self.frac_coords[rows, site, axis] = angle / (2 * math.pi) + 0.5
        coords = self.frac_coords[rows, site].unsqueeze(1)
        self.frac_coords[rows, site] = project_coords(group, letter.unsqueeze(1), coords)[:, 0]
        if len(last):
            self._settle(some[last], site[last], free[last].sum(1))

    def _settle(self, some: Tensor, site: Tensor, free: Tensor) -> None:
        """Sites of some running crystals (k,), all of whose free coordinates, so many (k,), have been chosen.

        Where there is an overlap they are chosen again: the tokens since the site began are as if they had never been.
        """
        if self.given and self.given.min_contact:
            overlap = self._so_far(self.rows[some], site).site_contacts(site) < self.given.min_contact
            again = overlap & (self.tried[some] < PLACES - 1)
            anew, back = some[again], free[again]
            self.tried[anew] += 1
            self.nats[anew] = 0
            self.at[anew] -= back
            tokens = self.seen.shape[1]
            self.seen[anew] &= torch.arange(tokens, device=self.device) < tokens - back.unsqueeze(1)
            some = some[~again]
        self.log_prob["coords"][self.rows[some]] += self.nats[some]
        self.nats[some], self.tried[some] = 0, 0

    def _so_far(self, rows: Tensor, site: Tensor) -> CrystalBatch:
        """The crystals `rows` (k,) with their sites up to these (k,)."""
        there = torch.arange(self.width, device=self.device) <= site.unsqueeze(1)
        letters, elements = (table[rows, : self.width] * there for table in (self.wyckoff, self.species))
        return CrystalBatch(
            self.space_group[rows], letters, elements, self.frac_coords[rows, : self.width], self.lattice[rows]
        )
