"""The causal video VAE in the layouts of Wan 2.1's and Wan 2.2's, at any width.

Names of parameters are those of the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2,
wan/modules/vae2_2.py), whose numbers these are; diffusers' AutoencoderKLWan is the oracle of the tests. A clip of
1+k·stride frames becomes 1+k latent frames; latent frame 0 sees frame 0 alone, so an image is a clip of one frame, and
a prefix of a clip has a prefix of its latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stdit.errors import StditError, nearest_name
from stdit.shapes import VideoShape
from stdit.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    DownLevel,
    Downsample,
    Past,
    ResidualBlock,
    RMSNorm,
    UpLevel,
    Upsample,
    patchify,
    unpatchify,
)

# Of the released Wan 2.1 weights (its vae.py; also diffusers' defaults).
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# Of the released Wan 2.2 VAE (its vae2_2.py).
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

START_LOGVAR = -6.0  # an untrained encoder's posterior: narrow, else its noise drowns the latents for the first steps


@dataclass(frozen=True)
class VaeConfig:
    """Shape of a CausalVAE.

    base_dim: channels at full resolution; decoder_base_dim: the decoder's, None for the same.
    dim_mult: channels of each level over base_dim; between two levels height and width halve.
    num_res_blocks: residual blocks a level of the encoder has (the decoder has one more).
    temporal_downsample: whether frames halve too, for each of the len(dim_mult) − 1 downsamplings.
    z_dim: latent channels.
    patch_size: pixels p×p are folded into channels before the encoder and unfolded after the decoder (Wan 2.2).
    residual: Wan 2.2's averaging and repeating shortcuts around each level.
    latents_mean, latents_std: of the raw latents, a channel; 0 and 1 are kept as None. Latents are normalised by them.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    z_dim: int = 16
    patch_size: int = 1
    residual: bool = False
    decoder_base_dim: int | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))  # YAML and JSON give lists
        if self.latents_mean is not None and not any(self.latents_mean):
            object.__setattr__(self, "latents_mean", None)
        if self.latents_std is not None and all(std == 1 for std in self.latents_std):
            object.__setattr__(self, "latents_std", None)
        for name in ("base_dim", "num_res_blocks", "z_dim", "patch_size"):
            if getattr(self, name) < 1:
                raise StditError(f"VAE: {name} is {getattr(self, name)}, it must be at least 1.")
        if self.decoder_base_dim is not None and self.decoder_base_dim < 1:
            raise StditError(f"VAE: decoder_base_dim is {self.decoder_base_dim}, it must be at least 1.")
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise StditError(f"VAE: dim_mult {self.dim_mult} must have at least one level, each at least 1.")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise StditError(
                f"VAE: temporal_downsample {self.temporal_downsample} has {len(self.temporal_downsample)} entries; "
                f"{len(self.dim_mult)} levels in dim_mult have {len(self.dim_mult) - 1} downsamplings between them."
            )
        if sum(self.temporal_downsample) > 2:
            raise StditError(
                f"VAE: temporal_downsample {self.temporal_downsample} makes a temporal stride of {self.stride[0]}; "
                f"diffusers and every program that reads Wan's VAEs run at most 4."
            )
        self._check_widths()
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.z_dim:
                raise StditError(f"VAE: {name} has {len(value)} entries, z_dim is {self.z_dim}.")
            if value is not None and not all(map(math.isfinite, value)):
                raise StditError(f"VAE: {name} {value} must be finite.")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise StditError(f"VAE: latents_std {self.latents_std} must be positive.")

    def _check_widths(self) -> None:
        """Raises where a level's channels cannot be halved, or averaged and repeated, as the layout does."""
        decoder = self.decoder_base_dim or self.base_dim
        if not self.residual:
            for mult in self.dim_mult[1:]:
                if mult * decoder % 2:
                    raise StditError(
                        f"VAE: a level of {mult}×{decoder} channels cannot be halved by the decoder's upsampling. "
                        "Choose an even base_dim."
                    )
            return
        cells = [8 if time else 4 for time in self.temporal_downsample]
        mults, top = self.dim_mult, self.dim_mult[-1]
        averaged = zip((1, *mults), mults, (*cells, 1))
        repeated = zip(mults[:0:-1], (top, *mults[:0:-1]), reversed(cells))
        for fine, coarse, cell in (*averaged, *repeated):
            if fine * cell % coarse:
                raise StditError(
                    f"VAE: dim_mult {mults}: {fine} times a cell of {cell} is no multiple of {coarse}, so the "
                    "shortcut of a residual level cannot be averaged or repeated."
                )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one latent."""
        space = self.patch_size * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space


PRESETS: dict[str, VaeConfig] = {
    "wan2.1": VaeConfig(latents_mean=WAN21_MEAN, latents_std=WAN21_STD),
    "wan2.2": VaeConfig(
        base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, residual=True,
        latents_mean=WAN22_MEAN, latents_std=WAN22_STD,
    ),
    # Stride 4×8×8 as Wan 2.1's, a 20th of its width: for demos and tests on a CPU.
    "toy": VaeConfig(
        base_dim=16, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True), z_dim=8, patch_size=2
    ),
}  # fmt: skip


def preset(name: str) -> VaeConfig:
    """The named config of PRESETS."""
    if name not in PRESETS:
        raise StditError(f"there is no VAE preset {name!r}.{nearest_name(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


class Encoder(nn.Module):
    """(B, 3·p·p, T, H, W) -> (B, 2·z, T', H', W')."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [config.base_dim * m for m in config.dim_mult]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, config.base_dim, (3, 3, 3))
        c = config.base_dim
        self.downsamples = nn.Sequential()
        for level, width in enumerate(widths):
            layers, temporal = blocks(c, width, config.num_res_blocks), None
            if level < len(widths) - 1:
                temporal = config.temporal_downsample[level]
                layers.append(Downsample(width, temporal))
            cell = (1, 1) if temporal is None else (1 + temporal, 2)
            self.downsamples.extend([DownLevel(layers, width, *cell)] if config.residual else layers)
            c = width
        self.middle = middle(c)
        self.head = head(c, 2 * config.z_dim)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.conv1(x, past)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, past)
        norm, silu, conv = self.head
        return conv(silu(norm(x)), past)


class Decoder(nn.Module):
    """(B, z, T', H', W') -> (B, 3·p·p, T, H, W)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [(config.decoder_base_dim or config.base_dim) * m for m in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        c = widths[0]
        self.conv1 = CausalConv3d(config.z_dim, c, (3, 3, 3))
        self.middle = middle(c)
        self.upsamples = nn.Sequential()
        for level, width in enumerate(widths):
            layers = blocks(c, width, config.num_res_blocks + 1)
            c = width
            if level < len(widths) - 1:
                c = width if config.residual else width // 2
                layers.append(Upsample(width, c, temporal[level]))
                if config.residual:
                    layers = [UpLevel(layers, width, 1 + temporal[level], 2)]
            elif config.residual:
                layers = [UpLevel(layers)]
            self.upsamples.extend(layers)
        self.head = head(c, 3 * config.patch_size**2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.conv1(x, past)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, past)
        norm, silu, conv = self.head
        return conv(silu(norm(x)), past)


def blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """`count` residual blocks, the first of which changes the channels."""
    return [ResidualBlock(out_channels if i else in_channels, out_channels) for i in range(count)]


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        RMSNorm(in_channels, 3), nn.SiLU(inplace=True), CausalConv3d(in_channels, out_channels, (3, 3, 3))
    )


class CausalVAE(nn.Module):
    """Clips to latents and back. Raw latents are what the encoder gives, normalised ones what a DiT sees."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
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

    def encode(self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W').

        sample: draw from the posterior, with fp32 noise from `generator` (on its own device); else its mode.
        """
        mean, logvar = self.encode_moments(video)
        return self.normalise(draw(mean, logvar, generator) if sample else mean)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W), in [−1, 1] (clamp=False: as it comes)."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise StditError(
                f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {self.config.z_dim}, T', H', W')."
            )
        video = self.decode_raw(self.denormalise(latents))
        return video.clamp(-1, 1) if clamp else video

    def encode_moments(self, video: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [−1, 1] -> mean and log-variance of the raw latents, (B, z, T', H', W') each.

        past: {} for the first chunk of a clip of several, then the same object for the chunks that follow; the first
        has 1+k·stride frames, the others k·stride. The chunks' latents are those of the whole clip.
        """
        self._check(video, more=bool(past))
        x = patchify(video, self.config.patch_size)  # (B, 3·p·p, T, H/p, W/p)
        x = self.conv1(self.encoder(x, past))  # (B, 2z, T', H', W')
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_raw(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Raw latents (B, z, T', H', W') -> (B, 3, T, H, W), not clamped. past: as in `encode_moments`."""
        x = latents.to(memory_format=torch.channels_last_3d)
        return unpatchify(self.decoder(self.conv2(x), past), self.config.patch_size)

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
        if video.ndim != 5 or video.shape[1] != 3:
            raise StditError(f"video of shape {tuple(video.shape)}: the VAE encodes (B, 3, T, H, W).")
        if not video.is_floating_point():
            raise StditError(
                f"video of {video.dtype}: the VAE encodes floats in [-1, 1]. From uint8: video.float() / 127.5 - 1."
            )
        _, _, t, h, w = video.shape
        VideoShape(t + 1 if more else t, h, w).latent(self.config.stride)  # raises where it does not divide
        if video.device.type == "meta" or video.numel() == 0:
            return
        low, high = torch.stack(video.detach().aminmax()).tolist()
        if math.isnan(low) or math.isnan(high):
            raise StditError("video has NaN in it.")
        if low < -1.001 or high > 1.001:
            raise StditError(
                f"video is in [{low:g}, {high:g}]: the VAE encodes [-1, 1]. From [0, 255]: video / 127.5 - 1; after a "
                f"resize that overshoots: video.clamp(-1, 1)."
            )


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """mean + exp(logvar / 2) · ε with ε drawn in fp32, on the generator's device (the CPU without one)."""
    device = generator.device if generator is not None else "cpu"
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=device)
    return mean + (0.5 * logvar).exp() * noise.to(mean)


@torch.no_grad()
def measure_latents(vae: CausalVAE, batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the raw latents a channel over clips, for `latents_mean` and `latents_std`.

    batches: of (B, 3, T, H, W) in [−1, 1], shapes may differ; every latent counts once. The posterior's mode is
    measured, which is what `encode` gives.
    """
    n, total, squares = 0, torch.zeros(vae.config.z_dim, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for video in batches:
        raw = vae.encode_moments(video)[0].double().cpu().transpose(0, 1).flatten(1)  # (z, B·T'·H'·W')
        n, total, squares = n + raw.shape[1], total + raw.sum(1), squares + raw.square().sum(1)
    if n < 2:
        raise StditError("measuring latents needs at least two of them; there were no clips.")
    mean = total / n
    std = (squares / n - mean**2).clamp_min(0).sqrt()
    if not (std > 0).all():
        raise StditError(f"latent channels {torch.nonzero(std <= 0).flatten().tolist()} never change: train the VAE.")
    return tuple(mean.tolist()), tuple(std.tolist())
