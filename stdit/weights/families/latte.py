"""Latte (Vchitect/Latte, models/latte_t2v.py): PixArt-α's blocks, each followed by one over time.

The release has diffusers' names, and a text for "no text" beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights.families.configs import (
    Fields,
    block_rules,
    checked_transformer,
    count,
    describe,
    described,
    end_rules,
    needed,
    width,
)
from stdit.weights.keymap import KeyMap, Rule, Shape, Unflatten

FAMILY = "Latte transformer"
_ORIGINAL_CLASS = "LatteT2V"
CLASSES = ("LatteTransformer3DModel", _ORIGINAL_CLASS)
SETTINGS: dict[str, Any] = {
    "family": "latte",
    "attention": "spatial_temporal",
    "cross_norm": "none",
    "qk_norm": "none",
    "text_padding": 0,
    "rotary": "none",
    "position": "space_time",
}
_OWN = ("text_padding",)
_KEPT = ("heads", "position_base", "position_stretch", "text_padding")  # beside an original
_BLOCKS = r"(?:temporal_)?transformer_blocks\.(\d+)\."
_DIFFUSERS = Fields(
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
    {
        "dropout": (0.0,),
        "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",),
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
        "norm_eps": (1e-6,),
    },
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json"
) -> TransformerConfig:
    """Our config of diffusers' config.json, of ours of an original, or, where `found` is empty, of shapes alone."""
    if not found or (found.get("_class_name") == _ORIGINAL_CLASS and "_stdit" in found):
        values = _values_from_shapes(shapes, place) | described(found, _KEPT, place)
        return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)
    known = {**found, "_class_name": _DIFFUSERS.class_name}
    if found.get("_class_name") == _ORIGINAL_CLASS:  # the release's has the keys of a larger class
        known = {name: value for name, value in known.items() if name in _DIFFUSERS.defaults or name.startswith("_")}
    values, theirs = _DIFFUSERS.read(known, _OWN, place)
    for name in ("in_channels", "patch_size", "caption_channels", "cross_attention_dim"):
        if theirs[name] is None:
            raise StditError(f"{place}: {name} is missing.")
    values |= width(theirs["num_attention_heads"], theirs["attention_head_dim"])
    if theirs["cross_attention_dim"] != values["dim"]:
        raise StditError(f"{place}: cross_attention_dim {theirs['cross_attention_dim']} is not {values['dim']}.")
    patch, sample = theirs["patch_size"], theirs["sample_size"]
    values["out_channels"] = theirs["out_channels"] or theirs["in_channels"]
    values |= {"patch": (1, patch, patch), "position_base": sample // patch}
    values["position_stretch"] = float(max(sample // 64, 1))
    values["null_text"] = shapes.get("caption_projection.y_embedding", (0,))[0]
    return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """config.json as diffusers' LatteTransformer3DModel.save_pretrained writes it.

    Its positions of frames are made for `video_length` frames, the release's 16; ours are for any number.
    """
    return _DIFFUSERS.write(
        config,
        _OWN,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        cross_attention_dim=config.dim,
        out_channels=config.out_channels,
        patch_size=config.patch[1],
        sample_size=config.position_base * config.patch[1],
        num_embeds_ada_norm=1000,
    )


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    """A config.json beside an original's tensors."""
    return describe(_ORIGINAL_CLASS, config, _KEPT)


def dialect_of(names: Mapping[str, Shape]) -> str:
    """ "original" or "diffusers", by the names alone; "" for another family's."""
    if "pos_embed.proj.weight" not in names or not any(n.startswith("temporal_transformer_blocks.") for n in names):
        return ""
    return "original" if "caption_projection.y_embedding" in names else "diffusers"


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    """Our names ↔ that dialect's."""
    return KeyMap(
        Rule("patch_embedding.weight", "pos_embed.proj.weight", Unflatten(1, (config.in_channels, *config.patch[1:]))),
        Rule("patch_embedding.bias", "pos_embed.proj.bias"),
        *block_rules(),
        *block_rules("temporal_blocks", "temporal_transformer_blocks"),
        *end_rules(),
        *([Rule("null_text", "caption_projection.y_embedding")] if dialect == "original" else []),
        absent=("null_text",) if dialect == "diffusers" else (),
    )


def build(config: TransformerConfig) -> STDiT:
    return STDiT(config)


def _values_from_shapes(shapes: Mapping[str, Shape], place: object) -> dict[str, Any]:
    """Widths are in the shapes; heads are 72 wide and positions for 64 latents a side, as in the release."""
    dim, channels, patch, _ = needed(shapes, "pos_embed.proj.weight", 4, place, FAMILY)
    return {
        **width(max(dim // 72, 1), dim // max(dim // 72, 1)),
        "layers": count(shapes, _BLOCKS),
        "in_channels": channels,
        "out_channels": needed(shapes, "proj_out.weight", 2, place, FAMILY)[0] // patch**2,
        "patch": (1, patch, patch),
        "text_dim": needed(shapes, "caption_projection.linear_1.weight", 2, place, FAMILY)[1],
        "position_base": 64 // patch,
        "null_text": shapes.get("caption_projection.y_embedding", (0,))[0],
    }
