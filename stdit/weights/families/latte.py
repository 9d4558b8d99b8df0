"""Latte (Vchitect/Latte, models/latte_t2v.py): PixArt-α's blocks, each followed by one over time.

The release has diffusers' names, and a learned text for "no text".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import IMAGE_VAE
from stdit.weights.families import configs
from stdit.weights.families.configs import block_rules, checked_transformer, end_rules
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape

TITLE = "Latte transformer"
_ORIGINAL_CLASS = "LatteT2V"
SETTINGS: dict[str, Any] = {
    **configs.PIXART_LIKE,
    "family": "latte",
    "attention": "spatial_temporal",
    "rotary": "none",
    "position": "space_time",
}
_OWN = ("text_padding",)
_BLOCKS = r"(?:temporal_)?transformer_blocks\.(\d+)\."
_DIFFUSERS = configs.Fields(
    "LatteTransformer3DModel",
    {"num_layers": "layers", "in_channels": "in_channels", "caption_channels": "text_dim"},
    {
        "num_attention_heads": 16,
        "attention_head_dim": 88,
        "in_channels": None,
        "out_channels": None,
        "num_layers": 1,
        "dropout": 0.0,
        "cross_attention_dim": None,
        "attention_bias": False,
        "sample_size": 64,
        "patch_size": None,
        "activation_fn": "geglu",
        "num_embeds_ada_norm": None,
        "norm_type": "layer_norm",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "caption_channels": None,
        "video_length": 16,
    },
    configs.PIXART_BLOCKS,
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    if not found or (found.get("_class_name") == _ORIGINAL_CLASS and "_stdit" in found):
        kept = configs.described(found, configs.PICTURE_KEPT, place)
        values = _values_from_shapes(shapes, place, kept.get("heads", heads)) | kept
        return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)
    known = {**found, "_class_name": _DIFFUSERS.class_name}
    if found.get("_class_name") == _ORIGINAL_CLASS:  # the release's has keys of a larger class
        known = {name: value for name, value in known.items() if name in _DIFFUSERS.defaults or name.startswith("_")}
    values, theirs = _DIFFUSERS.read(known, _OWN, place)
    for name in ("in_channels", "patch_size", "caption_channels", "cross_attention_dim"):
        if theirs[name] is None:
            raise StditError(f"{place}: {name} is missing.")
    values |= configs.checked_width(theirs, place) | configs.picture(theirs)
    values["null_text"] = shapes.get("caption_projection.y_embedding", (0,))[0]
    return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As LatteTransformer3DModel.save_pretrained writes it. Its frame positions are for `video_length` frames, the
    release's 16; ours are for any number."""
    sizes = configs.head_fields(config) | configs.picture_fields(config)
    return _DIFFUSERS.write(config, _OWN, **sizes, num_embeds_ada_norm=1000)


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    return configs.describe(_ORIGINAL_CLASS, config, configs.PICTURE_KEPT)


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]] | None:
    """config.json says everything. ComfyUI has no Latte."""
    return None if layout == "comfyui" else configs.pixart_built_in(config)


def dialect_of(names: Mapping[str, Shape]) -> str:
    if "pos_embed.proj.weight" not in names or not any(n.startswith("temporal_transformer_blocks.") for n in names):
        return ""
    return "original" if "caption_projection.y_embedding" in names else "diffusers"


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    return KeyMap(
        *configs.patch_rules(config),
        *block_rules(),
        *block_rules("temporal_blocks", "temporal_transformer_blocks"),
        *end_rules(),
        *([Rule("null_text", "caption_projection.y_embedding")] if dialect == "original" else []),
        absent=("null_text",) if dialect == "diffusers" else (),
    )


def _values_from_shapes(shapes: Mapping[str, Shape], place: object, heads: int | None) -> dict[str, Any]:
    """Positions are for 64 latents per side, as in the release."""
    names = ("pos_embed.proj.weight", "proj_out.weight", "caption_projection.linear_1.weight")
    values = configs.picture_from_shapes(shapes, place, TITLE, _BLOCKS, names, heads, {1152: 16})
    null_text = shapes.get("caption_projection.y_embedding", (0,))[0]
    return {**values, "position_base": 64 // values["patch"][1], "null_text": null_text}


FAMILY = Family(
    name="latte",
    title=TITLE,
    classes=(_DIFFUSERS.class_name, _ORIGINAL_CLASS),
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    not_written=("null_text",),  # diffusers has no place for it, and no output depends on it
    scheduler=lambda config: {"_class_name": "DDIMScheduler", **configs.LINEAR_BETAS, "clip_sample": False},
    pipelines={
        "LattePipeline": PipelineKind(8, "512x512x16", text=Treatment(120, "lower"), negative_follows=True),
    },
    releases=(
        Release(
            "Latte-1",
            {"dim": 1152, "layers": 28},
            vae="Stable Diffusion's, of images (4 channels, 8×8)",
            text="T5-XXL v1.1",
        ),
    ),
    autoencoders={"AutoencoderKL": IMAGE_VAE},
)
