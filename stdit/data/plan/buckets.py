"""Shape buckets: assigns each clip to a shape, or to a reason why it has none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from stdit.data.config import DataConfig, Stage
from stdit.data.manifest import Manifest
from stdit.data.plan.filters import outside_bounds, redundant_copies
from stdit.shapes import VideoShape

NO_REASON = -1
COLUMNS = ("frames", "fps", "width", "height", "start", "end")  # of a manifest, by which clips are assigned


class Reason(IntEnum):
    """Why a clip has no shape. `key` is its word in JSON, `text` its sentence.

    KIND, FPS, SHORT, SMALL and ASPECT are checked for each shape, in this order, up to the first that fails. Of all
    shapes' failures, the last in this order is the clip's reason. The other reasons are filters: they hold for every
    shape, and take precedence.
    """

    text: str

    def __new__(cls, number: int, text: str) -> Reason:
        member = int.__new__(cls, number)
        member._value_, member.text = number, text
        return member

    KIND = 0, "an image, but no shape has one frame; or a video, but every shape has one frame"
    FPS = 1, "the source has fewer frames per second than requested (data.repeat_frames allows it)"
    SHORT = 2, "shorter than every shape's duration"
    SMALL = 3, "smaller than every shape that is short enough (data.upscale allows it)"
    ASPECT = 4, "cropping to the nearest aspect ratio would lose more than data.max_crop of the area"
    MOTION = 5, "its motion is outside data.filter"
    SHARPNESS = 6, "its sharpness is outside data.filter"
    BRIGHTNESS = 7, "its brightness is outside data.filter"
    BLACK_BARS = 8, "its black_bars is outside data.filter"
    STILL_FRAMES = 9, "its still_frames is outside data.filter"
    REPEAT = 10, "it looks like another clip that is used (data.repeats allows it)"

    @property
    def key(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Assignment:
    """The shape of every row."""

    bucket: np.ndarray  # (rows,) int32 index into shapes; −1 for a clip that has none
    shapes: tuple[VideoShape, ...]
    reason: np.ndarray  # (rows,) int8 `Reason`, or NO_REASON for a clip that has a shape
    lost: np.ndarray  # (rows,) float32 share of the frame's area that is cropped; 0 for a clip that has no shape
    earlier: tuple[Assignment, ...] = ()  # stages of a curriculum, of which this is the last; all have the same shapes

    @property
    def stages(self) -> tuple[Assignment, ...]:
        return (*self.earlier, self)

    def rows(self, bucket: int | None = None) -> np.ndarray:
        """The rows in a bucket, or in any bucket, in at least one stage."""
        there = [stage.bucket >= 0 if bucket is None else stage.bucket == bucket for stage in self.stages]
        return np.flatnonzero(np.logical_or.reduce(there))

    @cached_property
    def counts(self) -> np.ndarray:
        """(shapes,) number of clips."""
        return np.bincount(self.bucket[self.bucket >= 0], minlength=len(self.shapes))

    @cached_property
    def crop_losses(self) -> np.ndarray:
        """(shapes,) mean share of the area that is cropped; 0 for an empty bucket."""
        kept = self.bucket >= 0
        sums = np.bincount(self.bucket[kept], self.lost[kept], minlength=len(self.shapes))
        return sums / np.maximum(self.counts, 1)

    @cached_property
    def reasons(self) -> dict[str, int]:
        """How many clips each reason excludes, by key; only reasons that exclude some."""
        counts = np.bincount(self.reason[self.reason != NO_REASON], minlength=len(Reason))
        return {reason.key: int(counts[reason]) for reason in Reason if counts[reason]}


def slack(start: Any, end: Any, source_fps: Any, frames: int, fps: float) -> Any:
    """Seconds by which a clip of `frames` at `fps` can be moved within [start, end]; negative if it does not fit.

    start, end, source_fps: numbers or arrays (rows,). The clip's last frame may be up to half a source frame later than
    the last source frame, which is shown at end − 1/source_fps.
    """
    return (end - start) - 0.5 / source_fps - (frames - 1) / fps + 1e-6


def assign(manifest: Manifest, config: DataConfig) -> Assignment:
    """Assigns each clip to exactly one shape or to a reason, in each stage of a curriculum. Filters take precedence.

    Among the shapes that fit: the nearest aspect ratio (in log), then the most frames, then the largest area. Images go
    to shapes of one frame, videos to the others. Nothing is looped, and nothing is upscaled unless `config.upscale`.
    """
    config.check()
    columns = {name: manifest.column(name) for name in COLUMNS}
    found = assign_columns(columns, config.video_shapes(), config)
    reason = np.full(len(manifest), NO_REASON, np.int8)
    for name, rows in outside_bounds(manifest, config.filter).items():
        reason[rows & (reason == NO_REASON)] = Reason[name.upper()]
    if not config.repeats:
        shaped = np.logical_or.reduce([stage.bucket >= 0 for stage in found.stages])
        reason[redundant_copies(manifest, shaped & (reason == NO_REASON))] = Reason.REPEAT
    out, stages = reason != NO_REASON, []
    for stage in found.stages:
        bucket, lost = np.where(out, -1, stage.bucket), np.where(out, 0, stage.lost)
        stages.append(Assignment(bucket, stage.shapes, np.where(out, reason, stage.reason), lost))
    return replace(stages[-1], earlier=tuple(stages[:-1]))


def assign_columns(columns: Mapping[str, np.ndarray], shapes: Sequence[VideoShape], config: DataConfig) -> Assignment:
    """As `assign`, without filters. columns: by the names in COLUMNS, (rows,) each."""
    # Clips of the same size that are long enough for the same shapes are assigned alike, so one row of each such kind
    # is assigned. Ten million clips of a few thousand sizes cost two sorts, whatever the number of shapes.
    image, rows = columns["frames"] == 1, len(columns["frames"])
    lengths = {shape.frames for shape in shapes}
    fits = np.zeros(rows, np.int64)  # the number of lengths that fit
    for length in lengths:
        fits += slack(columns["start"], columns["end"], columns["fps"], length, config.fps) >= 0
    fast = columns["fps"] >= 0.9 * config.fps
    size = (columns["width"].astype(np.int64) << 32) | columns["height"].astype(np.int64)
    _, size = np.unique(size, return_inverse=True)
    kinds, kind = np.unique(((size * (len(lengths) + 1) + fits) * 2 + image) * 2 + fast, return_inverse=True)
    row = np.empty(len(kinds), np.int64)
    row[kind] = np.arange(rows)  # one of each kind
    few = {name: column[row] for name, column in columns.items()}
    stages = []
    for stage in config.stages or [Stage()]:
        found = _assign_stage(few, shapes, stage, config)
        stages.append(Assignment(found.bucket[kind], found.shapes, found.reason[kind], found.lost[kind]))
    return replace(stages[-1], earlier=tuple(stages[:-1]))


def _assign_stage(
    columns: Mapping[str, np.ndarray], shapes: Sequence[VideoShape], stage: Stage, config: DataConfig
) -> Assignment:
    frames, fps, width, height, start, end = (columns[name] for name in COLUMNS)
    image, aspect = frames == 1, width / height
    bucket = np.full(len(aspect), -1, np.int32)
    lost = np.zeros(len(aspect), np.float32)
    reason = np.full(len(aspect), Reason.KIND, np.int8)  # of the shape that got furthest
    best = np.full(len(aspect), np.inf)  # distance of the chosen aspect ratio
    # From best to worst by the later criteria, so that only a nearer aspect ratio replaces a choice.
    for index in sorted(range(len(shapes)), key=lambda i: (-shapes[i].frames, -shapes[i].height * shapes[i].width, i)):
        shape = shapes[index]
        if not stage.allows(shape):
            continue
        ratio = aspect * shape.height / shape.width
        cost = 1 - np.minimum(ratio, 1 / ratio)  # the share of the area that is cropped
        conditions = {
            Reason.KIND: image == shape.is_image,
            Reason.FPS: image | (fps >= 0.9 * config.fps) | config.repeat_frames,
            Reason.SHORT: image | (slack(start, end, fps, shape.frames, config.fps) >= 0),
            Reason.SMALL: ((width >= shape.width) & (height >= shape.height)) | config.upscale,
            Reason.ASPECT: cost <= config.max_crop + 1e-9,
        }
        fits = np.ones(len(aspect), bool)
        for failing, condition in conditions.items():
            np.maximum(reason, np.where(fits & ~condition, failing, 0).astype(np.int8), out=reason)
            fits &= condition
        distance = np.abs(np.log(aspect) - math.log(shape.width / shape.height))
        better = fits & (distance < best - 1e-12)
        bucket[better] = index
        best[better] = distance[better]
        lost[better] = cost[better]
    return Assignment(bucket, tuple(shapes), np.where(bucket >= 0, NO_REASON, reason).astype(np.int8), lost)
