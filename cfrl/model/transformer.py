"""The transformer: log P(crystal | space group), token by token. Read top to bottom in one sitting.

A crystal with m sites is the token sequence W A x y z, m times, and one last W token for the stop. The output at a
token predicts the next one; the output at the stop token predicts the lattice. The architecture is CrystalFormer's
(arXiv 2403.15734), parameter for parameter, so that published weights load; `descriptors` adds what lets space
groups, Wyckoff positions and elements learn from each other. Drawing crystals is sampler.py's work; what a
distribution is, distributions.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrl import settings
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.descriptors import element_descriptors, site_descriptors, space_group_descriptors
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS, tables
from cfrl.errors import UserError
from cfrl.model.distributions import Categorical, LatticeMixture, SamplerOptions, VonMisesMixture

NUM_LETTERS = 28  # with 0 = empty / stop
TOKENS_PER_SITE = 5
FACTORS = ("wyckoff", "species", "coords", "lattice")
AXES = ("x", "y", "z")
MIN_STD = 1e-3  # of lattice parameters
Size = Annotated[int, settings.Range(1, 10**5)]


@dataclass(frozen=True)
class ModelConfig(settings.Settings):
    """Sizes and conventions of a model; stored in its file.

    Attributes:
        fourier: number of frequencies Nf in which a coordinate enters.
        coord_components, lattice_components: mixture sizes Kx and Kl.
        max_sites: sites plus one stop; n_max of the papers.
        descriptors: physical descriptors of elements, space groups and Wyckoff positions beside the learned tables,
            and output weights shared through them.
        likelihood: "exact": the density of the sampler. "published": lattice parameters scored by marginal mixtures
            and tied coordinates scored too, as the published code does.
    """

    embed_size: Size = 32
    h0_size: Size = 256
    model_size: Size = 64
    num_layers: Size = 16
    num_heads: Size = 16
    key_size: Size = 64
    fourier: Size = 5
    coord_components: Size = 16
    lattice_components: Size = 4
    max_sites: Size = 21
    dropout: settings.FractionBelowOne = 0.1
    descriptors: bool = False
    likelihood: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_size % 2:
            raise UserError(f"key_size = {self.key_size}: must be even, for rotary positions turn pairs")

    @property
    def num_weights(self) -> int:
        """About how many numbers the matrices of such a model hold; never more than there are."""
        inner, wide = self.num_heads * self.key_size, 3 * self.embed_size + 4 * self.fourier
        layer = 8 * self.model_size + 4 * inner
        return self.model_size * (self.num_layers * layer + wide + self.output_size) + self.embed_size * self.h0_size

    @property
    def output_size(self) -> int:
        species_and_lattice = NUM_ELEMENTS + 13 * self.lattice_components
        return max(species_and_lattice, 3 * self.coord_components, NUM_LETTERS)


PRESETS = {
    "alex-20": ModelConfig(),
    "small": ModelConfig(
        embed_size=32, h0_size=128, model_size=96, num_layers=4, num_heads=4, key_size=24, dropout=0.2
    ),
    "default": ModelConfig(
        embed_size=64, model_size=128, num_layers=6, num_heads=4, key_size=32, dropout=0.15, descriptors=True
    ),
}


class KeyValueCache:
    """Keys and values of the tokens decoded so far, per layer; grows as needed, shrinks with `select`."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, D) tensors after the `length` tokens held, and returns all of them."""
        end = self.length + keys.shape[2]
        stored = self.keys[layer]
        if stored is None or end > stored.shape[2]:
            for store, new in ((self.keys, keys), (self.values, values)):
                larger = new.new_empty(*new.shape[:2], max(2 * end, 32), new.shape[3])
                if store[layer] is not None:
                    larger[:, :, : self.length] = store[layer][:, :, : self.length]
                store[layer] = larger
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps only these crystals of the batch."""
        self.keys = [store[rows] for store in self.keys]
        self.values = [store[rows] for store in self.values]


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions over the whole key size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.key_size
        self.heads, self.key_size = config.num_heads, config.key_size
        self.query = nn.Linear(config.model_size, inner)
        self.key = nn.Linear(config.model_size, inner)
        self.value = nn.Linear(config.model_size, inner)
        self.out = nn.Linear(inner, config.model_size)

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        query, key, value = (f(x).view(B, T, self.heads, self.key_size) for f in (self.query, self.key, self.value))
        query, key = Rotation.apply(query, *rotary), Rotation.apply(key, *rotary)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, T, D)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        # One new token sees everything before it; a whole sequence needs the causal mask.
        y = F.scaled_dot_product_attention(query, key, value, is_causal=T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.model_size)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.model_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.model_size, 4 * config.model_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.model_size, config.model_size),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache, layer))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class DescribedEmbedding(nn.Embedding):
    """A learned table plus a linear map of fixed descriptors (rows, k) of the same things."""

    def __init__(self, descriptors: Tensor, size: int) -> None:
        super().__init__(len(descriptors), size)
        self.register_buffer("descriptors", descriptors, persistent=False)
        self.project = nn.Linear(descriptors.shape[1], size, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.project(self.descriptors[index])

    def table(self) -> Tensor:
        """All rows, (rows, size)."""
        return self.weight + self.project(self.descriptors)


class CrystalTransformer(nn.Module):
    """log P(crystal | space group) and its parts.

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
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.output_size)
        self.register_buffer("rotary", _rotary_table(TOKENS_PER_SITE * config.max_sites, config.key_size), False)
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
        multiplicity = tables(self.device).multiplicity[space_group, wyckoff].to(self.dtype)
        letter = self._site_embedding(space_group, wyckoff)
        return self.wyckoff_in(torch.cat([self._group(space_group, wyckoff), letter, multiplicity[..., None]], -1))

    def embed_species(self, space_group: Tensor, species: Tensor) -> Tensor:
        """(B, S, d) inputs of A tokens."""
        return self.species_in(torch.cat([self._group(space_group, species), self.species_embedding(species)], -1))

    def embed_coordinate(self, axis: int, space_group: Tensor, coordinate: Tensor) -> Tensor:
        """(B, S, d) inputs of the x, y or z tokens (axis 0, 1, 2)."""
        frequency = torch.arange(1, self.config.fourier + 1, device=self.device, dtype=self.dtype)
        phase = 2 * math.pi * frequency * coordinate.to(self.dtype).unsqueeze(-1)
        waves = torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)  # sin 1, cos 1, sin 2, ...
        return self.coords_in[axis](torch.cat([self._group(space_group, coordinate), waves], -1))

    def _group(self, space_group: Tensor, like: Tensor) -> Tensor:
        embedding = self.space_group_embedding(space_group - 1)  # (B, 1, e)
        return embedding.expand(*like.shape, embedding.shape[-1])

    def _site_embedding(self, space_group: Tensor, wyckoff: Tensor) -> Tensor:
        letter = self.wyckoff_embedding(wyckoff)
        if self.config.descriptors:
            letter = letter + self.site_project(self.site_descriptors[space_group, wyckoff])
        return letter

    def transform(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T, d) token inputs to (B, T, d) features; with a cache the tokens follow those that it holds."""
        start = cache.length if cache is not None else 0
        rotary = self.rotary[:, start : start + tokens.shape[1]]
        x = self.dropout(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    # ---- features to distributions; the sampler and log_prob share these ---------------------------------------

    def first_wyckoff_logits(self, space_group: Tensor) -> Tensor:
        """(B, 28) logits of the first site's letter; space_group (B,)."""
        hidden = F.gelu(self.first_hidden(self.space_group_embedding(space_group - 1)), approximate="tanh")
        logits = self.first_wyckoff(hidden)
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
    ) -> Categorical:
        """Of the next letter. space_group broadcasts to (...), logits (..., 28).

        Letters never decrease, and increase strictly after a site that can be occupied only once.

        Args:
            previous: (...) the letter before, or None for the first site (which may not be a stop).
            atoms: (...) atoms in the cell so far.
            nucleus: as in `Categorical`; so in the other distributions.
        """
        t = tables(self.device)
        letter = torch.arange(NUM_LETTERS, device=self.device)
        mask = (letter >= 1) & (letter <= t.num_letters[space_group].unsqueeze(-1))
        if options.max_atoms is not None:
            mask = mask & (atoms.unsqueeze(-1) + t.multiplicity[space_group] <= options.max_atoms)
        if previous is not None:
            lowest = previous + (t.dof[space_group, previous] == 0)
            mask = (mask & (letter >= lowest.unsqueeze(-1))) | (letter == 0)
        return Categorical(_at_least_float32(logits), mask, options, nucleus)

    def species_distribution(
        self, features: Tensor, options: SamplerOptions, nucleus: Tensor | None = None
    ) -> Categorical:
        """Of the element, from features (..., d) at W tokens."""
        logits = _at_least_float32(self._linear_head(features, NUM_ELEMENTS))
        if self.config.descriptors:
            match = self.species_query(features) @ self.species_embedding.table().T
            logits = logits + match / math.sqrt(self.config.embed_size)
        allowed = torch.ones(NUM_ELEMENTS, dtype=torch.bool, device=self.device)
        if options.elements is not None:
            allowed = torch.zeros_like(allowed)
            allowed[list(options.elements)] = True
        allowed[0] = False
        return Categorical(logits, allowed.expand_as(logits), options, nucleus)

    def coordinate_distribution(
        self, features: Tensor, options: SamplerOptions, nucleus: Tensor | None = None
    ) -> VonMisesMixture:
        """Of the angle 2 pi (x - 1/2), from features (..., d) at the token before the coordinate."""
        k = self.config.coord_components
        logits, mean, width = _at_least_float32(self._linear_head(features, 3 * k)).split(k, -1)
        return VonMisesMixture(logits, mean, F.softplus(width), options, nucleus)

    def lattice_distribution(
        self, features: Tensor, space_group: Tensor, options: SamplerOptions, nucleus: Tensor | None = None
    ) -> LatticeMixture:
        """Of the scaled lattice (see `scale_lattice`), from features (..., d) at the stop token."""
        k = self.config.lattice_components
        output = _at_least_float32(self._linear_head(features, NUM_ELEMENTS + 13 * k))[..., NUM_ELEMENTS:]
        logits, mean, width = output.split([k, 6 * k, 6 * k], -1)
        mean, width = mean.unflatten(-1, (k, 6)), width.unflatten(-1, (k, 6))
        free = tables(self.device).lattice_free[space_group]
        joint = self.config.likelihood == "exact"
        return LatticeMixture(logits, mean, F.softplus(width) + MIN_STD, free, options, joint, nucleus)

    def _linear_head(self, features: Tensor, width: int) -> Tensor:
        return F.linear(features, self.head.weight[:width], self.head.bias[:width])

    # ---- the likelihood ----------------------------------------------------------------------------------------

    def features(self, crystals: CrystalBatch) -> Tensor:
        """(B, 5 S + 1, d) features at all tokens of a batch with S sites; later tokens than a stop mean nothing."""
        group = crystals.space_group.unsqueeze(1)
        wyckoff = F.pad(crystals.wyckoff, (0, 1))  # the stop of the longest crystal
        sites = torch.stack(
            [
                self.embed_wyckoff(group, wyckoff[:, :-1]),
                self.embed_species(group, crystals.species),
                *(self.embed_coordinate(axis, group, crystals.frac_coords[..., axis]) for axis in range(3)),
            ],
            2,
        )  # (B, S, 5, d)
        return self.transform(torch.cat([sites.flatten(1, 2), self.embed_wyckoff(group, wyckoff[:, -1:])], 1))

    def distributions(
        self, crystals: CrystalBatch, options: SamplerOptions, nuclei: dict[str, Tensor] | None = None
    ) -> dict[str, Categorical | VonMisesMixture | LatticeMixture]:
        """Those that the choices along crystals with up to S sites are made from, by name.

        "first": of the first letter, (B,); "wyckoff": of the letter or stop after each site, "species", and "x", "y",
        "z": (B, S); "lattice": (B,). Batch and `nuclei` as in `forward`.
        """
        features, nuclei = self.features(crystals), nuclei or {}
        S, group, wyckoff = crystals.wyckoff.shape[1], crystals.space_group, crystals.wyckoff
        at = [features[:, k : 5 * S : 5] for k in range(TOKENS_PER_SITE)]  # W, A, x, y, z: (B, S, d)
        stop = crystals.num_sites  # (B,) index of the first empty site
        at_stop = features[torch.arange(len(stop), device=stop.device), TOKENS_PER_SITE * stop]
        none, atoms = torch.zeros_like(group), crystals.multiplicity.cumsum(1)
        first, later = self.first_wyckoff_logits(group), self.wyckoff_logits(at[4], group)
        return {
            "first": self.wyckoff_distribution(first, group, None, none, options, nuclei.get("first")),
            "wyckoff": self.wyckoff_distribution(
                later, group.unsqueeze(1), wyckoff, atoms, options, nuclei.get("wyckoff")
            ),
            "species": self.species_distribution(at[0], options, nuclei.get("species")),
            **{name: self.coordinate_distribution(at[k + 1], options, nuclei.get(name)) for k, name in enumerate(AXES)},
            "lattice": self.lattice_distribution(at_stop, group, options, nuclei.get("lattice")),
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
        chosen = occupied & ~self._forced_stop(S)
        w = of["first"].log_prob(wyckoff[:, 0]) + _sum(of["wyckoff"].log_prob(_following(wyckoff)), chosen)
        a = _sum(of["species"].log_prob(crystals.species), occupied)

        t = tables(self.device)
        counts = t.free if self.config.likelihood == "exact" else t.scored
        drawn = counts[group.unsqueeze(1), wyckoff]  # (B, S, 3)
        angle = 2 * math.pi * (crystals.frac_coords.to(w.dtype) - 0.5)
        density = [of[name].log_prob(angle[..., k]) for k, name in enumerate(AXES)]
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
            dict of (n,) tensors "wyckoff", "species", "coords", "lattice". Gradients flow; wrap in `torch.no_grad`
            where they are not wanted.

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
        order = crystals.num_sites.argsort()
        size = chunk or chunk_size(self.device)
        parts = [function(crystals[rows].trim(), rows) for rows in order.split(size) if len(rows)]
        back = order.argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in (parts[0] if parts else ())}


def chunk_size(device: torch.device) -> int:
    """Crystals per pass that go quickest: what fits a CPU's cache (2.5 times the rate of 256), or fills a GPU."""
    return 32 if device.type == "cpu" else 512


def scale_lattice(lattice: Tensor, num_atoms: Tensor) -> Tensor:
    """(..., 6) in angstrom and degrees to the network's units: lengths over (atoms in the cell)^(1/3), radians."""
    size = num_atoms.to(lattice.dtype).pow(1 / 3).unsqueeze(-1)
    return torch.cat([lattice[..., :3] / size, torch.deg2rad(lattice[..., 3:])], -1)


def unscale_lattice(scaled: Tensor, num_atoms: Tensor) -> Tensor:
    """The inverse of `scale_lattice`."""
    size = num_atoms.to(scaled.dtype).pow(1 / 3).unsqueeze(-1)
    return torch.cat([scaled[..., :3] * size, torch.rad2deg(scaled[..., 3:])], -1)


def space_group_shares(space_group: Tensor) -> Tensor:
    """(231,) log of the share of each space group among crystals, by number."""
    counts = torch.bincount(space_group, minlength=NUM_SPACE_GROUPS + 1).float()
    return (counts / counts.sum()).log()


def _following(wyckoff: Tensor) -> Tensor:
    """(B, S) the letter after each site, 0 after the last one."""
    return F.pad(wyckoff[:, 1:], (0, 1))


def _resized(nuclei: dict[str, Tensor], sites: int) -> dict[str, Tensor]:
    """Cut or padded to so many sites, where there is an axis of sites: (B, S, k)."""
    return {name: F.pad(x, (0, 0, 0, sites - x.shape[1])) if x.dim() == 3 else x for name, x in nuclei.items()}


def _sum(values: Tensor, where: Tensor) -> Tensor:
    """Sum over the second axis of the values that count."""
    return values.masked_fill(~where, 0).sum(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rotary_table(length: int, size: int) -> Tensor:
    """(2, length, 1, size / 2) cosines and sines; in float32 always, as the published code computes them."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency).unsqueeze(1)
    return torch.stack([angle.cos(), angle.sin()])


class Rotation(torch.autograd.Function):
    """Rotary position embedding, the halves of a key paired: (B, T, H, D) by angles (T, 1, D / 2).

    Written out, because left to autograd it costs as much as the attention itself; its gradient is the rotation back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(left, cos.to(x.dtype), out=y[..., :half]).addcmul_(right, sin.to(x.dtype), value=-1)
    torch.mul(right, cos.to(x.dtype), out=y[..., half:]).addcmul_(left, sin.to(x.dtype))
    return y


# ---- files -------------------------------------------------------------------------------------------------------
