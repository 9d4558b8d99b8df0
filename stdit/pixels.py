"""Pixels to what a VAE takes, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def to_video(frames: Tensor) -> Tensor:
    """uint8 frames (…, T, H, W, 3) as video (…, 3, T, H, W), fp32 in [−1, 1]."""
    return frames.movedim(-1, -4).float().div_(127.5).sub_(1)


def to_pixels(video: Tensor) -> Tensor:
    """Video (…, 3, T, H, W) in [−1, 1] as uint8 frames (…, T, H, W, 3), clamped and rounded as diffusers does."""
    unit = (video.movedim(-4, -1) * 0.5 + 0.5).clamp(0, 1).float()
    return (unit * 255).round().to(torch.uint8)
