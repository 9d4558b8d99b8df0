"""Where and when a token is: three-axis rotary positions and the sinusoids of the noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stdit.shapes import TokenGrid

LEAST_SIGMA = 0.001  # that a network of log(σ) is told


def grid_positions(grid: TokenGrid) -> Tensor:
    """Frame, row and column of every token of a grid in packing order: (n, 3) int64."""
    axes = (torch.arange(grid.frames), torch.arange(grid.height), torch.arange(grid.width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions turn with frame, row and column, as in Wan: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    positions: Tensor,
    head_dim: int,
    theta: float | Sequence[float] = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotary angles (Su et al. 2021, eq. 15, once per axis as in Wan).

    positions: (N, 3), integer or not. theta: the base, of all axes or of each. Returns (N, 1, head_dim/2) each,
    computed in fp64, given in dtype.
    """
    wide = widest(positions.device)
    bases = [theta] * 3 if isinstance(theta, int | float) else theta
    angles = []
    for axis, (size, base) in enumerate(zip(rotary_axes(head_dim), bases)):
        exponents = torch.arange(0, size, 2, dtype=wide, device=positions.device) / size
        angles.append(positions[:, axis, None].to(wide) * base**-exponents)
    angle = torch.cat(angles, dim=1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def ntk_bases(head_dim: int, theta: float, scale: Sequence[float]) -> list[float]:
    """theta · scale^(d / (d − 2)) for every axis of d dimensions, as NTK-aware scaling has it (Cosmos)."""
    return [theta * s ** (d / (d - 2)) if d > 2 else theta for d, s in zip(rotary_axes(head_dim), scale)]


def inner_rotary_table(places: Tensor, dim: int, heads: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of angles that run over the whole width, so that every head has frequencies of its own (LTX-Video).

    places: (N, 3) time, row and column as shares of a largest one, fp32. At each of dim//6 frequencies, from π/2 to
    θ·π/2, the three axes turn one pair each by frequency · (2·place − 1); dim % 6 dimensions in front do not turn.
    Returns (N, heads, dim/heads/2) each. Angles are in fp32, as in the release: at the highest frequencies they are
    off by 1e-3, and the weights were trained with that.
    """
    count = dim // 6
    frequencies = theta ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=places.device)
    frequencies = frequencies * math.pi / 2.0
    angle = frequencies * (places.unsqueeze(-1) * 2 - 1)  # (N, 3, dim//6)
    angle = F.pad(angle.transpose(1, 2).flatten(1), ((dim % 6) // 2, 0))  # (N, dim/2)
    angle = angle.unflatten(1, (heads, -1))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair (2i, 2i+1) of each head by its angle, in cos's dtype.

    x: (N, H, D_head). cos, sin: (N, 1 or H, D_head/2). Returns x's shape and dtype.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def network_time(levels: Tensor, kind: str = "level", scale: float = 1000.0) -> Tensor:
    """What the network is told of noise levels t in [0, 1], (K,), in fp64 as in Wan (437 would become 438 in bf16).

    kind: TransformerConfig.network_time. Of "log_sigma" the least σ is 0.001, that of known frames in Cosmos' own code:
    the log of 0 would be −∞.
    """
    t = levels.to(widest(levels.device))
    return (t / (1 - t)).clamp(min=LEAST_SIGMA).log() / 4 if kind == "log_sigma" else t * scale


def sinusoids(values: Tensor, size: int, sine_first: bool = False) -> Tensor:
    """[cos, sin] (or [sin, cos]) of values at size/2 frequencies from 1 to 1/10000: (n,) to (n, size), fp64."""
    wide = widest(values.device)
    exponents = torch.arange(size // 2, dtype=wide, device=values.device) / (size // 2)
    angle = values.to(wide)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    parts = (angle.sin(), angle.cos()) if sine_first else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that norms, modulation, rotary turns and sums are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """fp64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
