"""uint8 frames ↔ video in [−1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from stdit.pixels import to_pixels, to_video


def test_every_value_goes_to_minus_one_to_one_and_comes_back():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)  # (T, H, W, 3)
    frames[1] = frames[1].flip(0)
    video = to_video(frames)
    assert video.shape == (3, 2, 16, 16) and video.dtype == torch.float32
    assert torch.equal(video[1, 0].flatten(), torch.arange(256.0) / 127.5 - 1)
    assert torch.equal(to_pixels(video), frames)
    assert torch.equal(to_pixels(to_video(frames[None])), frames[None])


def test_rounding_is_that_of_diffusers():
    video = torch.randn(3, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        images = VaeImageProcessor().postprocess(video.to(dtype).transpose(0, 1), "pil")
        wanted = np.stack([np.asarray(image) for image in images])
        assert np.array_equal(to_pixels(video.to(dtype)).numpy(), wanted)
