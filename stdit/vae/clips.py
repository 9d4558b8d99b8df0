"""Clips as tensors: what a VAE accepts, and how clips fold into frames and into patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stdit.errors import StditError

ROUNDING = 1e-3  # how far a pixel may lie outside [-1, 1]


def check_video(video: Tensor) -> None:
    """Raises StditError unless `video` is (B, 3, T, H, W), of floats in [−1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3 or not len(video):
        raise StditError(f"video of shape {tuple(video.shape)}: the VAE encodes (B, 3, T, H, W).")
    check_pixels(video, "video")


def check_pixels(pixels: Tensor, name: str) -> None:
    """Raises StditError unless `pixels` are floats in [−1, 1]. name: of the pixels, for the message."""
    if not pixels.is_floating_point():
        raise StditError(
            f"{name} is {pixels.dtype}: the VAE encodes floats in [-1, 1]. From uint8: x.float() / 127.5 - 1."
        )
    if pixels.device.type == "meta" or pixels.numel() == 0 or torch.compiler.is_compiling():  # no values to check
        return
    low, high = torch.stack(pixels.detach().aminmax()).tolist()
    if math.isnan(low) or math.isnan(high):
        raise StditError(f"{name} has NaN in it: leave the clip out, or mend the frame.")
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise StditError(
            f"{name} is in [{low:g}, {high:g}]: the VAE encodes [-1, 1]. From [0, 255]: x / 127.5 - 1; after a resize "
            "that overshoots: x.clamp(-1, 1)."
        )


def check_latents(latents: Tensor, z_dim: int) -> None:
    """Raises StditError unless `latents` are (B, z_dim, T', H', W')."""
    if latents.ndim != 5 or latents.shape[1] != z_dim or not latents.numel():
        raise StditError(f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {z_dim}, T', H', W').")


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W); no copy if x is channels-last."""
    y = x.transpose(1, 2).flatten(0, 1)
    if len(y) > 1 or y.stride(1) != 1:
        return y
    # torch reads a single frame as channels-last only if the (unused) stride of its batch dimension fits, too
    return y.as_strided(y.shape, (y.shape[2] * y.stride(2), *y.stride()[1:]))


def to_clips(x: Tensor, clips: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W), the inverse of `to_frames`."""
    return x.unflatten(0, (clips, -1)).transpose(1, 2)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C·p·p, T, H/p, W/p), channels in the order (c, x, y) of Wan 2.2's VAE; channels-last."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 3, 5, 1, 6, 4).reshape(b, t, h // patch, w // patch, c * patch * patch)
    return x.permute(0, 4, 1, 2, 3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """(B, C·p·p, T, H, W) -> (B, C, T, H·p, W·p), the inverse of `patchify`; contiguous."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, t, h * patch, w * patch)
