"""Reads video and image files: frames by time, as a player shows them, or a VideoError with the reason why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import av
import numpy as np

from stdit.data.decode.checks import LIMITS, Limits, VideoError, error_text, reading, unchanged
from stdit.data.decode.formats import MOVING, STILL
from stdit.data.decode.pictures import PictureSource, content_of_path, decode_image, open_picture
from stdit.data.decode.pixels import cover
from stdit.data.decode.source import Probe, Source, VideoSource
from stdit.data.remote.paths import open_bytes, split_member

# Pure containers only: playlists and scripts (HLS, concat, …) could open other files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,ogg,asf,gif,apng,mxf,h264,hevc,ivf,"
    "yuv4mpegpipe,nut"
)

# Before PyAV 19, metadata that is not UTF-8 makes opening fail unless it is replaced.
OPEN_OPTIONS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}

_NEW_FRAMES = partial(np.empty, dtype=np.uint8)
VERIFY_PIXELS = 3_000_000_000  # `probe` decodes at most this much: ~10,000 frames of 640×480, ~360 of 4K


def probe(path: str, verify_pixels: int = VERIFY_PIXELS, limits: Limits = LIMITS) -> Probe:
    """Size, frame rate, frame count and duration: demuxes the whole file and decodes up to `verify_pixels` of it.

    Raises VideoError if no frame can be decoded. A file damaged further in is described up to the damage.
    """
    with reading(path, limits):
        content = content_of_path(path)
        if content in STILL:
            frame = decode_image(path, content, limits)
            return Probe(frame.shape[1], frame.shape[0], 1.0, 1, 0.0, 0.0, content, image=True)
        with open_source(path, content, limits) as source:
            # an animated picture tells its frames' durations only as it is decoded
            return source.probe(sys.maxsize if content in MOVING else verify_pixels)


def read_frames(
    path: str,
    count: int,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    start: float = 0.0,
    crop: tuple[float, float] = (0.5, 0.5),
    limits: Limits = LIMITS,
    sha256: str | None = None,
    allocate: Callable[[tuple[int, ...]], np.ndarray] = _NEW_FRAMES,
) -> np.ndarray:
    """`count` frames at start, start + 1/fps, …: uint8 RGB (T, H, W, 3), each the source frame nearest in time.

    size: (width, height). Frames are scaled with antialiasing to cover it, then cropped. None: the displayed size.
    fps: None reads every source frame from `start` on.
    crop: the share of the surplus that is cropped on the left and on top; 0.5 is the centre.
    sha256: checked if given.
    allocate: returns the uint8 array of a shape, to be filled and returned.

    Rotation, mirroring and pixel aspect ratio are applied. If the size changes in mid-stream, each frame is scaled and
    cropped on its own; with size None, to the first frame's size. Raises VideoError for any problem with the file.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1.")
    with reading(path, limits), unchanged(path, sha256):
        content = content_of_path(path)
        if content in STILL:
            if count > 1:
                raise VideoError(path, "too_short", f"is an image, but {count} frames are needed.")
            picture = decode_image(path, content, limits)
            picture = picture if size is None else cover(picture, size, crop)
            out = allocate((1, *picture.shape))
            out[0] = picture
            return out
        for seek in (True, False) if fps is not None and start > 1.0 else (False,):  # seeking may land too late
            with open_source(path, content, limits) as source:
                taken, shown = 0, None
                for frame in source.nearest(count, fps, start, seek):
                    if frame is not shown:
                        shown, rgb = frame, source.rgb(frame, size, crop)
                    if taken == 0:
                        out = allocate((count, *rgb.shape))
                        size = rgb.shape[1], rgb.shape[0]
                    out[taken] = rgb
                    taken += 1
                if taken:
                    return out
    raise AssertionError("reading from the beginning returns frames or raises")


@contextmanager
def open_source(path: str, content: str | None, limits: Limits) -> Iterator[Source]:
    """Opens a file to iterate over its frames. content: of `content_of_path`; not a still picture."""
    if content in MOVING:
        with open_picture(path, content, limits) as picture:
            yield PictureSource(path, content, picture, limits)
        return
    options = {"format_whitelist": _FORMATS}
    with ExitStack() as opened:
        try:
            if split_member(path) is not None:
                file: Any = opened.enter_context(open_bytes(path))
            else:
                file, options["protocol_whitelist"] = f"file:{path}", "file"
            container = opened.enter_context(av.open(file, mode="r", options=options, **OPEN_OPTIONS))
        except (av.FFmpegError, ValueError) as error:
            message = f"is not a video file that can be opened ({error_text(error)})."
            raise VideoError(path, "not_media", message) from error
        yield VideoSource(path, container, limits)
