"""A clip through a causal VAE in chunks of frames and tile by tile, and what causal layers keep between the chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae.clips import check_pixels
from stdit.vae.tiles import Tile

PAST_FRAMES = 2  # frames before the present one that a kernel of three frames sees


class CausalCache(dict[nn.Module, Tensor]):
    """The last input frames of each causal layer, (B, C, ≤ 2, H, W), kept from one chunk of a clip to the next.

    It is empty before the first chunk. Each clip needs its own, and so do the encoder and the decoder.

    shares_buffer_of: a cache used in turn with this one (that of another tile), to share `buffer` with.
    """

    def __init__(self, shares_buffer_of: CausalCache | None = None):
        super().__init__()
        self._buffer: list[Tensor] = [] if shares_buffer_of is None else shares_buffer_of._buffer

    def buffer(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised memory of `like`'s dtype for the input of one convolution, valid until the next call.

        Reused, because the system zeroes every page that it hands out: 7 % of the time at 256×256.
        """
        count = math.prod(shape)
        if not self._buffer or self._buffer[0].numel() < count or self._buffer[0].dtype != like.dtype:
            self._buffer.clear()
            self._buffer.append(like.new_empty(count))
        return self._buffer[0][:count].view(shape)


def with_past(x: Tensor, layer: nn.Module, cache: CausalCache | None, pad_single: bool = False) -> Tensor:
    """Puts the two frames before the chunk `x` in front of it, zeros at the start of a clip, and updates the cache.

    pad_single: also pad a clip's first frame when it comes alone. Without, its convolution skips the zeros.
    """
    past = None if cache is None else cache.get(layer)
    if past is not None:
        x = torch.cat([past, x], dim=2)
    if cache is not None:
        cache[layer] = x[:, :, -PAST_FRAMES:].clone()
    missing = PAST_FRAMES - (0 if past is None else past.shape[2])
    return x if not missing or (x.shape[2] == 1 and not pad_single) else F.pad(x, (0, 0, 0, 0, missing, 0))


Half = Callable[[Tensor, CausalCache], Tensor]  # of an encoder or a decoder


def unchanged(x: Tensor, cache: CausalCache) -> Tensor:
    return x


class Stream:
    """Over a clip's chunks in order, runs `before` and `after` on the whole frame, `fine` between them in tiles."""

    def __init__(self, tiles: list[Tile], fine: Half, before: Half = unchanged, after: Half = unchanged) -> None:
        self.before, self.fine, self.after = before, fine, after
        self.size = [side.stop for side in tiles[-1].target]
        self.cache = CausalCache()  # of the layers that run on the whole frame
        self.tiles = [(tile, CausalCache(self.cache)) for tile in tiles]

    def __call__(self, chunk: Tensor) -> Tensor:
        """The next chunk of a stream."""
        x = self.before(chunk, self.cache)
        if len(self.tiles) == 1:
            return self.after(self.fine(x, self.cache), self.cache)
        (whole,) = self._in_tiles([x], [], keeps_caches=True)
        return self.after(whole, self.cache)

    def clip(self, chunks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Writes all chunks of a clip to `out` (zeros before), tile after tile, so that one tile's cache is kept."""
        if len(self.tiles) == 1:
            for chunk, part in zip(chunks, out):
                part.copy_(self(chunk))
            return
        given = [self.before(chunk, self.cache) for chunk in chunks]
        if self.after is unchanged:
            self._in_tiles(given, [*out])
            return
        for x, part in zip(self._in_tiles(given, []), out):
            part.copy_(self.after(x, self.cache))

    def _in_tiles(self, given: list[Tensor], found: list[Tensor], keeps_caches: bool = False) -> list[Tensor]:
        """Adds `fine` of each chunk to `found`, which starts as zeros, or empty."""
        for tile, cache in self.tiles:
            for number, x in enumerate(given):
                part = self.fine(tile.of(x), cache)
                if number == len(found):
                    found.append(part.new_zeros((*part.shape[:3], *self.size)))
                tile.put(found[number], part)
            if not keeps_caches:
                cache.clear()
        return found


def chunk_lengths(frames: int, most: int, begun: bool = False) -> list[int]:
    """Latent frames of each chunk. A clip's first frame is a chunk of its own: its convolutions skip the zero frames
    before it."""
    first = [] if begun else [1]
    rest = frames - len(first)
    return first + [min(most, rest - done) for done in range(0, rest, most)]


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """mean + exp(logvar / 2) · ε, with ε drawn in fp32 on the generator's device (without a generator, the CPU)."""
    device = generator.device if generator is not None else "cpu"
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=device)
    return mean + (0.5 * logvar).exp() * noise.to(mean)


def checked_frames(frames: Iterable[Tensor], stride: tuple[int, int, int]) -> Iterator[Tensor]:
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
