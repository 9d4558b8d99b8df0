"""The released models of every family, told by their settings, and whose latents and embeddings they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stdit.models.config import TransformerConfig


@dataclass(frozen=True)
class Release:
    """name: of the release. settings: of TransformerConfig, what tells it from others. vae, text: whose latents and
    embeddings it takes."""

    name: str
    settings: dict[str, Any]
    vae: str
    text: str


_UMT5, _T5, _T5_11B = "UMT5-XXL", "T5-XXL v1.1", "T5-11B"
_REASON1 = "Cosmos-Reason1"
_WAN21, _WAN22 = "Wan 2.1's (16 channels, 4×8×8)", "Wan 2.2's (48 channels, 4×16×16)"
_LTX, _COSMOS = "LTX-Video's (128 channels, 8×32×32)", "Cosmos' (16 channels, 8×8×8)"
_ALLEGRO, _OPEN_SORA = "Allegro's (4 channels, 4×8×8)", "Open-Sora 1.2's (4 channels, 4×8×8)"
_SD, _SDXL = "Stable Diffusion's, of images (4 channels, 8×8)", "SDXL's, of images (4 channels, 8×8)"
_14B: dict[str, Any] = {"family": "wan", "dim": 5120, "layers": 40}
_25: dict[str, Any] = {"text_embedding": "gelu"}
_PIXART: dict[str, Any] = {"family": "pixart", "dim": 1152, "layers": 28}

RELEASES = (  # the first that fits counts
    Release("Wan 2.1 T2V 1.3B", {"family": "wan", "dim": 1536, "layers": 30, "in_channels": 16}, _WAN21, _UMT5),
    Release("Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B", {**_14B, "in_channels": 16}, _WAN21, _UMT5),
    Release("Wan 2.1 FLF2V 14B", {**_14B, "in_channels": 36, "image_text_positions": 514}, _WAN21, _UMT5),
    Release("Wan 2.1 I2V 14B", {**_14B, "in_channels": 36, "image_text_dim": 1280}, _WAN21, _UMT5),
    Release("an expert of Wan 2.2 I2V A14B", {**_14B, "in_channels": 36, "image_text_dim": 0}, _WAN21, _UMT5),
    Release("Wan 2.2 TI2V 5B", {"family": "wan", "dim": 3072, "in_channels": 48}, _WAN22, _UMT5),
    Release("LTX-Video 2B", {"family": "ltx", "dim": 2048, "layers": 28}, _LTX, _T5),
    Release("LTX-Video 13B", {"family": "ltx", "dim": 4096, "layers": 48}, _LTX, _T5),
    Release("PixArt-α XL 1024-MS", {**_PIXART, "level_condition": "size"}, _SD, _T5),
    Release("PixArt-Σ XL 2K-MS", {**_PIXART, "position_base": 128}, _SDXL, _T5),
    Release("PixArt-Σ XL 1024-MS", {**_PIXART, "position_base": 64}, _SDXL, _T5),
    Release("PixArt XL of at most 512 pixels (α or Σ)", _PIXART, f"α: {_SD}; Σ: {_SDXL}", _T5),
    Release("Latte-1", {"family": "latte", "dim": 1152, "layers": 28}, _SD, _T5),
    Release("Allegro", {"family": "allegro", "dim": 2304, "layers": 32}, _ALLEGRO, _T5),
    Release("Cosmos-Predict1 7B", {"family": "cosmos", "dim": 4096, "position": "learned"}, _COSMOS, _T5_11B),
    Release("Cosmos-Predict1 14B", {"family": "cosmos", "dim": 5120, "position": "learned"}, _COSMOS, _T5_11B),
    Release("Cosmos-Predict2.5 2B", {"family": "cosmos", "dim": 2048, **_25}, _WAN21, _REASON1),
    Release("Cosmos-Predict2.5 14B", {"family": "cosmos", "dim": 5120, **_25}, _WAN21, _REASON1),
    Release("Cosmos-Predict2 2B", {"family": "cosmos", "dim": 2048}, _WAN21, _T5_11B),
    Release("Cosmos-Predict2 14B", {"family": "cosmos", "dim": 5120}, _WAN21, _T5_11B),
    Release("STDiT3-XL/2", {"family": "stdit3", "dim": 1152, "layers": 28}, _OPEN_SORA, _T5),
)  # fmt: skip


def release_of(config: TransformerConfig) -> Release | None:
    """The release with these settings, None for a size that nobody released (most likely what stdit trained)."""
    for release in RELEASES:
        if all(getattr(config, name) == value for name, value in release.settings.items()):
            return release
    return None
