"""What families add to the tokens, to the noise level and beside the text: positions, sizes, image embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.models.layers import LayerNorm, Linear
from stdit.models.packing import TokenPack
from stdit.models.positions import inner_rotary_table, ntk_bases, rotary_table, sinusoids, widest


def rotary_of(pack: TokenPack, config: TransformerConfig, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin (N, 1 or H, D_head/2) of every token's rotary angles, None where there are none."""
    if config.rotary == "none":
        return None, None
    wide = widest(pack.positions.device)
    if config.rotary == "time":
        exponents = torch.arange(0, config.head_dim, 2, dtype=wide, device=pack.positions.device)
        angle = pack.positions[:, :1] * config.rope_theta ** -(exponents / config.head_dim)
        return angle.cos().unsqueeze(1).to(dtype), angle.sin().unsqueeze(1).to(dtype)
    if config.rotary.startswith("inner"):
        return inner_rotary_table(_shares(pack, config), config.dim, config.heads, config.rope_theta, dtype)
    positions, bases = pack.positions, [config.rope_theta] * 3
    if config.rotary == "axes_ntk":
        bases = ntk_bases(config.head_dim, config.rope_theta, config.rope_scale)
    elif config.rope_scale != (1.0, 1.0, 1.0):
        positions = positions / positions.new_tensor(config.rope_scale, dtype=wide)
    if pack.conditions.fps is not None and config.rope_fps:
        faster = pack.per_token(config.rope_fps / pack.conditions.fps.to(wide))
        positions = torch.stack([positions[:, 0] * faster, *positions[:, 1:].unbind(1)], dim=1)
    return rotary_table(positions, config.head_dim, bases, dtype)


def _shares(pack: TokenPack, config: TransformerConfig) -> Tensor:
    """Seconds and pixels of every token over rope_scale: (N, 3) fp32, rounded as LTX-Video's own code rounds."""
    frame, row, column = pack.positions.float().unbind(1)
    stride, scale = config.rope_stride, config.rope_scale
    fps, wide = pack.conditions.fps, widest(pack.positions.device)
    rate = pack.positions.new_tensor(config.rope_fps, dtype=wide) if fps is None else pack.per_token(fps).to(wide)
    if config.rotary == "inner_causal":
        seconds = (frame * (stride[0] * config.patch[0]) + 1 - stride[0]).clamp(min=0) * (1 / rate).float()
    else:
        seconds = frame * (stride[0] / rate).float() * config.patch[0]
    places = (seconds, row * stride[1] * config.patch[1], column * stride[2] * config.patch[2])
    return torch.stack([place / largest for place, largest in zip(places, scale)], dim=1)


def space_positions(pack: TokenPack, config: TransformerConfig) -> Tensor:
    """Sinusoids of column, then of row, of every token: (N, D) fp64.

    A grid of any size covers position_base / position_stretch units a side (diffusers' `get_2d_sincos_pos_embed`), or,
    for "space_resolution", as many as its own mean side, divided by the picture's over position_base (Open-Sora 1.2).
    """
    sizes = torch.tensor([(grid.height, grid.width) for grid in pack.grids], device=pack.positions.device).float()
    base = sizes.new_full((len(sizes), 1), config.position_base)
    stretch: Tensor | float = config.position_stretch
    if config.position == "space_resolution":
        picture = required(pack.conditions.size, "size", "width and height in pixels").to(sizes)
        stretch = pack.per_token(picture.prod(1, keepdim=True).sqrt() / config.position_base)
        base = sizes.prod(1, keepdim=True).sqrt().round()
    unit = pack.per_token(sizes / base)  # fp32, as where the weights were trained
    row, column = (pack.positions[:, 1:].float() / unit / stretch).unbind(1)
    return torch.cat([sinusoids(place, config.dim // 2, sine_first=True) for place in (column, row)], dim=1)


def frame_positions(pack: TokenPack, config: TransformerConfig) -> Tensor:
    """Sinusoids of the frame of every token, zero in clips of one frame: (N, D) fp64."""
    many = torch.tensor([grid.frames > 1 for grid in pack.grids], device=pack.positions.device)
    return sinusoids(pack.positions[:, 0], config.dim, sine_first=True) * pack.per_token(many)[:, None]


class LearnedPositions(nn.Module):
    """A learned vector for each frame, row and column, their sum brought to unit mean square (Cosmos-Predict1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.limits = config.position_max
        frames, rows, columns = config.position_max
        self.frame = nn.Parameter(torch.zeros(frames, config.dim))
        self.row = nn.Parameter(torch.zeros(rows, config.dim))
        self.column = nn.Parameter(torch.zeros(columns, config.dim))

    def forward(self, pack: TokenPack, dtype: torch.dtype) -> Tensor:
        """(N, D) in dtype."""
        for grid in pack.grids:
            size = (grid.frames, grid.height, grid.width)
            if any(one > limit for one, limit in zip(size, self.limits)):
                raise StditError(f"a grid of {size} tokens is more than the {self.limits} that these weights know.")
        frame, row, column = pack.positions.unbind(1)
        total = self.frame.to(dtype)[frame] + self.row.to(dtype)[row] + self.column.to(dtype)[column]
        norm = torch.linalg.vector_norm(total, dim=1, keepdim=True) / math.sqrt(total.shape[1])
        return total / (norm + 1e-6)


def required(condition: Tensor | None, name: str, what: str) -> Tensor:
    """A condition that a family cannot do without."""
    if condition is None:
        raise StditError(f"these weights need the condition `{name}`: {what}.")
    return condition


class FpsEmbedding(nn.Sequential):
    """The frames per second, as an addition to the noise level's embedding (Open-Sora 1.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(Linear(config.frequency_dim, config.dim), nn.SiLU(), Linear(config.dim, config.dim))
        self.frequency_dim = config.frequency_dim

    def of_clips(self, pack: TokenPack, dtype: torch.dtype) -> Tensor:
        """(S, D) in dtype."""
        fps = required(pack.conditions.fps, "fps", "frames per second")
        return self(sinusoids(fps, self.frequency_dim).to(dtype))


class SizeEmbedding(nn.Module):
    """The picture's height and width and their ratio, as an addition to the noise level's embedding (PixArt-α)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        third = config.dim // 3
        self.frequency_dim = config.frequency_dim
        self.side, self.ratio = (
            nn.Sequential(Linear(config.frequency_dim, third), nn.SiLU(), Linear(third, third)) for _ in range(2)
        )

    def of_clips(self, pack: TokenPack, dtype: torch.dtype) -> Tensor:
        """(S, D) in dtype."""
        size = required(pack.conditions.size, "size", "width and height in pixels")
        width, height = size.to(dtype).unbind(1)
        values = [(self.side, height), (self.side, width), (self.ratio, height / width)]
        return torch.cat([embed(sinusoids(v, self.frequency_dim).to(dtype)) for embed, v in values], dim=1)


class ImageEmbedding(nn.Module):
    """An image encoder's tokens brought to the model's width (Wan's `img_emb`)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.image_text_dim
        first, last = Linear(d, d), Linear(d, config.dim)
        self.proj = nn.Sequential(LayerNorm(d), first, nn.GELU(), last, LayerNorm(config.dim))
        if config.image_text_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_text_positions, d))

    def forward(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """tokens: (I, image_text_dim), of every clip `lengths` of them. Returns (I, D)."""
        if hasattr(self, "emb_pos"):
            positions = self.emb_pos[0].to(tokens.dtype)
            if any(length != len(positions) for length in lengths):
                raise StditError(f"image embeddings of {lengths} tokens; these weights take {len(positions)} a clip.")
            tokens = tokens + positions.repeat(len(lengths), 1)
        return self.proj(tokens)
