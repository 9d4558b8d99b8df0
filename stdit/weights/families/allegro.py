"""Allegro (rhymes-ai/Allegro, allegro/models/transformers/transformer_3d_allegro.py).

The release has diffusers' names. Its rotary embedding pairs the halves of each third of a head, so rows of q and k are
permuted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families import configs
from stdit.weights.families.configs import block_rules, checked_transformer, end_rules
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape, half_split_heads

TITLE = "Allegro transformer"
SETTINGS: dict[str, Any] = {**configs.PIXART_LIKE, "family": "allegro"}
_OWN = ("text_padding", "rope_theta")
_BLOCKS = r"transformer_blocks\.(\d+)\."
_DIFFUSERS = configs.Fields(
    "AllegroTransformer3DModel",
    {
        "num_layers": "layers",
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "caption_channels": "text_dim",
    },
    {
        "patch_size": 2,
        "patch_size_t": 1,
        "num_attention_heads": 24,
        "attention_head_dim": 96,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 32,
        "dropout": 0.0,
        "cross_attention_dim": 2304,
        "attention_bias": True,
        "sample_height": 90,
        "sample_width": 160,
        "sample_frames": 22,
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 4096,
        "interpolation_scale_h": 2.0,
        "interpolation_scale_w": 2.0,
        "interpolation_scale_t": 2.2,
    },
    {**configs.PLAIN_BLOCKS, "dropout": (0.0,), "patch_size_t": (1,)},  # the reference embeds frame by frame
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    """From shapes alone: with the release's positions."""
    if not found:
        names = ("pos_embed.proj.weight", "proj_out.weight", "caption_projection.linear_1.weight")
        values = configs.picture_from_shapes(shapes, place, TITLE, _BLOCKS, names, heads, {2304: 24})
        values["rope_scale"] = tuple(_DIFFUSERS.defaults[f"interpolation_scale_{axis}"] for axis in "thw")
        return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)
    values, theirs = _DIFFUSERS.read(found, _OWN, place)
    values |= configs.checked_width(theirs, place)
    if theirs["attention_head_dim"] % 6:
        raise StditError(f"{place}: attention_head_dim {theirs['attention_head_dim']} is not a multiple of 6.")
    if None in (scale := tuple(theirs[f"interpolation_scale_{axis}"] for axis in "thw")):
        raise StditError(f"{place}: interpolation_scale_t, _h and _w are {scale}; give numbers.")
    values |= {"patch": (1, theirs["patch_size"], theirs["patch_size"]), "rope_scale": tuple(map(float, scale))}
    return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As AllegroTransformer3DModel.save_pretrained writes it."""
    return _DIFFUSERS.write(
        config,
        _OWN,
        **configs.head_fields(config),
        patch_size=config.patch[1],
        **{f"interpolation_scale_{axis}": scale for axis, scale in zip("thw", config.rope_scale)},
    )


config_to_original = config_to_diffusers


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]] | None:
    """ComfyUI has no Allegro."""
    return None if layout == "comfyui" else {**configs.pixart_built_in(config), "rope_theta": (10000.0,)}


def dialect_of(names: Mapping[str, Shape]) -> str:
    return "diffusers" if {"pos_embed.proj.weight", "adaln_single.linear.weight"} <= set(names) else ""


def fits(shapes: Mapping[str, Shape]) -> bool:
    """Allegro has as many output as input channels; PixArt, with the same names, has twice as many."""
    head, patch = shapes.get("proj_out.weight", (0,)), shapes.get("pos_embed.proj.weight", (0, 0, 0, 0))
    return head[0] == math.prod(patch[1:])


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    turned = half_split_heads(config.heads, config.head_dim, parts=3)
    return KeyMap(
        *configs.patch_rules(config),
        Rule("blocks.{i}.self_attn.{p:q|k}.{leaf}", "transformer_blocks.{i}.attn1.to_{p}.{leaf}", turned),
        *block_rules(),
        *end_rules(),
    )


FAMILY = Family(
    name="allegro",
    title=TITLE,
    classes=(_DIFFUSERS.class_name,),
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    fits=fits,
    scheduler=lambda config: {"_class_name": "EulerAncestralDiscreteScheduler", **configs.LINEAR_BETAS},
    pipelines={"AllegroPipeline": PipelineKind(15, "1280x720x88", text=Treatment(512, "lower"))},
    releases=(
        Release("Allegro", {"dim": 2304, "layers": 32}, vae="Allegro's (4 channels, 4×8×8)", text="T5-XXL v1.1"),
    ),
    autoencoders={"AutoencoderKLAllegro": VaeTraits("Allegro", whole=True, tiled=True)},
)
