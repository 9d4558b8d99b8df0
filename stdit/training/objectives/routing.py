"""Which tokens skip which blocks while a transformer trains (TREAD, Krause et al. 2025, arXiv 2501.04765)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from stdit.data.load.loader import Example
from stdit.errors import StditError
from stdit.keyed.stream import keyed_stream
from stdit.models.config import TransformerConfig
from stdit.models.routing import check_routable
from stdit.training.objectives.protocol import StepKey

LAST_BLOCKS = 4  # all tokens run these, unless `end` is set


@dataclass
class RoutingConfig:
    """Token routing: a share of each clip's tokens skips the blocks between two depths, so that a step costs less.

    share: the share of a clip's tokens that skip, drawn anew in every epoch. Known tokens always stay.
    start: the first block that they skip, counted from 0.
    end: the first block that they run again; the number of blocks, if they run none. Unset: they run the last 4.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    start: NonNegativeInt = 2
    end: PositiveInt | None = None

    def blocks(self, model: TransformerConfig) -> range:
        """The blocks that are skipped. Raises StditError if the model cannot route tokens around them."""
        check_routable(model)
        layers = model.layers
        end = layers - LAST_BLOCKS if self.end is None else self.end
        if not self.start < end <= layers:
            unset = f" (unset: all but the last {LAST_BLOCKS})" if self.end is None else ""
            raise StditError(
                f"start {self.start} and end {end}{unset} leave no blocks to skip among the transformer's {layers}. "
                f"Set start < end ≤ {layers}, such as start={layers // 6} and end={layers - layers // 6}."
            )
        return range(self.start, end)

    def staying(self, tokens: int, known: int, example: Example, key: StepKey) -> Tensor:
        """Whether each of a clip's tokens stays: (tokens,) bool. The first `known` ones do, and at least one."""
        skipping = min(round(self.share * tokens), tokens - known, tokens - 1)
        stream = keyed_stream(key.seed, "routing", key.epoch, example.clip_id, example.occurrence)
        stays = torch.ones(tokens, dtype=torch.bool)
        stays[known + stream.permutation(tokens - known)[:skipping]] = False
        return stays
