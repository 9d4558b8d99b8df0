"""The causal video VAE in the layouts of Wan 2.1's and Wan 2.2's, at any width.

Names of parameters are those of the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2,
wan/modules/vae2_2.py), whose numbers these are; diffusers' AutoencoderKLWan is the oracle of the tests. A clip of
1+k·stride frames becomes 1+k latent frames; latent frame 0 sees frame 0 alone, so an image is a clip of one frame, and
a prefix of a clip has a prefix of its latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae import streaming
from stdit.vae.config import PRESETS as PRESETS
from stdit.vae.config import VaeConfig as VaeConfig
from stdit.vae.config import preset as preset
from stdit.vae.layers import (
    FRAMES_AT_ONCE,
    AttentionBlock,
    CausalConv3d,
    DownLevel,
    Downsample,
    Past,
    ResidualBlock,
    UpLevel,
    Upsample,
    activated,
    norm,
    patchify,
    unpatchify,
)

START_LOGVAR = -6.0  # an untrained encoder's posterior: narrow, else its noise drowns the latents for the first steps


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
        last = max((i for i, layer in enumerate(self.downsamples) if changes_frames(layer)), default=-1)
        come_in_pairs([self.conv1] * (last >= 0) + [*self.downsamples[: last + 1]])
        self.middle = middle(c, config.groups)
        self.head = head(c, 2 * config.z_dim, config.groups)

    def fine(self, x: Tensor, past: Past | None = None) -> Tensor:
        """All that sees a neighbourhood only, down to (B, C, T', H', W')."""
        slows = next((i for i, layer in enumerate(self.downsamples) if changes_frames(layer)), len(self.downsamples))
        x = few_by_few([self.conv1, *self.downsamples[:slows]], x, past)
        for layer in self.downsamples[slows:]:
            x = layer(x, past)
        return x

    def coarse(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The rest, in which all positions of a frame see one another."""
        for layer in self.middle:
            x = layer(x, past)
        first, _, conv = self.head
        return conv(activated(first, conv, x, past), ready=True)


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
        first = next((i for i, layer in enumerate(self.upsamples) if changes_frames(layer)), None)
        come_in_pairs([] if first is None else [*self.upsamples[first + 1 :], self.head])

    def coarse(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The part in which all positions of a frame see one another, to (B, C, T', H', W')."""
        x = self.conv1(x, past)
        for layer in self.middle:
            x = layer(x, past)
        return x

    def fine(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The rest, which sees a neighbourhood only."""
        last = max((i for i, layer in enumerate(self.upsamples) if changes_frames(layer)), default=-1)
        for layer in self.upsamples[: last + 1]:
            x = layer(x, past)
        return few_by_few([*self.upsamples[last + 1 :], self._finish], x, past)

    def _finish(self, x: Tensor, past: Past | None) -> Tensor:
        first, _, conv = self.head
        return conv(activated(first, conv, x, past), ready=True)


def changes_frames(layer: nn.Module) -> bool:
    return any(isinstance(one, Downsample | Upsample) and one.time_conv is not None for one in layer.modules())


def come_in_pairs(layers: Iterable[nn.Module]) -> None:
    """Tells the convolutions of layers where a latent frame is two frames or more."""
    for layer in layers:
        for one in layer.modules():
            if isinstance(one, CausalConv3d):
                one.even = True


def few_by_few(layers: Sequence[Callable[[Tensor, Past | None], Tensor]], x: Tensor, past: Past | None) -> Tensor:
    """Layers that keep the number of frames, one after another: on a few at a time where a past is kept and no
    gradient, since these are the widest frames, and what they take is what a chunk takes."""
    whole = []
    for part in [x] if past is None or torch.is_grad_enabled() else x.split(FRAMES_AT_ONCE, dim=2):
        for layer in layers:
            part = layer(part, past)
        whole.append(part)
    return torch.cat(whole, dim=2) if len(whole) > 1 else whole[0]


def blocks(in_channels: int, out_channels: int, count: int, groups: int) -> list[nn.Module]:
    """`count` residual blocks, the first of which changes the channels."""
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


class CausalVAE(nn.Module):
    """Clips to latents and back. Raw latents are what the encoder gives, normalised ones what a DiT sees."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.memory: int | None = None  # bytes that encoding and decoding work in where the call says nothing
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Where training starts: signals keep their size, residual branches start small, time passes through.

        torch's own initialisation shrinks signals layer by layer; docs/log.md has the two side by side.
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
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W'), of the weights' type and device.

        sample: draw from the posterior, with fp32 noise from `generator` (on its own device); else its mode.
        memory: bytes to work in, see `streaming.slices`; None: `self.memory`. With gradients and neither, all runs at
        once.
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
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W), in [−1, 1] (clamp=False: as it comes), of the
        weights' type and device.

        memory: as for `encode`.
        """
        memory = self.memory if memory is None else memory
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim or not latents.numel():
            raise StditError(
                f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {self.config.z_dim}, T', H', W')."
            )
        latents = latents.to(next(self.parameters()))
        if torch.is_grad_enabled() and memory is None:
            video = self.decode_raw(self.denormalise(latents))
            return video.clamp(-1, 1) if clamp else video
        return streaming.decode(self, latents, memory, clamp)

    def encode_stream(
        self, frames: Iterable[Tensor], memory: int | None = None, posterior: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """`encode` for frames as they come: see `streaming.encode_stream`."""
        return streaming.encode_stream(self, frames, self.memory if memory is None else memory, posterior)

    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], memory: int | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """`decode` with frames as they are ready: see `streaming.decode_stream`."""
        return streaming.decode_stream(self, latents, self.memory if memory is None else memory, clamp)

    def encode_moments(self, video: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [−1, 1] -> mean and log-variance of the raw latents, (B, z, T', H', W') each.

        past: Past() for the first chunk of a clip of several, then the same object for the chunks that follow; the
        first has 1+k·stride frames, the others k·stride. The chunks' latents are those of the whole clip.
        """
        return self.encode_coarse(self.encode_fine(video, past), past)

    def decode_raw(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Raw latents (B, z, T', H', W') -> (B, 3, T, H, W), not clamped. past: as in `encode_moments`."""
        return self.decode_fine(self.decode_coarse(latents, past), past)

    # Both are two halves, so that frames can be tiled: what sees a neighbourhood only may be, the attention may not.

    def encode_fine(self, video: Tensor, past: Past | None = None) -> Tensor:
        """The first half of `encode_moments`: (B, 3, T, H, W) -> (B, C, T', H', W')."""
        self._check(video, more=bool(past))
        return self.encoder.fine(patchify(video, self.config.patch_size), past)

    def encode_coarse(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """The second half."""
        mean, logvar = self.conv1(self.encoder.coarse(x, past)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_coarse(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """The first half of `decode_raw`: raw latents (B, z, T', H', W') -> (B, C, T', H', W')."""
        return self.decoder.coarse(self.conv2(latents.to(memory_format=torch.channels_last_3d)), past)

    def decode_fine(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The second half: -> (B, 3, T, H, W)."""
        return unpatchify(self.decoder.fine(x, past), self.config.patch_size)

    def normalise(self, raw: Tensor) -> Tensor:
        """(raw − mean) / std a channel, (B, z, …)."""
        mean, std = self._statistics(raw)
        return ((raw - mean) / std).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return (latents * std + mean).to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # From the config at each call, not buffers: nothing to go stale when a model is built on the meta device.
        z, shape = self.config.z_dim, (-1, *[1] * (like.ndim - 2))
        values = (self.config.latents_mean or (0.0,) * z, self.config.latents_std or (1.0,) * z)
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, std = (torch.tensor(v, dtype=dtype, device=like.device).view(shape) for v in values)
        return mean, std

    def _check(self, video: Tensor, more: bool) -> None:
        """Raises StditError for a clip that this VAE cannot encode. `more`: a chunk after the first."""
        if video.ndim != 5 or video.shape[1] != 3 or not len(video):
            raise StditError(f"video of shape {tuple(video.shape)}: the VAE encodes (B, 3, T, H, W).")
        if not video.is_floating_point():
            raise StditError(
                f"video of {video.dtype}: the VAE encodes floats in [-1, 1]. From uint8: video.float() / 127.5 - 1."
            )
        _, _, t, h, w = video.shape
        VideoShape(t + 1 if more else t, h, w).latent(self.config.stride)  # raises where it does not divide
        if video.device.type == "meta" or video.numel() == 0 or torch.compiler.is_compiling():  # no values to look at
            return
        low, high = torch.stack(video.detach().aminmax()).tolist()
        if math.isnan(low) or math.isnan(high):
            raise StditError("video has NaN in it.")
        if low < -1.001 or high > 1.001:
            raise StditError(
                f"video is in [{low:g}, {high:g}]: the VAE encodes [-1, 1]. From [0, 255]: video / 127.5 - 1; after a "
                f"resize that overshoots: video.clamp(-1, 1)."
            )


@torch.no_grad()
def measure_latents(vae: CausalVAE, batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the raw latents a channel over clips, for `latents_mean` and `latents_std`.

    batches: of (B, 3, T, H, W) in [−1, 1], shapes may differ; every latent counts once. The posterior's mode is
    measured, which is what `encode` gives.
    """
    n, total, squares = 0, torch.zeros(vae.config.z_dim, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for video in batches:
        mean, _ = streaming.encode_moments(vae, video, vae.memory).chunk(2, dim=1)
        raw = mean.double().cpu().transpose(0, 1).flatten(1)  # (z, B·T'·H'·W')
        n, total, squares = n + raw.shape[1], total + raw.sum(1), squares + raw.square().sum(1)
    if n < 2:
        raise StditError("measuring latents needs at least two of them; there were no clips.")
    mean = total / n
    std = (squares / n - mean**2).clamp_min(0).sqrt()
    if not (std > 0).all():
        raise StditError(f"latent channels {torch.nonzero(std <= 0).flatten().tolist()} never change: train the VAE.")
    return tuple(mean.tolist()), tuple(std.tolist())
