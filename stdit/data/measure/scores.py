"""Scores of a clip to choose by, from a few of its frames.

At up to 8 places evenly over a clip, 4 frames in a row are looked at, as displayed, scaled down (never up) until the
shorter side has 360 pixels, in grey levels from 0 to 255 (luma of BT.709).

- black_bars: the share of the picture outside the smallest box of all rows and columns that are lit: of whose pixels,
  in all these frames together, more than 1 % are above level 24. A wholly black clip has 1. The other scores are those
  of the picture inside the box.
- brightness: the mean grey level.
- sharpness: the variance of the Laplacian (a pixel's four neighbours less four times itself; Pech-Pacheco et al. 2000),
  its mean over one frame of each place. What is blurred or was enlarged has little; noise counts as sharp.
- motion: how many grey levels a pixel changes a second: the mean absolute difference between neighbouring frames, of
  means over blocks of 4×4 pixels (which leaves little of noise), over the time between them.
- still_frames: the share of neighbouring frames whose mean absolute difference, as above, is at most 0.255 levels
  (−60 dB, as FFmpeg's freezedetect has it): frozen or repeated ones.

An image, or a clip of one frame, has neither motion nor still_frames (None).

This runs in the process that decodes, and imports neither torch nor pyarrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stdit.data.decode.formats import STILL as STILL_PICTURES
from stdit.data.decode.pictures import content_of_path, decode_image
from stdit.data.decode.pixels import (
    LIMITS,
    Limits,
    VideoError,
    check_file,
    cover,
    displayed_size,
    strange_file,
    to_rgb,
    within,
)
from stdit.data.decode.source import Source
from stdit.data.decode.video import open_source
from stdit.data.measure.fingerprints import FRAMES, fingerprint

FORMAT = 1  # raise it when a definition changes: scans then score again
SCORES = ("motion", "sharpness", "brightness", "black_bars", "still_frames")
OF_VIDEOS = ("motion", "still_frames")  # alone

PLACES, IN_A_ROW = 8, 4
SHORT_SIDE = 360
BLACK = 24
LIT = 0.01
BLOCK = 4
STILL = 0.255
FAR = 4.0  # seconds ahead, from which on seeking costs less than decoding on
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


class Looked(NamedTuple):
    """Frames in a row: times (n,) in seconds, grey (n, H, W) float32."""

    times: list[float]
    grey: np.ndarray


def score(path: str, start: float, end: float, frames: int, limits: Limits = LIMITS) -> dict[str, float | str | None]:
    """The scores by name of what is shown from `start` to `end`, and its fingerprint (see `fingerprints`).

    Raises VideoError if not one frame can be decoded there.
    """
    with strange_file(path):
        check_file(path, limits)
        looked = look(path, start, end, frames, limits)
        if frames > 1 and all(len(run.times) == 1 for run in looked):
            raise VideoError(path, "damaged", "has no two frames in a row that can be decoded.")
        top, bottom, left, right = lit_box(np.concatenate([run.grey for run in looked]))
        bars = 1 - (bottom - top) * (right - left) / looked[0].grey[0].size
        if bottom > top:
            looked = [Looked(run.times, run.grey[:, top:bottom, left:right]) for run in looked]
        seen, pictures = [now for run in looked for now in run.times], [grey for run in looked for grey in run.grey]
        wanted = start + (end - start) * (np.arange(FRAMES) + 0.5) / FRAMES
        picked = [pictures[index] for index in np.abs(np.subtract.outer(wanted, seen)).argmin(1)]
        return {**scores_of(looked), "black_bars": bars, "fingerprint": fingerprint(picked)}


def scores_of(looked: Sequence[Looked]) -> dict[str, float | None]:
    """All scores but black_bars, of frames that are looked at; all have one size."""
    steps = [np.abs(np.diff(_blocks(run.grey), axis=0)).mean((1, 2)) for run in looked]
    differences = np.concatenate(steps)
    seconds = sum(run.times[-1] - run.times[0] for run in looked)
    return {
        "motion": float(differences.sum() / seconds) if len(differences) else None,
        "sharpness": float(np.mean([laplacian(run.grey[len(run.grey) // 2]).var() for run in looked])),
        "brightness": float(np.mean([run.grey.mean() for run in looked])),
        "still_frames": float((differences <= STILL).mean()) if len(differences) else None,
    }


def lit_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the smallest box that holds all lit rows and columns of frames (n, H, W)."""
    lit = grey > BLACK
    rows, columns = np.flatnonzero(lit.mean((0, 2)) > LIT), np.flatnonzero(lit.mean((0, 1)) > LIT)
    if not len(rows) or not len(columns):
        return 0, 0, 0, 0
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def laplacian(grey: np.ndarray) -> np.ndarray:
    """(H, W) to (H − 2, W − 2), or one zero where there is no inside."""
    if min(grey.shape) < 3:
        return np.zeros(1)
    return grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]


def _blocks(grey: np.ndarray) -> np.ndarray:
    """Means over blocks, (n, H, W) to (n, H/4, W/4); what is left over at the right and at the bottom is left out."""
    size = min(BLOCK, *grey.shape[1:])
    height, width = (side // size * size for side in grey.shape[1:])
    return grey[:, :height, :width].reshape(len(grey), height // size, size, width // size, size).mean((2, 4))


def look(path: str, start: float, end: float, frames: int, limits: Limits) -> list[Looked]:
    """The frames that are looked at of what is shown from `start` to `end` (seconds; both 0 for an image)."""
    if (content := content_of_path(path)) in STILL_PICTURES:
        rgb = decode_image(path, content, limits)
        return [Looked([0.0], _grey(cover(rgb, within((rgb.shape[1], rgb.shape[0]), SHORT_SIDE), (0.5, 0.5)))[None])]
    places, period = min(PLACES, max(1, frames // IN_A_ROW)), (end - start) / frames
    middles = [start + (end - start) * (place + 0.5) / places for place in range(places)]
    # half a frame earlier than the first of each place, so that times which are not exact do not matter
    firsts = [max(start - 1e-6, middle - (IN_A_ROW + 1) / 2 * period) for middle in middles]
    for seek in (True, False):  # False: where seeking lands behind all of it
        with open_source(path, limits) as source:
            if looked := list(_runs(source, firsts, end, seek)):
                return looked
    raise VideoError(path, "no_frames", f"has not one frame from {start:.3f} s to {end:.3f} s.")


def _runs(source: Source, firsts: Sequence[float], end: float, seek: bool) -> Iterator[Looked]:
    frames, now, size, looked = source.frames(), -math.inf, None, False
    for first in firsts:
        if seek and first - max(now, 0.0) > FAR and source.seek(first):
            frames = source.frames()
        times, grey = [], []
        try:
            for now, frame in frames:
                if now >= end:
                    break
                if now >= first:
                    size = size or within(displayed_size(frame, source.pixel_aspect), SHORT_SIDE)
                    rgb = to_rgb(frame, source.pixel_aspect, size, (0.5, 0.5), source.reformatter)
                    times.append(now)
                    grey.append(_grey(rgb))
                if len(times) == IN_A_ROW:
                    break
        except VideoError as error:
            if error.reason not in ("damaged", "undecodable") or not (looked or times or seek):
                raise
        if times:
            looked = True
            yield Looked(times, np.stack(grey))


def _grey(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float32) @ LUMA
