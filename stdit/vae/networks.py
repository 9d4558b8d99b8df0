"""The encoder and the decoder of the causal video VAE, each as two halves, so that frames can be tiled.

The `coarse` half, at the latents' resolution, has attention among all positions of a frame and must not be tiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from stdit.vae.config import VaeConfig
from stdit.vae.layers import AttentionBlock, CausalConv3d, DownLevel, Downsample, Head, ResidualBlock, UpLevel, Upsample
from stdit.vae.streaming import CausalCache
from stdit.vae.tiles import FRAMES_AT_ONCE


class Encoder(nn.Module):
    """(B, 3·p·p, T, H, W) -> (B, 2·z, T', H', W')."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [config.base_dim * m for m in config.dim_mult]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, config.base_dim, (3, 3, 3))
        c = config.base_dim
        self.downsamples = nn.Sequential()
        for level, width in enumerate(widths):
            layers, temporal = blocks(c, width, config.num_res_blocks, config.groups), None
            if level < len(widths) - 1:
                temporal = config.temporal_downsample[level]
                layers.append(Downsample(width, temporal))
            cell = (1, 1) if temporal is None else (1 + temporal, 2)
            self.downsamples.extend([DownLevel(layers, width, *cell)] if config.residual else layers)
            c = width
        times = [i for i, layer in enumerate(self.downsamples) if resamples_time(layer)]
        mark_even_frames([self.conv1, *self.downsamples[: times[-1] + 1]] if times else [])
        self.wide = times[0] if times else len(self.downsamples)  # layers at the full frame rate
        self.middle = middle(c, config.groups)
        self.head = Head(c, 2 * config.z_dim, config.groups)

    def fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers that see only a neighbourhood: -> (B, C, T', H', W')."""
        x = in_frame_chunks([self.conv1, *self.downsamples[: self.wide]], x, cache)
        for layer in self.downsamples[self.wide :]:
            x = layer(x, cache)
        return x

    def coarse(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers in which every position of a frame sees every other: -> (B, 2·z, T', H', W')."""
        for layer in self.middle:
            x = layer(x, cache)
        return self.head(x, cache)


class Decoder(nn.Module):
    """(B, z, T', H', W') -> (B, 3·p·p, T, H, W)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [(config.decoder_base_dim or config.base_dim) * m for m in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        c = widths[0]
        self.conv1 = CausalConv3d(config.z_dim, c, (3, 3, 3))
        self.middle = middle(c, config.groups)
        self.upsamples = nn.Sequential()
        for level, width in enumerate(widths):
            layers = blocks(c, width, config.num_res_blocks + 1, config.groups)
            c = width
            if level < len(widths) - 1:
                c = width // 2 if config.upsampling_halves else width
                layers.append(Upsample(width, c, temporal[level]))
                if config.residual:
                    layers = [UpLevel(layers, width, 1 + temporal[level], 2)]
            elif config.residual:
                layers = [UpLevel(layers)]
            self.upsamples.extend(layers)
        self.head = Head(c, 3 * config.patch_size**2, config.groups)
        times = [i for i, layer in enumerate(self.upsamples) if resamples_time(layer)]
        mark_even_frames([*self.upsamples[times[0] + 1 :], self.head] if times else [])
        self.narrow = times[-1] + 1 if times else 0  # layers before those at the full frame rate

    def coarse(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers in which every position of a frame sees every other: -> (B, C, T', H', W')."""
        x = self.conv1(x, cache)
        for layer in self.middle:
            x = layer(x, cache)
        return x

    def fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers that see only a neighbourhood: -> (B, 3·p·p, T, H, W)."""
        for layer in self.upsamples[: self.narrow]:
            x = layer(x, cache)
        return in_frame_chunks([*self.upsamples[self.narrow :], self.head], x, cache)


def resamples_time(layer: nn.Module) -> bool:
    return any(isinstance(part, Downsample | Upsample) and part.time_conv is not None for part in layer.modules())


def mark_even_frames(layers: Iterable[nn.Module]) -> None:
    """Marks the convolutions for which every chunk after a clip's first frame has an even number of frames."""
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, CausalConv3d):
                part.even_frames = True


def in_frame_chunks(
    layers: Sequence[Callable[[Tensor, CausalCache | None], Tensor]], x: Tensor, cache: CausalCache | None
) -> Tensor:
    """Runs layers that keep the number of frames, FRAMES_AT_ONCE at a time while streaming without gradients.

    These are the widest levels: they set the peak memory of a chunk.
    """
    done = []
    for part in [x] if cache is None or torch.is_grad_enabled() else x.split(FRAMES_AT_ONCE, dim=2):
        for layer in layers:
            part = layer(part, cache)
        done.append(part)
    return torch.cat(done, dim=2) if len(done) > 1 else done[0]


def blocks(in_channels: int, out_channels: int, count: int, groups: int) -> list[nn.Module]:
    """`count` residual blocks; the first changes the channels."""
    return [ResidualBlock(out_channels if i else in_channels, out_channels, groups) for i in range(count)]


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups),
        AttentionBlock(channels, groups),
        ResidualBlock(channels, channels, groups),
    )
