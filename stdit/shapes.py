"""Arithmetic of strides, patches and causal frames: pixels → latents → tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stdit.errors import StditError

LARGEST = 10**6  # limit of sides and of frames, so that products of the three fit into 64 bits


class Stride(tuple[int, ...]):
    """Frames, rows and columns of pixels per latent position. A plain tuple is the stride of a causal VAE.

    first: frames in the first latent frame: 1 for causal VAEs, 4 for Allegro's.
    group: frames after which the VAE starts over (Open-Sora's: 17, which are five latent frames), 0 for never.
    """

    first: int
    group: int

    def __new__(cls, sizes: tuple[int, int, int], first: int = 1, group: int = 0) -> Stride:
        made = super().__new__(cls, sizes)
        made.first, made.group = first, group
        return made


def _in_time(stride: int | tuple[int, ...]) -> tuple[int, int, int]:
    """Frames per latent frame, per first latent frame, and per group."""
    if isinstance(stride, int):
        return stride, 1, 0
    return (stride[0], stride.first, stride.group) if isinstance(stride, Stride) else (stride[0], 1, 0)


@dataclass(frozen=True, order=True)
class TokenGrid:
    """The tokens of a clip: frames × height × width of patches."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, order=True)
class LatentShape:
    """The latents of a clip, without channels: T' × H' × W'."""

    frames: int
    height: int
    width: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(T', H', W'), in the order of a tensor's shape."""
        return self.frames, self.height, self.width

    def grid(self, patch: tuple[int, int, int]) -> TokenGrid:
        """The token grid for a patch (pt, ph, pw), which must divide the latents."""
        sizes = self.sizes
        if any(size % p for size, p in zip(sizes, patch)):
            raise StditError(
                f"latents of {sizes[0]}×{sizes[1]}×{sizes[2]} (frames×height×width) "
                f"are not divisible by the patch {patch}."
            )
        return TokenGrid(*(size // p for size, p in zip(sizes, patch)))


@dataclass(frozen=True, order=True)
class VideoShape:
    """A shape bucket: frames, height and width in pixels, written WIDTHxHEIGHTxFRAMES. An image has one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> VideoShape:
        """Parses "WIDTHxHEIGHTxFRAMES" ("832x480x81") or "WIDTHxHEIGHT" (an image)."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})(?:\s*[x×]\s*(\d{1,6}))?\s*", text)
        width, height, frames = (int(part or 1) for part in match.groups()) if match else (0, 0, 0)
        if min(width, height, frames) < 1:
            raise StditError(
                f"{text!r} is not a shape. Write WIDTHxHEIGHTxFRAMES, such as 832x480x81, or WIDTHxHEIGHT for images, "
                "each of at most six digits."
            )
        return cls(frames, height, width)

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    def latent(self, stride: tuple[int, ...]) -> LatentShape:
        """The latents for a VAE of stride (t, h, w): 1 + (frames − 1)/t frames if causal. Raises if not divisible."""
        (t, h, w), (_, first, group) = stride, _in_time(stride)
        low, high = nearest_frames(self.frames, stride)
        if not low == self.frames == high:
            kind = "causal VAE" if first == 1 else "VAE"
            legal = f"groups of {group} frames and {first}+{t}k more" if group else f"{first}+{t}k frames"
            raise StditError(
                f"{self.frames} frames: a {kind} of temporal stride {t} takes {legal}; "
                f"nearest {'is' if low == high else 'are'} {' and '.join(map(str, sorted({low, high})))}."
            )
        check_size(self.width, self.height, (w, h))
        groups, rest = divmod(self.frames, group) if group else (0, self.frames)
        frames = groups * (1 + (group - first) // t) + (1 + (rest - first) // t if rest else 0)
        return LatentShape(frames, self.height // h, self.width // w)

    def grid(self, stride: tuple[int, ...], patch: tuple[int, int, int]) -> TokenGrid:
        """The token grid for a VAE's stride and a patch; sizes must be multiples of stride × patch."""
        check_size(self.width, self.height, (stride[2] * patch[2], stride[1] * patch[1]))
        latent = self.latent(stride)
        if latent.frames % patch[0]:
            low = latent.frames // patch[0] * patch[0]
            near = [frames_of(n, stride) for n in (low, low + patch[0]) if n]
            raise StditError(
                f"{self.frames} frames are {latent.frames} latent frames, which a patch of {patch[0]} frames does not "
                f"divide; nearest {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}."
            )
        return latent.grid(patch)


def nearest_frames(frames: int, stride: int | tuple[int, ...]) -> tuple[int, int]:
    """The largest legal number of frames ≤ frames and the smallest ≥ frames.

    stride: of a VAE, or only the temporal stride of a causal VAE.
    """
    t, first, group = _in_time(stride)
    rest = frames % group if group and frames > 0 else frames
    if frames > 0 and not rest:
        return frames, frames
    low = frames - rest + first + (max(rest, first) - first) // t * t
    return (low, low) if low >= frames else (low, low + t)


def frames_of(latents: int, stride: int | tuple[int, ...]) -> int:
    """The number of frames for a number of latent frames: the inverse of `VideoShape.latent`."""
    t, first, group = _in_time(stride)
    groups, rest = divmod(latents, 1 + (group - first) // t) if group else (0, latents)
    return groups * group + (first + (rest - 1) * t if rest else 0)


def frames_for(seconds: float, fps: float, stride: int | tuple[int, ...]) -> int:
    """The legal number of frames nearest to a duration, the smaller on a tie."""
    if not abs(seconds * fps) < LARGEST:
        raise StditError(f"{seconds:g} s at {fps:g} fps are more frames than {LARGEST:,}: give a shorter duration.")
    low, _ = nearest_frames(int(seconds * fps), stride)
    high = nearest_frames(low + 1, stride)[1]
    return low if seconds * fps - low <= high - seconds * fps else high


def check_size(width: int, height: int, multiple: tuple[int, int]) -> None:
    """Raises unless width and height are positive multiples of `multiple` (width, height), naming the nearest sizes."""
    if width > 0 and height > 0 and width % multiple[0] == 0 and height % multiple[1] == 0:
        return

    def around(size: int, step: int) -> list[int]:
        return sorted({max(step, size // step * step), max(step, -(-size // step) * step)})

    near = " or ".join(f"{w}x{h}" for w in around(width, multiple[0]) for h in around(height, multiple[1]))
    raise StditError(
        f"size {width}x{height}: width must be a multiple of {multiple[0]} and height of {multiple[1]} "
        f"(the VAE's stride times the patch). Nearest: {near}."
    )


def size_for(aspect: float, short_side: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """Width and height, multiples of `multiple`, with a short side near `short_side` and a ratio near `aspect`."""
    if aspect <= 0 or short_side <= 0:
        raise StditError(f"aspect {aspect} and short side {short_side} must be positive.")
    width, height = (short_side * aspect, short_side) if aspect >= 1 else (short_side, short_side / aspect)
    return max(1, round(width / multiple[0])) * multiple[0], max(1, round(height / multiple[1])) * multiple[1]
