"""The causal video VAE in the layouts of Wan 2.1 and Wan 2.2, at any width.

Parameters are named as in the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2, wan/modules/vae2_2.py)
and the numbers agree; the tests compare with diffusers' AutoencoderKLWan. A clip of 1+k·stride frames becomes 1+k
latent frames. Latent frame 0 sees frame 0 alone, so an image is a clip of one frame, and a prefix of a clip has a
prefix of its latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.keyed import random_seed
from stdit.keyed.stream import KeyedStream
from stdit.keyed.weights import ONE, ZERO, Start, StartingWeights
from stdit.shapes import LatentShape, VideoShape
from stdit.vae.clips import check_latents, check_video, patchify, unpatchify
from stdit.vae.config import PRESETS as PRESETS
from stdit.vae.config import VaeConfig as VaeConfig
from stdit.vae.config import preset as preset
from stdit.vae.layers import AttentionBlock, CausalConv3d, Downsample, ResidualBlock, Upsample
from stdit.vae.networks import Decoder, Encoder
from stdit.vae.streaming import CausalCache, Stream, checked_frames, chunk_lengths, draw
from stdit.vae.tiles import Slices, slices, tiles

START_LOGVAR = -6.0  # of an untrained encoder: with a wider posterior, noise drowns the latents in the first steps


@dataclass(frozen=True)
class PassesTime(Start):
    """A convolution over three frames that passes the last one on, plus small numbers: (C or 2C, C, 3, 1, 1)."""

    channels: int

    def draw(self, stream: KeyedStream, start: int, stop: int, device: torch.device | str) -> Tensor:
        place = torch.arange(start, stop, device=device)
        row, column, frame = place // (3 * self.channels), place // 3 % self.channels, place % 3
        passes = (frame == 2) & (row % self.channels == column)
        return super().draw(stream, start, stop, device) + passes


@dataclass(frozen=True)
class ConstantFrom(Start):
    """The numbers from `first` on are `value`."""

    first: int
    value: float

    def draw(self, stream: KeyedStream, start: int, stop: int, device: torch.device | str) -> Tensor:
        drawn = super().draw(stream, start, stop, device)
        drawn[max(0, self.first - start) :] = self.value
        return drawn


class CausalVAE(nn.Module):
    """Encodes clips to latents and decodes them. Raw latents come from the encoder; a DiT sees normalised ones.

    seed: of the starting weights (`starting_weights`). None: one from torch's global generator. On the meta device
        nothing is drawn; after `to_empty`, `initialise` makes the same weights.
    memory: bytes that encoding and decoding may take, see `tiles.slices`, unless a call says otherwise.
    """

    def __init__(self, config: VaeConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.memory: int | None = None
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        if not self.conv1.weight.is_meta:
            self.initialise(random_seed() if seed is None else seed)

    def initialise(self, seed: int) -> CausalVAE:
        """Fills all parameters with starting weights."""
        self.starting_weights(seed).fill(self)
        return self

    def starting_weights(self, seed: int) -> StartingWeights:
        """Weights for training: signals keep their size, residual branches start small, time passes through.

        torch's own initialisation shrinks signals layer by layer; docs/log.md compares the two.
        """
        small, found = {self.decoder.head[2]: 0.3}, dict[str, Start]()
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                small[module.residual[6]] = 0.3
            elif isinstance(module, AttentionBlock):
                small[module.proj] = 0.0  # adds nothing, as in the release
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                small[module.time_conv] = 0.1
        for place, module in self.named_modules():
            for name, p in module.named_parameters(place, recurse=False):
                if isinstance(module, nn.Conv2d | nn.Conv3d) and name.endswith("weight"):
                    std = small.get(module, 1.0) * p[0].numel() ** -0.5
                    found[name] = PassesTime("normal", std, p.shape[1]) if "time_conv" in name else Start("normal", std)
                else:
                    found[name] = ZERO if name.endswith("bias") else ONE
        drawn = self.conv1.weight[: self.config.z_dim].numel()  # the mean; its log-variance starts as a constant
        found["conv1.weight"] = ConstantFrom(**vars(found["conv1.weight"]), first=drawn, value=0.0)
        found["conv1.bias"] = ConstantFrom("constant", 0.0, first=self.config.z_dim, value=START_LOGVAR)
        return StartingWeights(found, "vae", seed)

    def encode(
        self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None, memory: int | None = None
    ) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W') in the weights' dtype, on their device.

        sample: draw from the posterior instead of taking its mode.
        generator: of the draw's fp32 noise, which is made on the generator's device.
        memory: bytes to work in; None: `self.memory`. If that is None too and gradients are enabled, the whole clip is
            encoded at once.
        """
        memory = self.memory if memory is None else memory
        check_video(video)
        video = video.to(next(self.parameters()))
        whole = torch.is_grad_enabled() and memory is None
        mean, logvar = self.encode_moments(video) if whole else self.moments_in_slices(video, memory)
        return self.normalise(draw(mean, logvar, generator) if sample else mean)

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
        video = self._in_slices("decoder", latents, LatentShape(*latents.shape[2:]), memory)
        return video.clamp_(-1, 1) if clamp else video

    @torch.no_grad()
    def encode_stream(
        self, frames: Iterable[Tensor], memory: int | None = None, posterior: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Encodes frames as they arrive, holding one chunk of them, to the latents that `encode` gives for all at once.

        frames: 1+k·stride of them, (3, H, W) in [−1, 1]. memory: as for `encode`.
        posterior: draws the latents from the posterior, the same for any length of chunks; None: its mode.
        Yields chunks of normalised latents (z, n, H', W'). Raises StditError for a frame that cannot be encoded, with
            its number; for no frames; and at the end if their number is not 1+k·stride.
        """
        stride = self.config.stride
        source = checked_frames(frames, stride)
        first = next(source)
        latent = VideoShape(1, *first.shape[1:]).latent(stride)
        cut = self._slices("encoder", (1, 0, latent.height, latent.width), memory)
        run = self._stream("encoder", latent.height, latent.width, cut)
        chunk = [first]
        del first
        while chunk:
            video = torch.stack(chunk, 1)[None].to(next(self.parameters()))
            chunk.clear()
            mean, logvar = run(video).chunk(2, dim=1)
            if posterior is not None:
                moments = zip(mean.split(1, dim=2), logvar.split(1, dim=2))
                mean = torch.cat([draw(*frame, posterior) for frame in moments], dim=2)
            yield self.normalise(mean)[0]
            chunk.extend(islice(source, cut.latents * stride[0]))

    @torch.no_grad()
    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], memory: int | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """Decodes the latents of one clip to its frames, as they are ready: those that `decode` gives for all at once.

        latents: normalised, (z, T', H', W'), whole or in chunks. clamp: to [−1, 1].
        memory: as for `encode`. If a stream does not fit but a clip tile by tile does, latents that are given whole are
            decoded as one chunk.
        Yields chunks of frames (3, t, H, W). Raises StditError for a chunk that cannot be decoded or does not fit those
            before, with its number, and for no latents.
        """
        run, cut, begun, before, z = None, None, False, "", self.config.z_dim
        for number, whole in enumerate([latents] if isinstance(latents, Tensor) else latents):
            if whole.ndim != 4 or whole.shape[0] != z or not whole.numel() or not whole.is_floating_point():
                raise StditError(
                    f"chunk {number}: latents of shape {tuple(whole.shape)}, {whole.dtype}: a stream of latents is "
                    f"floats ({z}, n, H', W')."
                )
            _, frames, rows, columns = whole.shape
            kind = f"{columns}x{rows}, {whole.dtype}"
            if run is None or cut is None:
                cut = self.stream_slices((frames if isinstance(latents, Tensor) else 0, rows, columns), memory)
                if cut is None:
                    yield self.decode(whole[None], clamp, memory)[0]
                    return
                run, before = self._stream("decoder", rows, columns, cut), kind
            if kind != before:
                raise StditError(
                    f"chunk {number}: latents of {kind}, those before of {before}: give those of one clip."
                )
            for chunk in whole.split(chunk_lengths(frames, cut.latents, begun), dim=1):
                begun = True
                video = run(chunk[None].to(next(self.parameters())))[0]
                yield video.clamp_(-1, 1) if clamp else video
        if run is None:
            raise StditError("there are no latents to decode: the iterator was empty. Give at least one latent frame.")

    def stream_slices(self, shape: tuple[int, int, int], memory: int | None) -> Slices | None:
        """The slices for decoding latents of `shape` (frames, rows, columns; 0 frames: unknown) as a stream.

        None if a stream does not fit, but the whole clip tile by tile does. Raises StditError if neither does.
        """
        try:
            return self._slices("decoder", (1, 0, *shape[1:]), memory)
        except StditError:
            if not shape[0]:
                raise
            self._slices("decoder", (1, *shape), memory)
            return None

    def moments_in_slices(self, video: Tensor, memory: int | None = None) -> tuple[Tensor, Tensor]:
        """`encode_moments` in `memory` bytes."""
        latent = VideoShape(*video.shape[2:]).latent(self.config.stride)
        mean, logvar = self._in_slices("encoder", video, latent, memory).chunk(2, dim=1)
        return mean, logvar

    def _in_slices(self, side: str, given: Tensor, latent: LatentShape, memory: int | None) -> Tensor:
        """The encoder's moments of clips, concatenated, or the decoder's frames for normalised latents."""
        cut = self._slices(side, (len(given), *latent.sizes), memory)
        t, h, w = self.config.stride
        lengths = chunk_lengths(latent.frames, cut.latents)
        frames = [1, *(n * t for n in lengths[1:])]
        if side == "encoder":
            chunks_in, chunks_out, sizes = frames, lengths, (2 * self.config.z_dim, *latent.sizes)
        else:
            chunks_in, chunks_out, sizes = lengths, frames, (3, sum(frames), latent.height * h, latent.width * w)
        whole = given.new_zeros((len(given), *sizes))
        for clips, out in zip(given.split(cut.clips), whole.split(cut.clips)):
            run = self._stream(side, latent.height, latent.width, cut)
            run.clip(clips.split(chunks_in, dim=2), out.split(chunks_out, dim=2))
        return whole

    def _slices(self, side: str, shape: tuple[int, int, int, int], memory: int | None) -> Slices:
        memory = self.memory if memory is None else memory
        return slices(self.config, side, shape, next(self.parameters()).element_size(), memory)

    def _stream(self, side: str, rows: int, columns: int, cut: Slices) -> Stream:
        of_frame, of_tile, scale = (rows, columns), (cut.rows, cut.columns), self.config.stride[1:]
        if side == "encoder":
            parts = tiles(of_frame, of_tile, scale, (1, 1))
            return Stream(parts, self.encode_fine, after=lambda *x: torch.cat(self.encode_coarse(*x), dim=1))
        parts = tiles(of_frame, of_tile, (1, 1), scale)
        return Stream(parts, self.decode_fine, before=lambda z, cache: self.decode_coarse(self.denormalise(z), cache))

    def encode_moments(self, video: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [−1, 1] -> mean and log-variance of the raw latents, (B, z, T', H', W') each.

        cache: for a clip in chunks; an empty CausalCache for the first chunk, of 1+k·stride frames, and the same object
            for the others, of k·stride frames. The result is that of the whole clip.
        """
        return self.encode_coarse(self.encode_fine(video, cache), cache)

    def decode_raw(self, latents: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Raw latents (B, z, T', H', W') -> (B, 3, T, H, W), not clamped. cache: as in `encode_moments`."""
        return self.decode_fine(self.decode_coarse(latents, cache), cache)

    def encode_fine(self, video: Tensor, cache: CausalCache | None = None) -> Tensor:
        """The first half of `encode_moments`: (B, 3, T, H, W) -> (B, C, T', H', W')."""
        check_video(video)
        frames, height, width = video.shape[2:]
        VideoShape(frames + bool(cache), height, width).latent(self.config.stride)  # raises unless it divides
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


@torch.no_grad()
def measure_latents(vae: CausalVAE, batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the raw latents per channel, for `latents_mean` and `latents_std`.

    batches: clips (B, 3, T, H, W) in [−1, 1]; shapes may differ, and every latent counts once. Measures the mode of
    the posterior, which is what `encode` returns.
    """
    return mean_and_deviation([latent_sums(vae, video) for video in batches])


class LatentSums(NamedTuple):
    """Of the raw latents of clips, per channel (z,) in fp64."""

    positions: int
    total: Tensor
    squares: Tensor


@torch.no_grad()
def latent_sums(vae: CausalVAE, video: Tensor) -> LatentSums:
    """video: clips (B, 3, T, H, W) in [−1, 1]."""
    mean, _ = vae.moments_in_slices(video)
    raw = mean.double().cpu().transpose(0, 1).flatten(1)  # (z, B·T'·H'·W')
    return LatentSums(raw.shape[1], raw.sum(1), raw.square().sum(1))


def mean_and_deviation(sums: Sequence[LatentSums]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of all clips together, per channel. Raises StditError without clips, and for channels that never change."""
    n = sum(one.positions for one in sums)
    if n < 2:
        raise StditError("there are no clips to measure latents of. Give at least one.")
    mean = torch.stack([one.total for one in sums]).sum(0) / n
    std = (torch.stack([one.squares for one in sums]).sum(0) / n - mean**2).clamp_min(0).sqrt()
    if not (std > 0).all():
        raise StditError(f"latent channels {torch.nonzero(std <= 0).flatten().tolist()} never change: train the VAE.")
    return tuple(mean.tolist()), tuple(std.tolist())
