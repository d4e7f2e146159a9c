"""The network: tokens of a crystal in, distributions of the next choice out. Read top to bottom in one sitting.

A crystal with m sites is the token sequence W A x y z, m times, and one last W token for the stop. The output at a
token predicts the next one; the output at the stop token predicts the lattice. The architecture is CrystalFormer's
(arXiv 2403.15734), parameter for parameter, so that published weights load; `descriptors` adds what lets space
groups, Wyckoff positions and elements learn from each other.

In order "composition" it is W A, m times, the stop, and S x y z for each site with a free coordinate, where S tells
its letter, its element and the cell, and what symmetry fixes is no token. A coordinate is then chosen knowing all
letters and elements; the last free coordinate of a site, what stands around the places that it could take.

B: crystals, S: sites, T: tokens, d: model size, e: embedding size. Layers are in layers.py, what a distribution is in
distributions.py; drawing crystals is sampler.py's work, scoring them transformer.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.descriptors import element_descriptors, site_descriptors, space_group_descriptors
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.surroundings import SURROUNDINGS, Surroundings
from cfrl.crystals.wyckoff import NUM_LETTERS, NUM_SPACE_GROUPS, tables
from cfrl.model.distributions import IMPOSSIBLE, Categorical, LatticeMixture, SamplerOptions, VonMisesMixture
from cfrl.model.layers import Block, DescribedEmbedding, KeyValueCache, rotary_table
from cfrl.model.options import ModelConfig

TOKENS = {"site": ("W", "A", "x", "y", "z"), "composition": ("W", "A", "S", "x", "y", "z")}  # of a site, by order
MIN_STD = 1e-3  # of lattice parameters
_CELL = 8  # numbers that describe a cell
_PLACE = 64  # hidden units that judge a place by its surroundings
_NEARBY = (-0.03, 0.0, 0.03)  # of a place, fractional: where surroundings are looked at
_ROUNDS = 2  # of moving a place
_FARTHEST = 0.3  # radians that it moves in one
_NARROWEST = 2.0  # logarithm of by how much its concentration changes in one


@dataclass
class LastCoordinates:
    """Coordinates after which a site has no free one left: what stands around it is known for each of their values.

    crystals: cell and earlier sites are known. crystal, site, axis: (E,) whose coordinates these are, and which.
    index: their places among the leading axes (...) of the features that they are chosen from.
    """

    crystals: CrystalBatch
    crystal: Tensor
    site: Tensor
    axis: Tensor
    index: tuple[Tensor, ...]


class CrystalNetwork(nn.Module):
    """What the sampler and the likelihood share.

    Attributes:
        config: sizes and conventions.
        space_group_log_prob: (231,) buffer, log of the share of each space group in the training data, by number.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, e = config.model_size, config.embed_size
        if config.descriptors:
            self.space_group_embedding = DescribedEmbedding(space_group_descriptors()[1:], e)
            self.species_embedding = DescribedEmbedding(element_descriptors(), e)
            self.register_buffer("site_descriptors", site_descriptors(), persistent=False)  # (231, 28, k)
            self.site_project = nn.Linear(self.site_descriptors.shape[-1], e, bias=False)
            self.species_query = nn.Linear(d, e)
            self.wyckoff_query = nn.Linear(d, e)
            self.first_wyckoff_query = nn.Linear(config.h0_size, e)
        else:
            self.space_group_embedding = nn.Embedding(230, e)
            self.species_embedding = nn.Embedding(NUM_ELEMENTS, e)
        self.wyckoff_embedding = nn.Embedding(NUM_LETTERS, e)
        self.first_hidden = nn.Linear(e, config.h0_size)
        self.first_wyckoff = nn.Linear(config.h0_size, NUM_LETTERS)
        self.wyckoff_in = nn.Linear(2 * e + 1, d)
        self.species_in = nn.Linear(2 * e, d)
        self.coords_in = nn.ModuleList(nn.Linear(e + 2 * config.fourier, d) for _ in range(3))
        if config.order == "composition":
            self.site_in = nn.Linear(3 * e + _CELL, d)
            self.register_buffer("nearby", torch.tensor(_NEARBY), persistent=False)
            self.place_in = nn.Linear(len(_NEARBY) * SURROUNDINGS, _PLACE)
            self.place_query = nn.Linear(d, _PLACE)
            self.place_out = nn.Linear(_PLACE, 3)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.output_size)
        self.tokens = TOKENS[config.order]
        self.register_buffer("rotary", rotary_table(len(self.tokens) * config.max_sites, config.key_size), False)
        self.register_buffer("space_group_log_prob", space_group_shares(torch.arange(1, NUM_SPACE_GROUPS + 1)))
        self._initialise()

    def _initialise(self) -> None:
        residual = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = 0.5 if "embedding.weight" in name else parameter.shape[1] ** -0.5
            nn.init.trunc_normal_(
                parameter, std=std * (residual if name.endswith(("out.weight", "mlp.2.weight")) else 1)
            )

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    # ---- tokens in, outputs out -------------------------------------------------------------------------------

    def embed_wyckoff(self, space_group: Tensor, wyckoff: Tensor) -> Tensor:
        """(B, S, d) inputs of W tokens; space_group (B, 1), wyckoff (B, S)."""
        multiplicity = tables(self.device).multiplicity[space_group, wyckoff].to(self.dtype)  # (B, S)
        letter = self._site_embedding(space_group, wyckoff)  # (B, S, e)
        return self.wyckoff_in(torch.cat([self._group(space_group, wyckoff), letter, multiplicity[..., None]], -1))

    def embed_species(self, space_group: Tensor, species: Tensor) -> Tensor:
        """(B, S, d) inputs of A tokens; space_group (B, 1), species (B, S)."""
        return self.species_in(torch.cat([self._group(space_group, species), self.species_embedding(species)], -1))

    def embed_coordinate(self, axis: int, space_group: Tensor, coordinate: Tensor) -> Tensor:
        """(B, S, d) inputs of the x, y or z tokens (axis 0, 1, 2); space_group (B, 1), coordinate (B, S)."""
        frequency = torch.arange(1, self.config.fourier + 1, device=self.device, dtype=self.dtype)  # (Nf,)
        phase = 2 * math.pi * frequency * coordinate.to(self.dtype).unsqueeze(-1)  # (B, S, Nf)
        waves = torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)  # (B, S, 2 Nf) sin 1, cos 1, sin 2, ...
        return self.coords_in[axis](torch.cat([self._group(space_group, coordinate), waves], -1))

    def embed_sites(self, crystals: CrystalBatch) -> Tensor:
        """(B, S, d) inputs of S tokens; coordinates are not looked at."""
        group, atoms = crystals.space_group.unsqueeze(1), crystals.num_atoms
        scaled = scale_lattice(crystals.lattice.to(self.dtype), atoms)  # (B, 6)
        room = (crystals.volumes() / atoms).nan_to_num(0).clamp(min=0.1).log()  # of a cell that cannot be, too
        cell = torch.cat([scaled, atoms.log().to(self.dtype)[:, None], room.to(self.dtype)[:, None]], -1)  # (B, 8)
        parts = [
            self._group(group, crystals.wyckoff),
            self._site_embedding(group, crystals.wyckoff),
            self.species_embedding(crystals.species),
            cell.unsqueeze(1).expand(-1, crystals.wyckoff.shape[1], -1),
        ]
        return self.site_in(torch.cat(parts, -1))

    def _group(self, space_group: Tensor, like: Tensor) -> Tensor:
        """(B, S, e) the space group beside each of `like` (B, S)."""
        embedding = self.space_group_embedding(space_group - 1)  # (B, 1, e)
        return embedding.expand(*like.shape, embedding.shape[-1])

    def _site_embedding(self, space_group: Tensor, wyckoff: Tensor) -> Tensor:
        """(B, S, e) of letters (B, S)."""
        letter = self.wyckoff_embedding(wyckoff)
        if self.config.descriptors:
            letter = letter + self.site_project(self.site_descriptors[space_group, wyckoff])
        return letter

    def position(self, name: str, site: int) -> int:
        """Of the named token of a site."""
        return len(self.tokens) * site + self.tokens.index(name)

    def transform(
        self, tokens: Tensor, positions: Tensor | slice, cache: KeyValueCache | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """(B, T, d) token inputs at positions (T,) or (B, T) to (B, T, d) features.

        Args:
            cache: holds the tokens that come before; these are added.
            seen: (B, 1, T or 1, tokens so far) bool, which of them each token knows; None: all up to itself.
        """
        rotary = self.rotary[:, positions]  # (2, ..., T, 1, D / 2)
        x = self.dropout(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer, seen)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    # ---- features to distributions; the sampler and log_prob share these ---------------------------------------

    def first_wyckoff_logits(self, space_group: Tensor) -> Tensor:
        """(B, 28) logits of the first site's letter; space_group (B,)."""
        hidden = F.gelu(self.first_hidden(self.space_group_embedding(space_group - 1)), approximate="tanh")  # (B, h0)
        logits = self.first_wyckoff(hidden)  # (B, 28)
        if self.config.descriptors:
            logits = logits + self._match_sites(self.first_wyckoff_query(hidden).unsqueeze(1), space_group)[:, 0]
        return logits

    def wyckoff_logits(self, features: Tensor, space_group: Tensor) -> Tensor:
        """(B, S, 28) logits of the next site's letter from features (B, S, d) at z tokens."""
        logits = self._linear_head(features, NUM_LETTERS)
        if self.config.descriptors:
            logits = logits + self._match_sites(self.wyckoff_query(features), space_group)
        return logits

    def _match_sites(self, query: Tensor, space_group: Tensor) -> Tensor:
        """(B, S, 28) how well queries (B, S, e) fit the letters of the space groups (B,)."""
        letters = torch.arange(NUM_LETTERS, device=self.device)
        sites = self._site_embedding(space_group.unsqueeze(1), letters)  # (B, 28, e)
        return query @ sites.transpose(1, 2) / math.sqrt(self.config.embed_size)

    def wyckoff_distribution(
        self,
        logits: Tensor,
        space_group: Tensor,
        previous: Tensor | None,
        atoms: Tensor,
        options: SamplerOptions,
        nucleus: Tensor | None = None,
        wished: Tensor | None = None,
    ) -> Categorical:
        """Of the next letter. space_group broadcasts to (...), logits (..., 28).

        Letters never decrease, and increase strictly after a site that can be occupied only once.

        Args:
            previous: (...) the letter before, or None for the first site (which may not be a stop).
            atoms: (...) atoms in the cell so far.
            nucleus: as in `Categorical`; so in the other distributions.
            wished: (..., 28) log-weights by the constraint of the options; None: none.
        """
        t = tables(self.device)
        letter = torch.arange(NUM_LETTERS, device=self.device)
        mask = (letter >= 1) & (letter <= t.num_letters[space_group].unsqueeze(-1))  # (..., 28)
        if options.max_atoms is not None:
            mask = mask & (atoms.unsqueeze(-1) + t.multiplicity[space_group] <= options.max_atoms)
        if previous is not None:
            lowest = previous + (t.dof[space_group, previous] == 0)
            mask = (mask & (letter >= lowest.unsqueeze(-1))) | (letter == 0)
        logits = _at_least_float32(logits)
        if wished is not None:
            logits, mask = _weighted(logits, wished, options), mask & ~wished.isneginf()
        return Categorical(logits, mask, options, nucleus)

    def species_distribution(
        self, features: Tensor, options: SamplerOptions, nucleus: Tensor | None = None, wished: Tensor | None = None
    ) -> Categorical:
        """Of the element, from features (..., d) at W tokens; `wished` (..., 119) as for letters."""
        logits = _at_least_float32(self._linear_head(features, NUM_ELEMENTS))  # (..., 119)
        if self.config.descriptors:
            match = self.species_query(features) @ self.species_embedding.table().T
            logits = logits + match / math.sqrt(self.config.embed_size)
        if options.favour:
            numbers, wishes = zip(*options.favour, strict=True)
            logits = logits.index_add(
                -1,
                torch.tensor(numbers, device=self.device),
                logits.new_tensor(wishes).expand(*logits.shape[:-1], len(wishes)),
            )
        mask = torch.ones(NUM_ELEMENTS, dtype=torch.bool, device=self.device)
        if options.elements is not None:
            mask = torch.zeros_like(mask)
            mask[list(options.elements)] = True
        mask[0] = False
        mask = mask.expand_as(logits)
        if wished is not None:
            logits, mask = _weighted(logits, wished, options), mask & ~wished.isneginf()
        return Categorical(logits, mask, options, nucleus)

    def coordinate_distribution(
        self,
        features: Tensor,
        options: SamplerOptions,
        nucleus: Tensor | None = None,
        last: LastCoordinates | None = None,
    ) -> VonMisesMixture:
        """Of the angle 2 pi (x - 1/2), from features (..., d) at the token before the coordinate.

        Args:
            last: which of them mind what stands around the places that their components point at; None: none.
        """
        k = self.config.coord_components
        logits, mean, width = _at_least_float32(self._linear_head(features, 3 * k)).split(k, -1)  # (..., Kx) each
        components = (logits, mean, F.softplus(width))
        if last is not None:
            moved = self._moved(*(part[last.index] for part in components), features[last.index], last)
            components = (x.index_put(last.index, y) for x, y in zip(components, moved, strict=True))
        return VonMisesMixture(*components, options, nucleus)

    def _moved(
        self, logits: Tensor, mean: Tensor, concentration: Tensor, features: Tensor, last: LastCoordinates
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Components (E, Kx) weighed, moved and narrowed by what stands around them; features (E, d)."""
        query = self.place_query(features).unsqueeze(1)  # (E, 1, h)
        near = Surroundings(last.crystals, last.crystal, last.site, last.axis, mean.dtype)
        for _ in range(_ROUNDS):
            places = (mean / (2 * math.pi) + 0.5).unsqueeze(-1) + self.nearby.to(mean.dtype)  # (E, Kx, 3)
            around = near(places.flatten(1)).unflatten(1, places.shape[1:]).flatten(2).to(features.dtype)
            hidden = F.gelu(self.place_in(around) + query, approximate="tanh")  # (E, Kx, h)
            weight, shift, narrow = self.place_out(hidden).to(mean.dtype).unbind(-1)
            logits, mean = logits + weight, mean + _FARTHEST * shift.tanh()
            concentration = concentration * (_NARROWEST * narrow.tanh()).exp()
        return logits, mean, concentration

    def lattice_distribution(
        self, features: Tensor, space_group: Tensor, options: SamplerOptions, nucleus: Tensor | None = None
    ) -> LatticeMixture:
        """Of the scaled lattice (see `scale_lattice`), from features (..., d) at the stop token."""
        k = self.config.lattice_components
        output = _at_least_float32(self._linear_head(features, NUM_ELEMENTS + 13 * k))[..., NUM_ELEMENTS:]  # 13 Kl
        logits, mean, width = output.split([k, 6 * k, 6 * k], -1)
        mean, width = mean.unflatten(-1, (k, 6)), width.unflatten(-1, (k, 6))  # (..., Kl, 6)
        free = tables(self.device).lattice_free[space_group]
        joint = self.config.likelihood == "exact"
        return LatticeMixture(logits, mean, F.softplus(width) + MIN_STD, free, options, joint, nucleus)

    def _linear_head(self, features: Tensor, width: int) -> Tensor:
        """(..., width): the first outputs of the head, of features (..., d)."""
        return F.linear(features, self.head.weight[:width], self.head.bias[:width])


def scale_lattice(lattice: Tensor, num_atoms: Tensor) -> Tensor:
    """(..., 6) in angstrom and degrees to the network's units: lengths over (atoms in the cell)^(1/3), radians."""
    size = num_atoms.to(lattice.dtype).pow(1 / 3).unsqueeze(-1)
    return torch.cat([lattice[..., :3] / size, torch.deg2rad(lattice[..., 3:])], -1)


def unscale_lattice(scaled: Tensor, num_atoms: Tensor) -> Tensor:
    """The inverse of `scale_lattice`."""
    size = num_atoms.to(scaled.dtype).pow(1 / 3).unsqueeze(-1)
    return torch.cat([scaled[..., :3] * size, torch.rad2deg(scaled[..., 3:])], -1)


def space_group_shares(space_group: Tensor, weights: Tensor | None = None) -> Tensor:
    """(231,) log of the share of each space group among crystals (n,), each counted by its weight, by number."""
    counts = torch.bincount(space_group, weights, minlength=NUM_SPACE_GROUPS + 1).float()
    return (counts / counts.sum()).log()


def _weighted(logits: Tensor, log_weights: Tensor, options: SamplerOptions) -> Tensor:
    """Logits of probabilities times weights; the temperature is for the former alone."""
    return logits + options.temperature * log_weights.clamp(min=IMPOSSIBLE)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
