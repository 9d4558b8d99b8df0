"""Where and when a token is: three-axis rotary positions and the sinusoids of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stdit.shapes import TokenGrid


def grid_positions(grid: TokenGrid) -> Tensor:
    """Frame, row and column of every token of a grid in packing order: (n, 3) int64."""
    axes = (torch.arange(grid.frames), torch.arange(grid.height), torch.arange(grid.width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions turn with frame, row and column, as in Wan: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotary angles (Su et al. 2021, eq. 15, once per axis as in Wan).

    positions: (N, 3), integer or not. Returns (N, 1, head_dim/2) each, computed in fp64, given in dtype.
    """
    wide = _widest(positions.device)
    angles = []
    for axis, size in enumerate(rotary_axes(head_dim)):
        exponents = torch.arange(0, size, 2, dtype=wide, device=positions.device) / size
        angles.append(positions[:, axis, None].to(wide) * theta**-exponents)
    angle = torch.cat(angles, dim=1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair (2i, 2i+1) of each head by its angle, in cos's dtype.

    x: (N, H, D_head). cos, sin: (N, 1, D_head/2). Returns x's shape and dtype.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def level_sinusoids(levels: Tensor, size: int, period: float = 10000.0) -> Tensor:
    """[cos, sin] of the network time t·1000, computed in fp64 as in Wan (437 would become 438 in bf16).

    levels: (K,) noise levels t in [0, 1]. Returns (K, size) in fp64.
    """
    wide = _widest(levels.device)
    exponents = torch.arange(size // 2, dtype=wide, device=levels.device) / (size // 2)
    angle = (levels.to(wide) * 1000)[:, None] * torch.exp(-math.log(period) * exponents)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that norms, modulation, rotary turns and sums are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widest(device: torch.device) -> torch.dtype:
    """fp64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
