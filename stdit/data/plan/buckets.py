"""Shape buckets: assigns each clip to a shape, or to a reason why it has none. Suggests a shape or a frame rate that
would include most of the clips without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from stdit.data.config import DataConfig, Stage
from stdit.data.manifest import Manifest
from stdit.data.plan.filters import outside_bounds, redundant_copies
from stdit.errors import StditError
from stdit.shapes import VideoShape

NO_REASON = -1
COLUMNS = ("frames", "fps", "width", "height", "start", "end")  # of a manifest, by which clips are assigned
MOST = 0.9  # share of the clips that a suggestion should include

Columns = Mapping[str, np.ndarray]  # by the names in COLUMNS, (rows,) each
TokensOf = Callable[[VideoShape], int]


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


def assign_columns(columns: Columns, shapes: Sequence[VideoShape], config: DataConfig) -> Assignment:
    """As `assign`, without filters."""
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


def _assign_stage(columns: Columns, shapes: Sequence[VideoShape], stage: Stage, config: DataConfig) -> Assignment:
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


@dataclass(frozen=True)
class Exclusion:
    """The clips excluded for one reason."""

    reason: str  # a `Reason`'s key
    clips: int
    found: str = ""  # their lengths or sizes
    remedy: str | None = None  # a setting or shape that would include `takes` of them
    takes: int = 0

    @property
    def text(self) -> str:
        """The reason as a sentence."""
        return Reason[self.reason.upper()].text

    @property
    def details(self) -> str:
        verb = "takes" if self.remedy and self.remedy.startswith("data.") else "would take"
        remedy = f"{self.remedy} {verb} {self.takes:,} of them" if self.remedy else ""
        return "; ".join(filter(None, (self.found, remedy)))


def explain_exclusions(
    manifest: Manifest, assignment: Assignment, config: DataConfig, tokens: TokensOf
) -> list[Exclusion]:
    """A stage's exclusions. tokens: a shape's token count; raises StditError for one that the model cannot take."""
    found = []
    for reason in Reason:
        rows = np.flatnonzero(assignment.reason == reason)
        if len(rows):
            clips = {name: manifest.column(name)[rows] for name in COLUMNS}
            found.append(_explain(reason, clips, assignment.shapes, config, tokens))
    return found


def _explain(
    reason: Reason, clips: Columns, shapes: Sequence[VideoShape], config: DataConfig, tokens: TokensOf
) -> Exclusion:
    width, height = clips["width"], clips["height"]
    exclusion = Exclusion(reason.key, len(width))
    multiple = config.rule.multiple if config.rule else 16
    if reason == Reason.FPS:
        rate = float(np.quantile(clips["fps"], 1 - MOST, method="lower"))
        rate = int(rate) if rate >= 2 else rate
        slower = int(_taken(clips, shapes, replace(config, fps=rate)).sum())
        remedy = f"data.fps={rate:g}" if slower else None
        return replace(exclusion, found=f"{_range(clips['fps'])} fps", remedy=remedy, takes=slower)
    if reason == Reason.KIND:
        images = clips["frames"] == 1
        mostly_images = images.sum() * 2 >= len(images)
        clips = {name: column[images == mostly_images] for name, column in clips.items()}
        count = len(clips["frames"])
        found = f"{count:,} {'image' if mostly_images else 'video'}{'s' if count > 1 else ''}"
        frames = [1] if mostly_images else _lengths(clips, config, shapes, tokens)
        candidates = [replace(shape, frames=n) for n in frames for shape in shapes]
    elif reason == Reason.SHORT:
        found = f"{_range(_frames(clips, config.fps))} frames at {config.fps:g} fps"
        frames = _lengths(clips, config, shapes, tokens)
        candidates = [replace(shape, frames=n) for n in frames for shape in shapes if not shape.is_image]
    elif reason == Reason.SMALL:
        order = np.argsort(width.astype(np.int64) * height, kind="stable")
        ends = [f"{width[row]}x{height[row]}" for row in order[[0, -1]]]
        found = " to ".join(dict.fromkeys(ends))
        scales = np.max([np.minimum(width / shape.width, height / shape.height) for shape in shapes], axis=0)
        scale = float(np.quantile(scales, 1 - MOST))
        candidates = [_sized(shape, shape.width * scale, shape.height * scale, multiple, np.floor) for shape in shapes]
        wide, high = (float(np.quantile(side, 1 - MOST)) for side in (width, height))
        candidates += [_sized(shape, wide, high, multiple, np.floor) for shape in shapes]
    elif reason == Reason.ASPECT:
        aspect = width / height
        found = f"width to height {_range(aspect)}"
        usual = float(np.median(aspect))
        candidates = [
            _sized(shape, (shape.width * shape.height * ratio) ** 0.5, (shape.width * shape.height / ratio) ** 0.5,
                   multiple, np.round)
            for shape in shapes for ratio in (usual, shape.height / shape.width)
        ]  # fmt: skip
    else:
        return exclusion
    legal = _legal(candidates, shapes, tokens)
    if not legal:
        return replace(exclusion, found=found)
    shape = legal[int(np.argmax(_taken(clips, legal, config)))]
    takes = int(_taken(clips, [shape], config).sum())
    name = shape if shape.frames > 1 else f"{shape.width}x{shape.height}"
    return replace(exclusion, found=found, remedy=f"the shape {name}" if takes else None, takes=takes)


def _range(values: np.ndarray) -> str:
    low, high = (f"{float(end):.4g}" for end in (values.min(), values.max()))
    return low if low == high else f"{low}–{high}"


def _frames(clips: Columns, fps: float) -> np.ndarray:
    """(clips,) the most frames at `fps` that fit into each."""
    room = slack(clips["start"], clips["end"], clips["fps"], 1, fps)
    return np.where(clips["frames"] == 1, 1, np.maximum(0, np.floor(room * fps + 1e-9)) + 1).astype(np.int64)


def _lengths(clips: Columns, config: DataConfig, shapes: Sequence[VideoShape], tokens: TokensOf) -> list[int]:
    """The most frames, legal for the model, that fit into most of the clips, or else into any."""
    frames = _frames(clips, config.fps)
    for most in (int(np.quantile(frames, 1 - MOST, method="lower")), int(frames.max())):
        for n in range(most, max(1, most - 64), -1):
            if _legal([replace(shapes[0], frames=n)], shapes, tokens):
                return [n]
    return []


def _sized(shape: VideoShape, width: float, height: float, multiple: int, rounded: Callable[..., float]) -> VideoShape:
    sides = [max(1, int(rounded(side / multiple + 1e-6))) * multiple for side in (width, height)]
    return VideoShape(shape.frames, sides[1], sides[0])


def _legal(candidates: Iterable[VideoShape], shapes: Sequence[VideoShape], tokens: TokensOf) -> list[VideoShape]:
    legal = []
    for shape in dict.fromkeys(candidates):
        try:
            if shape not in shapes and tokens(shape) > 0:
                legal.append(shape)
        except StditError:
            pass
    return legal


def _taken(clips: Columns, shapes: Sequence[VideoShape], config: DataConfig) -> np.ndarray:
    """(shapes,) how many clips are assigned to each."""
    return assign_columns(clips, shapes, replace(config, stages=[])).counts
