"""How other families differ from Wan. STDiT picks the parts by its config; skip this file to read only Wan.

Rotary positions, positions added to the tokens, conditions added to the noise level, image tokens, layouts of
attention, and Cosmos' low-rank modulation. The first entry of each table is Wan's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, cycle, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stdit.errors import StditError
from stdit.models.blocks import Block, BlockInputs, Head, LayerNorm, Linear, LowRank
from stdit.models.config import TransformerConfig
from stdit.models.fused import gated_residual, modulated_norm
from stdit.models.packing import TextPack, TokenPack, spatial_segments, temporal_segments
from stdit.models.positions import rotary_axes, rotary_table, sinusoids, widest

# Rotary positions: (pack, config, dtype) to cos and sin, (N, 1 or H, D_head/2) each, or None for no turn.

Turns = tuple[Tensor | None, Tensor | None]


def axes_rotary(pack: TokenPack, config: TransformerConfig, dtype: torch.dtype) -> Turns:
    """A third of each head turns with frame, row and column. Wan has no rope_scale and no rope_fps."""
    positions, theta, wide = pack.positions, config.rope_theta, widest(pack.positions.device)
    bases = [theta] * 3
    if config.rotary == "axes_ntk":
        axes = zip(rotary_axes(config.head_dim), config.rope_scale)
        bases = [theta * scale ** (d / (d - 2)) if d > 2 else theta for d, scale in axes]
    elif config.rope_scale != (1.0, 1.0, 1.0):
        positions = positions / positions.new_tensor(config.rope_scale, dtype=wide)
    if pack.conditions.fps is not None and config.rope_fps:
        faster = pack.per_token(config.rope_fps / pack.conditions.fps.to(wide))
        positions = torch.stack([positions[:, 0] * faster, *positions[:, 1:].unbind(1)], dim=1)
    return rotary_table(positions, config.head_dim, bases, dtype)


def inner_rotary(pack: TokenPack, config: TransformerConfig, dtype: torch.dtype) -> Turns:
    """Angles over the whole width, so each head has its own frequencies (LTX-Video).

    At each of D//6 frequencies, from π/2 to θ·π/2, each axis turns one pair by frequency · (2·share − 1). A share is a
    position in seconds or pixels over rope_scale. The first D % 6 dimensions do not turn. All of it in fp32, like the
    angles that the weights were trained with, which are off by 1e-3 at the highest frequencies.
    """
    frame, row, column = pack.positions.float().unbind(1)
    stride, fps, wide = config.rope_stride, pack.conditions.fps, widest(pack.positions.device)
    rate = pack.positions.new_tensor(config.rope_fps, dtype=wide) if fps is None else pack.per_token(fps).to(wide)
    if config.rotary == "inner_causal":  # the first latent frame is one frame long
        seconds = (frame * (stride[0] * config.patch[0]) + 1 - stride[0]).clamp(min=0) * (1 / rate).float()
    else:
        seconds = frame * (stride[0] / rate).float() * config.patch[0]
    axes = (seconds, row * stride[1] * config.patch[1], column * stride[2] * config.patch[2])
    shares = torch.stack([axis / largest for axis, largest in zip(axes, config.rope_scale)], dim=1)  # (N, 3)
    exponents = torch.linspace(0.0, 1.0, config.dim // 6, dtype=torch.float32, device=shares.device)
    frequencies = config.rope_theta**exponents * math.pi / 2.0
    angle = frequencies * (shares.unsqueeze(-1) * 2 - 1)  # (N, 3, D//6)
    angle = F.pad(angle.transpose(1, 2).flatten(1), ((config.dim % 6) // 2, 0)).unflatten(1, (config.heads, -1))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def time_rotary(pack: TokenPack, config: TransformerConfig, dtype: torch.dtype) -> Turns:
    """The whole head turns with the frame, in the blocks over time (Open-Sora 1.2)."""
    wide = widest(pack.positions.device)
    exponents = torch.arange(0, config.head_dim, 2, dtype=wide, device=pack.positions.device)
    angle = pack.positions[:, :1] * config.rope_theta ** -(exponents / config.head_dim)
    return angle.cos().unsqueeze(1).to(dtype), angle.sin().unsqueeze(1).to(dtype)


ROTARY: dict[str, Callable[[TokenPack, TransformerConfig, torch.dtype], Turns]] = {
    "axes": axes_rotary,
    "axes_ntk": axes_rotary,
    "inner": inner_rotary,
    "inner_causal": inner_rotary,
    "time": time_rotary,
    "none": lambda pack, config, dtype: (None, None),
}


class AddedPositions(nn.Module):
    """Adds no positions to the tokens: Wan's are rotary only. The base class of those that do."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, pack: TokenPack) -> Tensor:
        """The tokens (N, D) with positions added once, before the first block."""
        return x

    def before_each_block(self, x: Tensor, pack: TokenPack) -> Tensor | None:
        """Positions (N, D) in x's dtype to add before each block, or None."""
        return None


class SpacePositions(AddedPositions):
    """Adds sinusoids of column and row. Each side of a grid covers position_base / position_stretch units (PixArt).

    As diffusers' `get_2d_sincos_pos_embed` does. For "space_resolution", a side covers the grid's mean side, divided
    by the picture's mean side over position_base (Open-Sora 1.2).
    """

    def forward(self, x: Tensor, pack: TokenPack) -> Tensor:
        config, device = self.config, pack.positions.device
        sizes = torch.tensor([(grid.height, grid.width) for grid in pack.grids], device=device).float()
        base = sizes.new_full((len(sizes), 1), config.position_base)
        stretch: Tensor | float = config.position_stretch
        if config.position == "space_resolution":
            picture = required(pack.conditions.size, "size", "width and height in pixels").to(sizes)
            stretch = pack.per_token(picture.prod(1, keepdim=True).sqrt() / config.position_base)
            base = sizes.prod(1, keepdim=True).sqrt().round()
        unit = pack.per_token(sizes / base)  # in fp32, in which the weights were trained
        row, column = (pack.positions[:, 1:].float() / unit / stretch).unbind(1)
        waves = [sinusoids(axis, config.dim // 2, sine_first=True) for axis in (column, row)]
        return x + torch.cat(waves, dim=1).to(x.dtype)


class LearnedPositions(AddedPositions):
    """Adds a learned vector per frame, row and column, their sum scaled to unit mean square (Cosmos-Predict1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.frame, self.row, self.column = (nn.Parameter(torch.zeros(n, config.dim)) for n in config.position_max)

    def before_each_block(self, x: Tensor, pack: TokenPack) -> Tensor | None:
        limits, wide = self.config.position_max, torch.promote_types(x.dtype, torch.float32)
        for grid in pack.grids:
            size = (grid.frames, grid.height, grid.width)
            if any(n > limit for n, limit in zip(size, limits)):
                raise StditError(f"a grid of {size} tokens: these weights have positions for {limits} at most.")
        frame, row, column = pack.positions.unbind(1)
        total = self.frame.to(wide)[frame] + self.row.to(wide)[row] + self.column.to(wide)[column]  # (N, D)
        norm = torch.linalg.vector_norm(total, dim=1, keepdim=True) / math.sqrt(total.shape[1])
        return (total / (norm + 1e-6)).to(x.dtype)


POSITIONS: dict[str, type[AddedPositions]] = {
    "none": AddedPositions,
    "space": SpacePositions,
    "space_time": SpacePositions,
    "space_resolution": SpacePositions,
    "learned": LearnedPositions,
}


def required(condition: Tensor | None, name: str, meaning: str) -> Tensor:
    """The condition, or a StditError if it was not given."""
    if condition is None:
        raise StditError(f"these weights need the condition `{name}`: {meaning}.")
    return condition


class FpsEmbedding(nn.Sequential):
    """The frames per second (Open-Sora 1.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(Linear(config.frequency_dim, config.dim), nn.SiLU(), Linear(config.dim, config.dim))
        self.frequency_dim = config.frequency_dim

    def of_clips(self, pack: TokenPack, dtype: torch.dtype) -> Tensor:
        """(S, D) in dtype."""
        fps = required(pack.conditions.fps, "fps", "frames per second")
        return self(sinusoids(fps, self.frequency_dim).to(dtype))


class SizeEmbedding(nn.Module):
    """The picture's height and width and their ratio (PixArt-α)."""

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


LEVEL_CONDITIONS: dict[str, Callable[[TransformerConfig], FpsEmbedding | SizeEmbedding | None]] = {
    "none": lambda config: None,
    "size": SizeEmbedding,
    "fps": FpsEmbedding,
}


def text_layers(config: TransformerConfig) -> list[nn.Module]:
    """The layers that embed text tokens (M, D_text) as (M, D_context)."""
    if config.text_embedding == "mlp":
        return [Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), Linear(config.dim, config.dim)]
    if config.text_embedding == "gelu":
        return [Linear(config.text_dim, config.text_width), nn.GELU()]
    return []


def no_image(pack: TokenPack, dtype: torch.dtype) -> TextPack | None:
    """Cross-attention sees the text only."""
    return None


class ImageEmbedding(nn.Module):
    """An image encoder's tokens brought to the model's width, for cross-attention (Wan's `img_emb`)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.image_text_dim
        first, last = Linear(d, d), Linear(d, config.dim)
        self.proj = nn.Sequential(LayerNorm(d), first, nn.GELU(), last, LayerNorm(config.dim))
        self.emb_pos: nn.Parameter | None = None
        if config.image_text_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_text_positions, d))

    def forward(self, pack: TokenPack, dtype: torch.dtype) -> TextPack | None:
        """The clips' image tokens (I, image_text_dim), embedded in dtype: (I, D)."""
        image = pack.conditions.image_text
        if image is None:
            raise StditError("these weights see an image encoder's tokens beside the text: give `image_text`.")
        tokens, lengths = image.tokens.to(dtype), image.segments.lengths
        if self.emb_pos is not None:
            positions = self.emb_pos[0].to(dtype)
            if any(length != len(positions) for length in lengths):
                raise StditError(
                    f"image embeddings have {lengths} tokens; these weights take {len(positions)} per clip."
                )
            tokens = tokens + positions.repeat(len(lengths), 1)
        return replace(image, tokens=self.proj(tokens))


ADDED = (LearnedPositions, ImageEmbedding)  # modules whose own parameters are positions that are added to tokens

Steps = Iterable[BlockInputs]  # what each block reads, in the order of `STDiT.blocks_in_order`


def full_attention(config: TransformerConfig, x: Tensor, pack: TokenPack, inputs: BlockInputs) -> Steps:
    """Every block attends to all tokens of a clip."""
    return repeat(inputs)


def spatial_attention(config: TransformerConfig, x: Tensor, pack: TokenPack, inputs: BlockInputs) -> Steps:
    """Every block attends within frames (PixArt). Some blocks may compress their keys (PixArt-Σ 2K)."""
    inputs = replace(inputs, segments=spatial_segments(pack))
    if config.compressed:
        inputs = replace(inputs, grids=pack.grids, compressed=spatial_segments(pack, config.compression))
    return repeat(inputs)


def alternating_attention(config: TransformerConfig, x: Tensor, pack: TokenPack, inputs: BlockInputs) -> Steps:
    """Blocks within frames alternate with blocks over time, where each place of the frame is a segment (Latte)."""
    order, inverse_order, segments = temporal_segments(pack)
    spatial = replace(inputs, cos=None, sin=None, segments=spatial_segments(pack))
    temporal = replace(inputs, segments=segments, order=order, inverse_order=inverse_order)
    if order is not None and inputs.cos is not None and inputs.sin is not None:
        temporal = replace(temporal, cos=inputs.cos[order], sin=inputs.sin[order])
    first = temporal
    if config.position == "space_time":  # sinusoids of the frame, except in clips of one frame (Latte)
        many = torch.tensor([grid.frames > 1 for grid in pack.grids], device=pack.positions.device)
        waves = sinusoids(pack.positions[:, 0], config.dim, sine_first=True) * pack.per_token(many)[:, None]
        first = replace(temporal, added=waves.to(x.dtype))  # (N, D)
    return chain((spatial, first), cycle((spatial, temporal)))


LAYOUTS: dict[str, Callable[[TransformerConfig, Tensor, TokenPack, BlockInputs], Steps]] = {
    "full": full_attention,
    "spatial": spatial_attention,
    "spatial_temporal": alternating_attention,
    "spatial_temporal_text": alternating_attention,
}


class LowRankBlock(Block):
    """A block whose branches each modulate by a low-rank projection of c, plus the rows that all branches share."""

    def __init__(self, config: TransformerConfig, cross: bool = True, compressed: bool = False) -> None:
        super().__init__(config, cross, compressed)
        self.modulation = None
        rank = config.modulation_rank
        self.low_rank = nn.ModuleList(LowRank(config.dim, rank, 3 * config.dim) for _ in range(3))

    def forward(self, x: Tensor, modulation: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """x: (N, D). modulation: (K, 3, D). y: (M, D_context) text. Returns (N, D)."""

        def branch(x: Tensor, number: int, run: Callable[[Tensor], Tensor]) -> Tensor:
            rows = self.low_rank[number](inputs.c).unflatten(1, (3, -1)) + modulation  # (K, 3, D)
            shift, scale, gate = rows.unbind(1)  # (K, D) each
            h = run(modulated_norm(x, shift, scale, inputs.levels, self.eps, self.rms))  # (N, D)
            return gated_residual(x, h, gate, inputs.levels)  # (N, D)

        x = x if inputs.added is None else x + inputs.added  # (N, D)
        x = branch(x, 0, lambda h: self.self_attn(h, inputs))
        if (cross := self.cross_attn) is not None:
            x = branch(x, 1, lambda h: cross(h, y, inputs))
        return branch(x, 2, self.ffn)


class LowRankHead(Head):
    """A head whose shift and scale are a low-rank projection of c, added to the rows that all blocks share."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.modulation = None
        self.low_rank = LowRank(config.dim, config.modulation_rank, 2 * config.dim)

    def rows(self, c: Tensor, modulation: Tensor) -> Tensor:
        return self.low_rank(c).unflatten(1, (2, -1)) + modulation[:, :2]
