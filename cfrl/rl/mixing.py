"""How well a population of weighted or of moving crystals stands for the distribution that it is to follow."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_size(log_weight: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights (n,): how many equally weighted draws tell as much (Kong, Liu and Wong 1994)."""
    return float(torch.exp(2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)))


def next_temperature(energy: Tensor, now: float, size: float) -> float:
    """The largest inverse temperature up to 1 at which weights exp((next - now) energy) (n,) have this effective size.

    The effective size falls as the inverse temperature rises, so that bisection finds it.
    """

    def enough(there: float) -> bool:
        return effective_size((there - now) * energy) >= size

    if enough(1.0):
        return 1.0
    low, high = now, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def systematic(log_weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rows of those weighted (m,), each as often as its weight wants, rounded up or down by one draw for all.

    Systematic resampling (Kitagawa 1996): the expected number of copies is n w / sum w, with the least noise.
    """
    edges = log_weight.double().softmax(0).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=generator)) / n
    return torch.searchsorted(edges, points).clamp(max=len(edges) - 1)


def split_r_hat(values: Tensor) -> float:
    """Split R-hat of values (chains, draws): 1 where halves of chains differ no more than draws within them.

    A. Gelman et al., Bayesian Data Analysis (3rd ed.), sec. 11.4. NaN for fewer than 4 draws, or where all are equal.
    """
    halves = _halves(values)
    if halves.shape[1] < 2:
        return torch.nan
    within, pooled = _variances(halves)
    return float((pooled / within).sqrt()) if within > 0 else torch.nan


def effective_draws(values: Tensor) -> float:
    """How many independent draws tell as much of the mean as these (chains, draws).

    Ibid. sec. 11.5: the sum of autocorrelations up to the first pair that is no longer positive (Geyer 1992). NaN as in
    `split_r_hat`.
    """
    halves = _halves(values)
    chains, n = halves.shape
    if n < 2:
        return torch.nan
    within, pooled = _variances(halves)
    if not within > 0:
        return torch.nan
    correlation = [
        1 - 0.5 * float((halves[:, lag:] - halves[:, : n - lag]).square().mean() / pooled) for lag in range(n)
    ]
    time = -1.0
    for lag in range(0, n - 1, 2):
        pair = correlation[lag] + correlation[lag + 1]
        if pair <= 0:
            break
        time += 2 * pair
    return chains * n / max(time, 1.0)


def _halves(values: Tensor) -> Tensor:
    """(2 chains, draws / 2), the middle one of an odd number left out."""
    half = values.shape[1] // 2
    return torch.cat([values[:, :half], values[:, values.shape[1] - half :]]).double()


def _variances(halves: Tensor) -> tuple[Tensor, Tensor]:
    """Mean variance within chains, and that of all of them together."""
    n = halves.shape[1]
    within = halves.var(1).mean()
    return within, (n - 1) / n * within + halves.mean(1).var()
