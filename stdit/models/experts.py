"""Two transformers that act as one: an expert for high noise levels and one for low ones (Wan 2.2 A14B)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.models.packing import TextPack, TokenPack
from stdit.models.transformer import STDiT

SHARED_NDIM = {"fps": 0, "size": 1}  # dimensions of a condition that all clips share; with one more, one per clip


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
        high = t.reshape(len(t), -1).amax(1) >= self.boundary  # (B,)
        if high.all() or not high.any():
            return (self.high if high.all() else self.low).predict(latents, t, text, text_mask, **conditions)
        parts = []
        for expert, mine in ((self.high, high), (self.low, ~high)):

            def of_mine(value: Any, shared_ndim: int = 0, mine: Tensor = mine) -> Any:
                """The rows of this expert's clips."""
                if value is None or (value := torch.as_tensor(value)).ndim <= shared_ndim or len(value) != len(mine):
                    return value  # predict reports a wrong number of clips
                return value[mine.to(value.device)]

            given = {name: of_mine(value, SHARED_NDIM.get(name, 0)) for name, value in conditions.items()}
            parts.append(expert.predict(*map(of_mine, (latents, t, text, text_mask)), **given))
        out = parts[0].new_empty(len(latents), *parts[0].shape[1:])
        for part, mine in zip(parts, (high, ~high)):
            out[mine.to(out.device)] = part
        return out
