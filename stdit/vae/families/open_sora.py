"""Open-Sora 1.2's autoencoder: Stable Diffusion's on every frame, then a causal one over the latents of 17 frames.

The tensors have the names of hpcaitech/Open-Sora v1.2.0 (opensora/models/vae/vae.py and vae_temporal.py). The
autoencoder of frames is run by diffusers (extra `vaes`).
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
from stdit.vae.clips import check_latents, check_video
from stdit.vae.families.diffusers_vae import IMAGE_VAE, DiffusersVAE, NoMemoryBudget, diffusers_class
from stdit.vae.streaming import draw

SPATIAL_SCALE = 0.18215  # of the latents of frames; the release ignores their own config
FRAMES_AT_ONCE = 4  # in the autoencoder of frames


@dataclass(frozen=True)
class OpenSoraConfig:
    """The sizes of an OpenSoraVAE; the defaults are the release's."""

    # of the autoencoder of frames
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level
    blocks: int = 2  # residual blocks per level
    # of the autoencoder over time
    filters: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 2, 2, 4)  # channels of each level, in units of `filters`
    temporal_blocks: int = 4  # residual blocks per level
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # whether frames halve after each level but the last
    groups: int = 32  # of the group norms
    # of both
    z_dim: int = 4  # latent channels
    group: int = 17  # frames that are encoded together

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
    """A 3-D convolution that sees no later frame, with zero frames before the first."""

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


def _res_blocks(config: OpenSoraConfig, channels: int, out: int) -> nn.Sequential:
    blocks = [ResBlock(channels if i == 0 else out, out, config.groups) for i in range(config.temporal_blocks)]
    return nn.Sequential(*blocks)


class TemporalEncoder(nn.Module):
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
            x = halve(blocks(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
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
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level and isinstance(double := self.conv_blocks[level - 1], CausalConv):
                x = double(x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)  # channels (C, 2) to frames (T, 2)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Encodes latents of frames (B, C, T, H, W) to latents per `step` frames, and decodes them."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        z, self.step = config.z_dim, config.stride[0]
        self.encoder, self.quant_conv = TemporalEncoder(config), CausalConv(2 * z, 2 * z, kernel=1)
        self.decoder, self.post_quant_conv = TemporalDecoder(config), CausalConv(z, z, kernel=1)

    def encode(self, x: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.step, 0))
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return draw(mean, log_variance.clamp(-30, 20), generator) if sample else mean

    def decode(self, z: Tensor, frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(z))[:, :, -frames:]


class OpenSoraVAE(NoMemoryBudget, nn.Module):
    """Open-Sora's autoencoder with the methods of CausalVAE."""

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
        self.spatial_vae, self.temporal_vae = DiffusersVAE(frames, IMAGE_VAE), TemporalVAE(config)
        self.register_buffer("scale", torch.ones(1, config.z_dim, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, config.z_dim, 1, 1, 1))

    def encode(self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W'). sample: draw; else the mode."""
        check_video(video)
        VideoShape(*video.shape[2:]).latent(self.config.stride)  # raises unless the stride divides it
        parts = []
        for group in video.split(self.config.group, dim=2):
            frames = [self.spatial_vae.encode(few, sample, generator) for few in group.split(FRAMES_AT_ONCE, dim=2)]
            parts.append(self.temporal_vae.encode(torch.cat(frames, dim=2), sample, generator))
        return self.normalise(torch.cat(parts, dim=2))

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W). clamp: to [−1, 1]."""
        return torch.cat(list(self._decoded(latents, clamp)), dim=2)

    def decode_stream(self, latents: Tensor, clamp: bool = True) -> Iterator[Tensor]:
        """Decodes one clip (z, T', H', W') to frames (3, t, H, W), a group at a time."""
        for video in self._decoded(latents[None], clamp):
            yield video[0]

    def _decoded(self, latents: Tensor, clamp: bool) -> Iterator[Tensor]:
        check_latents(latents, self.config.z_dim)
        stride = self.config.stride
        whole = VideoShape(self.config.group, *stride[1:]).latent(stride).frames
        for part in self.denormalise(latents).split(whole, dim=2):
            frames = self.temporal_vae.decode(part, frames_of(part.shape[2], stride))
            yield self.spatial_vae.decode(frames, clamp)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B, z, T', H', W') -> as the DiT sees them."""
        return ((raw - self.shift) / self.scale).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return (latents * self.scale + self.shift).to(latents.dtype)


AnyVAE = CausalVAE | DiffusersVAE | OpenSoraVAE
