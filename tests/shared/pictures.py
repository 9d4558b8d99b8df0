"""Clips with transparency, written by PyAV and Pillow."""

from __future__ import annotations

import av
import numpy as np
from PIL import Image


def see_through(count=24, height=48, width=64):
    """RGBA frames: left transparent (and red, which must not show), right blue, on top half transparent; a square."""
    frames = np.zeros((count, height, width, 4), np.uint8)
    frames[..., : width // 2, :] = (255, 0, 0, 0)
    frames[..., width // 2 :, :] = (0, 0, 255, 255)
    frames[:, :8, width // 2 :, 3] = 128
    for number, frame in enumerate(frames):
        left = width // 2 + 2 + number % 16
        frame[20:32, left : left + 12] = (0, 255, 0, 255)
    return frames


def on_white(frames):
    """The same by the closed form: colour times alpha, white times the rest."""
    colour, alpha = frames[..., :3].astype(float), frames[..., 3:] / 255.0
    return np.round(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def write_with_alpha(path, codec, pixels, frames, options=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        stream.options = options or {}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgba").reformat(format=pixels)))
        container.mux(stream.encode())


def save_moving(path, frames, duration=100, **options):
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=duration, **options)
