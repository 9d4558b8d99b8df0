"""The released models of every family, told by their settings, and what each was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FLOW, EDM = "rectified flow (velocity)", "EDM (denoiser, preconditioned)"
DDPM, DDPM_SIGMA = "DDPM (noise)", "DDPM (noise and learned variance)"


@dataclass(frozen=True)
class Release:
    """name: of the release. settings: of TransformerConfig, what tells it from others. objective: what the network was
    trained to predict. vae, text: whose latents and embeddings it takes."""

    name: str
    settings: dict[str, Any]
    objective: str
    vae: str
    text: str


def _release(name: str, family: str, objective: str, vae: str, text: str, **settings: Any) -> Release:
    return Release(name, {"family": family, **settings}, objective, vae, text)


_WAN = ("wan", FLOW, "Wan 2.1's (16 channels, 4×8×8)", "UMT5-XXL")
_LTX = ("ltx", FLOW, "LTX-Video's (128 channels, 8×32×32)", "T5-XXL v1.1")
_SD = "Stable Diffusion's, of images (4 channels, 8×8)"
_SDXL = "SDXL's, of images (4 channels, 8×8)"
_PREDICT1 = ("cosmos", EDM, "Cosmos' (16 channels, 8×8×8)", "T5-11B")
_PREDICT2 = ("cosmos", FLOW, "Wan 2.1's (16 channels, 4×8×8)", "T5-11B")
_LARGE = {"dim": 5120, "layers": 40}
_XL = {"dim": 1152, "layers": 28}

RELEASES = (  # the first that fits counts
    _release("Wan 2.1 T2V 1.3B", *_WAN, dim=1536, layers=30, in_channels=16),
    _release("Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B", *_WAN, **_LARGE, in_channels=16),
    _release("Wan 2.1 FLF2V 14B", *_WAN, **_LARGE, in_channels=36, image_text_positions=514),
    _release("Wan 2.1 I2V 14B", *_WAN, **_LARGE, in_channels=36, image_text_dim=1280),
    _release("an expert of Wan 2.2 I2V A14B", *_WAN, **_LARGE, in_channels=36, image_text_dim=0),
    _release("Wan 2.2 TI2V 5B", "wan", FLOW, "Wan 2.2's (48 channels, 4×16×16)", "UMT5-XXL", dim=3072, in_channels=48),
    _release("LTX-Video 2B", *_LTX, dim=2048, layers=28),
    _release("LTX-Video 13B", *_LTX, dim=4096, layers=48),
    _release("PixArt-α XL 1024-MS", "pixart", DDPM_SIGMA, _SD, "T5-XXL v1.1", **_XL, level_condition="size"),
    _release("PixArt-Σ XL 2K-MS", "pixart", DDPM_SIGMA, _SDXL, "T5-XXL v1.1", **_XL, position_base=128),
    _release("PixArt-Σ XL 1024-MS", "pixart", DDPM_SIGMA, _SDXL, "T5-XXL v1.1", **_XL, position_base=64),
    _release(
        "PixArt XL of at most 512 pixels (α or Σ)", "pixart", DDPM_SIGMA, f"α: {_SD}; Σ: {_SDXL}", "T5-XXL v1.1", **_XL
    ),
    _release("Latte-1", "latte", DDPM_SIGMA, _SD, "T5-XXL v1.1", **_XL),
    _release("Allegro", "allegro", DDPM, "Allegro's (4 channels, 4×8×8)", "T5-XXL v1.1", dim=2304, layers=32),
    _release("Cosmos-Predict1 7B", *_PREDICT1, dim=4096, position="learned"),
    _release("Cosmos-Predict1 14B", *_PREDICT1, dim=5120, position="learned"),
    _release("Cosmos-Predict2.5 2B", *_PREDICT2[:3], "Cosmos-Reason1", dim=2048, text_embedding="gelu"),
    _release("Cosmos-Predict2 2B", *_PREDICT2, dim=2048),
    _release("Cosmos-Predict2 14B", *_PREDICT2, dim=5120),
    _release("STDiT3-XL/2", "stdit3", FLOW, "Open-Sora 1.2's (4 channels, 4×8×8)", "T5-XXL v1.1", **_XL),
)


def release_of(config: Any) -> Release | None:
    """The release with these settings, None for a size that nobody released (most likely what stdit trained)."""
    for release in RELEASES:
        if all(getattr(config, name, None) == value for name, value in release.settings.items()):
            return release
    return None
