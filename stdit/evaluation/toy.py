"""Reads a clip of the toy grammar from its pixels, and counts how often it shows what was asked for.

Nothing here is learned. The reader fits the background (one colour for the top of the frame, one for the bottom), takes
the most different pixels as the shape's colour, and writes every pixel as a mixture of the two: a matte. The direction
is the motion of the matte's centroid. The shape is the ideal outline, of the matte's area and centroid, that overlaps
the matte most. This works behind a blurry autoencoder; reading outlines or counting corners would not.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from stdit.data.toy import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, ToySpec, diagonal, outline_distance
from stdit.errors import StditError
from stdit.evaluation.metrics import binomial_p, wilson_interval

NONE = "none"
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "size": 1 / len(SIZES),
    "direction": 1 / len(DIRECTIONS),
    "background": 1 / len(BACKGROUNDS),
}

_NEUTRAL = 70  # max − min over RGB; backgrounds stay below 50, colours are above 130
_CONTRAST = 45  # a shape's colour is at least this far from the background
_MOTION = 0.12  # of the frame, over the whole clip; a rendered clip moves by more than 0.5
_OVERLAP = 0.55  # of the ideal outline with the matte; less is no shape


@dataclass(frozen=True)
class ToyReading:
    """The attributes that a clip shows, in the grammar's words or "none", and the numbers behind them."""

    colour: str
    shape: str
    size: str
    direction: str
    background: str
    overlap: float = 0.0  # of the best outline, intersection over union
    motion: tuple[float, float] = (0.0, 0.0)  # over the clip, in frame sizes: right, down

    @property
    def seen(self) -> dict[str, str]:
        """The attributes by name."""
        return {name: getattr(self, name) for name in CHANCE}

    def right(self, spec: ToySpec) -> dict[str, bool]:
        """For each attribute, whether it is what the spec asks for. A still spec asks for no direction."""
        asked = [name for name in CHANCE if name != "direction" or spec.direction != NONE]
        return {name: self.seen[name] == getattr(spec, name) for name in asked}


def read_clip(frames: np.ndarray) -> ToyReading:
    """Reads colour, shape, size, direction and background of any clip, uint8 (T, H, W, 3)."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise StditError(f"a clip to read is uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}.")
    pixels = frames.astype(np.float32)
    background = _fit_background(pixels)
    if background is None:
        return ToyReading(NONE, NONE, NONE, NONE, NONE)
    name = min(BACKGROUNDS, key=lambda name: float(((background - np.array(BACKGROUNDS[name])) ** 2).sum()))
    along = diagonal(frames.shape[2], frames.shape[1])[None, :, :, None]
    field = background[0] + (background[1] - background[0]) * along  # (1, H, W, 3)
    core = _core_colour(pixels - field, pixels)
    if core is None:
        return ToyReading(NONE, NONE, NONE, NONE, name)
    toward = core - field
    matte = np.clip(((pixels - field) * toward).sum(-1) / np.maximum((toward**2).sum(-1), 1.0), 0, 1)  # (T, H, W)
    matte = np.where(matte > 0.25, matte, 0)  # removes the background's noise
    shape, size, overlap = _read_outline(matte)
    direction, motion = _read_motion(matte)
    return ToyReading(_nearest_colour(core), shape, size, direction, name, overlap, motion)


def _fit_background(pixels: np.ndarray) -> np.ndarray | None:
    """A linear fit to the neutral pixels of all frames: the colours of the first and the last corner, (2, 3)."""
    frames, height, width, _ = pixels.shape
    along = np.broadcast_to(diagonal(width, height), (frames, height, width)).reshape(-1)
    every = max(1, len(along) // 10_007)  # ten thousand pixels are enough
    along, values = along[::every], pixels.reshape(-1, 3)[::every]
    keep = values.max(1) - values.min(1) < _NEUTRAL
    fit = np.zeros((2, 3))
    for _ in range(3):  # each time without the pixels far from the last fit: edges, shadows of a blurry decoder
        if keep.sum() < max(8, 0.05 * keep.size):
            return None
        design = np.stack([1 - along[keep], along[keep]], 1)
        fit = np.linalg.solve(design.T @ design + 1e-6 * np.eye(2), design.T @ values[keep])
        residual = np.abs(values - fit[0] - (fit[1] - fit[0]) * along[:, None]).max(1)
        keep = residual < max(12.0, 3 * float(np.median(residual[keep])))
    return fit.astype(np.float32)


def _core_colour(difference: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """The mean colour of the pixels that differ most from the background; None if none differs enough."""
    distance = np.sqrt((difference**2).sum(-1))
    far = float(np.quantile(distance, 0.985))  # a small shape covers 4 to 9 % of the frame
    if far < _CONTRAST:
        return None
    return pixels[distance > 0.8 * far].mean(0)


def _nearest_colour(core: np.ndarray) -> str:
    """The colour with the nearest hue, which a decoder keeps better than brightness."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(core / 255).tolist())
    if saturation < 0.3:
        return NONE

    def away(name: str) -> float:
        other = colorsys.rgb_to_hsv(*(value / 255 for value in COLOURS[name]))[0]
        return min(abs(hue - other), 1 - abs(hue - other))

    return min(COLOURS, key=away)


def _read_motion(matte: np.ndarray) -> tuple[str, tuple[float, float]]:
    """The direction of a line through the centroids over time, weighted by the visible area of the shape."""
    frames, height, width = matte.shape
    area = matte.sum((1, 2))
    seen = area > 0.005 * height * width
    if seen.sum() < max(2, frames / 2):
        return NONE, (0.0, 0.0)
    x = (matte.sum(1) @ (np.arange(width) + 0.5))[seen] / area[seen] / width
    y = (matte.sum(2) @ (np.arange(height) + 0.5))[seen] / area[seen] / height
    moment = np.linspace(0, 1, frames)[seen]
    weight = np.sqrt(np.minimum(area[seen] / np.median(area[seen]), 1))
    right, down = (float(np.polyfit(moment, place, 1, w=weight)[0]) for place in (x, y))
    if max(abs(right), abs(down)) < _MOTION:
        return NONE, (right, down)
    if abs(right) > abs(down):
        return ("right" if right > 0 else "left"), (right, down)
    return ("down" if down > 0 else "up"), (right, down)


def _read_outline(matte: np.ndarray) -> tuple[str, str, float]:
    """Shape, size and overlap, from the frames that show the whole shape (if none does: from all that show it)."""
    frames, height, width = matte.shape
    area = matte.sum((1, 2))
    seen = np.flatnonzero(area > 0.005 * height * width)
    if len(seen) < max(1, frames / 3):
        return NONE, NONE, 0.0
    solid = matte[seen] > 0.5
    cut = solid[:, [0, -1]].any((1, 2)) | solid[:, :, [0, -1]].any((1, 2))  # by the edge of the frame
    chosen = seen if cut.all() else seen[~cut]
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), 12)).round().astype(int))]
    rows, columns = np.arange(height, dtype=np.float32) + 0.5, np.arange(width, dtype=np.float32) + 0.5
    overlap, halves = np.zeros((2, len(SHAPES), len(chosen)))
    for frame, index in enumerate(chosen):
        alpha, mass = matte[index], area[index]
        x, y = float(alpha.sum(0) @ columns / mass), float(alpha.sum(1) @ rows / mass)
        for number, shape in enumerate(SHAPES):
            half = float(np.sqrt(mass / {"circle": np.pi, "square": 4, "triangle": 2}[shape]))
            centre = y - half / 3 if shape == "triangle" else y  # a triangle's centroid is below its middle
            distance = outline_distance(shape, columns[None, :] - x, rows[:, None] - centre, np.float32(half))
            ideal = np.clip(0.5 - distance, 0, 1)
            overlap[number, frame] = np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum()
            halves[number, frame] = half
    best = int(overlap.mean(1).argmax())
    score = float(overlap[best].mean())
    if score < _OVERLAP:
        return NONE, NONE, score
    relative = 2 * float(np.median(halves[best])) / np.sqrt(height * width)
    return SHAPES[best], ("small" if relative < np.sqrt(SIZES["small"] * SIZES["large"]) else "large"), score


@dataclass(frozen=True)
class Accuracy:
    """How often an attribute was right: the share, its 95 % interval, and the probability of as many by chance."""

    right: int
    total: int
    share: float
    low: float
    high: float
    chance: float
    p: float

    @classmethod
    def of(cls, right: int, total: int, chance: float) -> Accuracy:
        return cls(
            right, total, right / total, *wilson_interval(right, total), chance, binomial_p(right, total, chance)
        )


def score_readings(prompts: Sequence[str], readings: Sequence[ToyReading]) -> dict[str, Accuracy]:
    """The accuracy of each attribute over clips and their prompts, and of "all" attributes of a clip together."""
    if len(prompts) != len(readings) or not prompts:
        raise StditError(f"{len(readings)} clips and {len(prompts)} prompts: give one clip for each prompt.")
    answers = [reading.right(ToySpec.parse(prompt)) for prompt, reading in zip(prompts, readings)]
    result = {}
    for name, chance in CHANCE.items():
        asked = [answer[name] for answer in answers if name in answer]
        if asked:
            result[name] = Accuracy.of(sum(asked), len(asked), chance)
    together = [all(answer.values()) for answer in answers]
    result["all"] = Accuracy.of(sum(together), len(together), float(np.prod(list(CHANCE.values()))))
    return result


def as_json(accuracies: dict[str, Accuracy]) -> dict[str, dict[str, float]]:
    return {name: asdict(accuracy) for name, accuracy in accuracies.items()}
