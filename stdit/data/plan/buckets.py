"""Shape buckets: which shape every clip is cut to, or the reason why it is cut to none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from stdit.data.config import DataConfig, Stage
from stdit.data.manifest import Manifest
from stdit.data.measure.scores import SCORES
from stdit.data.plan.filters import outside_bounds, redundant_copies
from stdit.shapes import VideoShape

# A clip's reason is a filter's, or else the first of the conditions, in this order, that no shape meets together with
# those before.
REASONS = {
    "kind": "an image, and no shape has one frame; or a video, and every shape has one frame",
    "fps": "the source has fewer frames a second than asked for (data.repeat_frames allows it)",
    "short": "shorter than every shape's duration",
    "small": "smaller than every shape that is short enough (data.upscale allows it)",
    "aspect": "cutting to the nearest aspect ratio would lose more than data.max_crop of the area",
    **{score: f"its {score} is outside data.filter" for score in SCORES},
    "repeat": "it looks like another clip that is taken (data.repeats allows it)",
}


@dataclass(frozen=True)
class Assignment:
    """Which shape every row goes to.

    bucket: (rows,) int32 index into shapes, −1 for a clip in none.
    reason: (rows,) int8 index into REASONS, −1 for a clip that has a shape.
    lost: (rows,) float32 share of the frame's area that is cut off (0 where the clip has no bucket).
    earlier: the stages of a curriculum before this, its last one; all have the same shapes.
    """

    bucket: np.ndarray
    shapes: tuple[VideoShape, ...]
    reason: np.ndarray
    lost: np.ndarray
    earlier: tuple[Assignment, ...] = ()

    @property
    def stages(self) -> tuple[Assignment, ...]:
        return (*self.earlier, self)

    def rows(self, bucket: int | None = None) -> np.ndarray:
        """The rows that go to a bucket, or to any, in at least one stage."""
        there = [stage.bucket >= 0 if bucket is None else stage.bucket == bucket for stage in self.stages]
        return np.flatnonzero(np.logical_or.reduce(there))

    @cached_property
    def counts(self) -> np.ndarray:
        """(shapes,) clips in each."""
        return np.bincount(self.bucket[self.bucket >= 0], minlength=len(self.shapes))

    @cached_property
    def crop_losses(self) -> np.ndarray:
        """(shapes,) mean share of the area that is cut off a bucket's clips; 0 for an empty bucket."""
        kept = self.bucket >= 0
        sums = np.bincount(self.bucket[kept], self.lost[kept], minlength=len(self.shapes))
        return sums / np.maximum(self.counts, 1)

    @cached_property
    def reasons(self) -> dict[str, int]:
        """How many clips each reason left out; reasons that left out none are absent."""
        counts = np.bincount(self.reason[self.reason >= 0], minlength=len(REASONS))
        return {name: int(n) for name, n in zip(REASONS, counts) if n}


def slack(start: Any, end: Any, source_fps: Any, frames: int, fps: float) -> Any:
    """Seconds by which a clip of `frames` at `fps` can be moved inside [start, end]; negative: it does not fit.

    start, end, source_fps: numbers, or arrays (rows,). The last frame asked for may lie up to half a source frame after
    the last source frame, which is shown at end − 1/source_fps.
    """
    return (end - start) - 0.5 / source_fps - (frames - 1) / fps + 1e-6


def lost_area(aspect: np.ndarray, shape: VideoShape) -> np.ndarray:
    """The share of the area that cutting a frame of `aspect` (width/height) to the shape's costs."""
    ratio = aspect * shape.height / shape.width
    return 1 - np.minimum(ratio, 1 / ratio)


def assign(manifest: Manifest, config: DataConfig) -> Assignment:
    """Every clip to exactly one shape or to a named reason; with a curriculum, in each of its stages. Filters go first.

    Among the shapes that fit: the nearest aspect ratio (in log), then the most frames, then the largest area. Images go
    to shapes of one frame, videos to the others. Nothing is looped; nothing is upscaled unless `config.upscale`.
    """
    config.check()
    columns = {name: manifest.column(name) for name in ("frames", "fps", "width", "height", "start", "end")}
    found = assign_columns(**columns, shapes=config.video_shapes(), config=config)
    reason = np.full(len(manifest), -1, np.int8)
    for name, rows in outside_bounds(manifest, config.filter).items():
        reason[rows & (reason < 0)] = list(REASONS).index(name)
    if not config.repeats:
        shaped = np.logical_or.reduce([stage.bucket >= 0 for stage in found.stages])
        reason[redundant_copies(manifest, shaped & (reason < 0))] = list(REASONS).index("repeat")
    stages = [_without(stage, reason) for stage in found.stages]
    return replace(stages[-1], earlier=tuple(stages[:-1]))


def _without(found: Assignment, reason: np.ndarray) -> Assignment:
    """A stage without the clips that have a reason (rows,), −1 for none, to be left out."""
    out = reason >= 0
    bucket, lost = np.where(out, -1, found.bucket), np.where(out, 0, found.lost)
    return Assignment(bucket, found.shapes, np.where(out, reason, found.reason), lost)


def assign_columns(
    frames: np.ndarray,
    fps: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    shapes: Sequence[VideoShape],
    config: DataConfig,
) -> Assignment:
    """`assign` on the columns alone, (rows,) each."""
    # Clips of one size that have time for the same shapes go the same way: each kind of them is decided once. Ten
    # million clips of a few thousand sizes cost two sorts, whatever the number of shapes.
    lengths = sorted({shape.frames for shape in shapes})
    fits = np.zeros(len(frames), np.int64)  # how many of the lengths, the shorter first
    for length in lengths:
        fits += slack(start, end, fps, length, config.fps) >= 0
    image = frames == 1
    fast = image | (fps >= 0.9 * config.fps) | config.repeat_frames
    sizes, size_of = np.unique((width.astype(np.int64) << 32) | height.astype(np.int64), return_inverse=True)
    kinds, kind_of = np.unique(((size_of * (len(lengths) + 1) + fits) * 2 + image) * 2 + fast, return_inverse=True)
    size, fits = np.divmod(kinds // 4, len(lengths) + 1)
    kind = _Kinds(kinds // 2 % 2 == 1, kinds % 2 == 1, fits, sizes[size] >> 32, sizes[size] & 0xFFFFFFFF)
    found = []
    for stage in config.stages or [Stage()]:
        allowed = [number for number, shape in enumerate(shapes) if stage.allows(shape)]
        bucket, reason, lost = (values[kind_of] for values in _assign_kinds(kind, shapes, allowed, lengths, config))
        found.append(Assignment(bucket, tuple(shapes), reason, lost))
    return replace(found[-1], earlier=tuple(found[:-1]))


@dataclass(frozen=True)
class _Kinds:
    """(kinds,) each: images; enough frames a second; how many lengths fit; pixels."""

    image: np.ndarray
    fast: np.ndarray
    fits: np.ndarray
    width: np.ndarray
    height: np.ndarray


def _assign_kinds(
    kind: _Kinds, shapes: Sequence[VideoShape], allowed: Sequence[int], lengths: Sequence[int], config: DataConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kinds,) each: bucket, reason, lost."""
    aspect = kind.width / kind.height
    bucket = np.full(len(aspect), -1, np.int32)
    lost = np.zeros(len(aspect), np.float32)
    passed = np.zeros(len(aspect), np.int8)  # the most conditions that one shape meets
    best = np.full(len(aspect), np.inf)  # distance of the chosen aspect ratio
    # From the best to the worst by the later criteria, so that a nearer aspect ratio alone replaces a choice.
    for index in sorted(allowed, key=lambda i: (-shapes[i].frames, -shapes[i].height * shapes[i].width, i)):
        shape = shapes[index]
        cost = lost_area(aspect, shape)
        conditions = (
            kind.image == shape.is_image,
            kind.fast,
            kind.image | (kind.fits > lengths.index(shape.frames)),
            ((kind.width >= shape.width) & (kind.height >= shape.height)) | config.upscale,
            cost <= config.max_crop + 1e-9,
        )
        meets = np.ones(len(aspect), bool)
        for number, condition in enumerate(conditions, 1):
            meets &= condition
            np.maximum(passed, np.where(meets, number, 0).astype(np.int8), out=passed)
        distance = np.abs(np.log(aspect) - math.log(shape.width / shape.height))
        better = meets & (distance < best - 1e-12)
        bucket[better] = index
        best[better] = distance[better]
        lost[better] = cost[better]
    return bucket, np.where(bucket >= 0, -1, passed).astype(np.int8), lost
