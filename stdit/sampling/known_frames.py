"""Known frames in the forms that weights take: known tokens, channels beside the noise, tokens of an image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.pixels import to_video
from stdit.shapes import VideoShape
from stdit.text.images import ImageEncoder
from stdit.vae.families.open_sora import AnyVAE

KnownPixels = Mapping[str, Any]  # {"image": (H, W, 3)} or {"video": (T, H, W, 3)}, and {"last": (H, W, 3)}; uint8
IMAGE_FPS = 120.0  # Open-Sora 1.2 tells its weights this fps for images; other weights that know fps ignore it there


@dataclass(frozen=True)
class KnownFrames:
    """The known frames of one clip, as one model takes them.

    tokens: (C, k, H', W') normalised latents of the first k latent frames, which become known tokens.
    image: (image_channels, T', H', W') beside the noisy latents.
    image_text: (I, D) tokens of the image encoder.
    """

    tokens: Tensor | None = None
    image: Tensor | None = None
    image_text: Tensor | None = None

    def to(self, device: torch.device) -> KnownFrames:
        return KnownFrames(*(None if tensor is None else tensor.to(device) for tensor in vars(self).values()))


def known_level(config: TransformerConfig) -> float:
    """The noise level of known tokens: 0, but σ = 0.0001 for Cosmos-Predict2."""
    return 1e-4 / (1 + 1e-4) if config.image_channels == 1 else 0.0


class KnownFramesEncoder:
    """Turns a user's frames into `KnownFrames`, in the way that the transformer's config asks for."""

    def __init__(self, config: TransformerConfig, vae: AnyVAE, image_encoder: ImageEncoder | None) -> None:
        width = 0 if image_encoder is None else image_encoder.dim
        if width != config.image_text_dim:
            found = f"one of width {width}" if width else "none"
            raise StditError(
                f"the transformer takes image tokens of width {config.image_text_dim}, the image encoder is {found}."
            )
        self.config, self.vae, self.image_encoder = config, vae, image_encoder

    @torch.no_grad()
    def encode(self, known: KnownPixels | None, shape: VideoShape) -> KnownFrames:
        """The known frames of a clip. Raises StditError for those that do not fit its shape or these weights."""
        channels = self.config.image_channels
        mask = torch.zeros(1, *shape.latent(self.vae.config.stride).sizes)
        if known is None:
            if channels > 1:
                raise StditError("these weights begin with a picture: give known={'image': …} (--image FILE).")
            return KnownFrames(image=mask) if channels else KnownFrames()
        first, last = self._checked(known, shape)
        if channels > 1:
            return self._as_channels(first, last, shape)
        if last is not None:
            raise StditError("known has a last frame, which these weights do not take: they begin with known frames.")
        tokens = self.vae.encode(to_video(first)[None].to(next(self.vae.parameters())))[0].float()
        if not channels:
            return KnownFrames(tokens)
        mask[:, : tokens.shape[1]] = 1
        return KnownFrames(tokens, mask)

    def _as_channels(self, first: Tensor, last: Tensor | None, shape: VideoShape) -> KnownFrames:
        """For weights that take known frames as channels beside the noise, as Wan's do."""
        video = torch.zeros(3, shape.frames, shape.height, shape.width)
        is_known = torch.zeros(shape.frames, dtype=torch.bool)
        video[:, : len(first)], is_known[: len(first)] = to_video(first), True
        if last is not None:
            video[:, -1:], is_known[-1] = to_video(last), True
        image = mask_and_latents(self.vae, video.to(next(self.vae.parameters())), is_known)
        if len(image) != self.config.image_channels:
            raise StditError(
                f"these weights take {self.config.image_channels} channels beside the latents; a mask of "
                f"{self.vae.config.stride[0]} and {self.vae.config.z_dim} of the VAE's are {len(image)}."
            )
        return KnownFrames(image=image, image_text=self._image_text(first, last))

    def _image_text(self, first: Tensor, last: Tensor | None) -> Tensor | None:
        if self.image_encoder is None:
            return None
        pictures = [first[0]] if last is None else [first[0], last[0]]
        tokens = torch.cat(self.image_encoder.encode(pictures))
        expected = self.config.image_text_positions
        if expected and len(tokens) != expected:
            raise StditError(
                f"these weights see {expected} image tokens, {len(pictures)} known picture(s) have {len(tokens)}: "
                "a first and a last one belong together (known={'image': …, 'last': …})."
            )
        if last is not None and not expected:
            raise StditError("known has a last frame; these weights see the tokens of a first one only.")
        return tokens

    def _checked(self, known: KnownPixels, shape: VideoShape) -> tuple[Tensor, Tensor | None]:
        """The first frames and the last one, uint8 (T, H, W, 3)."""
        begin = set(known) - {"last"}
        if begin not in ({"image"}, {"video"}):
            raise StditError(
                'known must be {"image": (H, W, 3)} or {"video": (T, H, W, 3)}, and beside it {"last": (H, W, 3)}, '
                f"not {sorted(known)}."
            )
        (name,) = begin
        first = _checked_frames(known[name], name, shape)
        last = _checked_frames(known["last"], "last", shape) if "last" in known else None
        stride = self.vae.config.stride
        if VideoShape(len(first), shape.height, shape.width).latent(stride).frames >= shape.latent(stride).frames:
            raise StditError(
                f"known {name} has {len(first)} frames, the clip {shape.frames}: nothing is left to generate."
            )
        return first, last


def _checked_frames(value: Any, name: str, shape: VideoShape) -> Tensor:
    frames = torch.as_tensor(np.asarray(value))
    frames = frames[None] if name != "video" and frames.ndim == 3 else frames
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise StditError(f"known {name} must be uint8 frames (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}.")
    if frames.shape[1:3] != (shape.height, shape.width):
        raise StditError(
            f"known {name} is {frames.shape[2]}x{frames.shape[1]}, the clip {shape.width}x{shape.height}: scale it "
            "first."
        )
    if name == "last" and len(frames) != 1:
        raise StditError(f"known last has {len(frames)} frames; it must be a single frame.")
    return frames


def mask_and_latents(vae: AnyVAE, video: Tensor, is_known: Tensor) -> Tensor:
    """Known frames as channels beside the noise (diffusers' WanImageToVideoPipeline).

    video: (3, T, H, W) in [−1, 1]; its unknown frames are set to grey, in place.
    is_known: (T,) bool.
    Returns (group + z, T', H', W') fp32: a mask with a channel per frame of a latent frame, and the clip's latents.
    """
    video[:, ~is_known] = 0
    latents = vae.encode(video[None])[0].float()  # (z, T', H', W')
    group = vae.config.stride[0]
    # the first latent frame covers one frame, in all channels
    mask = torch.cat([is_known[:1].expand(group - 1), is_known]).view(-1, group).T[:, :, None, None]
    return torch.cat([mask.expand(-1, -1, *latents.shape[2:]).to(latents), latents])
