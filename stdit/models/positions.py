"""Positions of tokens, rotary tables, and sinusoids of the noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stdit.shapes import TokenGrid

LEAST_SIGMA = 0.001  # smallest σ given to networks conditioned on log σ


def grid_positions(grid: TokenGrid) -> Tensor:
    """Frame, row and column of each token of a grid, in packing order: (n, 3) int64."""
    axes = (torch.arange(grid.frames), torch.arange(grid.height), torch.arange(grid.width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many dimensions of a head turn with frame, row and column: 44, 42 and 42 of 128, as in Wan."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    positions: Tensor, head_dim: int, theta: float | Sequence[float] = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token's rotary angles (Su et al. 2021, eq. 15, once per axis as in Wan).

    positions: (N, 3), integer or not. theta: the base of the frequencies, one for all axes or one per axis.
    Returns (N, 1, head_dim/2) each, computed in fp64 and cast to dtype.
    """
    wide = widest(positions.device)
    bases = [theta] * 3 if isinstance(theta, int | float) else theta
    angles = []
    for axis, (size, base) in enumerate(zip(rotary_axes(head_dim), bases)):
        exponents = torch.arange(0, size, 2, dtype=wide, device=positions.device) / size
        angles.append(positions[:, axis, None].to(wide) * base**-exponents)
    angle = torch.cat(angles, dim=1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (2i, 2i+1) of each head by its angle, in the dtype of cos.

    x: (N, H, D_head). cos, sin: (N, 1 or H, D_head/2). Returns x's shape and dtype.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def network_time(levels: Tensor, kind: str = "level", scale: float = 1000.0) -> Tensor:
    """Converts noise levels t (K,) in [0, 1] to the time that the network is given, in fp64 (bf16 rounds 437 to 438).

    kind, scale: `network_time` and `time_scale` of the config. For "log_sigma" σ is at least 0.001, the σ of known
        frames in Cosmos' own code, since the log of 0 is −∞.
    """
    t = levels.to(widest(levels.device))
    return (t / (1 - t)).clamp(min=LEAST_SIGMA).log() / 4 if kind == "log_sigma" else t * scale


def sinusoids(values: Tensor, size: int, sine_first: bool = False) -> Tensor:
    """Embeds values (n,) as [cos, sin] (or [sin, cos]) at size/2 frequencies from 1 to 1/10000: (n, size), fp64."""
    wide = widest(values.device)
    exponents = torch.arange(size // 2, dtype=wide, device=values.device) / (size // 2)
    angle = values.to(wide)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    parts = (angle.sin(), angle.cos()) if sine_first else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms, modulation, rotary turns and sums of x are computed: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """fp64 where the device supports it, else fp32 (Apple GPUs)."""
    return torch.float32 if device.type == "mps" else torch.float64
