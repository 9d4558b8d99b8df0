"""The causal video VAE in the layouts of Wan 2.1 and Wan 2.2, at any width.

Parameters are named as in the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2, wan/modules/vae2_2.py)
and the numbers agree; the tests compare with diffusers' AutoencoderKLWan. A clip of 1+k·stride frames becomes 1+k
latent frames. Latent frame 0 sees frame 0 alone, so an image is a clip of one frame, and a prefix of a clip has a
prefix of its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae import streaming
from stdit.vae.causal_cache import CausalCache
from stdit.vae.clips import check_latents, check_video, patchify, unpatchify
from stdit.vae.config import PRESETS as PRESETS
from stdit.vae.config import VaeConfig as VaeConfig
from stdit.vae.config import preset as preset
from stdit.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    DownLevel,
    Downsample,
    ResidualBlock,
    UpLevel,
    Upsample,
    norm,
    norm_silu_with_past,
)

START_LOGVAR = -6.0  # of an untrained encoder: with a wider posterior, noise drowns the latents in the first steps


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
        last = max((i for i, layer in enumerate(self.downsamples) if resamples_time(layer)), default=None)
        if last is not None:
            mark_even_frames([self.conv1, *self.downsamples[: last + 1]])
        self.middle = middle(c, config.groups)
        self.head = head(c, 2 * config.z_dim, config.groups)

    def fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers that see only a neighbourhood: -> (B, C, T', H', W')."""
        wide = next((i for i, layer in enumerate(self.downsamples) if resamples_time(layer)), len(self.downsamples))
        x = in_frame_chunks([self.conv1, *self.downsamples[:wide]], x, cache)
        for layer in self.downsamples[wide:]:
            x = layer(x, cache)
        return x

    def coarse(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers in which every position of a frame sees every other: -> (B, 2·z, T', H', W')."""
        for layer in self.middle:
            x = layer(x, cache)
        return apply_head(self.head, x, cache)


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
        self.head = head(c, 3 * config.patch_size**2, config.groups)
        first = next((i for i, layer in enumerate(self.upsamples) if resamples_time(layer)), None)
        if first is not None:
            mark_even_frames([*self.upsamples[first + 1 :], self.head])

    def coarse(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers in which every position of a frame sees every other: -> (B, C, T', H', W')."""
        x = self.conv1(x, cache)
        for layer in self.middle:
            x = layer(x, cache)
        return x

    def fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The layers that see only a neighbourhood: -> (B, 3·p·p, T, H, W)."""
        last = max((i for i, layer in enumerate(self.upsamples) if resamples_time(layer)), default=-1)
        for layer in self.upsamples[: last + 1]:
            x = layer(x, cache)
        return in_frame_chunks([*self.upsamples[last + 1 :], partial(apply_head, self.head)], x, cache)


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
    for part in [x] if cache is None or torch.is_grad_enabled() else x.split(streaming.FRAMES_AT_ONCE, dim=2):
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


def head(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        norm(in_channels, 3, groups), nn.SiLU(inplace=True), CausalConv3d(in_channels, out_channels, (3, 3, 3))
    )


def apply_head(head: nn.Sequential, x: Tensor, cache: CausalCache | None) -> Tensor:
    norm, _, conv = head
    return conv(norm_silu_with_past(norm, conv, x, cache), has_past=True)


class CausalVAE(nn.Module):
    """Encodes clips to latents and decodes them. Raw latents come from the encoder; a DiT sees normalised ones."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.memory: int | None = None  # bytes for encoding and decoding, unless the call says otherwise
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights for training: signals keep their size, residual branches start small, time passes through.

        torch's own initialisation shrinks signals layer by layer; docs/log.md compares the two.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.residual[6].get_parameter("weight").mul_(0.3)
            elif isinstance(module, AttentionBlock):
                module.proj.weight.zero_()  # adds nothing, as in the release
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                weight = module.time_conv.weight  # (C or 2C, C, 3, 1, 1); the last frame is the present
                weight.mul_(0.1)
                for half in weight.split(weight.shape[1]):
                    half[:, :, 2, 0, 0] += torch.eye(weight.shape[1])
        self.decoder.head[2].get_parameter("weight").mul_(0.3)
        self.conv1.weight[self.config.z_dim :].zero_()
        self.conv1.get_parameter("bias")[self.config.z_dim :].fill_(START_LOGVAR)

    def encode(
        self,
        video: Tensor,
        sample: bool = False,
        generator: torch.Generator | None = None,
        memory: int | None = None,
    ) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W') in the weights' dtype, on their device.

        sample: draw from the posterior instead of taking its mode.
        generator: of the draw's fp32 noise, which is made on the generator's device.
        memory: bytes to work in, see `streaming.slices`; None: `self.memory`. If that is None too and gradients are
            enabled, the whole clip is encoded at once.
        """
        memory = self.memory if memory is None else memory
        self._check(video, more=False)
        video = video.to(next(self.parameters()))
        if torch.is_grad_enabled() and memory is None:
            mean, logvar = self.encode_moments(video)
        else:
            mean, logvar = streaming.encode_moments(self, video, memory).chunk(2, dim=1)
        return self.normalise(streaming.draw(mean, logvar, generator) if sample else mean)

    def decode(self, latents: Tensor, clamp: bool = True, memory: int | None = None) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W), in the weights' dtype and on their device.

        clamp: to [−1, 1]. memory: as for `encode`.
        """
        memory = self.memory if memory is None else memory
        check_latents(latents, self.config.z_dim)
        latents = latents.to(next(self.parameters()))
        if torch.is_grad_enabled() and memory is None:
            video = self.decode_raw(self.denormalise(latents))
            return video.clamp(-1, 1) if clamp else video
        return streaming.decode(self, latents, memory, clamp)

    def encode_stream(
        self, frames: Iterable[Tensor], memory: int | None = None, posterior: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Encodes frames as they arrive, see `streaming.encode_stream`."""
        return streaming.encode_stream(self, frames, self.memory if memory is None else memory, posterior)

    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], memory: int | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """Decodes to frames as they are ready, see `streaming.decode_stream`."""
        return streaming.decode_stream(self, latents, self.memory if memory is None else memory, clamp)

    def encode_moments(self, video: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [−1, 1] -> mean and log-variance of the raw latents, (B, z, T', H', W') each.

        cache: for a clip in chunks; an empty CausalCache for the first chunk, of 1+k·stride frames, and the same object
            for the others, of k·stride frames. The result is that of the whole clip.
        """
        return self.encode_coarse(self.encode_fine(video, cache), cache)

    def decode_raw(self, latents: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Raw latents (B, z, T', H', W') -> (B, 3, T, H, W), not clamped. cache: as in `encode_moments`."""
        return self.decode_fine(self.decode_coarse(latents, cache), cache)

    # Encoder and decoder are two halves each, so that frames can be tiled: the half with attention must not be.

    def encode_fine(self, video: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The first half of `encode_moments`: (B, 3, T, H, W) -> (B, C, T', H', W')."""
        self._check(video, more=bool(cache))
        return self.encoder.fine(patchify(video, self.config.patch_size), cache)

    def encode_coarse(self, x: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, Tensor]:
        """The second half: -> mean and log-variance."""
        mean, logvar = self.conv1(self.encoder.coarse(x, cache)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_coarse(self, latents: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The first half of `decode_raw`: raw latents (B, z, T', H', W') -> (B, C, T', H', W')."""
        return self.decoder.coarse(self.conv2(latents.to(memory_format=torch.channels_last_3d)), cache)

    def decode_fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The second half: -> (B, 3, T, H, W)."""
        return unpatchify(self.decoder.fine(x, cache), self.config.patch_size)

    def normalise(self, raw: Tensor) -> Tensor:
        """(raw − mean) / std per channel, (B, z, …)."""
        mean, std = self._statistics(raw)
        return ((raw - mean) / std).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return (latents * std + mean).to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Read from the config at each call: buffers would stay empty in a model that was built on the meta device.
        z, shape = self.config.z_dim, (-1, *[1] * (like.ndim - 2))
        values = (self.config.latents_mean or (0.0,) * z, self.config.latents_std or (1.0,) * z)
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, std = (torch.tensor(v, dtype=dtype, device=like.device).view(shape) for v in values)
        return mean, std

    def _check(self, video: Tensor, more: bool) -> None:
        """Raises StditError for a clip that this VAE cannot encode. more: it is a chunk after the first."""
        check_video(video)
        _, _, t, h, w = video.shape
        VideoShape(t + 1 if more else t, h, w).latent(self.config.stride)  # raises unless the stride divides it


@torch.no_grad()
def measure_latents(vae: CausalVAE, batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the raw latents per channel, for `latents_mean` and `latents_std`.

    batches: clips (B, 3, T, H, W) in [−1, 1]; shapes may differ, and every latent counts once. Measures the mode of
    the posterior, which is what `encode` returns.
    """
    n, total, squares = 0, torch.zeros(vae.config.z_dim, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for video in batches:
        mean, _ = streaming.encode_moments(vae, video, vae.memory).chunk(2, dim=1)
        raw = mean.double().cpu().transpose(0, 1).flatten(1)  # (z, B·T'·H'·W')
        n, total, squares = n + raw.shape[1], total + raw.sum(1), squares + raw.square().sum(1)
    if n < 2:
        raise StditError("there are no clips to measure latents of. Give at least one.")
    mean = total / n
    std = (squares / n - mean**2).clamp_min(0).sqrt()
    if not (std > 0).all():
        raise StditError(f"latent channels {torch.nonzero(std <= 0).flatten().tolist()} never change: train the VAE.")
    return tuple(mean.tolist()), tuple(std.tolist())
