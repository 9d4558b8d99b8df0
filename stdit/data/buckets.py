"""Shape buckets: which shape every clip is cut to, or the reason why it is cut to none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from stdit.data.filters import Bounds, check_filter, left_out, repeated
from stdit.data.manifest import Manifest
from stdit.data.scores import SCORES
from stdit.errors import StditError, about
from stdit.shapes import LARGEST, VideoShape, frames_for


@dataclass
class ShapeRule:
    """Shapes by rule: every area at every aspect ratio, for every duration at `data.fps`.

    areas: WIDTHxHEIGHT, each standing for its pixels. aspects: WIDTH:HEIGHT. durations: seconds, 0 for images.
    multiple: of which widths and heights are (the VAE's stride times the patch). frame_stride: frames are one and a
        multiple of it (the VAE's stride in time). What the rule gives is rounded to both.
    """

    areas: list[str]
    aspects: list[str]
    durations: list[float]
    multiple: int = 16
    frame_stride: int = 4

    def __post_init__(self) -> None:
        for name in ("areas", "aspects", "durations"):
            if not getattr(self, name):
                raise StditError(f"{name} is empty: a rule takes at least one.")
        if not 1 <= min(self.multiple, self.frame_stride) <= max(self.multiple, self.frame_stride) < LARGEST:
            raise StditError(
                f"multiple {self.multiple} and frame_stride {self.frame_stride} must be from 1 to {LARGEST - 1:,}."
            )

    def shapes(self, fps: float) -> tuple[VideoShape, ...]:
        """Without repetition: where two aspect ratios round to one size there is one shape."""
        sizes, lengths = [], []
        with about("areas"):
            areas = [VideoShape.parse(area) for area in self.areas]
        for area in areas:
            if not area.is_image:
                raise StditError(f"areas: {area} has frames; an area is WIDTHxHEIGHT alone.")
            for aspect in map(_aspect, self.aspects):
                sides = math.sqrt(area.width * area.height * aspect), math.sqrt(area.width * area.height / aspect)
                sizes.append([max(1, round(side / self.multiple)) * self.multiple for side in sides])
        for seconds in self.durations:
            with about("durations"):
                frames = frames_for(seconds, fps, self.frame_stride) if seconds else 1
            if seconds < 0 or (seconds and frames == 1):
                raise StditError(
                    f"durations: {seconds:g} s at {fps:g} fps is less than {1 + self.frame_stride} frames. Write 0 for "
                    f"images, {self.frame_stride / fps:g} or more for videos."
                )
            lengths.append(frames)
        return tuple(dict.fromkeys(VideoShape(n, height, width) for n in lengths for width, height in sizes))


def _aspect(text: str) -> float:
    """ "16:9" as 16/9."""
    width, _, height = text.partition(":")
    try:
        value = float(width) / float(height)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0.001 <= value <= 1000:
        raise StditError(f"aspects: {text!r} is not WIDTH:HEIGHT, such as 16:9, from 1:1000 to 1000:1.")
    return value


@dataclass
class Stage:
    """A part of a curriculum: every clip goes to the best shape within these limits.

    epochs: how many it lasts; unset: to the end of the run, for the last stage alone.
    area: WIDTHxHEIGHT, the most pixels a frame. frames: the most frames.
    """

    epochs: int | None = None
    area: str | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise StditError(f"epochs is {self.epochs}; a stage lasts at least one.")

    def allows(self, shape: VideoShape) -> bool:
        most = None if self.area is None else VideoShape.parse(self.area)
        small = most is None or shape.width * shape.height <= most.width * most.height
        return small and (self.frames is None or shape.frames <= self.frames)


@dataclass
class DataConfig:
    """What is read, and how clips are cut.

    manifest: the manifest file, or its URL.
    shapes: WIDTHxHEIGHTxFRAMES (WIDTHxHEIGHT for images); clips go to exactly one of them.
    rule: gives the shapes instead (see `ShapeRule`).
    stages: a curriculum over epochs (see `Stage`); none: all shapes in all epochs.
    sources: how often an epoch has the clips of a source, by a pattern of their paths as the manifest has them
        ("talks/*": 0.5); the first pattern that fits counts, what none fits comes once.
    filter: the least and the most of scores that a clip may have, such as {motion: [2, null], black_bars: [null, 0.1]}
        (null: no bound; the scores: see `scores`). repeats: also take clips that look like another one that is taken.
        Both need the columns of `stdit data scan --scores`.
    fps: frames a second that videos are read at. Sources of fewer than 0.9·fps would show frames twice: they are
        left out unless `repeat_frames`.
    max_crop: the share of a frame's area that cutting to another aspect ratio may cost.
    upscale: also take clips smaller than the shape.
    start: "random" (keyed by seed, epoch and clip) or "first": where in a longer source the clip starts.
    crop: "random" (keyed) or "centre": which part of a frame of another aspect ratio is kept.
    mirror: flip half of the clips horizontally (keyed). Wrong wherever a caption or a sign says left or right.
    cache: the folder, or URL, that `stdit data encode` wrote; latents then come from there and nothing is decoded.
    cache_dtype: float32, bfloat16 or float16, what the cache's tensors are stored as.
    crops: cuts of each clip that the cache holds. 1: from the first frame and at the centre. More: as `start`, `crop`
        and `mirror` say, keyed by clip and number; training draws one of them for every occurrence.
    workers: processes that read ahead (0: none, everything is read in the training's own); batches are the same for any
        number. A file that crashes or hangs the decoder then costs its clip and not the run.
    timeout: seconds of a core that reading a clip may take, or of waiting for its file, before it is left out.
    verify: tell a file that is not the one that was scanned by its sha256 (read once a worker), not only by size and
        time. Such clips are left out.
    prefetch: how many micro-steps they read ahead.
    keep_gb: decoded clips kept in memory, in GB, for data small enough; only where start is first and crop centre.
    """

    manifest: str = ""
    shapes: list[str] = field(default_factory=list)
    rule: ShapeRule | None = None
    stages: list[Stage] = field(default_factory=list)
    sources: dict[str, float] = field(default_factory=dict)
    filter: dict[str, Bounds] = field(default_factory=dict)
    repeats: bool = True
    fps: float = 16.0
    repeat_frames: bool = False
    max_crop: float = 0.5
    upscale: bool = False
    start: Literal["random", "first"] = "random"
    crop: Literal["random", "centre"] = "random"
    mirror: bool = False
    cache: str | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    crops: int = 1
    workers: int = 2
    timeout: float = 60.0
    verify: bool = False
    prefetch: int = 4
    keep_gb: float = 0.0

    def video_shapes(self) -> tuple[VideoShape, ...]:
        """The shapes, parsed and checked; raises StditError naming the value."""
        if self.rule is not None:
            if self.shapes:
                raise StditError("data.shapes and data.rule are both set: a list, or a rule that gives it.")
            with about("data.rule"):
                return self.rule.shapes(self.fps)
        shapes = tuple(VideoShape.parse(text) for text in self.shapes)
        if not shapes:
            raise StditError(
                "data.shapes is empty. List the shapes to train, such as [832x480x81, 480x832x81], or set data.rule."
            )
        twice = next((str(s) for i, s in enumerate(shapes) if s in shapes[:i]), None)
        if twice:
            raise StditError(f"data.shapes names {twice} twice.")
        return shapes

    def stage_of(self, epoch: int) -> int:
        """The number of an epoch's stage, from 0."""
        for number, stage in enumerate(self.stages[:-1]):
            epoch -= stage.epochs or 0
            if epoch < 0:
                return number
        return max(0, len(self.stages) - 1)

    def fixed(self) -> DataConfig:
        """The same, with no clip filtered out and each cut alike every time: what caches and measures are made of."""
        return replace(
            self, filter={}, repeats=True, start="first", crop="centre", mirror=False, cache=None, keep_gb=0.0
        )

    def check(self) -> None:
        if not 0.001 <= self.fps <= 1000:
            raise StditError(f"data.fps is {self.fps:g}; it must be from 0.001 to 1000.")
        for name, most in (("crops", 1000), ("workers", 1000), ("prefetch", 10_000)):
            if getattr(self, name) > most:
                raise StditError(f"data.{name} is {getattr(self, name)}; it must be at most {most:,}.")
        check_filter(self.filter)
        shapes = self.video_shapes()
        for number, stage in enumerate(self.stages, 1):
            if (stage.epochs is None) != (number == len(self.stages)):
                raise StditError(
                    f"data.stages: stage {number} of {len(self.stages)} has epochs {stage.epochs}; the last one has "
                    f"none and goes on to the end, the others say how many they last."
                )
            with about(f"data.stages: stage {number}"):
                if not any(map(stage.allows, shapes)):
                    raise StditError(f"no shape of data.shapes is within area {stage.area} and frames {stage.frames}.")
        for name, kind in get_type_hints(DataConfig).items():
            if (allowed := get_args(kind)) and get_origin(kind) is Literal and getattr(self, name) not in allowed:
                raise StditError(f"data.{name} is {getattr(self, name)!r}; it is one of {', '.join(allowed)}.")
        if not 0 <= self.max_crop < 1:
            raise StditError(f"data.max_crop is {self.max_crop}; it is a share of the area, from 0 up to below 1.")
        if self.keep_gb and (self.start, self.crop) != ("first", "centre"):
            raise StditError("data.keep_gb needs data.start=first and data.crop=centre: other cuts differ by epoch.")
        if self.crops < 1 or (self.crops > 1 and (self.start, self.crop, self.mirror) == ("first", "centre", False)):
            raise StditError(
                f"data.crops is {self.crops}; it is 1, or more if data.start or data.crop is random or data.mirror on."
            )
        if not 0 < self.timeout <= 1e6:
            raise StditError(f"data.timeout is {self.timeout:g}; it must be a number of seconds, at most a million.")
        if self.workers < 0 or self.prefetch < 1:
            raise StditError(
                f"data.workers is {self.workers} (at least 0), data.prefetch {self.prefetch} (at least 1)."
            )


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
    for name, rows in left_out(manifest, config.filter).items():
        reason[rows & (reason < 0)] = list(REASONS).index(name)
    if not config.repeats:
        shaped = np.logical_or.reduce([stage.bucket >= 0 for stage in found.stages])
        reason[repeated(manifest, shaped & (reason < 0))] = list(REASONS).index("repeat")
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
