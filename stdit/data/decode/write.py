"""Writing clips: H.264 files that play in a browser, and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace

from stdit.errors import StditError
from stdit.files import publish


def write_video(
    path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 18, threads: int = 1
) -> None:
    """Frames uint8 (H, W, 3), one after another, as an H.264 file that plays in a browser (yuv420p, BT.709, index in
    front). An iterator's frames are written as they come; where it raises, there is no file. fps: see `exact_rate`."""
    rate = exact_rate(fps)
    frames = iter(frames)
    first = next(frames, None)
    if first is None or first.ndim != 3 or first.shape[-1] != 3 or first.dtype != np.uint8:
        found = "there are none" if first is None else f"not {first.dtype} {first.shape}"
        raise ValueError(f"frames must be uint8 (H, W, 3), one after another; {found}.")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise StditError(
            f"{path}: {width}x{height} cannot be written as H.264 (4:2:0 needs even sizes). "
            f"Nearest: {width // 2 * 2 or 2}x{height // 2 * 2 or 2}."
        )
    with publish(path) as part:
        with av.open(f"file:{part}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # mbtree is off since with it x264 gives other bytes for the same frames, about once in twenty times
            stream.options = {"crf": str(crf), "preset": "medium", "threads": str(threads), "x264-params": "mbtree=0"}
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
            codec.color_range = 1  # limited
            for rgb in chain((first,), frames):
                if rgb.shape != first.shape:
                    raise ValueError(f"a frame is {rgb.shape}, the first was {first.shape}.")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            container.mux(stream.encode())


def exact_rate(fps: float) -> Fraction:
    """Frames a second as a file holds them, right to twelve digits: 1/3, 24000/1001, 16. From 0.001 to 1000."""
    if not 0.001 <= fps <= 1000:
        raise StditError(f"{fps} frames a second cannot be written; from 0.001 to 1000 can.")
    rate = Fraction(fps).limit_denominator(1001)
    return rate if math.isclose(rate, fps, rel_tol=1e-12) else Fraction(fps).limit_denominator(10**6)


def sheet_frames(count: int, columns: int = 8) -> list[int]:
    """The frames that a contact sheet shows of a clip of `count`."""
    return np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int)).tolist()


def contact_sheet(
    clips: Sequence[np.ndarray],
    path: str | Path,
    labels: Sequence[str] | None = None,
    columns: int = 8,
    side: int = 128,
) -> None:
    """A PNG with one row a clip (T, H, W, 3): up to `columns` frames, first and last among them, `side` pixels high."""
    from PIL import Image, ImageDraw

    rows, text = [], 14 if labels else 0
    for clip in clips:
        clip = np.asarray(clip)
        picks = sheet_frames(len(clip), columns)
        width = max(1, round(clip.shape[2] * side / clip.shape[1]))
        rows.append([Image.fromarray(clip[i]).resize((width, side), Image.Resampling.BICUBIC) for i in picks])
    if not rows:
        raise ValueError("a contact sheet needs at least one clip.")
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
