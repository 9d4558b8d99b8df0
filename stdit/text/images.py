"""The image encoder that some weights see their first frame through (Wan 2.1 I2V: CLIP's), from a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel

from stdit.errors import StditError


class ImageEncoder(nn.Module):
    """The last hidden states but one of a CLIP, as diffusers' WanImageToVideoPipeline takes them."""

    def __init__(self, encoder: CLIPVisionModel, processor: CLIPImageProcessor) -> None:
        super().__init__()
        self.encoder, self.processor = encoder.requires_grad_(False).eval(), processor

    @property
    def dim(self) -> int:
        """Width D of the tokens."""
        return int(self.encoder.config.hidden_size)

    @torch.no_grad()
    def encode(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Frames (H, W, 3) uint8, of any sizes, to their tokens (I, D)."""
        pixels = self.processor(images=[frame.cpu().numpy() for frame in frames], return_tensors="pt").pixel_values
        out = self.encoder(pixels.to(self.encoder.device, self.encoder.dtype), output_hidden_states=True)
        return [*out.hidden_states[-2]]

    def save(self, image_encoder: str | Path, image_processor: str | Path) -> None:
        """Writes both folders of a model folder; transformers opens them."""
        self.encoder.save_pretrained(image_encoder)
        self.processor.save_pretrained(image_processor)


def load_image_encoder(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ImageEncoder:
    """From a model folder with image_encoder/ and image_processor/. dtype None keeps the stored one."""
    folder = Path(folder)
    try:
        loaded: Any = CLIPVisionModel.from_pretrained(
            str(folder / "image_encoder"), local_files_only=True, use_safetensors=True, dtype=dtype or "auto",
            output_loading_info=True,
        )  # fmt: skip
        processor = CLIPImageProcessor.from_pretrained(str(folder / "image_processor"), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StditError(f"{folder}: its image_encoder/ and image_processor/ cannot be read: {error}") from error
    encoder, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise StditError(f"{folder / 'image_encoder'}: the weights do not fit config.json: {', '.join(lost[:5])}.")
    return ImageEncoder(encoder, processor).to(device)
