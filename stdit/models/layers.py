"""Layers of the blocks. They keep weights in their stored dtype and compute in that of their input, norms in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stdit.models.fused import rms_norm_rotary, widen
from stdit.models.positions import apply_rotary
from stdit.shapes import TokenGrid


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off; a no-op for meta tensors, which have none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with affine, computed in fp32 (fp64 for fp64) and returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over `dim` channels, all heads at once or each, and the rotary turn after it; in fp32 (fp64 for fp64)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        return rms_norm_rotary(x, self.weight, cos, sin, self.eps)


class Rotary(nn.Module):
    """The rotary turn without a norm; replaces RMSNorm if qk_norm is "none"."""

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        if cos is None or sin is None:
            return x
        return apply_rotary(x.unflatten(1, (-1, 2 * cos.shape[-1])), cos, sin).flatten(1)


class Compression(nn.Module):
    """Merges the keys or values of each square of factor × factor tokens of a frame into one (PixArt-Σ).

    Left-over tokens at the right and lower edges are dropped.
    """

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.sr = nn.Conv2d(dim, dim, factor, factor, groups=dim)
        nn.init.constant_(self.sr.weight, factor**-2)
        nn.init.zeros_(cast(Tensor, self.sr.bias))
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, grids: Sequence[TokenGrid]) -> Tensor:
        """x: (N, D), the tokens of the grids. Returns (M, D)."""
        weight, bias = self.sr.weight.to(x.dtype), cast(Tensor, self.sr.bias).to(x.dtype)
        parts = []
        for part, grid in zip(x.split([grid.tokens for grid in grids]), grids):
            frames = part.view(grid.frames, grid.height, grid.width, -1).permute(0, 3, 1, 2)
            small = F.conv2d(frames, weight, bias, self.sr.stride, groups=len(weight))
            parts.append(small.flatten(2).transpose(1, 2).flatten(0, 1))
        return self.norm(torch.cat(parts))


class LowRank(nn.Sequential):
    """SiLU, then two linear layers of low rank without biases (Cosmos' AdaLN-LoRA). Ignores autocast."""

    def __init__(self, dim: int, rank: int, out: int) -> None:
        super().__init__(nn.SiLU(), Linear(dim, rank, bias=False), Linear(rank, out, bias=False))

    def forward(self, c: Tensor) -> Tensor:
        with without_autocast(c.device):
            return super().forward(c)


class LoraLinear(Linear):
    """A linear layer with a low-rank addition: x·Wᵀ + b + alpha/rank · x·Aᵀ·Bᵀ (LoRA, Hu et al. 2022).

    It replaces the layer `base`, whose parameters keep their names.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_down = Linear(base.in_features, rank, bias=False)  # A
        self.lora_up = Linear(rank, base.out_features, bias=False)  # B
        self.alpha, self.scale = alpha, alpha / rank

    def plain(self) -> Linear:
        """The linear layer with the same weight and bias, without A and B."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_up(self.lora_down(x)) * self.scale
