"""An opened file as a sequence of timed frames, whichever library decodes it. Reading, probing and measures use it."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from stdit.data.decode.checks import Limits, VideoError, error_text
from stdit.data.decode.pixels import deinterlaced, displayed_size, to_rgb, within

# Decoders that also decode a WebM file's alpha channel; FFmpeg's own do not.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_WAITING = 64  # packets held back until later ones are known; H.264 reorders at most 16 frames


@dataclass(frozen=True)
class Probe:
    """A file as a player shows it. Times are in seconds after the stream's own start."""

    width: int  # after rotation, with square pixels
    height: int
    fps: float
    frames: int  # that can be decoded
    start: float  # of the first frame (almost always 0)
    end: float  # of the last frame
    codec: str
    image: bool = False
    verified: bool = True  # all frames were decoded
    damage: str | None = None  # where decoding stopped, if it did

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class SampleTimes:
    """The times start, start + 1/fps, …: `count` of them, in seconds."""

    start: float
    fps: float
    count: int

    def any_in(self, low: float, high: float) -> bool:
        """Whether a sample time lies in [low, high], within a microsecond."""
        first = max(0, math.ceil((low - 1e-6 - self.start) * self.fps)) if low > -math.inf else 0
        return first < self.count and self.start + first / self.fps <= high + 1e-6


class Source:
    """Frames of one opened file. Times are seconds after the stream's own start."""

    timed = True  # whether frames have timestamps
    wanted: SampleTimes | None = None  # frames that are not the nearest to one of these times may be skipped
    probing = False  # whether packet times are recorded, to count frames

    def __init__(self, path: str, limits: Limits, codec: str, rate: Fraction | None) -> None:
        self.path, self.limits, self.codec, self.declared_rate = path, limits, codec, rate
        self.deadline = time.thread_time() + limits.seconds  # CPU time: other work may occupy the core
        self.period = float(1 / rate) if rate else 1 / 25  # nominal, until timestamps say otherwise
        self.pixel_aspect = 1.0
        self._reformatter = VideoReformatter()
        self._small: tuple[int, int] | None = None

    def frames(self) -> Generator[tuple[float, av.VideoFrame], None, None]:
        """Yields (time, frame) in order; raises VideoError "damaged" where decoding fails."""
        raise NotImplementedError

    def seek(self, start: float) -> bool:
        """Makes `frames` begin at the last keyframe before `start`; returns False if the container cannot seek."""
        return False

    def remaining_times(self, last: float) -> tuple[list[float], str | None]:
        """Times of the frames after `last`, without decoding them, and the damage that stopped reading, if any."""
        raise NotImplementedError

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise VideoError(self.path, "timeout", f"took longer than {self.limits.seconds:g} s to read.")

    def check_count(self, frames: int) -> None:
        if frames > self.limits.frames:
            raise VideoError(self.path, "too_long", f"more than {self.limits.frames} frames to decode.")

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            message = f"has frames of {width}x{height}; the limit is {self.limits.pixels} pixels."
            raise VideoError(self.path, "too_large", message)

    def rgb(self, frame: av.VideoFrame, size: tuple[int, int] | None, crop: tuple[float, float]) -> np.ndarray:
        """As `pixels.to_rgb`."""
        return to_rgb(frame, self.pixel_aspect, size, crop, self._reformatter)

    def small_rgb(self, frame: av.VideoFrame, short_side: int) -> np.ndarray:
        """(H, W, 3) uint8, scaled down, never up, to at most this shorter side: the first frame's size for all."""
        self._small = self._small or within(displayed_size(frame, self.pixel_aspect), short_side)
        return self.rgb(frame, self._small, (0.5, 0.5))

    def nearest(self, count: int, fps: float | None, start: float, seek: bool) -> Iterator[av.VideoFrame]:
        """Yields `count` frames: those nearest to start, start + 1/fps, …, or (fps None) all from `start` on.

        seek: to `start` before decoding; yields none if that does not land before it. Raises VideoError.
        """
        if seek and not self.seek(start):
            return
        if fps is not None and self.timed:
            self.wanted = SampleTimes(start, fps, count)
        taken, last, shown = 0, 0.0, None
        damage: VideoError | None = None
        try:
            for now, frame in self.frames():
                if seek and shown is None and (frame.pts is None or now > start):
                    return
                if fps is None and now >= start - 1e-6:
                    yield frame
                    taken += 1
                elif fps is not None and shown is not None:
                    while taken < count and start + taken / fps <= (last + now) / 2 + 1e-9:
                        yield shown
                        taken += 1
                if taken == count:
                    return
                last, shown = now, frame
        except VideoError as error:
            # frames before the damage are good, and the last one still counts for half its period
            if error.reason not in ("damaged", "undecodable"):
                raise
            damage = error
        if shown is None:  # if after seeking, reading from the beginning may find some
            if seek:
                return
            raise damage or self._no_frames()
        # the last frame may also stand for times up to half its duration, or half a requested period, later
        tolerance = max(self.period, _duration(shown), 1 / (fps or 1e9)) / 2
        while fps is not None and taken < count and start + taken / fps <= last + tolerance + 1e-3:
            yield shown
            taken += 1
        if damage is not None and taken < count:
            raise damage
        if taken < count:
            rate = "" if fps is None else f" at {fps:g} fps"
            message = f"its last frame is at {last:.3f} s, too early for {count} frames{rate} from {start:.3f} s."
            raise VideoError(self.path, "too_short", message)

    def probe(self, verify_pixels: int) -> Probe:
        """As `video.probe`."""
        self.probing = True
        times: list[float] = []
        shown: tuple[int, int] | None = None
        last_duration, damage, verified = 0.0, None, True
        with closing(self.frames()) as frames:
            try:
                for now, frame in frames:
                    shown = shown or displayed_size(frame, self.pixel_aspect)
                    times.append(now)
                    last_duration = _duration(frame)
                    verify_pixels -= frame.width * frame.height
                    if verify_pixels <= 0:
                        verified = False
                        break
            except VideoError as error:
                if error.reason != "damaged":
                    raise
                damage = error.message
        if shown is None:
            raise self._no_frames()
        if not verified:
            more, damage = self.remaining_times(times[-1])
            times += more
        first, last, count = times[0], times[-1], len(times)
        measured = (count - 1) / (last - first) if count > 1 and last > first else 1 / self.period
        declared = float(self.declared_rate or 0)
        # if the container's rate agrees with the timestamps, it is the exact one
        fps = declared if declared and abs(declared / measured - 1) < 0.01 else measured
        if damage is not None or not 0 < last_duration < 4 / fps:
            last_duration = 1 / fps
        return Probe(*shown, fps, count, first, last + last_duration, self.codec, False, verified, damage)

    def _no_frames(self) -> VideoError:
        return VideoError(self.path, "no_frames", "has a video stream without a single frame.")


class VideoSource(Source):
    """The first video stream of a container, decoded by FFmpeg."""

    def __init__(self, path: str, container: av.container.InputContainer, limits: Limits) -> None:
        streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        if not streams:
            raise VideoError(path, "no_video", "has no video stream.")
        self.container, self.stream = container, streams[0]
        codec = self.stream.codec_context
        if codec is None:
            raise VideoError(path, "undecodable", "uses a codec that this FFmpeg does not decode.")
        rate = self.stream.average_rate
        super().__init__(path, limits, codec.name, rate)
        if not rate and (guessed := self.stream.guessed_rate or self.stream.base_rate):
            self.period = float(1 / guessed)
        self.check_size(codec.width, codec.height)
        self.tick = float(self.stream.time_base or 0)  # a Fraction per packet would cost as much as the packet
        self.origin = (self.stream.start_time or 0) * self.tick
        ratio = float(self.stream.sample_aspect_ratio or 1)
        self.pixel_aspect = ratio if 0.1 <= ratio <= 10 else 1.0
        self.packet_times = list[float]()  # filled while probing
        # AVI stores no presentation times, and those that FFmpeg invents for reordered frames are not monotonic
        self.timed = container.format.name != "avi"
        tags = {name.lower(): value for name, value in self.stream.metadata.items()}
        self.decoder: av.VideoCodecContext | None = None  # replaces the stream's own
        if tags.get("alpha_mode") == "1" and _WITH_ALPHA.get(codec.name) in av.codecs_available:
            self.decoder = cast(av.VideoCodecContext, av.CodecContext.create(_WITH_ALPHA[codec.name], "r"))
            self.decoder.extradata = codec.extradata
        for context in (codec, self.decoder):
            if context is not None:
                context.thread_count = 1  # workers run in parallel; one thread each keeps memory and results constant

    def remaining_times(self, last: float) -> tuple[list[float], str | None]:
        damage = None
        try:
            for _ in self.packets():
                pass
        except av.FFmpegError as error:
            damage = f"cannot be read after {len(self.packet_times)} packets ({error_text(error)})."
        return sorted(t for t in self.packet_times if t > last + 1e-6), damage

    def packets(self) -> Iterator[av.Packet]:
        packets = self.container.demux(self.stream)
        for _ in range(self.limits.packets):
            self.check_time()
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
        last = None
        for frame in deinterlaced(self._decoded()):
            now = frame.time - self.origin if self.timed and frame.time is not None else None
            if last is not None and (now is None or now <= last):
                now = last + self.period  # the timestamp is missing or goes backwards
            last = 0.0 if now is None else now
            yield last, frame

    def seek(self, start: float) -> bool:
        if not self.timed:
            return False
        try:
            offset = int((start + self.origin) / (self.tick or 0.001))
            self.container.seek(offset, stream=self.stream, backward=True)
        except av.FFmpegError:
            return False
        if self.decoder is not None:
            self.decoder.flush_buffers()
        return True

    def _decoded(self) -> Generator[av.VideoFrame, None, None]:
        decoded, is_progressive, skipping = 0, False, False
        codec = self.stream.codec_context
        try:
            wanted = self.wanted if self.codec == "h264" else None
            for packet, needed in needed_packets(self.packets(), wanted, self.tick, self.origin):
                if skipping != (is_progressive and not needed):
                    skipping = not skipping
                    codec.skip_frame = "NONREF" if skipping else "DEFAULT"
                for frame in packet.decode() if self.decoder is None else self.decoder.decode(packet):
                    self.check_size(frame.width, frame.height)
                    is_progressive = not frame.interlaced_frame  # deinterlacing needs the neighbours in time
                    decoded += 1
                    self.check_count(decoded)
                    yield frame
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            # av's errors are OSErrors too; those that do not concern the data concern the disk or the network
            if isinstance(error, av.InvalidDataError | av.EOFError | av.PatchWelcomeError | av.ExternalError):
                message = f"cannot be decoded after {decoded} frames ({error_text(error)})."
                raise VideoError(self.path, "damaged" if decoded else "undecodable", message) from error
            raise VideoError(self.path, "unreadable", f"reading failed ({error_text(error)}).") from error


def _duration(frame: av.VideoFrame) -> float:
    return float((frame.duration or 0) * (frame.time_base or 0))


def needed_packets(
    packets: Iterable[av.Packet], wanted: SampleTimes | None, tick: float, origin: float
) -> Iterator[tuple[av.Packet, bool]]:
    """Yields (packet, needed) in order. A packet is needed if its frame may be the nearest to a sample time.

    wanted: None if all packets are needed.
    tick, origin: presentation times are `pts · tick − origin` seconds.

    A packet is held back until its frame's neighbours in time are known: once a packet's decoding time is later than
    the next frame's presentation time, no frame in between can follow.
    """
    waiting: deque[av.Packet] = deque()
    shown: list[int] = []  # sorted presentation times of waiting packets and of some before them
    for packet in packets:
        if wanted is None or packet.pts is None or packet.dts is None or packet.is_discard:
            yield from ((held, True) for held in waiting)
            waiting.clear()
            yield packet, True
            continue
        waiting.append(packet)
        insort(shown, packet.pts)
        while waiting:
            pts = waiting[0].pts
            assert pts is not None
            later = bisect_right(shown, pts)
            if later < len(shown) and shown[later] <= packet.dts:
                before = bisect_left(shown, pts) - 1
                low = (shown[before] + pts) / 2 * tick - origin if before >= 0 else -math.inf
                yield waiting.popleft(), wanted.any_in(low, (pts + shown[later]) / 2 * tick - origin)
            elif len(waiting) > MAX_WAITING:
                yield waiting.popleft(), True
            else:
                break
        if len(shown) > 8 * MAX_WAITING:
            del shown[: -4 * MAX_WAITING]
    yield from ((held, True) for held in waiting)
