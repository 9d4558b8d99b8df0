"""Allegro (rhymes-ai/Allegro, allegro/models/transformers/transformer_3d_allegro.py).

The release has diffusers' names. Its rotary embedding pairs the halves of each third of a head, so rows of q and k are
permuted.
"""

from __future__ import annotations

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families import configs
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, block_rules, end_rules, made, only, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, half_split_heads

_SCALE = (2.2, 2.0, 2.0)  # of the release: frames, rows, columns


def _ours(values: Settings, theirs: Settings, place: object) -> Settings:
    if theirs["attention_head_dim"] % 6:
        raise StditError(f"{place}: attention_head_dim {theirs['attention_head_dim']} is not a multiple of 6.")
    scale, side = tuple(theirs[f"interpolation_scale_{axis}"] for axis in "thw"), theirs["patch_size"]
    if None in scale:
        raise StditError(f"{place}: interpolation_scale_t, _h and _w are {scale}; give numbers.")
    return {**configs.width(theirs, place), "patch": (1, side, side), "rope_scale": tuple(map(float, scale))}


_DIFFUSERS = ConfigJson(
    "AllegroTransformer3DModel",
    {
        **configs.PLAIN_BLOCKS,
        **configs.width_keys(24, 96, 2304),
        "num_layers": setting("layers", 32),
        "in_channels": setting("in_channels", 4),
        "out_channels": setting("out_channels", 4),
        "caption_channels": setting("text_dim", 4096),
        "patch_size": made(lambda config: config.patch[1], 2),
        "patch_size_t": only(1),  # the reference embeds frame by frame
        "dropout": only(0.0),
        "sample_height": 90,
        "sample_width": 160,
        "sample_frames": 22,
        "interpolation_scale_t": made(lambda config: config.rope_scale[0], _SCALE[0]),
        "interpolation_scale_h": made(lambda config: config.rope_scale[1], _SCALE[1]),
        "interpolation_scale_w": made(lambda config: config.rope_scale[2], _SCALE[2]),
    },
    own=("text_padding", "rope_theta"),
    ours=_ours,
)


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """With the release's positions."""
    return tensors.sizes(2, {2304: 24}) | {"rope_scale": _SCALE}


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    turned = half_split_heads(config.heads, config.head_dim, parts=3)
    return KeyMap(
        *configs.patch_rules(config),
        Rule("blocks.{i}.self_attn.{p:q|k}.{leaf}", "transformer_blocks.{i}.attn1.to_{p}.{leaf}", turned),
        *block_rules(),
        *end_rules(),
    )


FAMILY = Family(
    name="allegro",
    title="Allegro transformer",
    settings={**configs.PIXART_LIKE, "family": "allegro"},
    configs={"diffusers": _DIFFUSERS},
    marks={"diffusers": (r"pos_embed\.proj\.weight", r"adaln_single\.linear\.weight")},
    fits=configs.as_many_out,
    blocks=r"transformer_blocks\.(\d+)\.",
    keymap=_keymap,
    bare=_bare,
    built_in=lambda config, layout: {**configs.pixart_built_in(config), "rope_theta": (10000.0,)},
    scheduler=lambda config: {"_class_name": "EulerAncestralDiscreteScheduler", **configs.LINEAR_BETAS},
    pipelines={"AllegroPipeline": PipelineKind(15, "1280x720x88", text=Treatment(512, "lower"))},
    releases=(
        Release("Allegro", {"dim": 2304, "layers": 32}, vae="Allegro's (4 channels, 4×8×8)", text="T5-XXL v1.1"),
    ),
    autoencoders={"AutoencoderKLAllegro": VaeTraits("Allegro", whole=True, tiled=True)},
)
