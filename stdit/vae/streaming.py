"""Clips of any length and size through a causal VAE in bounded memory: in chunks of frames, in tiles, a few at a time.

Chunks of frames and slices of a batch are exact: a cache hands the last frames of each causal layer to the next chunk.
Tiles are nearly exact. Attention and the layers around it, at the latents' resolution, run on the whole frame. The
levels between those and the pixels, which take the memory, run in overlapping tiles: their convolutions do not see past
a tile's border, so tiles are blended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae.causal_cache import CausalCache
from stdit.vae.clips import check_pixels
from stdit.vae.config import VaeConfig
from stdit.vae.tiles import OVERLAP, SMALLEST_TILE, Tile, spans, tiles

DEFAULT_MEMORY = 256 << 20  # bytes, if the caller gives no budget; frames are tiled only under a given one
MOST_LATENTS = 8  # latent frames per chunk: larger chunks gain nothing
FRAMES_AT_ONCE = 2  # of the widest levels, which set the peak memory of a chunk


class Streamable(Protocol):
    """The two halves of `CausalVAE`'s encoder and decoder, which streaming drives."""

    config: VaeConfig

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def encode_fine(self, video: Tensor, cache: CausalCache | None = None) -> Tensor: ...
    def encode_coarse(self, x: Tensor, cache: CausalCache | None = None) -> tuple[Tensor, Tensor]: ...
    def decode_coarse(self, latents: Tensor, cache: CausalCache | None = None) -> Tensor: ...
    def decode_fine(self, x: Tensor, cache: CausalCache | None = None) -> Tensor: ...
    def normalise(self, raw: Tensor) -> Tensor: ...
    def denormalise(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Slices:
    """The amount that goes through a VAE at once: clips, latent frames, and rows × columns of latents."""

    clips: int
    latents: int
    rows: int
    columns: int


def slices(config: VaeConfig, side: str, shape: tuple[int, int, int, int], itemsize: int, memory: int | None) -> Slices:
    """The largest slices that fit into `memory`: clips are sliced first, then their frames; then frames are tiled.

    A stream keeps the caches of all its tiles. A whole clip goes through tile by tile instead, and the tensors between
    the tiled levels and the untiled ones are kept for all its frames.

    side: "encoder" or "decoder".
    shape: clips, latent frames (0: a stream), rows and columns of latents.
    itemsize: bytes per number.
    memory: bytes, beyond the weights, the input and the output; None: DEFAULT_MEMORY, and no tiles.

    Raises StditError if not even the smallest tile fits.
    """
    clips, latents, height, width = shape
    rows, columns = height, width
    budget = DEFAULT_MEMORY if memory is None else memory

    def takes(clips: int, frames: int, rows: int, columns: int) -> int:
        tiled = (rows, columns) != (height, width)
        kept = 1 if latents else len(spans(height, rows)) * len(spans(width, columns))
        between = coarse_bytes(config, side, frames, latents, height, width, itemsize) if tiled else 0
        return between + working_bytes(config, side, clips, frames, rows, columns, itemsize, kept)

    clips = next((n for n in range(clips, 1, -1) if takes(n, 1, rows, columns) <= budget), 1)
    tried = []  # smaller tiles overlap more, so they may need more when the caches of all are kept
    while memory is not None and (least := takes(1, 1, rows, columns)) > memory:
        tried.append(least)
        if max(rows, columns) <= SMALLEST_TILE:
            raise StditError(
                f"memory {memory}: in tiles of any size, this VAE's {side} takes {min(tried)} bytes for "
                f"{width}x{height} latents. Give at least as many."
            )
        if rows >= columns:
            rows = max(SMALLEST_TILE, (rows + OVERLAP + 1) // 2)
        else:
            columns = max(SMALLEST_TILE, (columns + OVERLAP + 1) // 2)
    most = min(latents or MOST_LATENTS, MOST_LATENTS)
    together = next((n for n in range(most, 1, -1) if takes(clips, n, rows, columns) <= budget), 1)
    return Slices(clips, together, rows, columns)


def working_bytes(
    config: VaeConfig, side: str, clips: int, latents: int, rows: int, columns: int, itemsize: int, tiles: int = 1
) -> int:
    """Estimates the bytes that a chunk takes beyond the weights, its frames and its latents.

    The sum of: the caches of the layers for each of `tiles`; the largest input of a convolution (`CausalCache.buffer`);
    the other tensors of the largest level (a residual block's input and result); the largest weights in oneDNN's order.
    """
    coarse = len(config.dim_mult) - 1
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    blocks = config.num_res_blocks + (side == "decoder")
    caches = buffer = most = 0.0
    for level, mult in enumerate(config.dim_mult):
        pixels = rows * columns * 4 ** (coarse - level)
        frames = latents * 2 ** sum(config.temporal_downsample[level:])
        channels = mult * base
        before = config.dim_mult[max(level - 1, 0) if side == "encoder" else min(level + 1, coarse)] * base
        if side == "decoder" and config.upsampling_halves and level < coarse:
            before //= 2
        convolutions = 2 * blocks + (4 if level == coarse else 1)
        caches += 2 * pixels * (before + (convolutions - 1) * channels)
        held = before if config.residual else 0
        wide = not any(config.temporal_downsample[: level + (config.residual and side == "encoder")])
        at_once = min(frames, FRAMES_AT_ONCE) if wide else frames  # see `autoencoder.in_frame_chunks`
        block = at_once * (before + channels + held)
        if side == "encoder":
            whole = level < coarse and config.temporal_downsample[level]
            resampled = (4 * frames if whole else 2 * at_once) * channels
        elif level > 0:  # at the next level's size, before and after its convolution
            doubled = 1 + config.temporal_downsample[level - 1]
            resampled = at_once * channels * (1 + 4 * doubled)
            resampled += 4 * doubled * at_once * channels // (1 + config.upsampling_halves)
        else:
            resampled = at_once * channels
        buffer = max(buffer, pixels * (at_once + 2) * max(before, channels))
        most = max(most, pixels * max(block, resampled))
    weights = 27 * (max(config.dim_mult) * base) ** 2
    return int(itemsize * (clips * (tiles * caches + buffer + most) + weights))


def coarse_bytes(config: VaeConfig, side: str, chunk: int, latents: int, rows: int, columns: int, itemsize: int) -> int:
    """Estimates the bytes of the untiled half, for tiled frames of rows × columns latents.

    The sum of: its output or input for `latents` frames (0: for a stream's chunk); the caches of five convolutions; the
    five tensors of the attention.
    """
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    return int(itemsize * rows * columns * config.dim_mult[-1] * base * ((latents or chunk) + 10 + 5 * chunk))


def encode_moments(vae: Streamable, video: Tensor, memory: int | None = None) -> Tensor:
    """(B, 3, T, H, W) -> mean and log-variance of the raw latents, concatenated: (B, 2z, T', H', W')."""
    t = vae.config.stride[0]
    latent = VideoShape(*video.shape[2:]).latent(vae.config.stride)
    whole = video.new_zeros((len(video), 2 * vae.config.z_dim, *latent.sizes))
    cut = _slices(vae, "encoder", (len(video), *latent.sizes), memory)
    lengths = _lengths(latent.frames, cut)
    for clips, out in zip(video.split(cut.clips), whole.split(cut.clips)):
        run = _Stream(vae, "encoder", latent.height, latent.width, cut)
        run.clip(clips.split([1, *(n * t for n in lengths[1:])], dim=2), out.split(lengths, dim=2))
    return whole


def decode(vae: Streamable, latents: Tensor, memory: int | None = None, clamp: bool = True) -> Tensor:
    """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W)."""
    count, _, frames, h, w = latents.shape
    t, *stride = vae.config.stride
    whole = latents.new_zeros((count, 3, 1 + (frames - 1) * t, h * stride[0], w * stride[1]))
    cut = _slices(vae, "decoder", (count, frames, h, w), memory)
    lengths = _lengths(frames, cut)
    for clips, out in zip(latents.split(cut.clips), whole.split(cut.clips)):
        run = _Stream(vae, "decoder", h, w, cut)
        run.clip(clips.split(lengths, dim=2), out.split([1, *(n * t for n in lengths[1:])], dim=2))
    return whole.clamp_(-1, 1) if clamp else whole


@torch.no_grad()
def encode_stream(
    vae: Streamable, frames: Iterable[Tensor], memory: int | None = None, posterior: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Encodes frames as they arrive, holding one chunk of them, to the latents that `encode` gives for all at once.

    frames: 1+k·stride of them, (3, H, W) in [−1, 1].
    memory: bytes, as in `slices`.
    posterior: draws the latents from the posterior, the same for any length of chunks; None: its mode.

    Yields chunks of normalised latents (z, n, H', W'). Raises StditError for a frame that cannot be encoded, with its
    number; for no frames; and at the end if their number is not 1+k·stride.
    """
    source = _checked(frames, vae.config.stride)
    first = next(source)
    latent = VideoShape(1, *first.shape[1:]).latent(vae.config.stride)
    cut = _slices(vae, "encoder", (1, 0, latent.height, latent.width), memory)
    run = _Stream(vae, "encoder", latent.height, latent.width, cut)
    chunk = [first]
    del first
    while chunk:
        video = torch.stack(chunk, 1)[None].to(next(vae.parameters()))
        chunk.clear()
        mean, logvar = run(video).chunk(2, dim=1)
        if posterior is not None:
            moments = zip(mean.split(1, dim=2), logvar.split(1, dim=2))
            mean = torch.cat([draw(*frame, posterior) for frame in moments], dim=2)
        yield vae.normalise(mean)[0]
        chunk.extend(islice(source, cut.latents * vae.config.stride[0]))


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """mean + exp(logvar / 2) · ε, with ε drawn in fp32 on the generator's device (without a generator, the CPU)."""
    device = generator.device if generator is not None else "cpu"
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=device)
    return mean + (0.5 * logvar).exp() * noise.to(mean)


@torch.no_grad()
def decode_stream(
    vae: Streamable, latents: Tensor | Iterable[Tensor], memory: int | None = None, clamp: bool = True
) -> Iterator[Tensor]:
    """Decodes the latents of one clip to its frames, as they are ready: those that `decode` gives for all at once.

    latents: normalised, (z, T', H', W'), whole or in chunks.
    memory: bytes, as in `slices`. If a stream does not fit but a clip tile by tile does, latents that are given whole
        are decoded as one chunk.
    clamp: to [−1, 1].

    Yields chunks of frames (3, t, H, W). Raises StditError for a chunk that cannot be decoded or does not fit those
    before, with its number, and for no latents.
    """
    run, cut, begun, before = None, None, False, ""
    for number, whole in enumerate([latents] if isinstance(latents, Tensor) else latents):
        if whole.ndim != 4 or whole.shape[0] != vae.config.z_dim or not whole.numel() or not whole.is_floating_point():
            raise StditError(
                f"chunk {number}: latents of shape {tuple(whole.shape)}, {whole.dtype}: a stream of latents is floats "
                f"({vae.config.z_dim}, n, H', W')."
            )
        rows, columns = whole.shape[2:]
        kind = f"{columns}x{rows}, {whole.dtype}"
        if run is None or cut is None:
            frames = whole.shape[1] if isinstance(latents, Tensor) else 0
            cut = stream_slices(vae, (frames, rows, columns), memory)
            if cut is None:
                yield decode(vae, whole[None].to(next(vae.parameters())), memory, clamp)[0]
                return
            run, before = _Stream(vae, "decoder", rows, columns, cut), kind
        if kind != before:
            raise StditError(f"chunk {number}: latents of {kind}, those before of {before}: give those of one clip.")
        for chunk in whole.split(_lengths(whole.shape[1], cut, begun), dim=1):
            begun = True
            video = run(chunk[None].to(next(vae.parameters())))[0]
            yield video.clamp_(-1, 1) if clamp else video
    if run is None:
        raise StditError("there are no latents to decode: the iterator was empty. Give at least one frame of them.")


def _lengths(frames: int, cut: Slices, begun: bool = False) -> list[int]:
    """Latent frames of each chunk. A clip's first frame is a chunk of its own: its convolutions skip the zero frames
    before it."""
    first = [] if begun else [1]
    rest = frames - len(first)
    return first + [min(cut.latents, rest - done) for done in range(0, rest, cut.latents)]


def stream_slices(vae: Streamable, shape: tuple[int, int, int], memory: int | None) -> Slices | None:
    """The slices for decoding latents of `shape` (frames, rows, columns; 0 frames: unknown) as a stream.

    None if a stream does not fit, but the whole clip tile by tile does. Raises StditError if neither does.
    """
    try:
        return _slices(vae, "decoder", (1, 0, *shape[1:]), memory)
    except StditError:
        if not shape[0]:
            raise
        _slices(vae, "decoder", (1, *shape), memory)
        return None


def _slices(vae: Streamable, side: str, shape: tuple[int, int, int, int], memory: int | None) -> Slices:
    return slices(vae.config, side, shape, next(vae.parameters()).element_size(), memory)


class _Stream:
    """The encoder or the decoder over the chunks of one clip in order, each chunk tile by tile."""

    def __init__(self, vae: Streamable, side: str, rows: int, columns: int, cut: Slices):
        self.vae, self.decodes, stride = vae, side == "decoder", vae.config.stride[1:]
        scale_in, scale_out = ((1, 1), stride) if self.decodes else (stride, (1, 1))
        self.size = rows * scale_out[0], columns * scale_out[1]
        self.cache = CausalCache()  # of the layers that run on the whole frame
        self.tiles: list[tuple[Tile, CausalCache]] = [
            (tile, CausalCache(self.cache))
            for tile in tiles((rows, columns), (cut.rows, cut.columns), scale_in, scale_out)
        ]

    def __call__(self, chunk: Tensor) -> Tensor:
        """The next chunk of a stream."""
        x = self._before(chunk)
        if len(self.tiles) == 1:
            return self._after(self._fine(x, self.cache))
        whole = None
        for tile, cache in self.tiles:
            part = self._fine(tile.of(x), cache)
            whole = self._empty(part) if whole is None else whole
            tile.put(whole, part)
        assert whole is not None
        return self._after(whole)

    def clip(self, chunks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Writes all chunks of a clip to `out` (zeros before), tile after tile, so that one tile's cache is kept."""
        if len(self.tiles) == 1:
            for chunk, part in zip(chunks, out):
                part.copy_(self(chunk))
            return
        given = [self._before(chunk) for chunk in chunks]
        found = [*out] if self.decodes else []
        for tile, cache in self.tiles:
            for number, x in enumerate(given):
                part = self._fine(tile.of(x), cache)
                if number == len(found):
                    found.append(self._empty(part))
                tile.put(found[number], part)
            cache.clear()
        if not self.decodes:
            for x, part in zip(found, out):
                part.copy_(self._after(x))

    def _before(self, chunk: Tensor) -> Tensor:
        return self.vae.decode_coarse(self.vae.denormalise(chunk), self.cache) if self.decodes else chunk

    def _fine(self, x: Tensor, cache: CausalCache) -> Tensor:
        return self.vae.decode_fine(x, cache) if self.decodes else self.vae.encode_fine(x, cache)

    def _after(self, x: Tensor) -> Tensor:
        return x if self.decodes else torch.cat(self.vae.encode_coarse(x, self.cache), dim=1)

    def _empty(self, part: Tensor) -> Tensor:
        return part.new_zeros((*part.shape[:3], *self.size))


def _checked(frames: Iterable[Tensor], stride: tuple[int, int, int]) -> Iterator[Tensor]:
    """Yields the frames, each checked, also against the first; at the end raises unless there were 1+k·stride."""
    count, size = 0, None
    for count, frame in enumerate(frames, 1):
        if frame.ndim != 3 or frame.shape[0] != 3:
            raise StditError(f"frame {count - 1} has shape {tuple(frame.shape)}: a stream's frames are (3, H, W).")
        check_pixels(frame, f"frame {count - 1}")
        if size not in (None, frame.shape):
            raise StditError(f"frame {count - 1} has shape {tuple(frame.shape)}, those before {tuple(size)}: scale it.")
        size = frame.shape
        yield frame
    if size is None:
        raise StditError("there are no frames to encode: the iterator was empty. Give at least one.")
    VideoShape(count, *size[1:]).latent(stride)
