"""The noise of a clip of a training with patches of 1×2×2, written out."""

from __future__ import annotations

from torch import Tensor

from stdit.keyed.stream import keyed_stream


def clip_noise(like: Tensor, seed: int, clip_id: str) -> Tensor:
    """(C, T, H, W): the numbers of its stream token after token, those of a token in the order of Wan's output."""
    channels, frames, height, width = like.shape
    numbers = keyed_stream(seed, "noise", 0, clip_id, 0).normal(0, like.numel())
    tokens = numbers.view(frames, height // 2, width // 2, 2, 2, channels)
    return tokens.permute(5, 0, 1, 3, 2, 4).reshape(like.shape)
