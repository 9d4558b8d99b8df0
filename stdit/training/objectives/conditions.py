"""Conditions beside the text in training: a clip's fps, its size, and the known frames of its task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stdit.data.load.loader import Example
from stdit.diffusion.tasks import Task
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.pixels import to_pixels
from stdit.sampling.known_frames import IMAGE_FPS, mask_and_latents
from stdit.vae.autoencoder import CausalVAE


class ImageEncoder(Protocol):
    """Encodes frames, (H, W, 3) uint8 each, to tokens, (I, D) each."""

    def encode(self, frames: Sequence[Tensor]) -> list[Tensor]: ...


class Conditions:
    """Makes the conditions of `pack_clips` that a transformer's config asks for.

    `image` has one of two forms. Beside known tokens (Cosmos-Predict), it is a mask of the known frames. Instead of
    known tokens (Wan's image to video), it is what `mask_and_latents` makes of the clip with its unknown frames grey.
    The image encoder then sees the clip's first frame, and its last one if the weights have positions for both (FLF2V).
    """

    def __init__(
        self, config: TransformerConfig, vae: CausalVAE, fps: float, image_encoder: ImageEncoder | None
    ) -> None:
        self.names, self.channels = config.conditions, config.image_channels
        self.vae, self.fps, self.image_encoder = vae, fps, image_encoder
        self.width, self.positions, self.patch = config.image_text_dim, config.image_text_positions, config.patch
        stride, z = vae.config.stride[0], vae.config.z_dim
        self.gives_latents = self.channels == stride + z  # instead of known tokens
        if self.channels not in (0, 1) and not self.gives_latents:
            raise StditError(
                f"model.init: takes {self.channels} image channels; supported are 1 (a mask of frames) and "
                f"{stride + z} (a mask, and latents of this VAE)."
            )
        if "image_text" in self.names and image_encoder is None:
            raise StditError(
                "model.init: these weights need an image encoder, and there is no image_encoder/ beside them. Name the "
                "model folder that has it."
            )

    def check(self, tasks: Iterable[str]) -> None:
        """Raises StditError for a task that these weights cannot do."""
        sees_first = self.image_encoder is not None and not self.positions
        if "first_last_to_video" in tasks and (not self.gives_latents or sees_first):
            take = "see the tokens of a first image alone" if self.gives_latents else "take no image beside the noise"
            raise StditError(
                f"objective.flow.tasks: first_last_to_video is for weights that take a first and a last image "
                f"(Wan FLF2V, Wan 2.2 I2V); these {take}."
            )

    @torch.no_grad()
    def of(self, examples: Sequence[Example], tasks: Sequence[Task]) -> list[dict[str, Tensor]]:
        """The conditions of each clip, by name."""
        shapes = [example.shape for example in examples]
        found = [self._numbers(IMAGE_FPS if one.is_image else self.fps, one.width, one.height) for one in shapes]
        if self.gives_latents:
            clips = [self._known(example, task) for example, task in zip(examples, tasks)]
            for conditions, (video, is_known) in zip(found, clips):
                conditions["image"] = mask_and_latents(self.vae, video, is_known)
            if self.image_encoder is not None:
                seen = (0, -1) if self.positions else (0,)
                tokens = self.image_encoder.encode([to_pixels(video[:, [at]])[0] for video, _ in clips for at in seen])
                for number, conditions in enumerate(found):
                    conditions["image_text"] = torch.cat(tokens[number * len(seen) : (number + 1) * len(seen)])
        elif self.channels:
            for conditions, shape, task in zip(found, shapes, tasks):
                latent = shape.latent(self.vae.config.stride)
                mask = task.mask(latent.frames)[:, None, None].expand(-1, latent.height, latent.width)
                conditions["image"] = mask[None].float()
        return found

    def of_empty_clip(self) -> dict[str, Tensor]:
        """The conditions of a clip of one token and weight 0."""
        images = {
            "image": torch.zeros(self.channels, *self.patch),
            "image_text": torch.zeros(self.positions or 1, self.width),
        }
        given = {name: image for name, image in images.items() if name in self.names}
        return self._numbers(self.fps, self.patch[2], self.patch[1]) | given

    def _numbers(self, fps: float, width: int, height: int) -> dict[str, Tensor]:
        values = {"fps": fps, "size": (width, height)}
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items() if name in self.names}

    def _known(self, example: Example, task: Task) -> tuple[Tensor, Tensor]:
        """The clip (3, T, H, W), and which of its frames are known, (T,)."""
        is_known = torch.zeros(example.shape.frames, dtype=torch.bool)
        is_known[: 1 + (task.known_frames - 1) * self.vae.config.stride[0] if task.known_frames else 0] = True
        if task.last:
            is_known[-1] = True
        return example.video.to(next(self.vae.parameters())), is_known
