"""How much of a clip goes through a VAE at once: slices that fit into memory, and overlapping tiles of a frame.

Chunks of frames and slices of a batch are exact: a cache hands the last frames of each causal layer to the next chunk.
Tiles are nearly exact. Attention and the layers around it, at the latents' resolution, run on the whole frame. The
levels between those and the pixels, which take the memory, run in overlapping tiles: their convolutions do not see past
a tile's border, so tiles are blended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.vae.config import VaeConfig

DEFAULT_MEMORY = 256 << 20  # bytes, if the caller gives no budget; frames are tiled only under a given one
MOST_LATENTS = 8  # latent frames per chunk: larger chunks gain nothing
FRAMES_AT_ONCE = 2  # of the widest levels, which set the peak memory of a chunk
OVERLAP = 8  # latents that neighbouring tiles share
MARGIN = 2  # outermost latents of a tile, of weight 0 because they see the zeros beyond its border
SMALLEST_TILE = 2 * OVERLAP


@dataclass(frozen=True)
class Slices:
    """The amount that goes through a VAE at once: clips, latent frames, and rows × columns of latents."""

    clips: int
    latents: int
    rows: int
    columns: int


def slices(config: VaeConfig, side: str, shape: tuple[int, int, int, int], itemsize: int, memory: int | None) -> Slices:
    """The largest slices that fit into `memory`: clips are sliced first, then their frames; then frames are tiled.

    A stream keeps the caches of all its tiles. A whole clip goes through tile by tile instead, and the tensors between
    the tiled levels and the untiled ones are kept for all its frames. Raises StditError if no tile is small enough.

    side: "encoder" or "decoder". shape: clips, latent frames (0: a stream), rows and columns of latents.
    itemsize: bytes per number.
    memory: bytes, beyond the weights, the input and the output; None: DEFAULT_MEMORY, and no tiles.
    """
    clips, latents, height, width = shape
    rows, columns = height, width
    budget = DEFAULT_MEMORY if memory is None else memory

    def takes(clips: int, frames: int, rows: int, columns: int) -> int:
        tiled = (rows, columns) != (height, width)
        kept = 1 if latents else len(spans(height, rows)) * len(spans(width, columns))
        between = coarse_bytes(config, side, frames, latents, height, width, itemsize) if tiled else 0
        return between + working_bytes(config, side, clips, frames, rows, columns, itemsize, kept)

    clips = next((n for n in range(clips, 1, -1) if takes(n, 1, rows, columns) <= budget), 1)
    tried = []  # smaller tiles overlap more, so they may need more when the caches of all are kept
    while memory is not None and (least := takes(1, 1, rows, columns)) > memory:
        tried.append(least)
        if max(rows, columns) <= SMALLEST_TILE:
            raise StditError(
                f"memory {memory}: in tiles of any size, this VAE's {side} takes {min(tried)} bytes for "
                f"{width}x{height} latents. Give at least as many."
            )
        if rows >= columns:
            rows = max(SMALLEST_TILE, (rows + OVERLAP + 1) // 2)
        else:
            columns = max(SMALLEST_TILE, (columns + OVERLAP + 1) // 2)
    most = min(latents or MOST_LATENTS, MOST_LATENTS)
    together = next((n for n in range(most, 1, -1) if takes(clips, n, rows, columns) <= budget), 1)
    return Slices(clips, together, rows, columns)


def working_bytes(
    config: VaeConfig, side: str, clips: int, latents: int, rows: int, columns: int, itemsize: int, tiles: int = 1
) -> int:
    """Estimates the bytes that a chunk takes beyond the weights, its frames and its latents.

    The sum of: the caches of the layers for each of `tiles`; the largest input of a convolution (`CausalCache.buffer`);
    the other tensors of the largest level (a residual block's input and result); the largest weights in oneDNN's order.
    """
    coarse = len(config.dim_mult) - 1
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    blocks = config.num_res_blocks + (side == "decoder")
    caches = buffer = most = 0.0
    for level, mult in enumerate(config.dim_mult):
        pixels = rows * columns * 4 ** (coarse - level)
        frames = latents * 2 ** sum(config.temporal_downsample[level:])
        channels = mult * base
        before = config.dim_mult[max(level - 1, 0) if side == "encoder" else min(level + 1, coarse)] * base
        if side == "decoder" and config.upsampling_halves and level < coarse:
            before //= 2
        convolutions = 2 * blocks + (4 if level == coarse else 1)
        caches += 2 * pixels * (before + (convolutions - 1) * channels)
        held = before if config.residual else 0
        wide = not any(config.temporal_downsample[: level + (config.residual and side == "encoder")])
        at_once = min(frames, FRAMES_AT_ONCE) if wide else frames  # see `networks.in_frame_chunks`
        block = at_once * (before + channels + held)
        if side == "encoder":
            whole = level < coarse and config.temporal_downsample[level]
            resampled = (4 * frames if whole else 2 * at_once) * channels
        elif level > 0:  # at the next level's size, before and after its convolution
            doubled = 1 + config.temporal_downsample[level - 1]
            resampled = at_once * channels * (1 + 4 * doubled)
            resampled += 4 * doubled * at_once * channels // (1 + config.upsampling_halves)
        else:
            resampled = at_once * channels
        buffer = max(buffer, pixels * (at_once + 2) * max(before, channels))
        most = max(most, pixels * max(block, resampled))
    weights = 27 * (max(config.dim_mult) * base) ** 2
    return int(itemsize * (clips * (tiles * caches + buffer + most) + weights))


def coarse_bytes(config: VaeConfig, side: str, chunk: int, latents: int, rows: int, columns: int, itemsize: int) -> int:
    """Estimates the bytes of the untiled half, for tiled frames of rows × columns latents.

    The sum of: its output or input for `latents` frames (0: for a stream's chunk); the caches of five convolutions; the
    five tensors of the attention.
    """
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    return int(itemsize * rows * columns * config.dim_mult[-1] * base * ((latents or chunk) + 10 + 5 * chunk))


@dataclass(frozen=True)
class Tile:
    """One tile of a frame: its place in the input and in the output, and its blending weights."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]
    weight: Tensor  # (rows, columns) of the output

    def of(self, chunk: Tensor) -> Tensor:
        return chunk[..., self.source[0], self.source[1]]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Adds the tile's result, weighted, to a frame that starts as zeros."""
        whole[..., self.target[0], self.target[1]] += part * self.weight.to(part)


def tiles(
    size: tuple[int, int], tile: tuple[int, int], scale_in: tuple[int, int], scale_out: tuple[int, int]
) -> list[Tile]:
    """The tiles of a frame.

    size: rows and columns of latents of the frame. tile: those of a tile.
    scale_in, scale_out: rows and columns of the input and of the output per latent.
    """
    rows, columns = spans(size[0], tile[0]), spans(size[1], tile[1])
    down, across = blend_weights(rows, scale_out[0]), blend_weights(columns, scale_out[1])
    return [
        Tile(
            (_scaled(row, scale_in[0]), _scaled(column, scale_in[1])),
            (_scaled(row, scale_out[0]), _scaled(column, scale_out[1])),
            vertical[:, None] * horizontal,
        )
        for row, vertical in zip(rows, down)
        for column, horizontal in zip(columns, across)
    ]


def _scaled(span: tuple[int, int], scale: int) -> slice:
    return slice(span[0] * scale, span[1] * scale)


def spans(size: int, tile: int) -> list[tuple[int, int]]:
    """(start, end) of evenly spaced tiles that cover 0 … size and overlap by OVERLAP or a little more."""
    if tile >= size:
        return [(0, size)]
    count = math.ceil((size - OVERLAP) / (tile - OVERLAP))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def blend_weights(tiles: list[tuple[int, int]], scale: int) -> list[Tensor]:
    """Each tile's weights along one axis, `scale` of them per latent. They sum to 1 everywhere.

    Counted inwards from a border with another tile, they are 0 for MARGIN latents and then rise linearly.
    """
    size = tiles[-1][1] * scale
    whole, raw = torch.zeros(size, dtype=torch.float64), []
    for first, end in tiles:
        place = torch.arange(first, end, 1 / scale, dtype=torch.float64) + 0.5 / scale  # in latents
        inside = torch.minimum(
            torch.full_like(place, torch.inf) if first == 0 else place - first,
            torch.full_like(place, torch.inf) if end == tiles[-1][1] else end - place,
        )
        raw.append(((inside - MARGIN) / (OVERLAP - 2 * MARGIN)).clamp(0, 1))
        whole[_scaled((first, end), scale)] += raw[-1]
    return [weight / whole[_scaled(span, scale)] for weight, span in zip(raw, tiles)]
