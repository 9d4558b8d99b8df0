"""The adversary of a VAE: a 3-D patch discriminator, its losses, and the adaptive weight of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight

from stdit.keyed import random_seed
from stdit.keyed.weights import ONE, ZERO, Start, StartingWeights


@dataclass
class DiscriminatorConfig:
    """Settings of the adversarial term.

    weight: 1: at the decoder's last layer its gradient is as long as that of the other terms.
    start: the first optimizer step in which it takes part.
    lr: of its AdamW, on the run's schedule.
    dim: channels of the discriminator's first layer.
    layers: each halves height and width; all but the first halve the frames, too.
    """

    weight: PositiveFloat = 0.5
    start: NonNegativeInt = 0
    lr: PositiveFloat = 1e-4
    dim: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    layers: Annotated[int, Field(ge=1, le=6)] = 4


class Discriminator(nn.Module):
    """Maps clips (B, 3, T, H, W) to logits (B, T', H', W'), one per patch of space and time; high means real.

    PatchGAN (Isola et al. 2017) with kernels of three frames, so it sees flicker. An image is a clip of one frame
    between zeros. The norms are per clip: its logits do not depend on the rest of the batch.
    """

    def __init__(self, config: DiscriminatorConfig, seed: int | None = None):
        """seed: of the starting weights, torch's own for such layers. None: one from torch's global generator."""
        super().__init__()
        widths = [config.dim * min(2**i, 8) for i in range(config.layers)]
        self.layers = nn.Sequential()
        for i, (inner, outer) in enumerate(zip([3, *widths], widths)):
            stride = (1, 2, 2) if i == 0 else (2, 2, 2)
            self.layers.append(_Conv(inner, outer, (3, 4, 4), stride, padding=1))
            if i:
                self.layers.append(nn.GroupNorm(8, outer))
            self.layers.append(nn.LeakyReLU(0.2))
        # Not a convolution: with a single output channel its gradient is NaN in bf16 on a CPU (torch 2.15, oneDNN).
        self.head = nn.Linear(widths[-1], 1)
        if not self.head.weight.is_meta:
            self.starting_weights(random_seed() if seed is None else seed).fill(self)

    def starting_weights(self, seed: int) -> StartingWeights:
        found: dict[str, Start] = {}
        for place, module in self.named_modules():
            for name, _ in module.named_parameters(place, recurse=False):
                if isinstance(module, nn.Conv3d | nn.Linear):
                    found[name] = Start("uniform", module.weight[0].numel() ** -0.5)
                else:
                    found[name] = ZERO if name.endswith("bias") else ONE
        return StartingWeights(found, "discriminator", seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x.to(memory_format=torch.channels_last_3d))  # (B, C, T', H', W')
        return self.head(x.movedim(1, -1)).squeeze(-1)


class _Conv(nn.Conv3d):
    """Kernels of three frames, padded by one. A single frame meets only the middle one, in a 2-D convolution.

    This is a third of the work. It also avoids a bug: oneDNN's 3-D convolution of a single bf16 frame of three channels
    reads uninitialised memory on CPUs with AMX (torch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1:
            return super().forward(x)
        weight = self.weight[:, :, 1].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x.squeeze(2), weight, self.bias, self.stride[1:], self.padding[1:]).unsqueeze(2)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017), from the logits (B, …) of clips and of reconstructions. Returns (B,).

    0 if all real logits are above 1 and all fake ones below −1; 1 if every logit is 0.
    """
    return 0.5 * (F.relu(1 - real.float()).flatten(1).mean(1) + F.relu(1 + fake.float()).flatten(1).mean(1))


def generator_loss(fake: Tensor) -> Tensor:
    """The VAE's adversarial loss: minus the mean logit of its reconstructions, (B, …) -> (B,)."""
    return -fake.float().flatten(1).mean(1)


@torch.no_grad()
def adaptive_weight(conv: nn.Conv3d, x: Tensor, wanted: Tensor, other: Tensor) -> Tensor:
    """The ratio of two losses' gradients at a layer's weights: ‖∇₁‖ / (‖∇₂‖ + 1e-4), at most 1e4 (Esser et al. 2021,
    eq. 7). Computed per clip, so that it does not depend on the rest of the batch. Returns (B,) in fp32.

    conv: of stride 1. x: its input, with the past frames in front, (B, C_in, T + past, H, W).
    wanted, other: the gradients of the two losses with respect to its output, (B, C_out, T, H, W).
    """
    taps = x.shape[2] - wanted.shape[2] + 1  # fewer for a single first frame
    size = (conv.out_channels, conv.in_channels, taps, *conv.kernel_size[1:])
    assert not isinstance(conv.padding, str)
    norms = []
    for gradient in (wanted, other):
        for clip, g in zip(x.split(1), gradient.split(1)):
            norms.append(conv3d_weight(clip.float(), size, g.float().contiguous(), padding=conv.padding).norm())
    first, second = torch.stack(norms).chunk(2)
    return (first / (second + 1e-4)).clamp(max=1e4)
