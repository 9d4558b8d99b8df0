"""Token routing: while a model trains, some tokens of each clip skip blocks and rejoin after them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from stdit.errors import StditError
from stdit.models.blocks import BlockInputs
from stdit.models.config import TransformerConfig
from stdit.models.packing import LevelIndex, Segments, TokenPack


@dataclass
class Routing:
    """Which tokens of a pack stay in `blocks`. The others skip these (TREAD, Krause et al. 2025, arXiv 2501.04765).

    A token that skips goes on after the blocks in the state that it had before them.
    """

    blocks: range  # of the transformer's blocks as they run
    kept: Tensor  # (N',) int64 on the tokens' device: the indices of the N' tokens that stay, ascending
    segments: Segments  # the kept tokens of each clip
    levels: LevelIndex  # the level of each kept token

    @classmethod
    def of(cls, pack: TokenPack, stays: Tensor, blocks: range) -> Routing:
        """pack: the whole pack, or a rank's part of it.
        stays: (N,) bool on the CPU, of the whole pack's tokens; true for at least one token of each clip.
        """
        device, index, sharing = pack.tokens.device, pack.level_index, pack.segments.sharing
        if sharing is not None:
            whole, parts = Segments.of(_kept(stays, sharing.whole), device), stays.split(sharing.tokens)
            sharing = replace(sharing, tokens=tuple(int(part.sum()) for part in parts), whole=whole)
            stays = parts[sharing.group.rank]
        level_of = index.run_levels.repeat_interleave(index.run_bounds.diff())  # (N,), on the host
        return cls(
            blocks=blocks,
            kept=stays.nonzero().flatten().to(device, non_blocking=True),
            segments=Segments.of(_kept(stays, pack.segments), device, sharing),
            levels=LevelIndex.of(level_of[stays]).to(device),
        )

    def narrowed(self, steps: Iterable[BlockInputs], shared: BlockInputs) -> Iterator[BlockInputs]:
        """What each block reads: of the kept tokens within `blocks`, else as in steps.

        shared: what a block reads if it attends to all tokens of each clip, as `check_routable` makes sure.
        """
        of_kept = replace(
            shared,
            levels=self.levels,
            cos=None if shared.cos is None else shared.cos[self.kept],
            sin=None if shared.sin is None else shared.sin[self.kept],
            segments=self.segments,
            clips=self.segments,
            added=None if shared.added is None else shared.added[self.kept],
        )
        for number, inputs in enumerate(steps):
            yield of_kept if number in self.blocks else inputs


def _kept(stays: Tensor, segments: Segments) -> list[int]:
    return [int(clip.sum()) for clip in stays.split(segments.lengths)]


def check_routable(config: TransformerConfig) -> None:
    """Raises StditError for networks whose tokens cannot skip blocks."""
    if config.attention != "full":
        raise StditError(
            f"weights with attention {config.attention!r} ({config.family}) attend within whole frames, so their "
            f"tokens cannot skip blocks. Leave routing out."
        )
    if config.level_condition != "none":
        raise StditError(
            f"weights with level_condition {config.level_condition!r} ({config.family}) modulate each clip by itself, "
            f"which token routing does not know. Leave routing out."
        )
