"""Draws samples.webp: what the demo's model makes of the first held-out prompts, at three shapes.

python docs/images/samples.py DEMO      DEMO: the folder of `make demo`, after `stdit eval toy`

Prompts are the first of the 64 that were evaluated, in their keyed order; none is chosen by its result.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from stdit.data.decode.video import read_frames
from stdit.shapes import VideoShape

COLUMNS, CELL, MARGIN, HEAD, TEXT = 4, 200, 8, 34, 74
FPS, HOLD = 8, 6  # frames per second; frames that the end is held for
KINDS = {
    "trained": "a trained shape",
    "untrained aspect ratio": "an aspect ratio never trained",
    "untrained duration": "a duration never trained",
}


def main(demo: Path) -> None:
    result = json.loads((demo / "dit" / "evaluation.json").read_text())
    sets = result["sets"]
    prompts = [clip["prompt"] for clip in sets[0]["clips"][:COLUMNS]]
    rows = [(row, [read(demo, row, clip) for clip in row["clips"][:COLUMNS]]) for row in sets]
    width = MARGIN + COLUMNS * (CELL + MARGIN)
    frames = max(clip.shape[0] for _, clips in rows for clip in clips)
    canvas = [draw(rows, prompts, width, min(at, frames - 1)) for at in range(frames + HOLD)]
    path = Path(__file__).with_name("samples.webp")
    canvas[0].save(path, save_all=True, append_images=canvas[1:], duration=1000 // FPS, loop=0, quality=72, method=6)
    print(f"{path}: {path.stat().st_size:,} bytes, {width}×{canvas[0].height}, {len(canvas)} frames")


def read(demo: Path, row: dict, clip: dict) -> np.ndarray:
    shape = VideoShape.parse(row["shape"])
    return read_frames(str(demo / "dit" / clip["file"]), shape.frames, (shape.width, shape.height), FPS)


def scale_of(clip: np.ndarray) -> float:
    return 2.5 if clip.shape[1] == clip.shape[2] else CELL / clip.shape[2]


def draw(rows: list, prompts: list[str], width: int, at: int) -> Image.Image:
    """One frame of the whole picture; a clip that has ended stands still."""
    heights = [round(clips[0].shape[1] * scale_of(clips[0])) for _, clips in rows]
    total = TEXT + sum(HEAD + height for height in heights) + MARGIN
    picture = Image.new("RGB", (width, total), "white")
    pen = ImageDraw.Draw(picture)
    for column, prompt in enumerate(prompts):
        middle = MARGIN + column * (CELL + MARGIN) + CELL // 2
        text = "\n".join(textwrap.wrap(prompt, 22))
        pen.multiline_text((middle, 6), text, "#1f2430", font(16), anchor="ma", align="center", spacing=3)
    y = TEXT
    for (row, clips), height in zip(rows, heights):
        shape = VideoShape.parse(row["shape"])
        label = f"{shape.width}×{shape.height}, {shape.frames} frames: {KINDS[row['kind']]}"
        pen.text((MARGIN, y + HEAD - 8), label, "#1f2430", font(16, bold=True), anchor="ls")
        y += HEAD
        for column, clip in enumerate(clips):
            frame = Image.fromarray(clip[min(at, len(clip) - 1)])
            size = (round(clip.shape[2] * scale_of(clip)), height)
            left = MARGIN + column * (CELL + MARGIN) + (CELL - size[0]) // 2
            picture.paste(frame.resize(size, Image.Resampling.BICUBIC), (left, y))
        y += height
    return picture


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    weight = "bold" if bold else "normal"
    properties = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties), size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
