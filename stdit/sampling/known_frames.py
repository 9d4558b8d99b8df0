"""Known frames as weights take them: clean tokens, channels beside the noise, an image encoder's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.shapes import VideoShape
from stdit.text.images import ImageEncoder
from stdit.vae.families.open_sora import AnyVAE

Known = Mapping[str, Any]  # {"image": (H, W, 3)} or {"video": (T, H, W, 3)}, beside it {"last": (H, W, 3)}; uint8


@dataclass(frozen=True)
class Given:
    """The known frames of one clip.

    tokens: (C, k, H', W') normalised latents of the first k latent frames, known tokens. image: (image_channels, T',
    H', W') beside the noisy latents. image_text: (I, D) tokens of the image encoder.
    """

    tokens: Tensor | None = None
    image: Tensor | None = None
    image_text: Tensor | None = None


class KnownFrames:
    """Turns known frames into what one model's transformer takes: by its config, the caller need not know."""

    def __init__(self, config: TransformerConfig, vae: AnyVAE, image_encoder: ImageEncoder | None) -> None:
        if bool(config.image_text_dim) != (image_encoder is not None) or (
            image_encoder is not None and image_encoder.dim != config.image_text_dim
        ):
            found = "none" if image_encoder is None else f"one of width {image_encoder.dim}"
            raise StditError(
                f"the transformer takes image tokens of width {config.image_text_dim}, the image encoder is {found}."
            )
        self.config, self.vae, self.image_encoder = config, vae, image_encoder

    @property
    def level(self) -> float:
        """The noise level of known tokens; Cosmos-Predict2 calls them σ = 0.0001."""
        return 1e-4 / (1 + 1e-4) if self.config.image_channels == 1 else 0.0

    @torch.no_grad()
    def of(self, known: Known | None, shape: VideoShape) -> Given:
        """Known frames of a clip of this shape. Raises StditError for frames that do not fit it or these weights."""
        beside = self.config.image_channels
        latent = shape.latent(self.vae.config.stride)
        if known is None:
            if beside > 1:
                raise StditError("these weights begin with a picture: give known={'image': …} (--image FILE).")
            empty = torch.zeros(1, latent.frames, latent.height, latent.width)
            return Given(image=empty) if beside else Given()
        first, last = self._frames(known, shape)
        if beside > 1:
            return self._concatenated(first, last, shape)
        if last is not None:
            raise StditError("known has a last frame, which these weights do not take: they begin with known frames.")
        tokens = self._encode(_video(first))
        if not beside:
            return Given(tokens)
        mask = torch.zeros(1, latent.frames, latent.height, latent.width)
        mask[:, : tokens.shape[1]] = 1
        return Given(tokens, mask)

    def _concatenated(self, first: Tensor, last: Tensor | None, shape: VideoShape) -> Given:
        """Wan's: a mask of known frames, one channel for each frame of a latent, and the latents of the clip with grey
        where it is to be made."""
        group = self.vae.config.stride[0]
        video = torch.zeros(1, 3, shape.frames, shape.height, shape.width)
        is_known = torch.zeros(shape.frames)
        video[:, :, : len(first)], is_known[: len(first)] = _video(first), 1
        if last is not None:
            video[:, :, -1:], is_known[-1] = _video(last), 1
        latents = self._encode(video)  # (z, T', H', W')
        mask = frame_mask(is_known, group)[:, :, None, None].expand(-1, -1, *latents.shape[2:])
        image = torch.cat([mask.to(latents), latents])
        if len(image) != self.config.image_channels:
            raise StditError(
                f"these weights take {self.config.image_channels} channels beside the latents; a mask of {group} and "
                f"{len(latents)} of the VAE's are {len(image)}."
            )
        return Given(image=image, image_text=self._image_text(first, last))

    def _image_text(self, first: Tensor, last: Tensor | None) -> Tensor | None:
        if self.image_encoder is None:
            return None
        pictures = [first[0]] if last is None else [first[0], last[0]]
        tokens = torch.cat(self.image_encoder.encode(pictures))
        wanted = self.config.image_text_positions
        if wanted and len(tokens) != wanted:
            raise StditError(
                f"these weights see {wanted} image tokens, {len(pictures)} known picture(s) have {len(tokens)}: "
                "a first and a last one belong together (known={'image': …, 'last': …})."
            )
        if last is not None and not wanted:
            raise StditError("known has a last frame; these weights see the tokens of a first one only.")
        return tokens

    def _encode(self, video: Tensor) -> Tensor:
        """(1, 3, T, H, W) -> normalised latents (z, T', H', W') fp32."""
        return self.vae.encode(video.to(next(self.vae.parameters())))[0].float()

    def _frames(self, known: Known, shape: VideoShape) -> tuple[Tensor, Tensor | None]:
        """The first frames and the last one, checked, uint8 (T, H, W, 3)."""
        names = set(known)
        if names - {"last"} not in ({"image"}, {"video"}):
            raise StditError(
                'known must be {"image": (H, W, 3)} or {"video": (T, H, W, 3)}, and beside it {"last": (H, W, 3)}, '
                f"not {sorted(known)}."
            )
        (begins,) = names - {"last"}
        first = self._checked(known[begins], begins, shape)
        last = self._checked(known["last"], "last", shape) if "last" in names else None
        stride = self.vae.config.stride
        begun = VideoShape(len(first), shape.height, shape.width).latent(stride)
        if begun.frames >= shape.latent(stride).frames:
            raise StditError(
                f"known {begins} has {len(first)} frames, the clip {shape.frames}: nothing is left to generate."
            )
        return first, last

    def _checked(self, frames: Any, name: str, shape: VideoShape) -> Tensor:
        frames = torch.as_tensor(np.asarray(frames))
        frames = frames[None] if name != "video" and frames.ndim == 3 else frames
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise StditError(
                f"known {name} must be uint8 frames (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}."
            )
        if frames.shape[1:3] != (shape.height, shape.width):
            raise StditError(
                f"known {name} is {frames.shape[2]}x{frames.shape[1]}, the clip {shape.width}x{shape.height}: scale it "
                "first."
            )
        if name == "last" and len(frames) != 1:
            raise StditError(f"known last is {len(frames)} frames; it is one.")
        return frames


def frame_mask(is_known: Tensor, group: int) -> Tensor:
    """Of frames, (T,) numbers, to (group, T'): a channel for each frame of a latent one; the first is one alone, and
    says the same in all."""
    return torch.cat([is_known[:1].expand(group - 1), is_known]).view(-1, group).T


def _video(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) -> (1, 3, T, H, W) in [−1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
