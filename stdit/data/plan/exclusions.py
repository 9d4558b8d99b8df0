"""Describes the clips that have no shape, and suggests a shape or a frame rate that would include most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stdit.data.config import DataConfig
from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import COLUMNS, Assignment, Reason, assign_columns, slack
from stdit.errors import StditError
from stdit.shapes import VideoShape

MOST = 0.9  # share of the clips that a suggestion should include

Columns = dict[str, np.ndarray]
TokensOf = Callable[[VideoShape], int]


@dataclass(frozen=True)
class Exclusion:
    """The clips excluded for one reason."""

    reason: str  # a `Reason`'s key
    clips: int
    found: str = ""  # their lengths or sizes
    remedy: str | None = None  # a setting or shape that would include `takes` of them
    takes: int = 0

    @property
    def text(self) -> str:
        """The reason as a sentence."""
        return Reason[self.reason.upper()].text

    @property
    def details(self) -> str:
        verb = "takes" if self.remedy and self.remedy.startswith("data.") else "would take"
        remedy = f"{self.remedy} {verb} {self.takes:,} of them" if self.remedy else ""
        return "; ".join(filter(None, (self.found, remedy)))


def explain_exclusions(
    manifest: Manifest, assignment: Assignment, config: DataConfig, tokens: TokensOf
) -> list[Exclusion]:
    """The exclusions of a stage, in the order of `Reason`.

    tokens: the token count of a shape; raises StditError for a shape that the model cannot take.
    """
    found = []
    for reason in Reason:
        rows = np.flatnonzero(assignment.reason == reason)
        if len(rows):
            clips = {name: manifest.column(name)[rows] for name in COLUMNS}
            found.append(_explain(reason, clips, assignment.shapes, config, tokens))
    return found


def _explain(
    reason: Reason, clips: Columns, shapes: Sequence[VideoShape], config: DataConfig, tokens: TokensOf
) -> Exclusion:
    width, height = clips["width"], clips["height"]
    exclusion = Exclusion(reason.key, len(width))
    multiple = config.rule.multiple if config.rule else 16
    if reason == Reason.FPS:
        rate = float(np.quantile(clips["fps"], 1 - MOST, method="lower"))
        rate = int(rate) if rate >= 2 else rate
        slower = int(_taken(clips, shapes, replace(config, fps=rate)).sum())
        remedy = f"data.fps={rate:g}" if slower else None
        return replace(exclusion, found=f"{_range(clips['fps'])} fps", remedy=remedy, takes=slower)
    if reason == Reason.KIND:
        images = clips["frames"] == 1
        mostly_images = images.sum() * 2 >= len(images)
        clips = {name: column[images == mostly_images] for name, column in clips.items()}
        count = len(clips["frames"])
        found = f"{count:,} {'image' if mostly_images else 'video'}{'s' if count > 1 else ''}"
        frames = [1] if mostly_images else _lengths(clips, config, shapes, tokens)
        candidates = [replace(shape, frames=n) for n in frames for shape in shapes]
    elif reason == Reason.SHORT:
        found = f"{_range(_frames(clips, config.fps))} frames at {config.fps:g} fps"
        frames = _lengths(clips, config, shapes, tokens)
        candidates = [replace(shape, frames=n) for n in frames for shape in shapes if not shape.is_image]
    elif reason == Reason.SMALL:
        order = np.argsort(width.astype(np.int64) * height, kind="stable")
        ends = [f"{width[row]}x{height[row]}" for row in order[[0, -1]]]
        found = " to ".join(dict.fromkeys(ends))
        scales = np.max([np.minimum(width / shape.width, height / shape.height) for shape in shapes], axis=0)
        scale = float(np.quantile(scales, 1 - MOST))
        candidates = [_sized(shape, shape.width * scale, shape.height * scale, multiple, np.floor) for shape in shapes]
        wide, high = (float(np.quantile(side, 1 - MOST)) for side in (width, height))
        candidates += [_sized(shape, wide, high, multiple, np.floor) for shape in shapes]
    elif reason == Reason.ASPECT:
        aspect = width / height
        found = f"width to height {_range(aspect)}"
        usual = float(np.median(aspect))
        candidates = [
            _sized(shape, (shape.width * shape.height * ratio) ** 0.5, (shape.width * shape.height / ratio) ** 0.5,
                   multiple, np.round)
            for shape in shapes for ratio in (usual, shape.height / shape.width)
        ]  # fmt: skip
    else:
        return exclusion
    shape, takes = _best(clips, _legal(candidates, shapes, tokens), config)
    remedy = None if shape is None else f"the shape {shape if shape.frames > 1 else f'{shape.width}x{shape.height}'}"
    return replace(exclusion, found=found, remedy=remedy, takes=takes)


def _range(values: np.ndarray) -> str:
    low, high = (f"{float(end):.4g}" for end in (values.min(), values.max()))
    return low if low == high else f"{low}–{high}"


def _frames(clips: Columns, fps: float) -> np.ndarray:
    """(clips,) the most frames at `fps` that fit into each."""
    room = slack(clips["start"], clips["end"], clips["fps"], 1, fps)
    return np.where(clips["frames"] == 1, 1, np.maximum(0, np.floor(room * fps + 1e-9)) + 1).astype(np.int64)


def _lengths(clips: Columns, config: DataConfig, shapes: Sequence[VideoShape], tokens: TokensOf) -> list[int]:
    """The most frames, legal for the model, that fit into most of the clips, or else into any."""
    frames = _frames(clips, config.fps)
    for most in (int(np.quantile(frames, 1 - MOST, method="lower")), int(frames.max())):
        for n in range(most, max(1, most - 64), -1):
            if _legal([replace(shapes[0], frames=n)], shapes, tokens):
                return [n]
    return []


def _sized(shape: VideoShape, width: float, height: float, multiple: int, rounded: Callable[..., float]) -> VideoShape:
    sides = [max(1, int(rounded(side / multiple + 1e-6))) * multiple for side in (width, height)]
    return VideoShape(shape.frames, sides[1], sides[0])


def _legal(candidates: Iterable[VideoShape], shapes: Sequence[VideoShape], tokens: TokensOf) -> list[VideoShape]:
    legal = []
    for shape in dict.fromkeys(candidates):
        try:
            if shape not in shapes and tokens(shape) > 0:
                legal.append(shape)
        except StditError:
            pass
    return legal


def _best(clips: Columns, candidates: Sequence[VideoShape], config: DataConfig) -> tuple[VideoShape | None, int]:
    if not candidates:
        return None, 0
    shape = candidates[int(np.argmax(_taken(clips, candidates, config)))]
    takes = int(_taken(clips, [shape], config).sum())
    return (shape, takes) if takes else (None, 0)


def _taken(clips: Columns, shapes: Sequence[VideoShape], config: DataConfig) -> np.ndarray:
    """(shapes,) how many clips are assigned to each."""
    return assign_columns(clips, shapes, replace(config, stages=[])).counts
