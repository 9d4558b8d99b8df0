"""What one clip of `stdit sample` becomes with a model: its legal shape, its known frames and its request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.cli.sample.files import frames_hash
from stdit.cli.sample.rows import ClipSettings
from stdit.errors import StditError
from stdit.shapes import frames_for, nearest_frames, size_for

if TYPE_CHECKING:
    import numpy as np

    from stdit.sampling.pipeline import Pipeline, SampleRequest
    from stdit.shapes import VideoShape

Known = dict[str, "np.ndarray"]
GUIDES = ("guidance_interval", "guidance_rescale", "zero_star", "apg", "skip_layers")  # how guidance acts


@dataclass(frozen=True)
class PlannedClip:
    """A clip whose settings are legal for a model.

    known: its known frames, as `SampleRequest` takes them.
    init: {"init": the frames that it starts from}.
    """

    given: ClipSettings
    shape: VideoShape
    fps: float
    known: Known | None
    init: Known | None = None

    @property
    def known_count(self) -> int:
        return 0 if self.known is None else 1 if "image" in self.known else len(self.known["video"])

    @property
    def content_hash(self) -> str | None:
        """Of the frames that are known or that it starts from."""
        return frames_hash({**(self.known or {}), **(self.init or {})})

    @property
    def shared(self) -> dict[str, Any]:
        """The options that clips of one request have in common, by their names there and in a sidecar."""
        return {
            "frames": self.shape.frames, "fps": self.fps, "steps": self.given.steps, "guidance": self.given.guidance,
            "guidance_2": self.given.guidance_2, "seed": self.given.seed, "shift": self.given.shift,
            "reuse": self.given.reuse, "window": self.given.window,
        }  # fmt: skip

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for clips that fit in one request."""
        given = self.given
        own = (given.solver, given.negative, given.guidance_options, given.levels, given.strength)
        return (self.shape, *own, *self.shared.values())

    def recorded(self, pipeline: Pipeline) -> dict[str, Any]:
        """The clip's own settings, for its sidecar."""
        paths = {name: getattr(self.given, name) for name in ("image", "last", "video", "init")}
        return {
            "negative": self.given.negative, "size": f"{self.shape.width}x{self.shape.height}", **self.shared,
            **({"strength": self.given.strength} if self.init else {}),
            **{name: value for name in (*GUIDES, "levels") if (value := getattr(self.given, name)) is not None},
            "solver": self.given.solver or pipeline.scheduler,
            **{name: str(path) if path else None for name, path in paths.items()}, "known_frames": self.known_count,
        }  # fmt: skip

    def describe(self, pipeline: Pipeline, clips: int) -> str:
        """One line on this clip and all others of its shape."""
        many, shape, fps = f"{clips} clips, " if clips > 1 else "", self.shape, self.fps
        if shape.frames == 1:
            return f"{many}{shape.width}x{shape.height}, an image"
        line = f"{many}{shape.width}x{shape.height}, {shape.frames} frames at {fps:g} fps, {shape.frames / fps:.2f} s"
        if known := self.known_count:
            line += f", the first {known} known" if known > 1 else ", the first frame known"
        trained = fps if pipeline.knows_fps else pipeline.settings.fps
        if fps != trained:
            line += f" (trained at {trained:g} fps: motion plays {fps / trained:.2g} times as fast)"
        return line


def plan_clips(pipeline: Pipeline, clips: Sequence[ClipSettings]) -> list[PlannedClip]:
    """Raises StditError, which begins with `where` of its clip, for settings that the model does not take."""
    read: dict[tuple[object, ...], Known | None] = {}  # clips that begin alike share their known frames
    planned = []
    for clip in clips:
        try:
            planned.append(_plan(pipeline, clip, read))
        except StditError as error:
            raise StditError(f"{clip.where}{error}") from None
    return planned


def request_of(clips: Sequence[PlannedClip], indices: Sequence[int]) -> SampleRequest:
    """One request for clips of equal `key`."""
    from stdit.sampling.pipeline import SampleRequest

    first = clips[0]
    return SampleRequest(
        [clip.given.prompt for clip in clips], indices=indices, negative_prompt=first.given.negative,
        guidance_options=first.given.guidance_options, levels=first.given.noise_levels,
        size=(first.shape.width, first.shape.height), known=[clip.known for clip in clips],
        init=[clip.init["init"] if clip.init else None for clip in clips], strength=first.given.strength,
        solver=first.given.solver,
        **first.shared,
    )  # fmt: skip


def _plan(pipeline: Pipeline, clip: ClipSettings, read: dict[tuple[object, ...], Known | None]) -> PlannedClip:
    from stdit.data.decode.video import probe, read_frames

    fps = float(pipeline.settings.fps if clip.fps is None else clip.fps)
    ratio, frames = clip.ratio, clip.frames
    model_for = clip.source or clip.init
    if ratio is None and clip.exact_size is None and model_for is not None:
        probed = probe(str(model_for))
        ratio = probed.width / probed.height
    if clip.init is not None and frames is None:
        there = max(1, int(probe(str(clip.init)).duration * fps + 1e-6))  # frames at this rate
        frames = nearest_frames(there, pipeline.vae.config.stride)[0]
    if clip.seconds is not None:
        frames = frames_for(clip.seconds, fps, pipeline.vae.config.stride)
    shape = pipeline.shape(clip.exact_size or _nearest_size(pipeline, ratio, clip.resolution), frames)
    key = (clip.image, clip.last, clip.video, clip.video_frames, shape, fps)
    if key not in read:
        read[key] = _known(pipeline, shape, fps, clip)
    of_init = (clip.init, shape, fps)
    if of_init not in read:
        size = (shape.width, shape.height)
        init = clip.init
        read[of_init] = None if init is None else {"init": read_frames(str(init), shape.frames, size, fps)}
    return PlannedClip(clip, shape, fps, read[key], read[of_init])


def _nearest_size(pipeline: Pipeline, ratio: float | None, resolution: int | None) -> tuple[int, int] | None:
    """The legal size nearest to an aspect ratio and a short side. The model's own fills in the one that is None."""
    if ratio is None and resolution is None:
        return None
    default = pipeline.settings.shape
    short = min(default.width, default.height) if resolution is None else resolution
    return size_for(ratio or default.width / default.height, short, pipeline.multiple)


def _known(pipeline: Pipeline, shape: VideoShape, fps: float, clip: ClipSettings) -> Known | None:
    """The known frames, scaled to cover the clip and cropped at the centre."""
    from stdit.data.decode.video import read_frames

    size = (shape.width, shape.height)
    if clip.image is not None:
        known = {"image": read_frames(str(clip.image), 1, size)[0]}
    elif clip.video is not None:
        known = {"video": _end_of(clip.video, pipeline, shape, fps, clip.video_frames)}
    else:
        return None
    if clip.last is not None:
        known["last"] = read_frames(str(clip.last), 1, size)[0]
    return known


def _end_of(video: Path, pipeline: Pipeline, shape: VideoShape, fps: float, count: int | None) -> np.ndarray:
    """The last `count` frames of a video at a rate; by default about half of the clip, if it is that long."""
    from stdit.data.decode.video import probe, read_frames

    found = probe(str(video))
    there = max(1, int(found.duration * fps + 1e-6))  # frames at this rate
    if count is None:
        count = nearest_frames(min(there, 1 + (shape.frames - 1) // 2), pipeline.vae.config.stride)[0]
    elif count > there:
        raise StditError(f"{video} has {there} frames at {fps:g} fps, not the {count} of --video-frames.")
    start = max(found.start, found.end - 1 / found.fps - (count - 1) / fps)  # the last one is the video's last
    return read_frames(str(video), count, (shape.width, shape.height), fps, start)
