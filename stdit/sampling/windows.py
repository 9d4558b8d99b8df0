"""Overlapping windows in time: a clip longer than its weights know is denoised in windows that they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of `length` latent frames over a clip of `frames`, each half over the one before; the last ends with it.

    In each step the network sees every window as a clip of its own. Where windows overlap, their outputs are mixed,
    each weighing more towards its middle (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113; over time as
    Gen-L-Video, Wang et al. 2023, arXiv 2305.18264). So nothing is decoded and encoded again at a join.
    """

    frames: int
    length: int
    patch: int = 1  # latent frames of a patch; windows begin at patches

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First latent frame of each window, and the one behind its last."""
        if self.length >= self.frames:
            return [(0, self.frames)]
        stride = max(self.patch, self.length // 2 // self.patch * self.patch)
        starts = [*range(0, self.frames - self.length, stride), self.frames - self.length]
        return [(start, start + self.length) for start in starts]

    def mix(self, outputs: Sequence[Tensor]) -> Tensor:
        """The output (C, T', H', W') of a clip from those of its windows (C, length, H', W')."""
        spans = self.spans
        if len(spans) == 1:
            return outputs[0]
        ramp = torch.arange(1, self.length + 1, device=outputs[0].device, dtype=outputs[0].dtype)
        weight = torch.minimum(ramp, ramp.flip(0))[None, :, None, None]
        shape = (outputs[0].shape[0], self.frames, *outputs[0].shape[2:])
        total, weights = outputs[0].new_zeros(shape), outputs[0].new_zeros(1, self.frames, 1, 1)
        for (start, stop), output in zip(spans, outputs):
            total[:, start:stop] += weight * output
            weights[:, start:stop] += weight
        return total / weights
