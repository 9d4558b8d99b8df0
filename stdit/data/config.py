"""The config sections `data` and `plan`: what is read, how clips are cut, and how an epoch is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from stdit.data.measure.scores import SCORES
from stdit.errors import StditError, error_context, nearest_name
from stdit.settings import check
from stdit.shapes import LARGEST, VideoShape, frames_for

Bounds = tuple[NonNegativeFloat | None, NonNegativeFloat | None]
Multiple = Annotated[int, Field(ge=1, lt=LARGEST)]
FILTERS = ("filter", "repeats")  # the settings of DataConfig that leave clips out; by default they leave out none


@dataclass
class ShapeRule:
    """Shapes by rule: every area at every aspect ratio, for every duration at `data.fps`.

    areas: WIDTHxHEIGHT; only the number of pixels counts.
    aspects: aspect ratios, WIDTH:HEIGHT.
    durations: in seconds; 0 for images.
    multiple: widths and heights are rounded to a multiple of this, the VAE's stride times the patch.
    frame_stride: frames are rounded to 1 + a multiple of this, the VAE's stride in time.
    """

    areas: Annotated[list[str], Field(min_length=1)]
    aspects: Annotated[list[str], Field(min_length=1)]
    durations: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    multiple: Multiple = 16
    frame_stride: Multiple = 4

    def shapes(self, fps: float) -> tuple[VideoShape, ...]:
        """Each shape once, even if two aspect ratios round to it."""
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
            if seconds and frames == 1:
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

    epochs: how long it lasts. The last stage, and only that, leaves it unset: it lasts to the end of the run.
    area: WIDTHxHEIGHT, the most pixels per frame; unset: no limit.
    frames: the most frames; unset: no limit.
    """

    epochs: PositiveInt | None = None
    area: str | None = None
    frames: NonNegativeInt | None = None

    def allows(self, shape: VideoShape) -> bool:
        most = None if self.area is None else VideoShape.parse(self.area)
        small = most is None or shape.width * shape.height <= most.width * most.height
        return small and (self.frames is None or shape.frames <= self.frames)


@dataclass
class DataConfig:
    """Which clips are read, and how they are cut.

    manifest: the manifest file, its URL, or a pattern such as sets/*.parquet; or a list of these, which make one data
        set. A clip that several have counts once, as the first of them has it.
    shapes: WIDTHxHEIGHTxFRAMES, or WIDTHxHEIGHT for images. Every clip goes to one of them.
    rule: gives the shapes by areas, aspect ratios and durations, in place of `shapes`.
    stages: a curriculum over epochs; empty: all shapes in all epochs.
    sources: how often per epoch the clips of a source come, by a pattern of their paths in the manifest, such as
        {"talks/*": 0.5}. The first pattern that matches counts; clips that match none come once. With several
        manifests, a path begins with its manifest's folder.
    filter: lowest and highest score of the clips to train on, such as {motion: [2, null], black_bars: [null, 0.1]};
        null: no bound. Needs the columns that `stdit data scan --scores` writes.
    repeats: also takes clips that look like another one that is taken; false needs the same columns.
    fps: frames per second at which videos are read. Slower sources (below 0.9 × fps) are left out, unless
        `repeat_frames` is set.
    repeat_frames: also takes sources slower than fps, and shows some of their frames twice.
    max_crop: the largest share of a frame's area that may be cut off to get another aspect ratio.
    upscale: also takes clips smaller than the shape.
    start: where in a longer source a clip starts: random (keyed by seed, epoch and clip), or first: at its first frame.
    crop: which part of a frame of another aspect ratio is kept: random (keyed) or centre.
    mirror: flips half of the clips horizontally (keyed). Wrong where a caption or a sign says left or right.
    cache: the folder or URL that `stdit data encode` wrote. Latents come from there, and nothing is decoded.
    cache_dtype: of the cache's tensors.
    crops: cuts of each clip in the cache. 1: from the first frame, at the centre. More: as `start`, `crop` and `mirror`
        say, keyed by clip and number; training draws one of them for every occurrence.
    workers: processes that read ahead; 0: the training reads by itself. Batches are the same for any number. With
        workers, a file that crashes or hangs the decoder costs its clip and not the run.
    timeout: seconds of CPU time that reading a clip may take, and seconds to wait for its file, before it is left out.
    verify: compares the sha256 of each file with the scanned one (once per worker), not only size and time. Clips of
        changed files are left out.
    prefetch: micro-steps to read ahead.
    keep_gb: decoded clips to keep in memory, in GB, for small data; needs start: first and crop: centre.
    """

    manifest: str | list[str] = ""
    shapes: list[str] = field(default_factory=list)
    rule: ShapeRule | None = None
    stages: list[Stage] = field(default_factory=list)
    sources: dict[str, NonNegativeFloat] = field(default_factory=dict)
    filter: dict[str, Bounds] = field(default_factory=dict)
    repeats: bool = True
    fps: Annotated[float, Field(ge=0.001, le=1000)] = 16.0
    repeat_frames: bool = False
    max_crop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    upscale: bool = False
    start: Literal["random", "first"] = "random"
    crop: Literal["random", "centre"] = "random"
    mirror: bool = False
    cache: str | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    crops: Annotated[int, Field(ge=1, le=1000)] = 1
    workers: Annotated[int, Field(ge=0, le=1000)] = 2
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    verify: bool = False
    prefetch: Annotated[int, Field(ge=1, le=10_000)] = 4
    keep_gb: NonNegativeFloat = 0.0

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
        """The same without FILTERS, and with every clip cut from its first frame and centre, without the cache.

        Evaluation assigns held-out clips with it. `stdit data encode` takes only the cuts from it (for `crops: 1`).
        """
        unfiltered: dict[str, Any] = {name: getattr(DataConfig(), name) for name in FILTERS}
        return replace(self, **unfiltered, start="first", crop="centre", mirror=False, cache=None, keep_gb=0.0)

    def check(self) -> None:
        """Raises StditError for what no run can be trained with; also for an instance that no file gave."""
        check(self, "the config", "data")
        for name, (least, most) in self.filter.items():
            if name not in SCORES:
                raise StditError(
                    f"data.filter: {name} is not a score.{nearest_name(name, SCORES)} "
                    f"Those that `stdit data scan --scores` writes are {', '.join(SCORES)}."
                )
            if least is not None and most is not None and least > most:
                raise StditError(
                    f"data.filter: {name} [{least:g}, {most:g}] lets nothing through: write [least, most]."
                )
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
        if self.keep_gb and (self.start, self.crop) != ("first", "centre"):
            raise StditError("data.keep_gb needs data.start=first and data.crop=centre: other cuts differ by epoch.")
        if self.crops > 1 and (self.start, self.crop, self.mirror) == ("first", "centre", False):
            raise StditError(f"data.crops is {self.crops}, which needs data.start or data.crop random, or data.mirror.")


@dataclass
class PlanConfig:
    """How an epoch is cut into steps.

    largest_clips_per_step: work of a global step, in clips of the largest shape that has clips.
    work_per_step: work of a global step in forward FLOPs; replaces `largest_clips_per_step`.
    tokens_per_pack: tokens of a micro-step on one rank, or on the ranks that share a pack
        (`parallel.sequence_parallel`); unset: those of two of the largest clips, at least 16384.
    """

    largest_clips_per_step: NonNegativeFloat = 16.0
    work_per_step: NonNegativeInt | None = None
    tokens_per_pack: NonNegativeInt | None = None
