"""Open-Sora 1.2's autoencoder: Stable Diffusion's on every frame, then a causal one over 17 frames' latents at a time.

As hpcaitech/Open-Sora v1.2.0 has it (opensora/models/vae/vae.py and vae_temporal.py); its tensors' names are ours too.
The one of frames is diffusers' (extra `vaes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import Stride, VideoShape, frames_of
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.families.diffusers_vae import IMAGE_VAE, OtherVAE, WithoutBudget, diffusers_class
from stdit.vae.streaming import draw

SPATIAL_SCALE = 0.18215  # of the latents of frames, whatever their own config says
FRAMES_AT_ONCE = 4  # in the autoencoder of frames


@dataclass(frozen=True)
class OpenSoraConfig:
    """The release's sizes by default.

    widths, blocks: of the levels of the autoencoder of frames, and residual blocks in each. filters, multipliers,
    temporal_blocks, groups: of the one over time. temporal_downsample: whether frames halve after each level but the
    last. z_dim: channels of all latents. group: frames that go through it together.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    filters: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_blocks: int = 4
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    groups: int = 32
    z_dim: int = 4
    group: int = 17

    family = "open_sora_vae"
    name = "VideoAutoencoderPipeline"

    def __post_init__(self) -> None:
        halved = 2 ** sum(self.temporal_downsample)
        if (self.group - 1) % halved:
            raise StditError(f"{self.name}: groups of {self.group} frames are not 1+{halved}k.")

    @cached_property
    def stride(self) -> Stride:
        side = 2 ** (len(self.widths) - 1)
        return Stride((2 ** sum(self.temporal_downsample), side, side), group=self.group)


class CausalConv(nn.Module):
    """A convolution of (frames, rows, columns) that sees no later frame; zeros stand for what was before."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, (stride, 1, 1), bias=bias)
        self.pad = (*(kernel // 2,) * 4, kernel - stride, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), CausalConv(channels, out, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(groups, out), CausalConv(out, out, bias=False)
        self.conv3 = nn.Identity() if channels == out else CausalConv(channels, out, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.conv3(x)


def _res_blocks(config: OpenSoraConfig, channels: int, out: int) -> nn.ModuleList:
    blocks = [ResBlock(channels if i == 0 else out, out, config.groups) for i in range(config.temporal_blocks)]
    return nn.ModuleList(blocks)


class Encoder(nn.Module):
    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        self.conv_in = CausalConv(config.z_dim, config.filters, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        width = config.filters
        for multiplier, halves in zip(config.multipliers, (*config.temporal_downsample, False)):
            before, width = width, config.filters * multiplier
            self.block_res_blocks.append(_res_blocks(config, before, width))
            self.conv_blocks.append(CausalConv(width, width, stride=2) if halves else nn.Identity())
        self.res_blocks = _res_blocks(config, width, width)
        self.norm1 = nn.GroupNorm(config.groups, width)
        self.conv2 = CausalConv(width, 2 * config.z_dim, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for blocks, halve in zip(self.block_res_blocks, self.conv_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            x = halve(x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        width = config.filters * config.multipliers[-1]
        self.conv1 = CausalConv(config.z_dim, width)
        self.res_blocks = _res_blocks(config, width, width)
        levels, doublings = [], []  # from the last to the first
        for multiplier, doubles in zip(reversed(config.multipliers), (*reversed(config.temporal_downsample), False)):
            before, width = width, config.filters * multiplier
            levels.append(_res_blocks(config, before, width))
            doublings.append(CausalConv(width, 2 * width) if doubles else nn.Identity())
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(levels[::-1]), nn.ModuleList(doublings[:-1][::-1])
        self.norm1 = nn.GroupNorm(config.groups, width)
        self.conv_out = CausalConv(width, config.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:  # type: ignore[attr-defined]
                x = block(x)
            if level and isinstance(double := self.conv_blocks[level - 1], CausalConv):
                x = double(x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)  # channels (C, 2) to frames (T, 2)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Latents of frames (B, C, T, H, W) to latents of every `step` frames and back."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        z, self.step = config.z_dim, config.stride[0]
        self.encoder, self.quant_conv = Encoder(config), CausalConv(2 * z, 2 * z, kernel=1)
        self.decoder, self.post_quant_conv = Decoder(config), CausalConv(z, z, kernel=1)

    def encode(self, x: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.step, 0))
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        if not sample:
            return mean
        return draw(mean, log_variance.clamp(-30, 20), generator)

    def decode(self, z: Tensor, frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(z))[:, :, -frames:]


class OpenSoraVAE(WithoutBudget, nn.Module):
    """Clips to latents and back; see CausalVAE, whose methods these are."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.widths)
        frames = diffusers_class("AutoencoderKL", IMAGE_VAE, "Open-Sora 1.2's VAE")(
            block_out_channels=config.widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.blocks,
            latent_channels=config.z_dim,
            scaling_factor=SPATIAL_SCALE,
        )
        self.spatial_vae, self.temporal_vae = OtherVAE(frames, IMAGE_VAE), TemporalVAE(config)
        self.register_buffer("scale", torch.ones(1, config.z_dim, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, config.z_dim, 1, 1, 1))

    def encode(self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W'). sample: draw, else the mode."""
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise StditError(
                f"video of {video.dtype} {tuple(video.shape)}: the VAE encodes floats in [-1, 1] (B, 3, T, H, W)."
            )
        VideoShape(*video.shape[2:]).latent(self.config.stride)  # raises where it does not divide
        parts = []
        for group in video.split(self.config.group, dim=2):
            frames = [self.spatial_vae.encode(few, sample, generator) for few in group.split(FRAMES_AT_ONCE, dim=2)]
            parts.append(self.temporal_vae.encode(torch.cat(frames, dim=2), sample, generator))
        return self.normalise(torch.cat(parts, dim=2))

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W), in [−1, 1] (clamp=False: as it comes)."""
        return torch.cat(list(self._decoded(latents, clamp)), dim=2)

    def decode_stream(self, latents: Tensor, clamp: bool = True) -> Iterator[Tensor]:
        """`decode` of one clip (z, T', H', W'): its frames (3, t, H, W), a group at a time."""
        for video in self._decoded(latents[None], clamp):
            yield video[0]

    def _decoded(self, latents: Tensor, clamp: bool) -> Iterator[Tensor]:
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise StditError(
                f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {self.config.z_dim}, T', H', W')."
            )
        stride = self.config.stride
        whole = VideoShape(self.config.group, *stride[1:]).latent(stride).frames
        for part in self.denormalise(latents).split(whole, dim=2):
            frames = self.temporal_vae.decode(part, frames_of(part.shape[2], stride))
            yield self.spatial_vae.decode(frames, clamp)

    def normalise(self, raw: Tensor) -> Tensor:
        """(B, z, T', H', W') as encoded -> as the DiT sees them."""
        return ((raw - self.shift) / self.scale).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return (latents * self.scale + self.shift).to(latents.dtype)


AnyVAE = CausalVAE | OtherVAE | OpenSoraVAE
