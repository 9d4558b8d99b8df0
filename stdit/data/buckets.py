"""Shape buckets: which shape every clip is cut to, or the reason why it is cut to none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from stdit.data.manifest import Manifest
from stdit.errors import StditError
from stdit.shapes import VideoShape


@dataclass
class DataConfig:
    """What is read, and how clips are cut.

    manifest: the manifest file, or its URL.
    shapes: WIDTHxHEIGHTxFRAMES (WIDTHxHEIGHT for images); clips go to exactly one of them.
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
    timeout: seconds that reading a clip may take before it is left out.
    verify: also leave out clips whose file is not the one that was scanned, by its sha256 (read once a worker).
    prefetch: how many micro-steps they read ahead.
    keep_gb: decoded clips kept in memory, in GB, for data small enough; only where start is first and crop centre.
    """

    manifest: str = ""
    shapes: list[str] = field(default_factory=list)
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
        shapes = tuple(VideoShape.parse(text) for text in self.shapes)
        if not shapes:
            raise StditError("data.shapes is empty. List the shapes to train, such as [832x480x81, 480x832x81].")
        twice = next((str(s) for i, s in enumerate(shapes) if s in shapes[:i]), None)
        if twice:
            raise StditError(f"data.shapes names {twice} twice.")
        return shapes

    def fixed(self) -> DataConfig:
        """The same, with every clip decoded and cut alike each time: what caches and measures are made of."""
        return replace(self, start="first", crop="centre", mirror=False, cache=None, keep_gb=0.0)

    def check(self) -> None:
        self.video_shapes()
        for name, kind in get_type_hints(DataConfig).items():
            if (allowed := get_args(kind)) and get_origin(kind) is Literal and getattr(self, name) not in allowed:
                raise StditError(f"data.{name} is {getattr(self, name)!r}; it is one of {', '.join(allowed)}.")
        if not self.fps > 0:
            raise StditError(f"data.fps is {self.fps}; it must be positive.")
        if not 0 <= self.max_crop < 1:
            raise StditError(f"data.max_crop is {self.max_crop}; it is a share of the area, from 0 up to below 1.")
        if self.keep_gb and (self.start, self.crop) != ("first", "centre"):
            raise StditError("data.keep_gb needs data.start=first and data.crop=centre: other cuts differ by epoch.")
        if self.crops < 1 or (self.crops > 1 and (self.start, self.crop, self.mirror) == ("first", "centre", False)):
            raise StditError(
                f"data.crops is {self.crops}; it is 1, or more if data.start or data.crop is random or data.mirror on."
            )
        if not self.timeout > 0:
            raise StditError(f"data.timeout is {self.timeout}; it must be a positive number of seconds.")
        if self.workers < 0 or self.prefetch < 1:
            raise StditError(
                f"data.workers is {self.workers} (at least 0), data.prefetch {self.prefetch} (at least 1)."
            )


# A clip's reason is the first of these conditions, in this order, that no shape meets together with those before.
REASONS = {
    "kind": "an image, and no shape has one frame; or a video, and every shape has one frame",
    "fps": "the source has fewer frames a second than asked for (data.repeat_frames allows it)",
    "short": "shorter than every shape's duration",
    "small": "smaller than every shape that is short enough (data.upscale allows it)",
    "aspect": "cutting to the nearest aspect ratio would lose more than data.max_crop of the area",
}


@dataclass(frozen=True)
class Assignment:
    """Which shape every row goes to.

    bucket: (rows,) int32 index into shapes, −1 for a clip in none.
    reason: (rows,) int8 index into REASONS, −1 for a clip that has a shape.
    lost: (rows,) float32 share of the frame's area that is cut off (0 where the clip has no bucket).
    """

    bucket: np.ndarray
    shapes: tuple[VideoShape, ...]
    reason: np.ndarray
    lost: np.ndarray

    @cached_property
    def counts(self) -> np.ndarray:
        """(shapes,) clips in each."""
        return np.bincount(self.bucket[self.bucket >= 0], minlength=len(self.shapes))

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
    """Every clip to exactly one shape or to a named reason.

    Among the shapes that fit: the nearest aspect ratio (in log), then the most frames, then the largest area. Images go
    to shapes of one frame, videos to the others. Nothing is looped; nothing is upscaled unless `config.upscale`.
    """
    config.check()
    columns = {name: manifest.column(name) for name in ("frames", "fps", "width", "height", "start", "end")}
    return assign_columns(**columns, shapes=config.video_shapes(), config=config)


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
    """`assign` on the columns alone, (rows,) each. Memory is a few bytes a row, whatever the number of shapes."""
    rows = len(frames)
    image = frames == 1
    aspect = width / height
    bucket = np.full(rows, -1, np.int32)
    lost = np.zeros(rows, np.float32)
    passed = np.zeros(rows, np.int8)  # the most conditions that one shape meets
    best = np.full(rows, np.inf)  # distance of the chosen aspect ratio
    # From the best to the worst by the later criteria, so that a nearer aspect ratio alone replaces a choice.
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i].frames, -shapes[i].height * shapes[i].width, i))
    for index in order:
        shape = shapes[index]
        cost = lost_area(aspect, shape)
        conditions = (
            image == shape.is_image,
            image | (fps >= 0.9 * config.fps) | config.repeat_frames,
            image | (slack(start, end, fps, shape.frames, config.fps) >= 0),
            ((width >= shape.width) & (height >= shape.height)) | config.upscale,
            cost <= config.max_crop + 1e-9,
        )
        meets = np.ones(rows, bool)
        for number, condition in enumerate(conditions, 1):
            meets &= condition
            np.maximum(passed, np.where(meets, number, 0).astype(np.int8), out=passed)
        distance = np.abs(np.log(aspect) - math.log(shape.width / shape.height))
        better = meets & (distance < best - 1e-12)
        bucket[better] = index
        best[better] = distance[better]
        lost[better] = cost[better]
    reason = np.where(bucket >= 0, -1, passed).astype(np.int8)
    return Assignment(bucket, tuple(shapes), reason, lost)
