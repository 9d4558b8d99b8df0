"""What weights take of a clip beside its text, in training: its rate, its size, and the frames that its task gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stdit.data.loader import Example
from stdit.diffusion.tasks import Task
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.vae.autoencoder import CausalVAE

IMAGE_FPS = 120.0  # what Open-Sora 1.2 tells its weights of images (opensora/datasets/datasets.py)


class ImageEncoder(Protocol):
    """Frames (H, W, 3) uint8 to tokens (I, D) each."""

    def encode(self, frames: Sequence[Tensor]) -> list[Tensor]: ...


class Conditions:
    """Makes the conditions of `pack_inputs` for weights of a config.

    `image` is either a mask of the known frames beside known tokens (Cosmos-Predict), or, instead of known tokens, as
    many mask channels as the VAE's stride has frames and the latents of the clip with its unknown frames grey (Wan's
    image to video; diffusers' WanImageToVideoPipeline). There the image encoder sees the first frame of that clip.
    """

    def __init__(
        self, config: TransformerConfig, vae: CausalVAE, fps: float, image_encoder: ImageEncoder | None
    ) -> None:
        self.names, self.channels = config.conditions, config.image_channels
        self.vae, self.fps, self.image_encoder = vae, fps, image_encoder
        self.width, self.positions, self.patch = config.image_text_dim, config.image_text_positions, config.patch
        stride, z = vae.config.stride[0], vae.config.z_dim
        self.gives_latents = self.channels == stride + z  # beside the noisy ones, instead of known tokens
        if self.channels not in (0, 1) and not self.gives_latents:
            raise StditError(
                f"model.init: takes {self.channels} channels of an image; known are 1, a mask of frames, and "
                f"{stride + z}, a mask and latents of this VAE."
            )
        if "image_text" in self.names and image_encoder is None:
            raise StditError(
                "model.init: these weights see their image through an encoder as well, and there is no image_encoder/ "
                "beside them. Name the model folder that has it."
            )
        if self.positions:
            raise StditError(
                "model.init: weights for a first and a last image (Wan FLF2V) do not train here: no task gives both."
            )

    @torch.no_grad()
    def of(self, examples: Sequence[Example], tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """The conditions of each clip."""
        found: list[dict[str, Any]] = [self._numbers(example) for example in examples]
        if self.gives_latents:
            videos = [self._given(example, task) for example, task in zip(examples, tasks)]
            for one, video, task in zip(found, videos, tasks):
                z = self.vae.encode(video[None])[0].float()
                mask = z.new_zeros(self.vae.config.stride[0], *z.shape[1:])
                mask[:, : task.known_frames] = 1
                one["image"] = torch.cat([mask, z])
            if self.image_encoder is not None:
                frames = [video[:, 0].permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8) for video in videos]
                for one, tokens in zip(found, self.image_encoder.encode(frames)):
                    one["image_text"] = tokens
        elif self.channels:
            for one, example, task in zip(found, examples, tasks):
                latent = example.shape.latent(self.vae.config.stride)
                mask = task.mask(latent.frames)[:, None, None].expand(-1, latent.height, latent.width)
                one["image"] = mask[None].float()
        return found

    def nothing(self) -> dict[str, Any]:
        """Conditions of a clip of one token, which weighs nothing."""
        found: dict[str, Any] = {"fps": self.fps, "size": (self.patch[2], self.patch[1])}
        found["image"] = torch.zeros(self.channels, *self.patch)
        found["image_text"] = torch.zeros(1, self.width)
        return {name: self._tensor(found[name]) for name in self.names}

    def _numbers(self, example: Example) -> dict[str, Any]:
        shape = example.shape
        values = {"fps": IMAGE_FPS if shape.is_image else self.fps, "size": (shape.width, shape.height)}
        return {name: self._tensor(value) for name, value in values.items() if name in self.names}

    def _tensor(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)

    def _given(self, example: Example, task: Task) -> Tensor:
        """The clip (3, T, H, W) with its unknown frames grey."""
        video = example.video.to(next(self.vae.parameters()))
        known = 1 + (task.known_frames - 1) * self.vae.config.stride[0] if task.known_frames else 0
        video[:, known:] = 0
        return video
