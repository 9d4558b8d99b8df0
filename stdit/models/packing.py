"""Packs of clips and of texts: tokens one after another, without padding and without a batch dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.models.positions import grid_positions, widest
from stdit.models.sequence import SequenceGroup
from stdit.shapes import LatentShape, TokenGrid

Patch = tuple[int, int, int]


@dataclass
class Segments:
    """Where each of S segments begins and ends among packed tokens."""

    offsets: Tensor  # (S+1,) int32 on the tokens' device, for kernels
    lengths: tuple[int, ...]  # for code on the host
    host: Tensor  # (S+1,) int64 offsets on the CPU, for operators: a tensor, so compiled code has no guard on it
    sharing: Sharing | None = None  # if the tokens are one rank's part of a pack that a group of ranks shares

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu", sharing: Sharing | None = None) -> Segments:
        """sharing: a rank's part of a pack may have none of a segment's tokens."""
        if not lengths or min(lengths) < (0 if sharing else 1):
            raise StditError(f"segments of lengths {lengths}: there must be at least one, and none may be empty.")
        host = torch.tensor([0, *lengths]).cumsum(0)
        return cls(host.to(torch.int32).to(device, non_blocking=True), tuple(lengths), host, sharing)

    def to(self, device: torch.device | str) -> Segments:
        sharing = self.sharing and replace(self.sharing, whole=self.sharing.whole.to(device))
        return replace(self, offsets=self.offsets.to(device, non_blocking=True), sharing=sharing)

    @property
    def whole(self) -> Segments:
        """The segments of the whole pack, of which a rank may hold a part."""
        return self.sharing.whole if self.sharing else self


@dataclass(frozen=True)
class Sharing:
    """How a group of ranks shares a pack."""

    group: SequenceGroup
    tokens: tuple[int, ...]  # how many each rank holds, in the order of the pack
    whole: Segments  # of all tokens
    grids: tuple[TokenGrid, ...]  # of all clips
    order: Tensor | None = None  # (N,) of all tokens for self-attention, where segments are not contiguous
    inverse_order: Tensor | None = None  # (N,) the way back


@dataclass
class LevelIndex:
    """Which of K noise levels each of N tokens has. Run r of equal level is tokens run_bounds[r] to run_bounds[r+1]."""

    level_of: Tensor  # (N,) int64 on the tokens' device
    run_bounds: Tensor  # (R+1,) int64 on the CPU
    run_levels: Tensor  # (R,) int64 on the CPU, the level of each run

    @classmethod
    def of(cls, level_of: Tensor) -> LevelIndex:
        """The runs in level_of, which is on the CPU."""
        first = level_of.new_zeros(min(1, len(level_of)))
        starts = torch.cat([first, torch.nonzero(level_of[1:] != level_of[:-1]).flatten() + 1])
        return cls(level_of, torch.cat([starts, starts.new_tensor([len(level_of)])]), level_of[starts])

    def to(self, device: torch.device | str) -> LevelIndex:
        return replace(self, level_of=self.level_of.to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> LevelIndex:
        """Of the tokens from start to stop; there may be none."""
        begins, ends = self.run_bounds[:-1].clamp(min=start), self.run_bounds[1:].clamp(max=stop)
        inside = begins < ends  # (R,)
        bounds = torch.cat([begins[inside], begins.new_tensor([stop])]) - start
        return LevelIndex(self.level_of[start:stop], bounds, self.run_levels[inside])


@dataclass
class ClipConditions:
    """Conditions of S clips besides their texts, which some families take. None if not given."""

    fps: Tensor | None = None  # (S,) frames per second
    size: Tensor | None = None  # (S, 2) width and height in pixels
    image_text: TextPack | None = None  # tokens of an image encoder

    def to(self, device: torch.device | str) -> ClipConditions:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    def part(self, clips: slice) -> ClipConditions:
        """Of some clips."""
        return ClipConditions(
            fps=None if self.fps is None else self.fps[clips],
            size=None if self.size is None else self.size[clips],
            image_text=None if self.image_text is None else self.image_text.part(clips),
        )


@dataclass
class TokenPack:
    """The clips of one micro-step on one rank."""

    tokens: Tensor  # (N, C·pt·ph·pw)
    levels: Tensor  # (K,) distinct noise levels t in [0, 1], fp32 or fp64
    level_index: LevelIndex  # the level of each token
    positions: Tensor  # (N, 3) frame, row and column of each token
    segments: Segments  # one per clip
    grids: tuple[TokenGrid, ...]  # one per clip; tokens of a segment beyond its grid are condition only: not unpacked
    conditions: ClipConditions = field(default_factory=ClipConditions)

    @property
    def level_of(self) -> Tensor:
        """(N,) int64, the index of each token's level."""
        return self.level_index.level_of

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TokenPack:
        """Moves the pack to a device and casts its tokens to dtype; levels and positions keep theirs."""
        return replace(
            self,
            tokens=self.tokens.to(device, dtype, non_blocking=True),
            levels=self.levels.to(device, non_blocking=True),
            level_index=self.level_index.to(device),
            positions=self.positions.to(device, non_blocking=True),
            segments=self.segments.to(device),
            conditions=self.conditions.to(device),
        )

    def part(self, group: SequenceGroup | None) -> PackPart:
        """The contiguous range of tokens that this rank of a group holds; all of them if there is no group.

        Where a clip is cut, several ranks have a part of it. A rank without a token still has a clip.
        """
        if group is None:
            return PackPart(self, slice(None), slice(None))
        tokens, ends = group.shares(len(self.tokens)), self.segments.host
        start = sum(tokens[: group.rank])
        stop = start + tokens[group.rank]
        first = min(int(torch.searchsorted(ends, start, right=True)), len(ends) - 1) - 1
        clips = slice(first, max(first + 1, int(torch.searchsorted(ends, stop))))
        lengths = ends.clamp(start, stop).diff()[clips].tolist()
        pack = TokenPack(
            tokens=self.tokens[start:stop].clone(),  # not a view, which would keep the whole
            levels=self.levels,
            level_index=self.level_index.part(start, stop),
            positions=self.positions[start:stop],
            segments=Segments.of(lengths, self.tokens.device, Sharing(group, tuple(tokens), self.segments, self.grids)),
            grids=self.grids[clips],
            conditions=self.conditions.part(clips),
        )
        return PackPart(pack, slice(start, stop), clips)

    def per_token(self, values: Tensor) -> Tensor:
        """Repeats values (S, …) of the clips for each of their tokens: (N, …)."""
        lengths = torch.tensor(self.segments.lengths, device=values.device)
        return values.repeat_interleave(lengths, dim=0, output_size=len(self.tokens))

    def level_clip_pairs(self) -> tuple[Tensor, Tensor, LevelIndex]:
        """The distinct pairs of noise level and clip: level (K',) and clip (K',) of each, and the pair of each token.

        Modulation that depends on a clip's conditions too has a row per pair.
        """
        index, ends = self.level_index, self.segments.host  # both on the host, so nothing waits for a GPU
        bounds = torch.unique(torch.cat([index.run_bounds, ends]))  # runs of one level within one clip
        level = index.run_levels[torch.searchsorted(index.run_bounds, bounds[:-1], right=True) - 1]
        clip = torch.searchsorted(ends, bounds[:-1], right=True) - 1
        clips, device = len(ends) - 1, self.level_of.device
        pairs, pair_of = torch.unique(level * clips + clip, return_inverse=True)
        of_token = pair_of.repeat_interleave(bounds.diff()).to(device, non_blocking=True)
        return (pairs // clips).to(device), (pairs % clips).to(device), LevelIndex(of_token, bounds, pair_of)


class PackPart(NamedTuple):
    """A rank's part of a pack: its `tokens` are these of the whole pack's, and belong to its `clips`."""

    pack: TokenPack
    tokens: slice
    clips: slice


@dataclass
class TextPack:
    """The text tokens of one micro-step."""

    tokens: Tensor  # (M, D_text)
    multiplicity: Tensor | None  # (M,) fp32 on the CPU, padding positions that each token stands for; None: 1 each
    segments: Segments  # one per clip

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextPack:
        tokens = self.tokens.to(device, dtype, non_blocking=True)
        return replace(self, tokens=tokens, segments=self.segments.to(device))

    def part(self, clips: slice) -> TextPack:
        """The texts of some clips."""
        if clips == slice(None):
            return self
        rows = slice(int(self.segments.host[clips.start]), int(self.segments.host[clips.stop]))
        counts = None if self.multiplicity is None else self.multiplicity[rows]
        return TextPack(self.tokens[rows], counts, Segments.of(self.segments.lengths[clips], self.tokens.device))


def patchify(latents: Tensor, patch: Patch) -> Tensor:
    """Cuts latents (C, T, H, W) into tokens (n, C·pt·ph·pw). Features are ordered as in a flattened Conv3d weight."""
    (pt, ph, pw), (c, t, h, w) = patch, latents.shape
    grid = LatentShape(t, h, w).grid(patch)
    x = latents.reshape(c, grid.frames, pt, grid.height, ph, grid.width, pw)
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(grid.tokens, c * pt * ph * pw)


def unpatchify(tokens: Tensor, grid: TokenGrid, patch: Patch) -> Tensor:
    """Joins output tokens (n, pt·ph·pw·C), whose features are in Wan's order, to a clip (C, T, H, W)."""
    pt, ph, pw = patch
    x = tokens.reshape(grid.frames, grid.height, grid.width, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], grid.frames * pt, grid.height * ph, grid.width * pw)


def output_tokens(clip: Tensor, patch: Patch) -> Tensor:
    """Cuts a clip (C, T, H, W) into tokens (n, pt·ph·pw·C) like the network's output: the inverse of `unpatchify`."""
    return patchify(clip, patch).unflatten(1, (len(clip), -1)).transpose(1, 2).flatten(1)


def pack_clips(
    clips: Sequence[Tensor], levels: Sequence[Tensor], patch: Patch, conditions: Sequence[Mapping[str, Any]] = ()
) -> TokenPack:
    """Packs latents (C, T, H, W) of any shapes. Equal noise levels share a row of `levels`.

    levels: noise level t of each clip: () for the clip, (T/pt,) per patch frame, or (n,) per token; fp32 or fp64 in
        [0, 1]. On the CPU they spare a wait for a GPU.
    conditions: what some families take besides, a mapping per clip with the same keys for all clips: `fps`, a number;
        `size`, (width, height) in pixels; `image`, (C_image, T, H, W), channels concatenated to the clip's;
        `image_text`, (I, D_image), an image encoder's tokens.
    """
    assert len(conditions) in (0, len(clips)) and len({frozenset(given) for given in conditions}) <= 1, conditions
    taken = {name: [given[name] for given in conditions] for name in (conditions[0] if conditions else ())}
    images, texts = taken.pop("image", None), taken.pop("image_text", None)
    if images is not None:
        clips = [torch.cat([clip, image.to(clip)]) for clip, image in zip(clips, images)]
    if not clips or len(clips) != len(levels):
        raise StditError(f"{len(clips)} clips with {len(levels)} noise levels cannot be packed.")
    if len({(clip.ndim, clip.shape[0]) for clip in clips}) > 1 or clips[0].ndim != 4:
        raise StditError(f"latents to pack must be (C, T, H, W) with one C: {[tuple(c.shape) for c in clips]}.")
    device = clips[0].device
    grids = tuple(LatentShape(*clip.shape[1:]).grid(patch) for clip in clips)
    entries, repeats = [], []
    for number, (level, grid) in enumerate(zip(levels, grids)):
        level = torch.as_tensor(level).detach().cpu()
        each = {(): grid.tokens, (grid.frames,): grid.tokens // grid.frames, (grid.tokens,): 1}.get(tuple(level.shape))
        if each is None:
            raise StditError(
                f"clip {number} has noise levels of shape {tuple(level.shape)}; its grid of {grid.frames}×"
                f"{grid.height}×{grid.width} tokens takes (), ({grid.frames},) per patch frame or "
                f"({grid.tokens},) per token."
            )
        if level.dtype not in (torch.float32, torch.float64) or not ((level >= 0) & (level <= 1)).all():
            raise StditError(
                f"clip {number} has noise levels {level.dtype} from {level.min().item():g} to {level.max().item():g}; "
                "they must be float32 or float64 in [0, 1] (1 is noise), not timesteps up to 1000."
            )
        entries.append(level.reshape(-1))
        repeats.append(torch.full((level.numel(),), each))
    dtype = torch.float64 if any(entry.dtype == torch.float64 for entry in entries) else torch.float32
    distinct, index = torch.unique(torch.cat([e.to(dtype) for e in entries]), return_inverse=True)
    rows = {name: torch.stack([torch.as_tensor(v, device=device) for v in values]) for name, values in taken.items()}
    return TokenPack(
        tokens=torch.cat([patchify(clip, patch) for clip in clips]),
        levels=distinct.to(widest(device) if dtype == torch.float64 else dtype).to(device, non_blocking=True),
        level_index=LevelIndex.of(index.repeat_interleave(torch.cat(repeats))).to(device),
        positions=torch.cat([grid_positions(grid) for grid in grids]).to(device, non_blocking=True),
        segments=Segments.of([grid.tokens for grid in grids], device),
        grids=grids,
        conditions=ClipConditions(image_text=pack_texts(texts, padding=0) if texts else None, **rows),
    )


def spatial_segments(pack: TokenPack, factor: int = 1) -> Segments:
    """Makes a segment of each frame of each clip, or of its squares of factor × factor tokens."""
    lengths = [(grid.height // factor) * (grid.width // factor) for grid in _grids(pack) for _ in range(grid.frames)]
    return _among_ranks(pack, Segments.of(lengths, pack.tokens.device))


def temporal_segments(pack: TokenPack) -> tuple[Tensor | None, Tensor | None, Segments]:
    """Makes a segment of each place of a frame through time. Returns the tokens' order (N,), its inverse, segments.

    The order is None if ranks share the pack: none of them can bring its tokens into it, so the segments have it.
    """
    order, lengths, start = [], [], 0
    for grid in _grids(pack):
        places = grid.height * grid.width
        order.append(torch.arange(start, start + grid.tokens).view(grid.frames, places).T.flatten())
        lengths += [grid.frames] * places
        start += grid.tokens
    there, segments = torch.cat(order).to(pack.tokens.device), Segments.of(lengths, pack.tokens.device)
    back = torch.argsort(there)
    if pack.segments.sharing is None:
        return there, back, segments
    return None, None, _among_ranks(pack, segments, there, back)


def _grids(pack: TokenPack) -> tuple[TokenGrid, ...]:
    """Those of all clips, of which a rank may hold a part."""
    grids = pack.grids if pack.segments.sharing is None else pack.segments.sharing.grids
    assert pack.segments.whole.lengths == tuple(grid.tokens for grid in grids), "no tokens beside the grid"
    return grids


def _among_ranks(
    pack: TokenPack, whole: Segments, order: Tensor | None = None, inverse_order: Tensor | None = None
) -> Segments:
    """`whole`, which segments all tokens of the pack, as a rank's part if ranks share the pack."""
    if (sharing := pack.segments.sharing) is None:
        return whole
    sharing = replace(sharing, whole=whole, order=order, inverse_order=inverse_order)
    return replace(pack.segments, sharing=sharing)


def unpack_clips(tokens: Tensor, pack: TokenPack, patch: Patch) -> list[Tensor]:
    """Cuts output tokens (N, pt·ph·pw·C_out) of a pack into its clips (C_out, T, H, W)."""
    parts = tokens.split(pack.segments.lengths)
    return [unpatchify(part[: grid.tokens], grid, patch) for part, grid in zip(parts, pack.grids)]


def pack_texts(texts: Sequence[Tensor], padding: int) -> TextPack:
    """Packs text embeddings (L, D_text).

    padding: 0 packs the texts as they are, n as if they were zero-padded to n positions without a mask, as in Wan. The
        n − L padding positions of a text are equal, so one zero token stands for them with multiplicity n − L: exact.
    """
    if not texts:
        raise StditError("no texts to pack.")
    parts, lengths, counts = [], [], list[float]()
    for number, text in enumerate(texts):
        length = len(text)
        if padding and length > padding:
            raise StditError(f"text {number} has {length} tokens, more than text_padding {padding}. Truncate it.")
        if not padding and not length:
            raise StditError(f"text {number} is empty and text_padding is 0: there is nothing to attend to.")
        missing = max(padding - length, 0)
        parts.append(torch.cat([text, text.new_zeros(1, text.shape[1])]) if missing else text)
        lengths.append(len(parts[-1]))
        counts += [1.0] * length + [float(missing)] * (missing > 0)
    multiplicity = torch.tensor(counts) if any(count != 1 for count in counts) else None
    return TextPack(torch.cat(parts), multiplicity, Segments.of(lengths, texts[0].device))
