"""The built-in toy data set: a grammar of moving shapes, rendered to video files with captions.

"a large red circle moving left on a black background": colour × shape × size × direction × background. Each shape
crosses the frame once from a clip's first to its last frame, whatever the duration, so that motion spans several tokens
even at 64 × 64. Twelve of the 72 combinations of colour, shape and direction are never trained on (HELD_OUT).

`make_toy(folder)` writes

    folder/train/clip-000000.mp4 …, captions.csv       to scan and train on (some are still PNG images)
    folder/held_out/clip-000000.mp4 …, captions.csv    the held-out combinations, for evaluation only
    folder/toy.json                                    the settings, and whether the folder is complete
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stdit.data.decode.write import write_video
from stdit.data.read_ahead import read_ahead
from stdit.errors import StditError, nearest_name
from stdit.files import publish, publish_text
from stdit.keyed import keyed_seed, keyed_uniform
from stdit.shapes import VideoShape

# Six hues about 55° apart, all far more saturated than any background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "yellow": (240, 205, 40),
    "green": (45, 175, 65),
    "cyan": (50, 200, 210),
    "blue": (45, 65, 225),
    "magenta": (215, 60, 195),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"small": 0.44, "large": 0.60}  # width / √(frame area)
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # upper left and lower right corner
    "black": ((0, 0, 4), (60, 60, 64)),
    "grey": ((60, 60, 56), (136, 136, 132)),
    "dusk": ((30, 22, 62), (112, 80, 72)),
}
# Backgrounds are similar and dark: a white one would outweigh the shape in the latents' variance, and so in the loss.
# Each is a gradient, which tells places of the frame apart, so directions are learned sooner.
SOFT_EDGE = 0.04  # width of the blurred edges / √(frame area)
TRAVEL = (0.15, 0.85)  # the centre's first and last position along the direction, as a share of the frame

# (colour, shape, direction) never trained. Each (shape, direction) is held out once, each colour twice, and any other
# pair at most once: every value and every pair is frequent in training, and only the triple is new.
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    (tuple(COLOURS)[k % 6], SHAPES[k // 4], tuple(DIRECTIONS)[k % 4]) for k in range(12)
)


@dataclass(frozen=True, order=True)
class ToySpec:
    """What a clip shows. direction: "none" for a still image."""

    colour: str
    shape: str
    size: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        motion = "" if self.direction == "none" else f" moving {self.direction}"
        return f"a {self.size} {self.colour} {self.shape}{motion} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape, self.direction) in HELD_OUT

    @classmethod
    def parse(cls, caption: str) -> ToySpec:
        """Parses a caption of the grammar. Raises a StditError that names the unknown word."""
        example = "A toy caption reads 'a large red circle moving left on a black background'."
        match = re.fullmatch(r"a (\w+) (\w+) (\w+)(?: moving (\w+))? on a (\w+) background", caption.strip())
        if not match:
            raise StditError(f"{caption!r} is not a caption of the toy grammar. {example}")
        size, colour, shape, direction, background = match.groups()
        spec = cls(colour, shape, size, direction or "none", background)
        known = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "background": BACKGROUNDS}
        for attribute, values in (known | {"direction": (*DIRECTIONS, "none")}).items():
            value = getattr(spec, attribute)
            if value not in values:
                raise StditError(
                    f"{caption!r}: the toy grammar has no {attribute} {value!r}.{nearest_name(value, values)} {example}"
                )
        return spec


@cache
def all_specs(held_out: bool) -> tuple[ToySpec, ...]:
    """Every moving spec of the training set (360), or of the held-out set (72), in a fixed order."""
    every = itertools.product(COLOURS, SHAPES, DIRECTIONS, SIZES, BACKGROUNDS)
    specs = (ToySpec(colour, shape, size, direction, ground) for colour, shape, direction, size, ground in every)
    return tuple(spec for spec in specs if spec.held_out == held_out)


@cache
def still_specs() -> tuple[ToySpec, ...]:
    """Every spec of a still image (108)."""
    return tuple(sorted({ToySpec(s.colour, s.shape, s.size, "none", s.background) for s in all_specs(held_out=False)}))


def held_out_prompts(n: int = 64, seed: int = 0) -> list[str]:
    """n of the 72 held-out captions, in a keyed order."""
    specs = all_specs(held_out=True)
    if not 1 <= n <= len(specs):
        raise StditError(f"there cannot be {n} held-out prompts; the toy grammar has from 1 to {len(specs)}.")
    return [spec.caption for spec in _shuffled(specs, keyed_seed(seed, "toy held-out prompts"))[:n]]


@cache
def _shuffled(specs: tuple[ToySpec, ...], seed: int) -> tuple[ToySpec, ...]:
    return tuple(specs[i] for i in np.random.default_rng(seed).permutation(len(specs)))


@dataclass(frozen=True)
class Jitter:
    """A clip's deviation from its spec. start, end, across: positions, as shares of the frame."""

    start: float = 0.0
    end: float = 0.0
    across: float = 0.0
    size: float = 0.0  # relative
    colour: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in units of 255

    @classmethod
    def keyed(cls, seed: int) -> Jitter:
        most = [0.04, 0.04, 0.10, 0.05, 0.03, 0.03, 0.03]
        start, end, across, size, *colour = (np.random.default_rng(seed).uniform(-1, 1, 7) * most).tolist()
        return cls(start, end, across, size, tuple(colour))


def render(spec: ToySpec, width: int, height: int, frames: int, jitter: Jitter | None = None) -> np.ndarray:
    """A clip of a spec, edges soft: uint8 (T, H, W, 3).

    The shape crosses the frame once, at constant speed, from the first frame to the last; a single frame or a still
    spec shows it about the middle.
    """
    jitter = jitter or Jitter()
    half = SIZES[spec.size] * (1 + jitter.size) * np.sqrt(width * height) / 2
    x, y = _path(spec, width, height, frames, jitter)
    dy = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - y[:, None, None]  # (T, H, 1)
    dx = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - x[:, None, None]  # (T, 1, W)
    edge = np.float32(max(1.0, SOFT_EDGE * np.sqrt(width * height)))
    outside = outline_distance(spec.shape, dx, dy, np.float32(half)) / edge
    coverage = np.clip(0.5 - outside, 0, 1)[..., None]  # (T, H, W, 1)

    first, last = (np.array(colour, np.float32) for colour in BACKGROUNDS[spec.background])
    background = first + (last - first) * diagonal(width, height)[None, :, :, None]  # (1, H, W, 3)
    colour = np.clip(np.array(COLOURS[spec.colour], np.float32) + 255 * np.array(jitter.colour, np.float32), 0, 255)
    return (background + coverage * (colour - background) + 0.5).astype(np.uint8)


def diagonal(width: int, height: int) -> np.ndarray:
    """How far each pixel lies from the upper left corner to the lower right one, 0 to 1: (H, W) fp32."""
    across, down = ((np.arange(size, dtype=np.float32) + 0.5) / size for size in (width, height))
    return (down[:, None] + across[None, :]) / 2


def _path(spec: ToySpec, width: int, height: int, frames: int, jitter: Jitter) -> tuple[np.ndarray, np.ndarray]:
    """The centre's x and y in pixels, (T,) each."""
    step_x, step_y = DIRECTIONS.get(spec.direction, (0, 0))
    moment = np.linspace(0, 1, frames, dtype=np.float32) if frames > 1 else np.full(1, 0.5, np.float32)
    first, last = TRAVEL[0] + jitter.start, TRAVEL[1] + jitter.end
    along = first + (last - first) * moment - 0.5  # (T,) from the middle
    if not (step_x or step_y):
        x, y = np.full(frames, jitter.start * 3), np.full(frames, jitter.across)
    else:
        x = along * step_x if step_x else np.full(frames, jitter.across)
        y = along * step_y if step_y else np.full(frames, jitter.across)
    return ((0.5 + x) * width).astype(np.float32), ((0.5 + y) * height).astype(np.float32)


def outline_distance(shape: str, dx: np.ndarray, dy: np.ndarray, half: np.float32) -> np.ndarray:
    """Signed distance in pixels to the shape's outline, negative inside; all shapes are 2·half wide and high."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - half
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - half
    return np.maximum(dy - half, (2 * np.abs(dx) - dy - half) / np.float32(5**0.5))  # an upright triangle


@dataclass(frozen=True)
class ToySettings:
    """What `make_toy` renders. Clip i depends on (seed, i) alone, so a folder can grow."""

    clips: int = 1000
    held_out: int = 48
    seed: int = 0
    shapes: tuple[str, ...] = ("64x64", "80x48", "48x80")  # WIDTHxHEIGHT
    scales: tuple[float, ...] = (1.0, 1.5, 2.0)  # files are this much larger than the shapes
    seconds: tuple[float, ...] = (1.25, 1.75, 2.25, 2.75)  # a little more than 9, 13, 17 and 21 frames at 8 fps
    fps: tuple[int, ...] = (16, 24, 30)
    image_share: float = 0.1

    def __post_init__(self) -> None:
        for shape in self.shapes:
            VideoShape.parse(shape)
        if self.clips < 1 or self.held_out < 0:
            raise StditError(f"clips={self.clips} must be 1 or more, held_out={self.held_out} 0 or more.")
        if not (self.shapes and self.scales and self.seconds and self.fps):
            raise StditError("shapes, scales, seconds and fps of the toy set each need at least one value.")
        if not 0 <= self.image_share <= 1:
            raise StditError(f"image_share={self.image_share} is not between 0 and 1.")


@dataclass(frozen=True)
class ToyFile:
    """One file to render."""

    name: str
    spec: ToySpec
    width: int
    height: int
    frames: int
    fps: int
    jitter: Jitter


def toy_file(settings: ToySettings, part: str, index: int) -> ToyFile:
    """File `index` of "train" or "held_out": a function of the seed and the index alone."""

    def choose(purpose: str, values: tuple):
        return values[int(keyed_uniform(settings.seed, f"toy {purpose}", part, index) * len(values))]

    still = part == "train" and keyed_uniform(settings.seed, "toy still", part, index) < settings.image_share
    specs = still_specs() if still else all_specs(held_out=part == "held_out")
    deal, place = divmod(index, len(specs))  # every spec once before any comes again
    spec = _shuffled(specs, keyed_seed(settings.seed, "toy deal", part, deal))[place]
    shape, scale = VideoShape.parse(choose("shape", settings.shapes)), choose("scale", settings.scales)
    fps = choose("fps", settings.fps)
    return ToyFile(
        name=f"clip-{index:06d}.{'png' if still else 'mp4'}",
        spec=spec,
        width=2 * round(shape.width * scale / 2),  # yuv420p needs even sizes
        height=2 * round(shape.height * scale / 2),
        frames=1 if still else max(2, round(choose("seconds", settings.seconds) * fps)),
        fps=fps,
        jitter=Jitter.keyed(keyed_seed(settings.seed, "toy jitter", part, index)),
    )


def make_toy(
    folder: str | Path, settings: ToySettings | None = None, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, int | bool]:
    """Renders the toy set into a folder, or completes it.

    progress: called with (done, total) after each file.

    Returns counts: train, held_out, rendered (0 if it was complete). Raises StditError if the folder has other content,
    or a toy set with other settings (more clips are fine).
    """
    folder, settings = Path(folder), settings or ToySettings()
    _claim(folder, settings)
    missing: list[tuple[Path, ToyFile]] = []
    for part, count in (("train", settings.clips), ("held_out", settings.held_out)):
        files = [toy_file(settings, part, index) for index in range(count)]
        missing += [(path, file) for file in files if not (path := folder / part / file.name).exists()]
        rows = [f"{file.name},{file.spec.caption}\n" for file in files]
        publish_text(folder / part / "captions.csv", "".join(["path,caption\n", *rows]))
    # threads suffice: numpy and the encoder release the GIL most of the time
    jobs = read_ahead(lambda job: _write(*job), ([job] for job in missing), os.cpu_count() or 1, ahead=100)
    for done, _ in enumerate(jobs, 1):
        progress(done, len(missing))
    _write_settings(folder, settings, complete=True)
    return {"train": settings.clips, "held_out": settings.held_out, "rendered": len(missing)}


def _claim(folder: Path, settings: ToySettings) -> None:
    """Reserves the folder for this toy set. Raises StditError if it has other content."""
    path = folder / "toy.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise StditError(f"{path} is damaged ({error}). Delete the folder or choose another.") from error
        wanted = json.loads(json.dumps(asdict(settings)))
        grown = [name for name in ("clips", "held_out") if (found.get(name) or 0) < wanted[name]]
        differing = [
            f"{name} is {found.get(name)} there, {wanted[name]} here"
            for name in wanted
            if found.get(name) != wanted[name] and name not in grown
        ]
        if differing:
            raise StditError(
                f"{folder} has a different toy set: {'; '.join(differing)}. Delete it or choose another folder."
            )
        if found != wanted:  # it grows
            _write_settings(folder, settings, complete=False)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StditError(f"{folder} is not a toy set (it has no toy.json). Choose an empty or new folder.")
    _write_settings(folder, settings, complete=False)


def _write_settings(folder: Path, settings: ToySettings, complete: bool) -> None:
    content = {"format": 1, "complete": complete, "settings": asdict(settings)}
    publish_text(folder / "toy.json", json.dumps(content, indent=2) + "\n")


def _write(path: Path, file: ToyFile) -> None:
    frames = render(file.spec, file.width, file.height, file.frames, file.jitter)
    if file.frames > 1:
        write_video(path, frames, file.fps, crf=16)
        return
    from PIL import Image

    with publish(path) as part:
        Image.fromarray(frames[0]).save(part, "png")
