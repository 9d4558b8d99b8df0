"""One picture's pixels: orientation, scaling to cover a size, colour, and image files. Errors with names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import av
import av.filter
import numpy as np
from av.video.format import VideoFormat
from av.video.reformatter import Colorspace, VideoReformatter

from stdit.data.decode import hdr
from stdit.data.remote.paths import file_of, open_bytes, split_member
from stdit.errors import StditError
from stdit.files import sha256_of

# SWS_BICUBIC, SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT (without which every second column of an RGB picture has its
# neighbour's colour) as numbers: PyAV names the latter two from 18 on, which wants Python 3.11
_SCALING = 0x4 | 0x40000 | 0x2000


@dataclass(frozen=True)
class Limits:
    """What one read may cost. `seconds` are the reading thread's own on a core, checked between packets."""

    bytes: int = 1 << 40  # of a file on this machine
    pixels: int = 8192 * 8192  # of one frame
    frames: int = 100_000  # decoded for one read
    packets: int = 2_000_000
    seconds: float = 60.0


LIMITS = Limits()
CHANGED = "is not the file that was scanned"  # how messages of reason "changed" begin


class VideoError(StditError):
    """A file, or the part asked for, that cannot be read. `reason` is one word a program may read.

    Reasons: missing, unreadable, unreachable (the disk or the network failed, not the file), empty, changed, not_media,
    unsupported, no_video, undecodable, no_frames, too_large, too_long, too_short, damaged, timeout, and (from processes
    of `isolated`) crashed.
    """

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.message = path, reason, message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.message)


def plain(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


# errors of a disk or a network, which say nothing of the file
_STORAGE_NAMES = (
    "EIO ESTALE ETIMEDOUT ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH "
    "ENETRESET EREMOTEIO ENOLINK"
)
_STORAGE_ERRORS = {getattr(errno, name) for name in _STORAGE_NAMES.split() if hasattr(errno, name)}


@contextmanager
def strange_file(path: str) -> Iterator[None]:
    """Makes a VideoError of whatever a strange file brings up in the decoder: one clip must not end a run."""
    try:
        yield
    except Exception as error:
        if (failed := _storage_error(path, error)) is not None:
            raise VideoError(path, "unreachable", f"the storage failed ({plain(failed)}).") from failed
        if isinstance(error, StditError):
            raise
        if isinstance(error, MemoryError):
            raise VideoError(path, "too_large", "needs more memory than there is.") from error
        raise VideoError(path, "undecodable", f"cannot be decoded ({type(error).__name__}: {error}).") from error


def _storage_error(path: str, error: BaseException | None) -> OSError | None:
    """What a disk or the network did, where that is what is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            return error if not isinstance(error, av.FFmpegError) else _read_error(path)
        error = error.__cause__
    return None


def _read_error(path: str) -> OSError | None:
    """Of reading all bytes: FFmpeg says "Input/output error" of damaged files, too."""
    try:
        with open_bytes(path) as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        return error
    return None


def check_file(path: str, limits: Limits = LIMITS) -> None:
    member, file = split_member(path), file_of(path)
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            raise VideoError(path, "unreadable", "is not a regular file.")
        size = status.st_size
        with open(file, "rb"):
            pass
    except FileNotFoundError as error:
        raise VideoError(path, "missing", "no such file.") from error
    except (OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"cannot be opened ({plain(error)}).") from error
    if member is not None:
        if member.offset + member.size > size:
            raise VideoError(path, "damaged", f"reaches beyond the end of its tar, at {size} bytes. Scan again.")
        size = member.size
    if size == 0:
        raise VideoError(path, "empty", "is an empty file.")
    if size > limits.bytes:
        raise VideoError(path, "too_large", f"has {size} bytes; the limit is {limits.bytes} bytes.")


def check_content(path: str, sha256: str) -> None:
    """Raises VideoError "changed" for another file than the one whose sha256 (hex) is given.

    A file is hashed when it is first read, and again if its size or time changes.
    """
    status = os.stat(file_of(path))
    found = _known_sha256(path, status.st_size, status.st_mtime_ns)
    if found != sha256:
        message = f"{CHANGED} (sha256 {found}, the manifest has {sha256}). Scan again: stdit data scan."
        raise VideoError(path, "changed", message)


@lru_cache(maxsize=1 << 16)
def _known_sha256(path: str, size: int, time: int) -> str:
    return file_sha256(path)


def file_sha256(path: str) -> str:
    with open_bytes(path) as file:
        return sha256_of(file)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip horizontally, then flip vertically) that the display matrix asks for."""
    data = cast(Any, frame.side_data).get("DISPLAYMATRIX")  # PyAV's older stubs know no names
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a·x + c·y, y' = b·x + d·y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def displayed_size(frame: av.VideoFrame, pixel_aspect: float) -> tuple[int, int]:
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (height, width) if orientation(frame)[0] else (width, height)


def covering_size(have: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) with the aspect ratio of `have` that covers `size`."""
    scale = max(size[0] / have[0], size[1] / have[1])
    return max(size[0], round(have[0] * scale)), max(size[1], round(have[1] * scale))


def within(have: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) scaled down, not up, until the shorter side is no more than this."""
    scale = min(1.0, short_side / min(have))
    return max(1, round(have[0] * scale)), max(1, round(have[1] * scale))


def cut(frame: np.ndarray, size: tuple[int, int], crop: tuple[float, float]) -> np.ndarray:
    height, width = frame.shape[:2]
    left, top = round((width - size[0]) * crop[0]), round((height - size[1]) * crop[1])
    return frame[top : top + size[1], left : left + size[0]]


def to_rgb(
    frame: av.VideoFrame,
    pixel_aspect: float,
    size: tuple[int, int] | None,
    crop: tuple[float, float],
    reformatter: VideoReformatter,
) -> np.ndarray:
    """(H, W, 3) uint8 as displayed: swscale scales (bicubic, widened when shrinking) and converts in one pass.

    reformatter: the same for all frames of a read, since it keeps swscale's tables; a frame's own makes them anew.
    HDR (PQ, HLG) becomes sRGB as `hdr.to_srgb` says; other transfers stay as they are, as players leave them.
    Through planes of one colour each: the same numbers as "rgb24", in half the time where chroma is kept whole.
    """
    transpose, flip_x, flip_y = orientation(frame)
    if _has_alpha(frame.format.name):
        frame = _on_white(frame, reformatter)
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    if size is not None:
        width, height = covering_size((width, height), size[::-1] if transpose else size)
    bright = frame.color_trc in (hdr.PQ, hdr.HLG)
    rgb = reformatter.reformat(
        frame,
        width,
        height,
        "rgb48le" if bright else "gbrp",
        src_colorspace=_colorspace(frame),
        interpolation=_SCALING,
        threads=1,
    ).to_ndarray()
    if bright:
        rgb = hdr.to_srgb(rgb, frame.color_trc)
    if transpose:
        rgb = rgb.transpose(1, 0, 2)
    if flip_x:
        rgb = rgb[:, ::-1]
    if flip_y:
        rgb = rgb[::-1]
    return rgb if size is None else cut(rgb, size, crop)  # a view: the reader copies it to where it belongs


def _colorspace(frame: av.VideoFrame) -> Colorspace | None:
    """Where the file does not say, HD is BT.709 and less is BT.601, as players assume."""
    if frame.colorspace not in (0, 2) or frame.format.name == "rgb24":
        return None
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


@lru_cache(maxsize=256)
def _has_alpha(name: str) -> bool:
    found = VideoFormat(name, 16, 16)
    return found.has_palette or any(component.is_alpha for component in found.components)


def _on_white(frame: av.VideoFrame, reformatter: VideoReformatter) -> av.VideoFrame:
    """What shows of a frame with transparency before white, as RGB; not premultiplied, as nearly all files are.

    Before it is scaled: the colours of transparent pixels must not bleed into their neighbours.
    """
    bright = frame.color_trc in (hdr.PQ, hdr.HLG)
    form = "rgba64le" if bright else "rgba"
    colours = _colorspace(frame)
    shown = reformatter.reformat(frame, format=form, src_colorspace=colours, interpolation=_SCALING, threads=1)
    rgba: Any = shown.to_ndarray()
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if bright:
        rgb, alpha = hdr.to_srgb(rgb, frame.color_trc), (alpha >> 8).astype(np.uint8)
    if alpha.min() < 255:
        weight = alpha.astype(np.uint16)
        rgb = ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")


def progressive(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames, one for each; those of two fields (interlaced) as of their first field's time, by FFmpeg's bwdif."""
    graph, kind = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None or kind != (frame.width, frame.height, frame.format.name):
            yield from _drained(graph)
            kind = (frame.width, frame.height, frame.format.name)
            graph = av.filter.Graph()
            given = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            graph.link_nodes(given, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        graph.vpush(frame)
        yield from _finished(graph)
    yield from _drained(graph)


def _drained(graph: av.filter.Graph | None) -> Iterator[av.VideoFrame]:
    if graph is not None:
        graph.vpush(None)
        yield from _finished(graph)


def _finished(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def cover(frame: np.ndarray, size: tuple[int, int], crop: tuple[float, float]) -> np.ndarray:
    from PIL import Image

    wanted = covering_size((frame.shape[1], frame.shape[0]), size)
    if wanted != (frame.shape[1], frame.shape[0]):
        frame = np.array(Image.fromarray(frame).resize(wanted, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(cut(frame, size, crop))
