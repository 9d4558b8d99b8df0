"""What the clips are like that no shape takes, and a shape, or a rate, that would take most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from stdit.data.config import DataConfig
from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import REASONS, Assignment, assign_columns, slack
from stdit.errors import StditError
from stdit.shapes import VideoShape

MOST = 0.9  # of the clips that a suggestion should take
COLUMNS = ("frames", "fps", "width", "height", "start", "end")


@dataclass(frozen=True)
class Exclusion:
    """The clips of one reason (see `buckets.REASONS`).

    found: how long or large they are. remedy: what would take some, `takes` of them; None where no setting does.
    """

    reason: str
    clips: int
    found: str = ""
    remedy: str | None = None
    takes: int = 0

    @property
    def details(self) -> str:
        verb = "takes" if self.remedy and self.remedy.startswith("data.") else "would take"
        remedy = f"{self.remedy} {verb} {self.takes:,} of them" if self.remedy else ""
        return "; ".join(filter(None, (self.found, remedy)))


def explain_exclusions(
    manifest: Manifest, assignment: Assignment, config: DataConfig, tokens: Callable[[VideoShape], int]
) -> list[Exclusion]:
    """Every reason that left out clips in a stage, in the order of `REASONS`.

    tokens: of a shape; raises StditError for one that the model does not take.
    """
    found = []
    for number, reason in enumerate(REASONS):
        rows = np.flatnonzero(assignment.reason == number)
        if len(rows):
            clips = {name: manifest.column(name)[rows] for name in COLUMNS}
            found.append(_explain(reason, clips, assignment.shapes, config, tokens))
    return found


def _explain(
    reason: str,
    clips: dict[str, np.ndarray],
    shapes: tuple[VideoShape, ...],
    config: DataConfig,
    tokens: Callable[[VideoShape], int],
) -> Exclusion:
    width, height = clips["width"], clips["height"]
    plain = Exclusion(reason, len(width))
    multiple = config.rule.multiple if config.rule else 16
    if reason == "fps":
        rate = float(np.quantile(clips["fps"], 1 - MOST, method="lower"))
        rate = int(rate) if rate >= 2 else rate
        slower = int(_taken(clips, shapes, replace(config, fps=rate)).sum())
        remedy = f"data.fps={rate:g}" if slower else None
        return replace(plain, found=f"{_range(clips['fps'])} fps", remedy=remedy, takes=slower)
    if reason == "kind":
        images = clips["frames"] == 1
        one = images if images.sum() * 2 >= len(images) else ~images
        clips = {name: column[one] for name, column in clips.items()}
        found = f"{one.sum():,} {'images' if one is images else 'videos'}"
        frames = [1] if one is images else _lengths(clips, config, shapes, tokens)
        candidates = [VideoShape(n, shape.height, shape.width) for n in frames for shape in shapes]
    elif reason == "short":
        found = f"{_range(_frames(clips, config.fps))} frames at {config.fps:g} fps"
        videos = [shape for shape in shapes if not shape.is_image]
        frames = _lengths(clips, config, shapes, tokens)
        candidates = [VideoShape(n, shape.height, shape.width) for n in frames for shape in videos]
    elif reason == "small":
        order = np.argsort(width.astype(np.int64) * height, kind="stable")
        ends = [f"{width[row]}x{height[row]}" for row in order[[0, -1]]]
        found = " to ".join(dict.fromkeys(ends))
        scales = np.max([np.minimum(width / shape.width, height / shape.height) for shape in shapes], axis=0)
        scale = float(np.quantile(scales, 1 - MOST))
        candidates = [_sized(shape, shape.width * scale, shape.height * scale, multiple, np.floor) for shape in shapes]
        wide, high = (float(np.quantile(side, 1 - MOST)) for side in (width, height))
        candidates += [_sized(shape, wide, high, multiple, np.floor) for shape in shapes]
    elif reason == "aspect":
        aspect = width / height
        found = f"width to height {_range(aspect)}"
        usual = float(np.median(aspect))
        candidates = [
            _sized(shape, (shape.width * shape.height * ratio) ** 0.5, (shape.width * shape.height / ratio) ** 0.5,
                   multiple, np.round)
            for shape in shapes for ratio in (usual, shape.height / shape.width)
        ]  # fmt: skip
    else:
        return plain
    shape, takes = _best(clips, _legal(candidates, shapes, tokens), config)
    remedy = None if shape is None else f"the shape {shape if shape.frames > 1 else f'{shape.width}x{shape.height}'}"
    return replace(plain, found=found, remedy=remedy, takes=takes)


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}–{high:.4g}"


def _frames(clips: dict[str, np.ndarray], fps: float) -> np.ndarray:
    """(clips,) how many frames each has time for."""
    room = slack(clips["start"], clips["end"], clips["fps"], 1, fps)
    return np.where(clips["frames"] == 1, 1, np.maximum(0, np.floor(room * fps + 1e-9)) + 1).astype(np.int64)


def _lengths(
    clips: dict[str, np.ndarray],
    config: DataConfig,
    shapes: tuple[VideoShape, ...],
    tokens: Callable[[VideoShape], int],
) -> list[int]:
    """The most frames, legal for the model, that most of the clips have time for, or else that any has."""
    frames = _frames(clips, config.fps)
    for most in (int(np.quantile(frames, 1 - MOST, method="lower")), int(frames.max())):
        for n in range(most, max(1, most - 64), -1):
            if _legal([VideoShape(n, shapes[0].height, shapes[0].width)], shapes, tokens):
                return [n]
    return []


def _sized(shape: VideoShape, width: float, height: float, multiple: int, rounded: Callable[..., float]) -> VideoShape:
    sides = [max(1, int(rounded(side / multiple + 1e-6))) * multiple for side in (width, height)]
    return VideoShape(shape.frames, sides[1], sides[0])


def _legal(
    candidates: Iterable[VideoShape], shapes: tuple[VideoShape, ...], tokens: Callable[[VideoShape], int]
) -> list[VideoShape]:
    legal = []
    for shape in dict.fromkeys(candidates):
        try:
            if shape not in shapes and tokens(shape) > 0:
                legal.append(shape)
        except StditError:
            pass
    return legal


def _best(
    clips: dict[str, np.ndarray], candidates: list[VideoShape], config: DataConfig
) -> tuple[VideoShape | None, int]:
    if not candidates:
        return None, 0
    shape = candidates[int(np.argmax(_taken(clips, tuple(candidates), config)))]
    takes = int(_taken(clips, (shape,), config).sum())
    return (shape, takes) if takes else (None, 0)


def _taken(clips: dict[str, np.ndarray], shapes: tuple[VideoShape, ...], config: DataConfig) -> np.ndarray:
    """(shapes,) how many clips go to each."""
    return assign_columns(**clips, shapes=shapes, config=replace(config, stages=[])).counts
