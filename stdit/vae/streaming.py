"""Clips of any length and size through a causal VAE in bounded memory: some latent frames, tiles and clips at a time.

Chunks are exact: the causal layers' last frames go from one to the next. So are slices of a batch. Tiles are nearly:
the attention within a frame, and what stands at the latents' resolution around it, run on the whole frame; the levels
between that and the pixels, which take the memory, run in tiles, whose convolutions do not see past their borders.
They overlap there, and are blended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae.config import VaeConfig
from stdit.vae.layers import FRAMES_AT_ONCE, Past

DEFAULT_MEMORY = 256 << 20  # bytes to work in where the caller gives no budget; frames are tiled only under a given one
MOST_LATENTS = 8  # latent frames of a chunk, however small they are: more gain nothing
OVERLAP = 8  # latents that neighbouring tiles share
MARGIN = 2  # of these, the outermost of a tile are not used: they see its border's zeros
SMALLEST_TILE = 2 * OVERLAP


class Streamable(Protocol):
    """What streaming asks of a VAE: `CausalVAE`'s two halves of encoder and decoder."""

    config: VaeConfig

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def encode_fine(self, video: Tensor, past: Past | None = None) -> Tensor: ...
    def encode_coarse(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]: ...
    def decode_coarse(self, latents: Tensor, past: Past | None = None) -> Tensor: ...
    def decode_fine(self, x: Tensor, past: Past | None = None) -> Tensor: ...
    def normalise(self, raw: Tensor) -> Tensor: ...
    def denormalise(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Slices:
    """What goes through a VAE at once: clips, latent frames, and rows × columns of latents."""

    clips: int
    latents: int
    rows: int
    columns: int


def slices(config: VaeConfig, side: str, shape: tuple[int, int, int, int], itemsize: int, memory: int | None) -> Slices:
    """The largest slices of `shape` (clips, latent frames, rows, columns; 0 latent frames: a stream) within `memory`.

    side: "encoder" or "decoder". itemsize: bytes of a number. memory: bytes, beyond the weights and what goes in and
    out; None: DEFAULT_MEMORY, but never tiles. First the clips are sliced, then their frames, then the frames are
    tiled. A stream keeps the past of all its tiles; a whole clip goes through tile by tile, and what is between the
    tiled levels and the rest is kept for all its frames. Raises StditError where not even the smallest tile fits.
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
    tried = []  # not the smallest tiles take least where the past of all is kept: they share more
    while memory is not None and (least := takes(1, 1, rows, columns)) > memory:
        tried.append(least)
        if max(rows, columns) <= SMALLEST_TILE:
            raise StditError(
                f"memory {memory}: in tiles of whatever size, this VAE's {side} takes {min(tried)} bytes for "
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
    """About what a chunk takes beyond the weights, its frames and its latents: the past that the layers keep for each
    of `tiles`, the largest input of a convolution, whose memory stays (see `Past.room`), the other tensors of the level
    that needs most (a residual block's input and the result), and the largest weights in oneDNN's order."""
    coarse = len(config.dim_mult) - 1
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    blocks = config.num_res_blocks + (side == "decoder")
    past = room = most = 0.0
    for level, mult in enumerate(config.dim_mult):
        pixels = rows * columns * 4 ** (coarse - level)
        frames = latents * 2 ** sum(config.temporal_downsample[level:])
        channels = mult * base
        before = config.dim_mult[max(level - 1, 0) if side == "encoder" else min(level + 1, coarse)] * base
        if side == "decoder" and config.upsampling_halves and level < coarse:
            before //= 2
        convolutions = 2 * blocks + (4 if level == coarse else 1)
        past += 2 * pixels * (before + (convolutions - 1) * channels)
        held = before if config.residual else 0
        wide = not any(config.temporal_downsample[: level + (config.residual and side == "encoder")])
        at_once = min(frames, FRAMES_AT_ONCE) if wide else frames  # see `autoencoder.few_by_few`
        block = at_once * (before + channels + held)
        if side == "encoder":
            whole = level < coarse and config.temporal_downsample[level]
            resampled = (4 * frames if whole else 2 * at_once) * channels
        elif level > 0:  # to the next level's pixels, before its convolution and after
            doubled = 1 + config.temporal_downsample[level - 1]
            resampled = at_once * channels * (1 + 4 * doubled)
            resampled += 4 * doubled * at_once * channels // (1 + config.upsampling_halves)
        else:
            resampled = at_once * channels
        room = max(room, pixels * (at_once + 2) * max(before, channels))
        most = max(most, pixels * max(block, resampled))
    weights = 27 * (max(config.dim_mult) * base) ** 2
    return int(itemsize * (clips * (tiles * past + room + most) + weights))


def coarse_bytes(config: VaeConfig, side: str, chunk: int, latents: int, rows: int, columns: int, itemsize: int) -> int:
    """About what the untiled half takes of a tiled frame of rows × columns: what goes to the tiles or comes from them,
    of `latents` frames (0: of a stream's chunk), the past of five convolutions, and the attention's five tensors."""
    base = config.base_dim if side == "encoder" else config.decoder_base_dim or config.base_dim
    return int(itemsize * rows * columns * config.dim_mult[-1] * base * ((latents or chunk) + 10 + 5 * chunk))


@dataclass(frozen=True)
class Tile:
    """One tile of a frame: where it is in the input and in the output, and its weights there."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]
    weight: Tensor  # (rows, columns) of the output

    def of(self, chunk: Tensor) -> Tensor:
        return chunk[..., self.source[0], self.source[1]]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Adds the tile's result to what was zeros."""
        whole[..., self.target[0], self.target[1]] += part * self.weight.to(part)


def tiles(size: tuple[int, int], cut: Slices, scale_in: tuple[int, int], scale_out: tuple[int, int]) -> list[Tile]:
    """size: rows and columns of latents; scale_in, scale_out: pixels of the input and of the output to one latent."""
    rows, columns = spans(size[0], cut.rows), spans(size[1], cut.columns)
    down, across = blend_weights(rows, scale_out[0]), blend_weights(columns, scale_out[1])
    return [
        Tile(
            (_scaled(row, scale_in[0]), _scaled(column, scale_in[1])),
            (_scaled(row, scale_out[0]), _scaled(column, scale_out[1])),
            vertical[:, None] * horizontal,
        )
        for row, vertical in zip(rows, down)
        for column, horizontal in zip(columns, across)
    ]


def _scaled(span: tuple[int, int], scale: int) -> slice:
    return slice(span[0] * scale, span[1] * scale)


def spans(size: int, tile: int) -> list[tuple[int, int]]:
    """(first, end) of tiles that cover 0 … size, OVERLAP shared or a little more, as even as can be."""
    if tile >= size:
        return [(0, size)]
    count = math.ceil((size - OVERLAP) / (tile - OVERLAP))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def blend_weights(tiles: list[tuple[int, int]], scale: int) -> list[Tensor]:
    """Each tile's weights along one side, `scale` of them to a latent; they sum to 1 wherever tiles meet.

    From a border with another tile inwards they are 0 for MARGIN latents and then rise linearly over what is shared.
    """
    size = tiles[-1][1] * scale
    whole, raw = torch.zeros(size, dtype=torch.float64), []
    for first, end in tiles:
        place = torch.arange(first, end, 1 / scale, dtype=torch.float64) + 0.5 / scale  # in latents
        inside = torch.minimum(
            torch.full_like(place, torch.inf) if first == 0 else place - first,
            torch.full_like(place, torch.inf) if end == tiles[-1][1] else end - place,
        )
        raw.append(((inside - MARGIN) / (OVERLAP - 2 * MARGIN)).clamp(0, 1))
        whole[_scaled((first, end), scale)] += raw[-1]
    return [weight / whole[_scaled(span, scale)] for weight, span in zip(raw, tiles)]


def encode_moments(vae: Streamable, video: Tensor, memory: int | None = None) -> Tensor:
    """(B, 3, T, H, W) -> mean and log-variance of the raw latents behind one another, (B, 2z, T', H', W')."""
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
    """Frames (3, H, W) in [−1, 1], 1+k·stride of them, to chunks of normalised latents (z, n, H', W'), as they come.

    The posterior's mode: what `encode` gives for all frames at once; or drawn from it, with noise of the generator
    `posterior`, the same for any length of chunks. Only a chunk's frames are held. memory: bytes, as in `slices`.
    Raises StditError for a frame that cannot be encoded, which it names by its number, for no frames, and, when they
    end, for a number of frames that is not 1+k·stride.
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
    """mean + exp(logvar / 2) · ε with ε drawn in fp32, on the generator's device (the CPU without one)."""
    device = generator.device if generator is not None else "cpu"
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=device)
    return mean + (0.5 * logvar).exp() * noise.to(mean)


@torch.no_grad()
def decode_stream(
    vae: Streamable, latents: Tensor | Iterable[Tensor], memory: int | None = None, clamp: bool = True
) -> Iterator[Tensor]:
    """Normalised latents of one clip, (z, T', H', W') whole or in chunks, to chunks of its frames (3, t, H, W).

    What `decode` gives for all of them at once. memory: bytes, as in `slices`; where a stream does not fit but a clip
    tile by tile does, latents that are given whole come as one chunk. Raises StditError for a chunk that
    cannot be decoded, or not after those before, which it names by its number, and for no latents.
    """
    run, cut, begun, before = None, None, False, ""
    for number, whole in enumerate([latents] if isinstance(latents, Tensor) else latents):
        if whole.ndim != 4 or whole.shape[0] != vae.config.z_dim or not whole.numel() or not whole.is_floating_point():
            raise StditError(
                f"chunk {number}: latents of shape {tuple(whole.shape)}, {whole.dtype}: a stream of them is floats "
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
            raise StditError(f"chunk {number}: latents of {kind}, those before of {before}: give one clip's.")
        for chunk in whole.split(_lengths(whole.shape[1], cut, begun), dim=1):
            begun = True
            video = run(chunk[None].to(next(vae.parameters())))[0]
            yield video.clamp_(-1, 1) if clamp else video
    if run is None:
        raise StditError("there are no latents to decode: the iterator was empty. Give at least one frame's.")


def _lengths(frames: int, cut: Slices, begun: bool = False) -> list[int]:
    """Latent frames of each chunk of `frames`. A clip's first is a chunk of its own: its convolutions have one tap
    instead of three."""
    first = [] if begun else [1]
    rest = frames - len(first)
    return first + [min(cut.latents, rest - done) for done in range(0, rest, cut.latents)]


def stream_slices(vae: Streamable, shape: tuple[int, int, int], memory: int | None) -> Slices | None:
    """The slices in which latents of `shape` (frames, rows, columns; 0 frames: unknown) are decoded as a stream.

    None: a stream does not fit, but all of them tile by tile. Raises StditError where neither does.
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
    """A side of a VAE over the chunks of a clip in order, each chunk tile by tile."""

    def __init__(self, vae: Streamable, side: str, rows: int, columns: int, cut: Slices):
        self.vae, self.decodes, stride = vae, side == "decoder", vae.config.stride[1:]
        scale_in, scale_out = ((1, 1), stride) if self.decodes else (stride, (1, 1))
        self.size = rows * scale_out[0], columns * scale_out[1]
        self.past = Past()  # of what runs on the whole frame
        self.tiles: list[tuple[Tile, Past]] = [
            (tile, Past(self.past)) for tile in tiles((rows, columns), cut, scale_in, scale_out)
        ]

    def __call__(self, chunk: Tensor) -> Tensor:
        """The next chunk of a stream."""
        x = self._before(chunk)
        if len(self.tiles) == 1:
            return self._after(self._fine(x, self.past))
        whole = None
        for tile, past in self.tiles:
            part = self._fine(tile.of(x), past)
            whole = self._empty(part) if whole is None else whole
            tile.put(whole, part)
        assert whole is not None
        return self._after(whole)

    def clip(self, chunks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """All chunks of a clip to `out`, zeros before: each tile over all of them, so that one tile's past is kept."""
        if len(self.tiles) == 1:
            for chunk, part in zip(chunks, out):
                part.copy_(self(chunk))
            return
        given = [self._before(chunk) for chunk in chunks]
        found = [*out] if self.decodes else []
        for tile, past in self.tiles:
            for number, x in enumerate(given):
                part = self._fine(tile.of(x), past)
                if number == len(found):
                    found.append(self._empty(part))
                tile.put(found[number], part)
            past.clear()
        if not self.decodes:
            for x, part in zip(found, out):
                part.copy_(self._after(x))

    def _before(self, chunk: Tensor) -> Tensor:
        return self.vae.decode_coarse(self.vae.denormalise(chunk), self.past) if self.decodes else chunk

    def _fine(self, x: Tensor, past: Past) -> Tensor:
        return self.vae.decode_fine(x, past) if self.decodes else self.vae.encode_fine(x, past)

    def _after(self, x: Tensor) -> Tensor:
        return x if self.decodes else torch.cat(self.vae.encode_coarse(x, self.past), dim=1)

    def _empty(self, part: Tensor) -> Tensor:
        return part.new_zeros((*part.shape[:3], *self.size))


def _checked(frames: Iterable[Tensor], stride: tuple[int, int, int]) -> Iterator[Tensor]:
    """The frames, each held to what the first one is; an error at the end where their number is not 1+k·stride."""
    count, size = 0, None
    for count, frame in enumerate(frames, 1):
        if frame.ndim != 3 or frame.shape[0] != 3:
            raise StditError(f"frame {count - 1} has shape {tuple(frame.shape)}: a stream's frames are (3, H, W).")
        if not frame.is_floating_point():
            raise StditError(
                f"frame {count - 1} is {frame.dtype}: the VAE encodes floats in [-1, 1]. "
                "From uint8: frame.float() / 127.5 - 1."
            )
        if size not in (None, frame.shape):
            raise StditError(f"frame {count - 1} has shape {tuple(frame.shape)}, those before {tuple(size)}: scale it.")
        if frame.isnan().any():
            raise StditError(f"frame {count - 1} has NaN in it: leave the clip out, or mend the frame.")
        size = frame.shape
        yield frame
    if size is None:
        raise StditError("there are no frames to encode: the iterator was empty. Give at least one.")
    VideoShape(count, *size[1:]).latent(stride)
