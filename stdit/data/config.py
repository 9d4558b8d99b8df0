"""The config sections `data` and `plan`: what is read, how clips are cut, and how an epoch is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args, get_origin, get_type_hints

from stdit.data.measure.scores import SCORES
from stdit.errors import StditError, error_context, nearest_name
from stdit.shapes import LARGEST, VideoShape, frames_for

Bounds = tuple[float | None, float | None]


def check_filter(bounds: Mapping[str, Bounds]) -> None:
    for name, (least, most) in bounds.items():
        if name not in SCORES:
            raise StditError(
                f"data.filter: {name} is not a score.{nearest_name(name, SCORES)} "
                f"Those that `stdit data scan --scores` writes are {', '.join(SCORES)}."
            )
        if least is not None and most is not None and least > most:
            raise StditError(f"data.filter: {name} [{least:g}, {most:g}] lets nothing through: write [least, most].")


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
        with error_context("areas"):
            areas = [VideoShape.parse(area) for area in self.areas]
        for area in areas:
            if not area.is_image:
                raise StditError(f"areas: {area} has frames; an area is WIDTHxHEIGHT alone.")
            for aspect in map(_aspect, self.aspects):
                sides = math.sqrt(area.width * area.height * aspect), math.sqrt(area.width * area.height / aspect)
                sizes.append([max(1, round(side / self.multiple)) * self.multiple for side in sides])
        for seconds in self.durations:
            with error_context("durations"):
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
            with error_context("data.rule"):
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
            with error_context(f"data.stages: stage {number}"):
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


@dataclass
class PlanConfig:
    """How an epoch is cut.

    largest_clips_per_step: work of a global step, as so many clips of the largest shape that has clips.
    work_per_step: the same in forward FLOPs; when set, it takes the place of `largest_clips_per_step`.
    tokens_per_pack: what one rank holds in a micro-step; unset: twice the largest clip, at least 16384.
    """

    largest_clips_per_step: float = 16.0
    work_per_step: int | None = None
    tokens_per_pack: int | None = None
