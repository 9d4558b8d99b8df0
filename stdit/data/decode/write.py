"""Writes clips as H.264 files that play in a browser, and as contact sheets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image, ImageDraw

from stdit.errors import StditError
from stdit.files import publish


def write_video(path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Writes an H.264 file that plays in a browser (yuv420p, BT.709, index in front).

    frames: uint8 (H, W, 3) each. An iterator is encoded as it yields; if it raises, no file is left.
    fps: from 0.001 to 1000, see `exact_rate`.
    crf: quality, lower is better.
    """
    rate = exact_rate(fps)
    frames = iter(frames)
    first = next(frames, None)
    if first is None or first.ndim != 3 or first.shape[-1] != 3 or first.dtype != np.uint8:
        found = "there are none" if first is None else f"not {first.dtype} {first.shape}"
        raise ValueError(f"frames must be uint8 (H, W, 3) each; {found}.")
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
            # with mbtree, x264 is not deterministic: about one time in twenty it writes different bytes
            stream.options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
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
