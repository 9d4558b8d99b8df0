"""Reading and writing of video and image files: frames by time, as a player shows them, or a named reason why not.

Importing this module is cheap (no torch): the processes that probe files import nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from stdit.data.needed import Times, needed_packets
from stdit.data.paths import open_bytes, split_member
from stdit.data.pixels import (
    IMAGE_SUFFIXES,
    LIMITS,
    Limits,
    VideoError,
    check_content,
    check_file,
    cover,
    decode_image,
    displayed_size,
    is_image,
    plain,
    progressive,
    strange_file,
    to_rgb,
)
from stdit.data.video_write import contact_sheet, write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "LIMITS",
    "VIDEO_SUFFIXES",
    "Limits",
    "Probe",
    "VideoError",
    "contact_sheet",
    "is_image",
    "probe",
    "read_frames",
    "write_video",
]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".3g2", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".ogv", ".flv", ".wmv", ".asf", ".gif", ".mxf", ".y4m", ".ivf"}
)
# Containers of pictures only: playlists and scripts (HLS, concat, …) could make a file open other files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,ogg,asf,gif,mxf,h264,hevc,ivf,yuv4mpegpipe,nut"
)

# Before PyAV 19 metadata that is not UTF-8 made opening fail, unless asked to replace it.
OPEN_OPTIONS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}

VERIFY_PIXELS = 3_000_000_000  # what `probe` decodes of a file at most: ~10,000 frames of 640×480, ~360 of 4K


@dataclass(frozen=True)
class Probe:
    """What a player shows: size after rotation and with square pixels, frames and seconds that can be decoded.

    `start` is the time of the first frame after the stream's own start (almost always 0); `end` is when the last frame
    ends. `damage` says where decoding stopped, if it did; `verified` whether all frames were decoded.
    """

    width: int
    height: int
    fps: float
    frames: int
    start: float
    end: float
    codec: str
    image: bool = False
    verified: bool = True
    damage: str | None = None

    @property
    def duration(self) -> float:
        return self.end - self.start


def probe(path: str, verify_pixels: int = VERIFY_PIXELS, limits: Limits = LIMITS) -> Probe:
    """Size, frame rate, frames and duration of a file, by demuxing it whole and decoding up to `verify_pixels` of it.

    Raises VideoError if not one frame can be decoded. A file damaged further in is described up to the damage.
    """
    check_file(path, limits)
    if is_image(path):
        frame = decode_image(path, limits)
        return Probe(frame.shape[1], frame.shape[0], 1.0, 1, 0.0, 0.0, Path(path).suffix[1:].lower(), image=True)
    with open_source(path, limits) as source:
        return source.probe(verify_pixels)


def _new_frames(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def read_frames(
    path: str,
    count: int,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    start: float = 0.0,
    crop: tuple[float, float] = (0.5, 0.5),
    limits: Limits = LIMITS,
    sha256: str | None = None,
    allocate: Callable[[tuple[int, ...]], np.ndarray] = _new_frames,
) -> np.ndarray:
    """`count` frames at start, start + 1/fps, …: uint8 RGB (T, H, W, 3), each the source frame nearest in time.

    size: (width, height); frames are scaled with antialiasing to cover it, then cropped at `crop`, the share of the
    surplus that is cut off on the left and on top (0.5 is the centre). None keeps the displayed size. fps None takes
    the source's frames one after another. Rotation, mirroring and pixel aspect ratio are applied. Where the size
    changes in mid-stream, each frame is scaled and cropped for itself; with size None, to the first one's size.
    sha256: the file's, checked. allocate: makes the uint8 array of a shape that is filled and returned.

    Raises VideoError, whatever a strange file brings up in the decoder: one clip must not end a training.
    """
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1.")
    with strange_file(path):
        check_file(path, limits)
        if sha256 is not None:
            check_content(path, sha256)
        return _read_frames(path, count, size, fps, start, crop, limits, allocate)


def _read_frames(
    path: str,
    count: int,
    size: tuple[int, int] | None,
    fps: float | None,
    start: float,
    crop: tuple[float, float],
    limits: Limits,
    allocate: Callable[[tuple[int, ...]], np.ndarray],
) -> np.ndarray:
    if is_image(path):
        if count > 1:
            raise VideoError(path, "too_short", f"is an image; {count} frames were asked for.")
        frame = decode_image(path, limits)
        frame = frame if size is None else cover(frame, size, crop)
        out = allocate((1, *frame.shape))
        out[0] = frame
        return out
    for seek in (True, False) if fps is not None and start > 1.0 else (False,):  # False: where seeking lands too late
        with open_source(path, limits) as source:
            frames = source.read(count, size, fps, start, crop, allocate, seek)
            if frames is not None:
                return frames
    raise AssertionError("from the beginning there are frames or an error")


class VideoSource:
    """One opened video stream. Times are seconds after the stream's own start."""

    def __init__(self, path: str, container: av.container.InputContainer, limits: Limits) -> None:
        self.path, self.container, self.limits = path, container, limits
        streams = [s for s in container.streams.video if not _is_cover_art(s)]
        if not streams:
            raise VideoError(path, "no_video", "has no video stream.")
        self.stream = streams[0]
        codec = self.stream.codec_context
        if codec is None:
            raise VideoError(path, "undecodable", "has a video stream of a codec that this FFmpeg does not decode.")
        self._check_size(codec.width, codec.height)
        codec.thread_count = 1  # workers run side by side; one thread each keeps memory and results the same
        self.tick = float(self.stream.time_base or 0)  # a Fraction a packet would cost as much as the packet
        self.origin = (self.stream.start_time or 0) * self.tick
        self.deadline = time.thread_time() + limits.seconds  # not wall-clock: other work may take the core
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.period = float(1 / rate) if rate else 1 / 25  # nominal, until timestamps say otherwise
        ratio = float(self.stream.sample_aspect_ratio or 1)
        self.pixel_aspect = ratio if 0.1 <= ratio <= 10 else 1.0
        self.probing, self.packet_times = False, list[float]()
        self.asked: Times | None = None  # what is read, of a stream in which unneeded frames may be skipped
        self.reformatter = VideoReformatter()
        # AVI stores no presentation times; what FFmpeg makes up for reordered frames goes back and forth
        self.timed = container.format.name != "avi"

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise VideoError(
                self.path, "too_large", f"is {width}x{height} pixels a frame; the limit is {self.limits.pixels} pixels."
            )

    def packets(self) -> Iterator[av.Packet]:
        packets = self.container.demux(self.stream)
        for _ in range(self.limits.packets):
            if time.thread_time() > self.deadline:
                raise VideoError(self.path, "timeout", f"took longer than {self.limits.seconds:g} s to read.")
            packet = next(packets, None)
            if packet is None:
                return
            if self.probing:
                stamp = packet.pts if packet.pts is not None else packet.dts
                if packet.size and stamp is not None and not packet.is_discard:
                    self.packet_times.append(stamp * self.tick - self.origin)
            yield packet
        raise VideoError(self.path, "too_long", f"has more than {self.limits.packets} packets.")

    def frames(self) -> Generator[tuple[float, av.VideoFrame], None, None]:
        """(time, frame) in order; raises VideoError('damaged') where decoding fails."""
        last = None
        for frame in progressive(self._decoded()):
            now = frame.time - self.origin if self.timed and frame.time is not None else None
            if last is not None and (now is None or now <= last):
                now = last + self.period  # no timestamp, or one that goes back
            last = 0.0 if now is None else now
            yield last, frame

    def seek(self, start: float) -> bool:
        """Makes `frames` begin at the last keyframe before `start` that the container knows of; False if it cannot."""
        if not self.timed:
            return False
        try:
            offset = int((start + self.origin) / float(self.stream.time_base or Fraction(1, 1000)))
            self.container.seek(offset, stream=self.stream, backward=True)
        except av.FFmpegError:
            return False
        return True

    def _decoded(self) -> Generator[av.VideoFrame, None, None]:
        decoded, progressive, skipping = 0, False, False
        codec = self.stream.codec_context
        try:
            for packet, needed in needed_packets(self.packets(), self.asked, self.tick, self.origin):
                if skipping != (progressive and not needed):
                    skipping = not skipping
                    codec.skip_frame = "NONREF" if skipping else "DEFAULT"
                for frame in packet.decode():
                    self._check_size(frame.width, frame.height)
                    decoded += 1
                    progressive = not frame.interlaced_frame  # else its neighbours in time are needed, too
                    if decoded > self.limits.frames:
                        raise VideoError(self.path, "too_long", f"more than {self.limits.frames} frames to decode.")
                    yield frame
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            # av's errors are OSErrors too; what is not about the data is about the disk or the network
            if isinstance(error, av.InvalidDataError | av.EOFError | av.PatchWelcomeError | av.ExternalError):
                message = f"cannot be decoded after {decoded} frames ({plain(error)})."
                raise VideoError(self.path, "damaged" if decoded else "undecodable", message) from error
            raise VideoError(self.path, "unreadable", f"reading failed ({plain(error)}).") from error

    def read(
        self,
        count: int,
        size: tuple[int, int] | None,
        fps: float | None,
        start: float,
        crop: tuple[float, float],
        allocate: Callable[[tuple[int, ...]], np.ndarray],
        seek: bool,
    ) -> np.ndarray | None:
        """As `read_frames`; None if the stream could not be sought to before `start`."""
        if seek and not self.seek(start):
            return None
        if fps is not None and self.timed and self.stream.codec_context.name == "h264":
            self.asked = Times(start, fps, count)
        out, taken = np.empty(0), 0
        previous: tuple[float, av.VideoFrame] | None = None
        converted: np.ndarray | None = None

        def take_previous() -> None:
            nonlocal converted, out, taken, size
            assert previous is not None
            if converted is None:
                converted = to_rgb(previous[1], self.pixel_aspect, size, crop, self.reformatter)
            if taken == 0:
                out = allocate((count, *converted.shape))
                size = converted.shape[1], converted.shape[0]
            out[taken] = converted
            taken += 1

        def wanted() -> float:
            return start + taken / fps if fps is not None else start

        try:
            for now, frame in self.frames():
                if seek and previous is None and (frame.pts is None or now > start):
                    return None
                if fps is None:  # every frame from `start` on
                    if now >= start - 1e-6:
                        previous, converted = (now, frame), None
                        take_previous()
                elif previous is not None:
                    while taken < count and wanted() <= (previous[0] + now) / 2 + 1e-9:
                        take_previous()
                if taken == count:
                    return out
                previous, converted = (now, frame), None
        except VideoError as error:
            # what was decoded before the damage is good, and the last such frame stands for half its own period
            if error.reason not in ("damaged", "undecodable"):
                raise
            damage: VideoError | None = error
        else:
            damage = None
        if previous is None and seek:  # landed where nothing more can be decoded
            return None
        if previous is None:
            raise damage or VideoError(self.path, "no_frames", "has a video stream, but not one frame in it.")
        # The last frame is shown for its own duration; half of it, or of a requested period, is within tolerance.
        tolerance = max(self.period, _seconds(previous[1].duration, previous[1].time_base), 1 / (fps or 1e9)) / 2
        while fps is not None and taken < count and wanted() <= previous[0] + tolerance + 1e-3:
            take_previous()
        if taken == count:
            return out
        if damage is not None:
            raise damage
        rate = "" if fps is None else f" at {fps:g} fps"
        raise VideoError(
            self.path,
            "too_short",
            f"its last frame is at {previous[0]:.3f} s; {count} frames{rate} from {start:.3f} s need more.",
        )

    def probe(self, verify_pixels: int) -> Probe:
        self.probing = True
        times: list[float] = []
        shown: tuple[int, int] | None = None
        last_duration, budget, damage, verified = 0.0, verify_pixels, None, True
        frames = self.frames()
        try:
            for now, frame in frames:
                shown = shown or displayed_size(frame, self.pixel_aspect)
                times.append(now)
                last_duration = _seconds(frame.duration, frame.time_base)
                budget -= frame.width * frame.height
                if budget <= 0:
                    verified = False
                    break
        except VideoError as error:
            if error.reason != "damaged":
                raise
            damage = error.message
        finally:
            frames.close()
        if not times or shown is None:
            raise VideoError(self.path, "no_frames", "has a video stream, but not one frame in it.")
        if not verified:  # the rest is counted, not decoded
            try:
                for _ in self.packets():
                    pass
            except av.FFmpegError as error:
                damage = f"cannot be read after {len(self.packet_times)} packets ({plain(error)})."
            times += sorted(t for t in self.packet_times if t > times[-1] + 1e-6)
        return self._describe(times, shown, last_duration, verified, damage)

    def _describe(
        self, times: list[float], shown: tuple[int, int], last_duration: float, verified: bool, damage: str | None
    ) -> Probe:
        first, last, count = times[0], times[-1], len(times)
        measured = (count - 1) / (last - first) if count > 1 and last > first else 1 / self.period
        declared = float(self.stream.average_rate or 0)
        # the container's rational rate is exact where it agrees with the timestamps
        fps = declared if declared and abs(declared / measured - 1) < 0.01 else measured
        if damage is not None or not 0 < last_duration < 4 / fps:
            last_duration = 1 / fps
        return Probe(
            *shown, fps, count, first, last + last_duration, self.stream.codec_context.name, False, verified, damage
        )


def _seconds(value: int | None, time_base: Fraction | None) -> float:
    return float((value or 0) * (time_base or 0))


def _is_cover_art(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


@contextmanager
def open_source(path: str, limits: Limits) -> Iterator[VideoSource]:
    """The file's first video stream."""
    options = {"format_whitelist": _FORMATS}
    part = open_bytes(path) if split_member(path) else None
    try:
        if part is None:
            options["protocol_whitelist"] = "file"
        container = av.open(part or f"file:{path}", mode="r", options=options, **OPEN_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        if part is not None:
            part.close()
        raise VideoError(path, "not_media", f"is not a video file that can be opened ({plain(error)}).") from error
    with part or nullcontext(), container:
        yield VideoSource(path, container, limits)
