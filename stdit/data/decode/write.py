"""Writes clips as videos that play in a browser, as pictures, and as contact sheets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from stdit.errors import StditError
from stdit.files import make_folder, publish, publish_folder, remove_folder

# x264: with mbtree, it is not deterministic: about one time in twenty it writes different bytes
_X264 = {"preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
_VP9 = {"deadline": "good", "cpu-used": "4", "threads": "1", "b": "0"}


def write_video(
    path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int | None = None, about: str = ""
) -> None:
    """Writes a video that plays in a browser: by the path's end VP9 (.webm), a GIF, or else H.264 in an MP4
    (yuv420p, BT.709, index in front); without an end, a folder of PNG files 00000.png, 00001.png, …

    frames: uint8 (H, W, 3) each. An iterator is encoded as it yields; if it raises, no file is left.
    fps: from 0.001 to 1000, see `exact_rate`. A GIF counts in hundredths of a second.
    crf: quality of H.264 (18) and VP9 (24), lower is better.
    about: a comment in the file's metadata.
    """
    path, rate = Path(path), exact_rate(fps)
    frames = iter(frames)
    first = next(frames, None)
    if first is None or first.ndim != 3 or first.shape[-1] != 3 or first.dtype != np.uint8:
        found = "there are none" if first is None else f"not {first.dtype} {first.shape}"
        raise ValueError(f"frames must be uint8 (H, W, 3) each; {found}.")
    alike = _alike(chain((first,), frames))
    if path.suffix == ".gif":
        with publish(path) as part:
            images = map(_as_palette, alike)
            milliseconds = max(20, round(100 / rate) * 10)  # browsers slow down what is shorter
            options: dict[str, Any] = {"comment": about.encode()} if about else {}
            next(images).save(
                part, "GIF", save_all=True, append_images=images, duration=milliseconds, loop=0, disposal=1, **options
            )
    elif path.suffix:
        _encode(path, alike, rate, first.shape[:2], crf, about)
    else:
        _write_pictures(path, alike, about)


def _encode(
    path: Path, frames: Iterable[np.ndarray], rate: Fraction, size: tuple[int, ...], crf: int | None, about: str
) -> None:
    (height, width), vp9 = size, path.suffix == ".webm"
    if height % 2 or width % 2:
        raise StditError(
            f"{path}: {width}x{height} cannot be written as {'VP9' if vp9 else 'H.264'} (4:2:0 needs even sizes). "
            f"Nearest: {width // 2 * 2 or 2}x{height // 2 * 2 or 2}."
        )
    kind = {"format": "webm"} if vp9 else {"format": "mp4", "options": {"movflags": "+faststart"}}
    with publish(path) as part, av.open(f"file:{part}", "w", **kind) as container:
        if about:
            container.metadata["comment"] = about
        stream = container.add_stream("libvpx-vp9" if vp9 else "libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str((24 if vp9 else 18) if crf is None else crf), **(_VP9 if vp9 else _X264)}
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_pictures(folder: Path, frames: Iterable[np.ndarray], about: str) -> None:
    part = make_folder(folder.parent) / f".{folder.name}.part"
    remove_folder(part)
    try:
        part.mkdir()
        for number, rgb in enumerate(frames):
            Image.fromarray(rgb).save(part / f"{number:05d}.png", pnginfo=picture_comment(about))
        publish_folder(part, folder)
    finally:
        with suppress(OSError):
            remove_folder(part)


def picture_comment(about: str) -> PngInfo:
    """The metadata of a PNG file with a comment, for `Image.save`."""
    found = PngInfo()
    if about:
        found.add_itxt("Comment", about)
    return found


def _alike(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    shape = None
    for rgb in frames:
        shape = shape or rgb.shape
        if rgb.shape != shape:
            raise ValueError(f"a frame is {rgb.shape}, the first was {shape}.")
        yield rgb


def _as_palette(rgb: np.ndarray) -> Image.Image:
    """256 colours of its own for each frame."""
    return Image.fromarray(rgb).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)


def exact_rate(fps: float) -> Fraction:
    """A frame rate as a fraction, exact to twelve digits: 1/3, 24000/1001, 16."""
    if not 0.001 <= fps <= 1000:
        raise StditError(f"a video cannot have {fps} frames per second; it can have from 0.001 to 1000.")
    rate = Fraction(fps).limit_denominator(1001)
    return rate if math.isclose(rate, fps, rel_tol=1e-12) else Fraction(fps).limit_denominator(10**6)


def sheet_frames(count: int, columns: int = 8) -> list[int]:
    """The frame numbers that a contact sheet shows of a clip of `count` frames."""
    return np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int)).tolist()


def contact_sheet(
    clips: Sequence[np.ndarray], path: str | Path, labels: Sequence[str] = (), columns: int = 8, side: int = 128
) -> None:
    """Writes a PNG with a row per clip (T, H, W, 3): up to `columns` frames from first to last, `side` pixels high."""
    rows, text = [], 14 if labels else 0
    for clip in clips:
        clip = np.asarray(clip)
        picks = sheet_frames(len(clip), columns)
        width = max(1, round(clip.shape[2] * side / clip.shape[1]))
        rows.append([Image.fromarray(clip[i]).resize((width, side), Image.Resampling.BICUBIC) for i in picks])
    total = max(sum(image.width + 2 for image in row) for row in rows)
    sheet = Image.new("RGB", (max(total, 2), len(rows) * (side + text + 2)), "white")
    for i, row in enumerate(rows):
        top, left = i * (side + text + 2), 0
        if labels:
            ImageDraw.Draw(sheet).text((2, top + 1), labels[i], fill="black")
        for image in row:
            sheet.paste(image, (left, top + text))
            left += image.width + 2
    with publish(path) as part:
        sheet.save(part, format="PNG")
