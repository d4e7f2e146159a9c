"""CHGNet's gated perceptron, so written that it costs little to evaluate and to differentiate.

The network joins the features of two atoms and a bond, or of two bonds, an angle and an atom, and multiplies by one
matrix. That is the sum of one product for each part, and a part belongs to fewer things than there are pairs of them:
atoms are multiplied before they are gathered to edges, not after. What follows is elementwise, and its derivative is
written out, in place, because left to autograd it costs more than the products.

The weights are constants here: gradients flow to the inputs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Part = tuple[Tensor, Tensor | None]  # features (k, d), and which row each of the n outputs takes (n,); None: its own


class Gated:
    """silu(norm(core(x))) sigmoid(norm(gate(x))), where x are parts side by side and core and gate perceptrons.

    d: features of a part, and of the output.
    """

    def __init__(self, mlp: nn.Module, parts: int) -> None:
        """Of a `chgnet.model.functions.GatedMLP` that takes so many parts of equal size."""
        towers = [
            [layer for layer in tower.layers if isinstance(layer, nn.Linear)] for tower in (mlp.mlp_core, mlp.mlp_gate)
        ]
        first = [tower[0] for tower in towers]
        joined = torch.cat([layer.weight for layer in first]).T  # (parts * d, 2 d)
        self.weights = [part.contiguous() for part in joined.detach().chunk(parts)]
        self.bias = torch.cat([layer.bias for layer in first]).detach()
        self.hidden = [(tower[1].weight.detach(), tower[1].bias.detach()) for tower in towers if len(tower) > 1]
        self.norms = [(norm.weight.detach(), norm.bias.detach(), norm.eps) for norm in (mlp.bn1, mlp.bn2) if norm]

    def __call__(self, parts: Sequence[Part]) -> Tensor:
        """(n, d) of n rows, each of which has its share of every part."""
        x: Tensor | None = None
        for (features, rows), weight in zip(parts, self.weights, strict=True):
            own = features @ weight if x is not None else torch.addmm(self.bias, features, weight)
            own = own if rows is None else own.index_select(0, rows)
            x = own if x is None else x.add_(own)
        return _Gate.apply(x, self)


class _Gate(torch.autograd.Function):
    """What a `Gated` does after its first product, (n, 2 d) to (n, d)."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Gated) -> Tensor:
        """x: core and gate side by side."""
        ctx.layer, normed, stats = layer, [], []
        hidden = F.silu(x) if layer.hidden else x
        for i, part in enumerate(hidden.chunk(2, 1)):
            if layer.hidden:
                weight, bias = layer.hidden[i]
                part = torch.addmm(bias, part, weight.T)
            if layer.norms:
                weight, bias, eps = layer.norms[i]
                part = part.contiguous()
                after, *stat = torch.native_layer_norm(part, weight.shape, weight, bias, eps)
                stats += [part, *stat]
                part = after
            normed.append(part)
        core, gate = normed
        ctx.save_for_backward(x, core, gate, *stats)
        return F.silu(core).mul_(torch.sigmoid(gate))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer: Gated = ctx.layer
        x, core, gate, *stats = ctx.saved_tensors
        open_gate, active = torch.sigmoid(gate), torch.sigmoid(core)
        along = gradient * open_gate
        # d silu(c)/dc = s (1 + c (1 - s)), d sigmoid(g)/dg = s (1 - s)
        to_gate = (1 - open_gate).mul_(along).mul_(core).mul_(active)
        to_core = along.mul_(active).mul_((1 - active).mul_(core).add_(1))
        result = torch.empty_like(x)
        for i, part in enumerate((to_core, to_gate)):
            if layer.norms:
                weight, bias, _ = layer.norms[i]
                before, mean, scale = stats[3 * i : 3 * i + 3]
                part = torch.ops.aten.native_layer_norm_backward(
                    part, before, weight.shape, mean, scale, weight, bias, [True, False, False]
                )[0]
            half = result[:, i * part.shape[1] : (i + 1) * part.shape[1]]
            if layer.hidden:
                torch.mm(part, layer.hidden[i][0], out=half)
            else:
                half.copy_(part)
        if layer.hidden:
            torch.ops.aten.silu_backward.grad_input(result, x, grad_input=result)
        return result, None
