"""Overlapping tiles of a frame, and the weights that blend them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP = 8  # latents that neighbouring tiles share
MARGIN = 2  # outermost latents of a tile, of weight 0 because they see the zeros beyond its border
SMALLEST_TILE = 2 * OVERLAP


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
