"""The distributions that a crystal is drawn from, `sample` and `log_prob` side by side so that they agree.

Temperature, nucleus (top-p) truncation and masks are part of each distribution: the log-probability of a crystal
is always that of the sampler that made it. All classes take tensors of any leading shape (...).
Randomness comes from the generator that `sample` is given, on the device of the tensors: torch's global one is shared
with other threads, whose draws would make crystals depend on when those run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cfrl.errors import NotFinite
from cfrl.model.constraints import Constraint

IMPOSSIBLE = -1e10  # log-probability of what a mask forbids; finite, so that 0 * log 0 stays 0 in entropies
NEARLY_NORMAL = 1e6  # concentration beyond which a von Mises density is normal to one part in a million
MAX_ROUNDS = 200  # of the rejection sampler, which accepts at least 65% in each: 1e-91 that one is not enough
NOT_FINITE = "the model gives no finite probabilities: its weights are damaged, or the temperature is too extreme"


@dataclass(frozen=True)
class SamplerOptions:
    """How crystals are drawn; the same options give their log-probability.

    temperature: divides the logits of every discrete choice and the concentrations of the coordinates,
        and multiplies the variances of the lattice.
    top_p: discrete choices, mixture components included, keep the likeliest values up to this total.
    elements: atomic numbers that may occur; None: all.
    max_atoms: largest number of atoms in the conventional cell; None: no limit.
    favour: atomic numbers, and what is added to the logit of each.
    constraint: what letters and elements must come to; None: nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    elements: tuple[int, ...] | None = None
    max_atoms: int | None = None
    favour: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None


class Categorical:
    """Masked categorical distribution over the last axis.

    Args:
        logits: (..., k).
        mask: (..., k) bool, True where a value is allowed; None: all are.
        options: temperature and top-p.
        nucleus: (..., k) bool, the values that top-p keeps, as found at an earlier time; None: by these logits.

    Attributes:
        log_probs: (..., k).
        nucleus: (..., k) bool; None where top-p keeps everything.
    """

    def __init__(
        self, logits: Tensor, mask: Tensor | None, options: SamplerOptions, nucleus: Tensor | None = None
    ) -> None:
        logits = logits / options.temperature
        if mask is not None:
            logits = logits.masked_fill(~mask, IMPOSSIBLE)
        self.log_probs, self.nucleus = logits.log_softmax(-1), None
        if options.top_p < 1.0:
            self.nucleus = _nucleus(self.log_probs.detach().exp(), options.top_p) if nucleus is None else nucleus
            self.log_probs = logits.masked_fill(~self.nucleus, IMPOSSIBLE).log_softmax(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(...) int64. Raises NotFinite where the probabilities are not."""
        probs = self.log_probs.exp()  # (..., k)
        if not torch.isfinite(probs).all():
            raise NotFinite(NOT_FINITE)
        rows = probs.reshape(-1, probs.shape[-1])
        return torch.multinomial(rows, 1, generator=generator).reshape(probs.shape[:-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """(...) log-probability of `value` (...) int64."""
        return self.log_probs.gather(-1, value.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """(...) in nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class VonMisesMixture:
    """Mixture of von Mises densities on the circle.

    Density sum_k w_k exp(kappa_k cos(angle - mu_k)) / (2 pi I0(kappa_k)), per radian.

    Args:
        logits: (..., k) of the components.
        mean: (..., k) mu, radians.
        concentration: (..., k) kappa >= 0.
        options, nucleus: see `Categorical`; of the components.
    """

    def __init__(
        self,
        logits: Tensor,
        mean: Tensor,
        concentration: Tensor,
        options: SamplerOptions,
        nucleus: Tensor | None = None,
    ) -> None:
        self.components = Categorical(logits, None, options, nucleus)
        self.mean = mean
        self.concentration = concentration / options.temperature

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(...) angles in [-pi, pi). Raises NotFinite where a parameter is not."""
        component = self.components.sample(generator).unsqueeze(-1)  # (..., 1)
        mean = self.mean.gather(-1, component).squeeze(-1)
        concentration = self.concentration.gather(-1, component).squeeze(-1)  # (...)
        angle = mean + von_mises(concentration.double(), generator).to(mean.dtype)
        return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi

    def log_prob(self, angle: Tensor) -> Tensor:
        """(...) log-density per radian at `angle` (...)."""
        kappa = self.concentration
        # exp(kappa (cos - 1)) / i0e(kappa) stays finite where I0 itself overflows.
        density = kappa * (torch.cos(angle.unsqueeze(-1) - self.mean) - 1)
        density = density - math.log(2 * math.pi) - torch.special.i0e(kappa).log()  # (..., k)
        return torch.logsumexp(self.components.log_probs + density, -1)


class LatticeMixture:
    """Mixture of diagonal Gaussians over the six lattice parameters, of which only the free ones count.

    Args:
        logits: (..., k) of the components.
        mean, std: (..., k, 6).
        free: (..., 6) bool, the parameters that the crystal system leaves free.
        options, nucleus: see `Categorical`; of the components.
        joint: True: one component for all parameters, the density of the sampler. False: each parameter scored by
            its own marginal mixture, as the published code does (which samples jointly all the same).
    """

    def __init__(
        self,
        logits: Tensor,
        mean: Tensor,
        std: Tensor,
        free: Tensor,
        options: SamplerOptions,
        joint: bool = True,
        nucleus: Tensor | None = None,
    ) -> None:
        self.components = Categorical(logits, None, options, nucleus)
        self.mean, self.free, self.joint = mean, free, joint
        self.std = std * math.sqrt(options.temperature)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(..., 6); entries that are not free are to be overwritten by the caller."""
        component = self.components.sample(generator)[..., None, None]  # (..., 1, 1)
        component = component.expand(*self.mean.shape[:-2], 1, 6)
        mean = self.mean.gather(-2, component).squeeze(-2)  # (..., 6)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + self.std.gather(-2, component).squeeze(-2) * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """(...) log-density of `value` (..., 6), in the units of the free parameters."""
        z = (value.unsqueeze(-2) - self.mean) / self.std  # (..., k, 6)
        density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)  # (..., k, 6)
        free, log_weights = self.free.unsqueeze(-2), self.components.log_probs  # (..., 1, 6), (..., k)
        if self.joint:
            return torch.logsumexp(log_weights + (density * free).sum(-1), -1)
        marginals = torch.logsumexp(log_weights.unsqueeze(-1) + density, -2)  # (..., 6)
        return (marginals * self.free).sum(-1)


def von_mises(concentration: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Angles (...) in [-pi, pi] about 0, of concentration kappa (...) float64 >= 0.

    By rejection from a wrapped Cauchy density (D. J. Best and N. I. Fisher, Appl. Stat. 28, 152 (1979)); where kappa
    is so large that this loses its digits, the normal density of variance 1 / kappa.

    Raises:
        NotFinite: a concentration is not finite, for which rejection would never end.
    """
    if not torch.isfinite(concentration).all():
        raise NotFinite(NOT_FINITE)

    def uniform() -> Tensor:
        return torch.rand(concentration.shape, dtype=torch.float64, device=concentration.device, generator=generator)

    kappa = concentration.clamp(1e-6, NEARLY_NORMAL)
    tau = 1 + torch.sqrt(1 + 4 * kappa.square())
    rho = (tau - torch.sqrt(2 * tau)) / (2 * kappa)
    r = (1 + rho.square()) / (2 * rho)
    angle = torch.zeros_like(kappa)
    missing = torch.ones_like(kappa, dtype=torch.bool)
    for _ in range(MAX_ROUNDS):
        z = torch.cos(math.pi * uniform())
        cosine = (1 + r * z) / (r + z)
        c = kappa * (r - cosine)
        accepted = missing & (torch.log(c / uniform()) + 1 - c >= 0)
        side = torch.where(uniform() < 0.5, -1.0, 1.0)
        angle = torch.where(accepted, side * torch.arccos(cosine.clamp(-1, 1)), angle)
        missing &= ~accepted
        if not missing.any():
            break
    else:
        raise NotFinite(NOT_FINITE)
    noise = torch.randn(kappa.shape, dtype=torch.float64, device=kappa.device, generator=generator)
    return torch.where(concentration > NEARLY_NORMAL, noise * concentration.rsqrt(), angle)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(..., k) bool: the smallest set of likeliest values whose probability reaches `top_p`."""
    ordered, order = probs.sort(-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < top_p
    keep[..., 0] = True  # though float32 may take a small top_p for 0
    return torch.zeros_like(keep).scatter(-1, order, keep)
