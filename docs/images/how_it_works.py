"""Draws how-it-works.png: a clip becomes latents, tokens, packs, and frames again.

python docs/images/how_it_works.py

The clips are rendered by the toy data set. Token counts are those of the toy presets: VAE stride 4×8×8, patch 1×2×2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from stdit.data.toy import Jitter, ToySpec, render
from stdit.shapes import VideoShape

STRIDE, PATCH = (4, 8, 8), (1, 2, 2)
INK, FAINT, BOX = "#1f2430", "#8a90a0", "#eef1f7"
WIDTH = 100.0
CLIPS = {  # caption, shape, colour of its tokens, noise level
    "A": ("a large red circle moving right on a black background", "96x48x17", "#d9534f", 0.83),
    "B": ("a small yellow square on a dusk background", "64x64", "#e0b03b", 0.41),
    "C": ("a small magenta circle on a grey background", "64x64", "#c459b5", 0.97),
    "D": ("a large cyan triangle moving up on a grey background", "64x64x17", "#3aa6b5", 0.62),
    "E": ("a large green square moving down on a dusk background", "48x80x9", "#4a9d57", 0.25),
}
RANKS = (("A", "B", "C"), ("D", "E"))


def main() -> None:
    figure = Figure(figsize=(11, 10.4), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(94.5, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    draw_clips(axes, top=5)
    draw_latents(axes, top=28)
    draw_packs(axes, top=51)
    draw_network(axes, top=70.5)
    path = Path(__file__).with_name("how-it-works.png")
    figure.savefig(path, dpi=150)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def grid_of(shape: VideoShape) -> tuple[int, int, int]:
    grid = shape.grid(STRIDE, PATCH)
    return grid.frames, grid.height, grid.width


def frames_of(name: str) -> np.ndarray:
    """The clip's frames, uint8 (T, H, W, 3)."""
    caption, text, *_ = CLIPS[name]
    shape = VideoShape.parse(text)
    return render(ToySpec.parse(caption), shape.width, shape.height, shape.frames, Jitter())


def centre(index: int) -> float:
    return 11.5 + index * 19.2


def heading(axes: Axes, y: float, number: int, text: str, note: str = "") -> None:
    axes.text(2, y, f"{number}", fontsize=17, fontweight="bold", color="white", va="center", ha="center",
              bbox={"boxstyle": "circle,pad=0.25", "fc": INK, "ec": "none"})  # fmt: skip
    axes.text(5, y, text, fontsize=16, fontweight="bold", color=INK, va="center")
    if note:
        axes.text(98, y, note, fontsize=13, color=FAINT, va="center", ha="right")


def stack(axes: Axes, pictures: np.ndarray, x: float, y: float, scale: float, colour: str | None = None) -> None:
    """Frames as a stack of sheets, the first in front; its lower edge at y. colour: draws the grid of patches."""
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    shift = 0.75 if len(pictures) < 6 else 0.5
    left = x - (width + shift * (len(pictures) - 1)) / 2
    for sheet in reversed(range(len(pictures))):
        at = (left + shift * sheet, y - height - shift * sheet)
        box = (at[0], at[0] + width, at[1] + height, at[1])
        axes.imshow(pictures[sheet], extent=box, interpolation="nearest", zorder=3 - sheet / 100)
        edge = colour or "white"
        axes.add_patch(Rectangle(at, width, height, fill=False, ec=edge, lw=1.0, zorder=3.005 - sheet / 100))
        if colour and sheet == 0:
            rows, columns = pictures.shape[1] // PATCH[1], pictures.shape[2] // PATCH[2]
            for row in range(1, rows):
                axes.plot([box[0], box[1]], [at[1] + height * row / rows] * 2, color="white", lw=1.1, zorder=4)
            for column in range(1, columns):
                axes.plot([at[0] + width * column / columns] * 2, [at[1], box[2]], color="white", lw=1.1, zorder=4)


def draw_clips(axes: Axes, top: float) -> None:
    heading(axes, top - 1.5, 1, "Clips of any shape", "videos and images, any aspect ratio and duration")
    for index, name in enumerate(CLIPS):
        shape = VideoShape.parse(CLIPS[name][1])
        frames = frames_of(name)
        shown = np.concatenate([frames[len(frames) // 2 :], frames[: len(frames) // 2]])[:: -(-len(frames) // 9)]
        stack(axes, shown, centre(index), top + 16, 0.125)
        length = "image" if shape.is_image else f"{shape.frames} frames"
        axes.text(centre(index), top + 18, f"{shape.width}×{shape.height}, {length}", ha="center", va="center",
                  fontsize=13, color=INK)  # fmt: skip


def draw_latents(axes: Axes, top: float) -> None:
    heading(axes, top - 1.5, 2, "Latents, cut into spacetime patches: tokens", "the VAE makes 4×8×8 pixels one latent")
    for index, name in enumerate(CLIPS):
        _, text, colour, _ = CLIPS[name]
        shape = VideoShape.parse(text)
        axes.add_patch(FancyArrowPatch((centre(index), top - 4.4 + 5), (centre(index), top + 4), color=FAINT, lw=1.6,
                                       arrowstyle="-|>", mutation_scale=13))  # fmt: skip
        frames = frames_of(name)[:: STRIDE[0]]
        frames = np.concatenate([frames[len(frames) // 2 :], frames[: len(frames) // 2]])
        height, width = shape.height // STRIDE[1], shape.width // STRIDE[2]
        latents = frames.reshape(len(frames), height, STRIDE[1], width, STRIDE[2], 3).mean((2, 4)).astype(np.uint8)
        stack(axes, latents, centre(index), top + 16, 0.85, colour)
        t, h, w = grid_of(shape)
        axes.text(centre(index), top + 18, f"{t}×{h}×{w} = {t * h * w} tokens", ha="center", va="center", fontsize=13,
                  color=INK)  # fmt: skip


def draw_packs(axes: Axes, top: float) -> None:
    heading(
        axes, top - 1.5, 3, "Packs: tokens one after another, no padding", "equal work on all ranks; t: noise level"
    )
    total = max(sum(tokens(name) for name in names) for names in RANKS)
    unit = 84 / total
    for rank, names in enumerate(RANKS):
        y, x = top + 2.2 + rank * 7.6, 12.0
        axes.text(2, y + 2, f"rank {rank}", fontsize=13, color=INK, va="center")
        for name in names:
            x = strip(axes, name, x, y, unit)


def tokens(name: str) -> int:
    t, h, w = grid_of(VideoShape.parse(CLIPS[name][1]))
    return t * h * w


def strip(axes: Axes, name: str, x: float, y: float, unit: float, height: float = 4.0) -> float:
    """A clip's tokens as a strip; returns where it ends."""
    _, _, colour, level = CLIPS[name]
    count = tokens(name)
    axes.add_patch(Rectangle((x, y), count * unit, height, fc=colour, ec="white", lw=1.5))
    for number in range(1, count):
        axes.plot([x + number * unit] * 2, [y, y + height], color="white", lw=0.35, alpha=0.7)
    label = f"t = {level}" if count > 20 else f"{level}"
    axes.text(x + count * unit / 2, y + height / 2, label, ha="center", va="center", fontsize=13, color="white",
              fontweight="bold", zorder=5)  # fmt: skip
    return x + count * unit


def draw_network(axes: Axes, top: float) -> None:
    heading(axes, top - 1.5, 4, "One forward: tokens attend within their clip, and to its caption")
    noise = np.random.default_rng(0).normal(0, 1, (8, 8, 3))
    clean = frames_of("D")[8].reshape(8, 8, 8, 8, 3).mean((1, 3)) / 255
    noisy = np.clip(0.3 * clean + 0.7 * (0.5 + 0.25 * noise), 0, 1)
    middle, side = top + 10.5, 8.5
    picture(axes, noisy, 5.5, middle, side, "x_t = (1 − t)·x₀ + t·ε")
    arrow(axes, 15.2, 21, middle)
    box(axes, 21.5, middle - 4.5, 20, 9, "diffusion\ntransformer")
    axes.text(31.5, middle + 9.2, "“a large cyan triangle moving up …”", ha="center", va="center", fontsize=12,
              color=INK, style="italic")  # fmt: skip
    axes.add_patch(FancyArrowPatch((31.5, middle + 8), (31.5, middle + 4.8), color=FAINT, lw=1.6, arrowstyle="-|>",
                                   mutation_scale=13))  # fmt: skip
    arrow(axes, 42, 48, middle)
    axes.text(45, middle - 2.2, "flow", ha="center", va="center", fontsize=12.5, color=INK)
    picture(axes, clean, 49.5, middle, side, "x₀, after some steps")
    arrow(axes, 59.2, 64.5, middle)
    box(axes, 65, middle - 4.5, 13, 9, "VAE\ndecoder")
    arrow(axes, 78.5, 84, middle)
    frames = frames_of("D")
    stack(axes, np.concatenate([frames[8::2], frames[:8:2]]), 91, middle + side / 2, 0.105)
    axes.text(91, middle + 6.6, "frames", ha="center", va="center", fontsize=12.5, color=INK)


def picture(axes: Axes, pixels: np.ndarray, x: float, y: float, side: float, label: str) -> None:
    axes.imshow(pixels, extent=(x, x + side, y + side / 2, y - side / 2), interpolation="nearest", zorder=3)
    axes.text(x + side / 2, y + 6.6, label, ha="center", va="center", fontsize=12.5, color=INK)


def arrow(axes: Axes, start: float, end: float, y: float) -> None:
    axes.add_patch(FancyArrowPatch((start, y), (end, y), color=FAINT, lw=1.8, arrowstyle="-|>", mutation_scale=14))


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=BOX, ec=INK,
                                  lw=1.3))  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=15, color=INK)


if __name__ == "__main__":
    main()
