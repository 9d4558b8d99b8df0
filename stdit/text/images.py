"""The image encoder for weights that see embeddings of the first frame (Wan 2.1 I2V: CLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel

from stdit.errors import StditError
from stdit.text.pretrained import load_weights, read_part


class ImageEncoder(nn.Module):
    """CLIP's second to last hidden states, as diffusers' WanImageToVideoPipeline uses them."""

    def __init__(self, encoder: CLIPVisionModel, processor: CLIPImageProcessor) -> None:
        super().__init__()
        self.encoder, self.processor = encoder.requires_grad_(False).eval(), processor

    @property
    def dim(self) -> int:
        """Width D of the tokens."""
        return int(self.encoder.config.hidden_size)

    @torch.no_grad()
    def encode(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Frames (H, W, 3) uint8 of any sizes to tokens (I, D)."""
        pixels = self.processor(images=[frame.cpu().numpy() for frame in frames], return_tensors="pt").pixel_values
        out = self.encoder(pixels.to(self.encoder.device, self.encoder.dtype), output_hidden_states=True)
        return [*out.hidden_states[-2]]

    def save(self, image_encoder: str | Path, image_processor: str | Path) -> None:
        """Writes both folders of a model folder, in transformers' layout."""
        self.encoder.save_pretrained(image_encoder)
        self.processor.save_pretrained(image_processor)


def load_image_encoder(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ImageEncoder:
    """From a model folder with image_encoder/ and image_processor/. dtype None keeps the stored one."""
    folder = Path(folder)
    encoder = load_weights(CLIPVisionModel, folder / "image_encoder", "the image encoder", dtype=dtype or "auto")
    place = folder / "image_processor"
    if not place.is_dir():
        raise StditError(f"{folder}: this model folder has no image_processor/. Download that folder too.")
    return ImageEncoder(encoder, read_part(CLIPImageProcessor, place, "it")).to(device)
