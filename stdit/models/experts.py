"""Two transformers that act as one: an expert for high noise levels and one for low ones (Wan 2.2 A14B)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.models.packing import TextPack, TokenPack
from stdit.models.transformer import STDiT


class Experts(nn.Module):
    """Predicts with `high` at noise levels of `boundary` or more, with `low` below.

    The level of a clip is the highest of its tokens', since known tokens are always at 0.
    """

    def __init__(self, high: STDiT, low: STDiT, boundary: float) -> None:
        super().__init__()
        if high.config != low.config:
            raise StditError("two experts must have one config: only their weights differ.")
        if not 0 < boundary < 1:
            raise StditError(f"the experts' boundary is {boundary!r}; it must be a noise level between 0 and 1.")
        self.high, self.low, self.boundary = high, low, float(boundary)

    @property
    def config(self) -> TransformerConfig:
        """The config of either expert: they have the same."""
        return self.high.config

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    def at(self, level: float) -> STDiT:
        """The expert for a noise level."""
        return self.high if level >= self.boundary else self.low

    def forward(self, pack: TokenPack, text: TextPack) -> Tensor:
        """Like STDiT.forward, for clips on one side of the boundary."""
        of_token = pack.levels[pack.level_of].split(pack.segments.lengths)
        levels = [float(clip.max()) for clip in of_token]
        chosen = {self.at(level) for level in levels}
        if len(chosen) > 1:
            raise StditError(
                f"a pack has clips at noise levels {min(levels):g} to {max(levels):g}, on both sides of the experts' "
                f"boundary {self.boundary:g}: pack the clips of each expert separately."
            )
        return chosen.pop()(pack, text)

    def predict(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """Like STDiT.predict, with the expert for the noise level of each clip."""
        given = self.high.checked_conditions(conditions, latents, t, text, text_mask)
        high = t.reshape(len(t), -1).amax(1) >= self.boundary  # (B,)
        out = latents.new_empty(len(latents), self.config.out_channels, *latents.shape[2:])
        for expert, mine in ((self.high, high), (self.low, ~high)):
            if rows := mine.nonzero().flatten().tolist():
                mask = None if text_mask is None else text_mask[rows]
                of_mine = {name: value[rows] for name, value in given.items()}
                out[rows] = expert.predict(latents[rows], t[rows], text[rows], mask, **of_mine)
        return out
