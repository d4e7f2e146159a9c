"""What the network is made of: attention with a cache, blocks, embeddings with descriptors, rotary positions.

Nothing here knows of crystals. B: sequences, T: tokens, d: model size, H: heads, D: key size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrl.model.options import ModelConfig


class KeyValueCache:
    """Keys and values of the tokens decoded so far, per layer; grows as needed, shrinks with `select`."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers  # each (B, H, room, D)
        self.values: list[Tensor | None] = [None] * num_layers
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, D) tensors after the `length` tokens held, and returns all: (B, H, length + T, D)."""
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

    def select(self, kept: Tensor) -> Tensor:
        """Keeps only these sequences, (B,) bool, and returns their numbers (k,) as they stand from now on.

        Each stays in its place, but for the last ones, which go where others went: so little has to be copied.
        """
        k = int(kept.sum())
        gaps, last = (~kept[:k]).nonzero()[:, 0], k + kept[k:].nonzero()[:, 0]
        for stores in (self.keys, self.values):
            for store in stores:
                store[gaps, :, : self.length] = store[last, :, : self.length]
            stores[:] = [store[:k] for store in stores]
        return torch.arange(k, device=kept.device).index_put((gaps,), last)

    def blank(self, sequences: int, room: int) -> KeyValueCache:
        """One of as many layers that holds nothing yet, with room for so many tokens of so many sequences."""
        other = KeyValueCache(0)
        for mine, new in ((self.keys, other.keys), (self.values, other.values)):
            new.extend(store.new_zeros(sequences, store.shape[1], room, store.shape[3]) for store in mine)
        return other

    def first(self, length: int, rows: Tensor, room: int) -> KeyValueCache:
        """The first tokens of some sequences, by their numbers (k,): a cache of its own, with room for some more."""
        part = self.blank(len(rows), length + room)
        part.length = length
        part.put(slice(None), self, rows, 0)
        return part

    def put(self, rows: Tensor | slice, other: KeyValueCache, theirs: Tensor, start: int) -> None:
        """Of another cache, as long as this one, what it holds from token `start` on: its rows `theirs` for `rows`."""
        for mine, new in zip(self.keys + self.values, other.keys + other.values, strict=True):
            mine[rows, :, start : self.length] = new[theirs, :, start : self.length]


class Attention(nn.Module):
    """Multi-head attention with rotary positions over the whole key size; causal, unless it is told what to see."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.key_size  # H D
        self.heads, self.key_size = config.num_heads, config.key_size
        self.query = nn.Linear(config.model_size, inner)
        self.key = nn.Linear(config.model_size, inner)
        self.value = nn.Linear(config.model_size, inner)
        self.out = nn.Linear(inner, config.model_size)

    def forward(
        self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None, layer: int, seen: Tensor | None = None
    ) -> Tensor:
        """(B, T, d) to (B, T, d); rotary (2, ..., T, 1, D / 2), of the tokens' positions; seen as for `_attend`."""
        B, T, _ = x.shape
        maps = (self.query, self.key, self.value)  # as one product, which is quicker
        weight, bias = (torch.cat([getattr(f, name) for f in maps]) for name in ("weight", "bias"))
        joined = F.linear(x, weight, bias).view(B, T, 3 * self.heads, self.key_size)
        turned, value = joined.split([2 * self.heads, self.heads], 2)
        query, key = Rotation.apply(turned, *rotary).chunk(2, 2)  # (B, T, H, D)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, T, D)
        if cache is not None:
            key, value = cache.append(layer, key, value)  # (B, H, all tokens so far, D)
        y = _attend(query, key, value, seen)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Attention; what comes in bfloat16 on a CPU in float32, where its gradient takes a twentieth of the time.

    seen: (B, 1, T or 1, tokens so far) bool, of which keys each query knows. None: of all before it; one new token sees
        everything, a whole sequence needs the causal mask.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return _attend(query.float(), key.float(), value.float(), seen)
    causal = seen is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, seen, is_causal=causal)


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

    def forward(
        self, x: Tensor, rotary: Tensor, cache: KeyValueCache | None, layer: int, seen: Tensor | None = None
    ) -> Tensor:
        """(B, T, d) to (B, T, d); the rest as for `Attention`."""
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache, layer, seen))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class DescribedEmbedding(nn.Embedding):
    """A learned table plus a linear map of fixed descriptors (rows, k) of the same things."""

    def __init__(self, descriptors: Tensor, size: int) -> None:
        super().__init__(len(descriptors), size)
        self.register_buffer("descriptors", descriptors, persistent=False)
        self.project = nn.Linear(descriptors.shape[1], size, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        """(...) row numbers to (..., size)."""
        return super().forward(index) + self.project(self.descriptors[index])

    def table(self) -> Tensor:
        """All rows, (rows, size)."""
        return self.weight + self.project(self.descriptors)


def rotary_table(length: int, size: int) -> Tensor:
    """(2, length, 1, size / 2) cosines and sines; in float32 always, as the published code computes them."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency).unsqueeze(1)  # (length, 1, size / 2)
    return torch.stack([angle.cos(), angle.sin()])


class Rotation(torch.autograd.Function):
    """Rotary position embedding, the halves of a key paired: (B, T, H, D) by angles (..., T, 1, D / 2).

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
    left, right = x[..., :half], x[..., half:]  # (B, T, H, D / 2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(left, cos.to(x.dtype), out=y[..., :half]).addcmul_(right, sin.to(x.dtype), value=-1)
    torch.mul(right, cos.to(x.dtype), out=y[..., half:]).addcmul_(left, sin.to(x.dtype))
    return y
