"""Scores of a clip for filtering, computed from a few of its frames.

At up to 8 places spread evenly over the clip, 4 consecutive frames are sampled as displayed, scaled down (never up) to
a shorter side of 360 pixels, in grey levels from 0 to 255 (luma of BT.709).

- black_bars: share of the picture outside the smallest box of all lit rows and columns. A row or column is lit if more
  than 1 % of its pixels over all sampled frames are above level 24. 1 for an all-black clip. The other scores are
  computed inside the box.
- brightness: mean grey level.
- sharpness: variance of the Laplacian (four neighbours minus four times the pixel; Pech-Pacheco et al. 2000), averaged
  over one frame per place. Low for blurred or enlarged pictures; noise counts as sharp.
- motion: change of a pixel in grey levels per second: mean absolute difference of consecutive frames, averaged over
  blocks of 4×4 pixels (which suppresses noise), divided by the time between them.
- still_frames: share of consecutive frames whose mean absolute difference, as above, is at most 0.255 levels (−60 dB,
  as in FFmpeg's freezedetect): frozen or repeated frames.

An image, or a clip of one frame, has neither motion nor still_frames (None).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stdit.data.decode.checks import LIMITS, Limits, VideoError, reading
from stdit.data.decode.formats import STILL as STILL_PICTURES
from stdit.data.decode.pictures import content_of_path, decode_image
from stdit.data.decode.pixels import cover, within
from stdit.data.decode.source import Source
from stdit.data.decode.video import open_source
from stdit.data.measure.fingerprints import FRAMES, fingerprint

FORMAT = 1  # raise it when a definition changes: scans then score all clips again
SCORES = ("motion", "sharpness", "brightness", "black_bars", "still_frames")
VIDEO_SCORES = ("motion", "still_frames")  # None for images

PLACES, CONSECUTIVE = 8, 4
SHORT_SIDE = 360
BLACK = 24
LIT = 0.01
BLOCK = 4
STILL = 0.255
SEEK_FROM = 4.0  # seconds ahead, beyond which seeking is cheaper than decoding
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


class FrameRun(NamedTuple):
    """Consecutive frames. times: (n,) in seconds. grey: (n, H, W) float32."""

    times: list[float]
    grey: np.ndarray


def score(path: str, start: float, end: float, frames: int, limits: Limits = LIMITS) -> dict[str, float | str | None]:
    """A clip's scores by name, and its fingerprint. Raises VideoError if none of its frames can be decoded."""
    with reading(path, limits):
        runs = sample_runs(path, start, end, frames, limits)
        if frames > 1 and all(len(run.times) == 1 for run in runs):
            raise VideoError(path, "damaged", "has no two consecutive frames that can be decoded.")
        top, bottom, left, right = lit_box(np.concatenate([run.grey for run in runs]))
        bars = 1 - (bottom - top) * (right - left) / runs[0].grey[0].size
        if bottom > top:
            runs = [FrameRun(run.times, run.grey[:, top:bottom, left:right]) for run in runs]
        times, pictures = [now for run in runs for now in run.times], [grey for run in runs for grey in run.grey]
        wanted = start + (end - start) * (np.arange(FRAMES) + 0.5) / FRAMES
        nearest = [pictures[index] for index in np.abs(np.subtract.outer(wanted, times)).argmin(1)]
        return {**scores_of(runs), "black_bars": bars, "fingerprint": fingerprint(nearest)}


def scores_of(runs: Sequence[FrameRun]) -> dict[str, float | None]:
    """All scores but black_bars. All frames have the same size."""
    steps = [np.abs(np.diff(_block_means(run.grey), axis=0)).mean((1, 2)) for run in runs]
    differences = np.concatenate(steps)
    seconds = sum(run.times[-1] - run.times[0] for run in runs)
    return {
        "motion": float(differences.sum() / seconds) if len(differences) else None,
        "sharpness": float(np.mean([laplacian(run.grey[len(run.grey) // 2]).var() for run in runs])),
        "brightness": float(np.mean([run.grey.mean() for run in runs])),
        "still_frames": float((differences <= STILL).mean()) if len(differences) else None,
    }


def lit_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the smallest box around all lit rows and columns of frames (n, H, W)."""
    lit = grey > BLACK
    rows, columns = np.flatnonzero(lit.mean((0, 2)) > LIT), np.flatnonzero(lit.mean((0, 1)) > LIT)
    if not len(rows) or not len(columns):
        return 0, 0, 0, 0
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def laplacian(grey: np.ndarray) -> np.ndarray:
    """(H, W) to (H − 2, W − 2); a single zero for pictures too small to have an interior."""
    if min(grey.shape) < 3:
        return np.zeros(1)
    return grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]


def _block_means(grey: np.ndarray) -> np.ndarray:
    """Means over blocks, (n, H, W) to (n, H/4, W/4); incomplete blocks at the right and the bottom are dropped."""
    size = min(BLOCK, *grey.shape[1:])
    height, width = (side // size * size for side in grey.shape[1:])
    return grey[:, :height, :width].reshape(len(grey), height // size, size, width // size, size).mean((2, 4))


def sample_runs(path: str, start: float, end: float, frames: int, limits: Limits) -> list[FrameRun]:
    """Samples a clip's frames from `start` to `end` (seconds; both 0 for an image)."""
    if (content := content_of_path(path)) in STILL_PICTURES:
        rgb = decode_image(path, content, limits)
        return [FrameRun([0.0], _grey(cover(rgb, within((rgb.shape[1], rgb.shape[0]), SHORT_SIDE), (0.5, 0.5)))[None])]
    places, period = min(PLACES, max(1, frames // CONSECUTIVE)), (end - start) / frames
    middles = [start + (end - start) * (place + 0.5) / places for place in range(places)]
    # half a frame before the first of each place, so that inexact times do not matter
    firsts = [max(start - 1e-6, middle - (CONSECUTIVE + 1) / 2 * period) for middle in middles]
    for seek in (True, False):  # seeking may land behind the clip
        with open_source(path, content, limits) as source:
            if runs := list(_read_runs(source, firsts, end, seek)):
                return runs
    raise VideoError(path, "no_frames", f"has no frame from {start:.3f} s to {end:.3f} s.")


def _read_runs(source: Source, firsts: Sequence[float], end: float, seek: bool) -> Iterator[FrameRun]:
    frames, now, found = source.frames(), -math.inf, False
    for first in firsts:
        if seek and first - max(now, 0.0) > SEEK_FROM and source.seek(first):
            frames = source.frames()
        times, grey = [], []
        try:
            for now, frame in frames:
                if now >= end:
                    break
                if now >= first:
                    times.append(now)
                    grey.append(_grey(source.small_rgb(frame, SHORT_SIDE)))
                if len(times) == CONSECUTIVE:
                    break
        except VideoError as error:
            if error.reason not in ("damaged", "undecodable") or not (found or times or seek):
                raise
        if times:
            found = True
            yield FrameRun(times, np.stack(grey))


def _grey(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float32) @ LUMA
