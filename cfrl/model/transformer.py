"""The transformer as its users know it: log P(crystal | space group) of whole crystals, by factor.

The network underneath (network.py) tells the distribution of each choice; this file walks along crystals that are
given and adds up. B: crystals, S: sites, d: model size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.wyckoff import tables
from cfrl.errors import UserError
from cfrl.model.distributions import Categorical, LatticeMixture, SamplerOptions, VonMisesMixture
from cfrl.model.network import CrystalNetwork, LastCoordinates, scale_lattice
from cfrl.model.threads import side_by_side

FACTORS = ("wyckoff", "species", "coords", "lattice")
AXES = ("x", "y", "z")


class CrystalTransformer(CrystalNetwork):
    """log P(crystal | space group) and its parts; attributes as those of `CrystalNetwork`."""

    def features(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """What each choice along crystals with S sites is made from.

        "wyckoff": of the letter or stop after each site, "species", and "x", "y", "z": (B, S, d); "lattice": (B, d).
        Those beyond a crystal's stop mean nothing.
        """
        if self.config.order == "composition":
            return self._composition_first(crystals)
        return self._site_by_site(crystals)

    def _site_by_site(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        group, S = crystals.space_group.unsqueeze(1), crystals.wyckoff.shape[1]
        sites = torch.stack([*self._letters_and_elements(crystals), *self._coordinates(crystals)], 2)  # (B, S, 5, d)
        stop = self.embed_wyckoff(group, torch.zeros_like(group))  # of the longest crystal
        tokens = torch.cat([sites.flatten(1, 2), stop], 1)  # (B, 5 S + 1, d)
        features = self.transform(tokens, slice(0, 5 * S + 1))
        species, x, y, z, wyckoff = (features[:, k : 5 * S : 5] for k in range(5))  # at W, A, x, y, z
        lattice = features[torch.arange(len(crystals), device=self.device), 5 * crystals.num_sites]
        return {"wyckoff": wyckoff, "species": species, "x": x, "y": y, "z": z, "lattice": lattice}

    def _composition_first(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """Of the slots W A, S times, W, and S x y z, S times, only those are computed that hold a token."""
        sites = torch.arange(crystals.wyckoff.shape[1], device=self.device)
        group, begin = crystals.space_group.unsqueeze(1), 2 * len(sites) + 1
        stop = self.embed_wyckoff(group, torch.zeros_like(group))  # of the longest crystal
        before = torch.stack(self._letters_and_elements(crystals), 2).flatten(1, 2)  # (B, 2 S, d)
        after = torch.stack([self.embed_sites(crystals), *self._coordinates(crystals)], 2).flatten(1, 2)  # (B, 4 S, d)
        letters = torch.arange(begin, device=self.device) <= 2 * crystals.num_sites.unsqueeze(1)
        there = torch.cat([letters, coordinate_slots(crystals.space_group, crystals.wyckoff)], 1)  # (B, 6 S + 1)
        longest = int(there.sum(1).max())
        order = (~there).int().argsort(dim=1, stable=True)[:, :longest]  # (B, T) slots, empty ones last
        tokens = _gathered(torch.cat([before, stop, after], 1), order)
        features = self.transform(tokens, self.slot_positions(len(sites))[order])
        latest = there.cumsum(1) - 1  # (B, 6 S + 1) the last token up to each slot
        coords = {name: _gathered(features, latest[:, begin + k :: 4]) for k, name in enumerate(AXES)}
        return {
            "wyckoff": _gathered(features, latest[:, 1:begin:2]),
            "species": _gathered(features, latest[:, 0 : begin - 1 : 2]),
            **coords,
            "lattice": _gathered(features, latest.gather(1, 2 * crystals.num_sites.unsqueeze(1)))[:, 0],
        }

    def num_tokens(self, crystals: CrystalBatch) -> Tensor:
        """(n,) of each crystal on any device, its stop included."""
        if self.config.order == "site":
            return 5 * crystals.num_sites + 1
        slots = coordinate_slots(crystals.space_group, crystals.wyckoff)
        return 2 * crystals.num_sites + 1 + slots.sum(1)

    def slot_positions(self, sites: int) -> Tensor:
        """(6 S + 1,) of the slots of `_composition_first`: all six of a site side by side."""
        site = torch.arange(6 * (sites + 1), device=self.device).view(-1, 6)  # W A S x y z
        return torch.cat([site[:, :2].flatten()[:-1], site[:-1, 2:].flatten()])

    def _letters_and_elements(self, crystals: CrystalBatch) -> list[Tensor]:
        group = crystals.space_group.unsqueeze(1)
        return [self.embed_wyckoff(group, crystals.wyckoff), self.embed_species(group, crystals.species)]

    def _coordinates(self, crystals: CrystalBatch) -> list[Tensor]:
        group = crystals.space_group.unsqueeze(1)
        return [self.embed_coordinate(axis, group, crystals.frac_coords[..., axis]) for axis in range(3)]

    def last_coordinates(self, crystals: CrystalBatch, axis: int) -> LastCoordinates | None:
        """Those along this axis that are weighed by their surroundings, among features (B, S, d); None: none are."""
        if self.config.order == "site":
            return None
        free = tables(self.device).free[crystals.space_group.unsqueeze(1), crystals.wyckoff]  # (B, S, 3)
        index = (last_free_axis(free) == axis).nonzero(as_tuple=True)
        return LastCoordinates(crystals, *index, torch.full_like(index[0], axis), index)

    def distributions(
        self, crystals: CrystalBatch, options: SamplerOptions, nuclei: dict[str, Tensor] | None = None
    ) -> dict[str, Categorical | VonMisesMixture | LatticeMixture]:
        """Those that the choices along crystals with up to S sites are made from, by name.

        "first": of the first letter, (B,); "wyckoff": of the letter or stop after each site, "species", and "x", "y",
        "z": (B, S); "lattice": (B,). Batch and `nuclei` as in `forward`.
        """
        features, nuclei = self.features(crystals), nuclei or {}
        group, wyckoff = crystals.space_group, crystals.wyckoff
        none, atoms = torch.zeros_like(group), crystals.multiplicity.cumsum(1)  # (B,), (B, S)
        wished = options.constraint.along(crystals) if options.constraint else {}
        first, later = self.first_wyckoff_logits(group), self.wyckoff_logits(features["wyckoff"], group)
        return {
            "first": self.wyckoff_distribution(
                first, group, None, none, options, nuclei.get("first"), wished.get("first")
            ),
            "wyckoff": self.wyckoff_distribution(
                later, group.unsqueeze(1), wyckoff, atoms, options, nuclei.get("wyckoff"), wished.get("wyckoff")
            ),
            "species": self.species_distribution(
                features["species"], options, nuclei.get("species"), wished.get("species")
            ),
            **{
                name: self.coordinate_distribution(
                    features[name], options, nuclei.get(name), self.last_coordinates(crystals, axis)
                )
                for axis, name in enumerate(AXES)
            },
            "lattice": self.lattice_distribution(features["lattice"], group, options, nuclei.get("lattice")),
        }

    def forward(
        self,
        crystals: CrystalBatch,
        options: SamplerOptions | None = None,
        entropy: bool = False,
        nuclei: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What `log_prob` returns, for one batch that is on the model's device and trimmed of padding."""
        of = self.distributions(crystals, options or SamplerOptions(), nuclei)
        S, group, wyckoff = crystals.wyckoff.shape[1], crystals.space_group, crystals.wyckoff
        occupied = wyckoff > 0  # (B, S)
        # A crystal with the most sites possible stops with certainty.
        chosen = occupied & ~self._forced_stop(S)  # (B, S)
        w = of["first"].log_prob(wyckoff[:, 0]) + _sum(of["wyckoff"].log_prob(_following(wyckoff)), chosen)  # (B,)
        a = _sum(of["species"].log_prob(crystals.species), occupied)

        t = tables(self.device)
        counts = t.free if self.config.likelihood == "exact" else t.scored
        drawn = counts[group.unsqueeze(1), wyckoff]  # (B, S, 3)
        angle = 2 * math.pi * (crystals.frac_coords.to(w.dtype) - 0.5)  # (B, S, 3)
        density = [of[name].log_prob(angle[..., k]) for k, name in enumerate(AXES)]  # (B, S) each
        x = _sum(torch.stack(density, -1), drawn).sum(-1)

        scaled = scale_lattice(crystals.lattice.to(w.dtype), crystals.num_atoms)
        scores = {"wyckoff": w, "species": a, "coords": x, "lattice": of["lattice"].log_prob(scaled)}
        if entropy:
            scores["entropy/wyckoff"] = of["first"].entropy() + _sum(of["wyckoff"].entropy(), chosen)
            scores["entropy/species"] = _sum(of["species"].entropy(), occupied)
            scores["entropy/coords"], scores["entropy/lattice"] = -x, -scores["lattice"]
        return scores

    def _forced_stop(self, sites: int) -> Tensor:
        """(S,) bool: after this site there is no room for another, so the stop is no choice."""
        last = torch.arange(sites, device=self.device) == self.config.max_sites - 2
        return last & (self.config.likelihood == "exact")

    def log_prob(
        self,
        crystals: CrystalBatch,
        options: SamplerOptions | None = None,
        *,
        entropy: bool = False,
        chunk: int | None = None,
        nuclei: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Log-probability of crystals, by factor; their sum is log P(C | G) in nats.

        Coordinates are densities per radian of 2 pi x, the lattice per unit of the scaled free parameters.
        Sites are scored in the order in which they stand.

        Args:
            crystals: n crystals on any device.
            options: how they were drawn; the log-probability is under exactly that sampler.
            entropy: also return "entropy/<factor>" (n,): exact along the crystal for letters and elements, one-sample
                estimates (-log p) for the densities.
            chunk: crystals per pass, None: `chunk_size`; they are grouped by length, so that no padding is computed.
            nuclei: of `nuclei`: the values that top-p kept when these crystals were drawn. Without them top-p keeps
                what it would keep now, and what it no longer keeps has a log-probability near `IMPOSSIBLE`.

        Returns:
            dict of (n,) tensors "wyckoff", "species", "coords", "lattice". Gradients flow where the weights ask for
            them: while a model is trained or tuned, not from one that was loaded or is done.

        Raises:
            UserError: a crystal has more sites than the model can hold.
        """

        def score(part: CrystalBatch, rows: Tensor) -> dict[str, Tensor]:
            kept = nuclei and {name: x[rows] for name, x in nuclei.items()}
            return self(part, options, entropy, kept and _resized(kept, part.wyckoff.shape[1]))

        return self._by_length(crystals, score, chunk) or {name: torch.zeros(0, device=self.device) for name in FACTORS}

    @torch.no_grad()
    def nuclei(self, crystals: CrystalBatch, options: SamplerOptions) -> dict[str, Tensor]:
        """The values that top-p keeps, choice by choice along the crystals, to be frozen while the weights change.

        What a crystal did choose is always among them: rounding, or weights that have changed since, may have put it
        just outside, where it would have no probability at all.

        Returns:
            dict of (n, ..., k) bool tensors by the names of `distributions`; empty where top-p keeps everything.
        """
        if options.top_p == 1:
            return {}
        sites = crystals.wyckoff.shape[1]

        def keep(part: CrystalBatch, _rows: Tensor) -> dict[str, Tensor]:
            of = self.distributions(part, options)
            chose = {"first": part.wyckoff[:, 0], "wyckoff": _following(part.wyckoff), "species": part.species}
            kept = {name: of[name].nucleus.scatter(-1, value.unsqueeze(-1), True) for name, value in chose.items()}
            return _resized(kept | {name: of[name].components.nucleus for name in (*AXES, "lattice")}, sites)

        return self._by_length(crystals, keep)

    def _by_length(
        self, crystals: CrystalBatch, function: Callable[..., dict[str, Tensor]], chunk: int | None = None
    ) -> dict[str, Tensor]:
        """`function(part, rows)` of trimmed parts on this device, joined in the order of the crystals; {} of none."""
        if len(crystals) and int(crystals.num_sites.max()) >= self.config.max_sites:
            limit = self.config.max_sites - 1
            raise UserError(f"a crystal has {int(crystals.num_sites.max())} sites; this model holds at most {limit}")
        crystals = crystals.to(self.device)
        order = self.num_tokens(crystals).argsort()  # (n,)
        size = chunk or chunk_size(self.device)
        pieces = [rows for rows in order.split(size) if len(rows)]
        parts = list(side_by_side(lambda rows: function(crystals[rows].trim(), rows), pieces, self.device))
        back = order.argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in (parts[0] if parts else ())}


def chunk_size(device: torch.device, half: bool = False) -> int:
    """Crystals per pass that go quickest: what fits a CPU's cache (2.5 times the rate of 256), or fills a GPU.

    Args:
        half: in bfloat16, whose products are so short on a CPU that what comes with each counts (128: 1.5 times the
            rate of 32).
    """
    return (128 if half else 32) if device.type == "cpu" else 512


def draw_size(device: torch.device, n: int) -> int:
    """Crystals drawn at once, of n, that go quickest.

    A step takes thousands of small operations however few crystals are left, and there are as many as the longest of
    them has tokens: so many at once. On a CPU two lots of few, for two cores, do better than one.
    """
    return min(max(-(-n // 2), 256), 1024) if device.type == "cpu" else 8192


def coordinate_slots(space_group: Tensor, wyckoff: Tensor) -> Tensor:
    """(B, 4 S) which of S x y z hold a token, of letters (B, S): free coordinates, and sites that have any.

    What symmetry ties follows from the letters.
    """
    free = tables(wyckoff.device).free[space_group.unsqueeze(1), wyckoff]  # (B, S, 3)
    return torch.cat([free.any(-1, keepdim=True), free], -1).flatten(1)


def last_free_axis(free: Tensor) -> Tensor:
    """(...) of sites whose coordinates are free or not, (..., 3) bool; -1: none is."""
    return (free * torch.arange(1, 4, device=free.device)).amax(-1) - 1


def _gathered(features: Tensor, index: Tensor) -> Tensor:
    """(B, k, d) of features (B, T, d) at places (B, k)."""
    return features.gather(1, index.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def _following(wyckoff: Tensor) -> Tensor:
    """(B, S) the letter after each site, 0 after the last one."""
    return F.pad(wyckoff[:, 1:], (0, 1))


def _resized(nuclei: dict[str, Tensor], sites: int) -> dict[str, Tensor]:
    """Cut or padded to so many sites, where there is an axis of sites: (B, S, k)."""
    return {name: F.pad(x, (0, 0, 0, sites - x.shape[1])) if x.dim() == 3 else x for name, x in nuclei.items()}


def _sum(values: Tensor, where: Tensor) -> Tensor:
    """Sum over the second axis of the values that count."""
    return values.masked_fill(~where, 0).sum(1)
