"""What causal layers keep between the chunks of a clip."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAST_FRAMES = 2  # frames before the present one that a kernel of three frames sees


class CausalCache(dict[nn.Module, Tensor]):
    """The last input frames of each causal layer, (B, C, ≤ 2, H, W), kept from one chunk of a clip to the next.

    It is empty before the first chunk. Each clip needs its own, and so do the encoder and the decoder.

    shares_buffer_of: a cache used in turn with this one (that of another tile), to share `buffer` with.
    """

    def __init__(self, shares_buffer_of: CausalCache | None = None):
        super().__init__()
        self._buffer: list[Tensor] = [] if shares_buffer_of is None else shares_buffer_of._buffer

    def buffer(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised memory of `like`'s dtype for the input of one convolution, valid until the next call.

        Reused, because the system zeroes every page that it hands out: 7 % of the time at 256×256.
        """
        count = math.prod(shape)
        if not self._buffer or self._buffer[0].numel() < count or self._buffer[0].dtype != like.dtype:
            self._buffer.clear()
            self._buffer.append(like.new_empty(count))
        return self._buffer[0][:count].view(shape)


def with_past(x: Tensor, layer: nn.Module, cache: CausalCache | None, pad_single: bool = False) -> Tensor:
    """Puts the two frames before the chunk `x` in front of it, zeros at the start of a clip, and updates the cache.

    pad_single: also pad a clip's first frame when it comes alone. Without, its convolution skips the zeros.
    """
    past = None if cache is None else cache.get(layer)
    if past is not None:
        x = torch.cat([past, x], dim=2)
    if cache is not None:
        cache[layer] = x[:, :, -PAST_FRAMES:].clone()
    missing = PAST_FRAMES - (0 if past is None else past.shape[2])
    return x if not missing or (x.shape[2] == 1 and not pad_single) else F.pad(x, (0, 0, 0, 0, missing, 0))
