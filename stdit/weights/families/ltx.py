"""LTX-Video (Lightricks/LTX-Video, ltx_video/models/transformers/transformer3d.py): 2B and 13B.

The original's names are diffusers' except for four, both in the release's folders and in the single files that ComfyUI
reads, which add a prefix and hold the VAE too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stdit.diffusion.solvers import euler_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families import configs
from stdit.weights.families.configs import Fields, block_rules, checked_transformer, end_rules, needed
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape, output_order

TITLE = "LTX-Video transformer"
SETTINGS: dict[str, Any] = {
    "family": "ltx",
    "norm": "rms",
    "cross_norm": "none",
    "qk_eps": 1e-5,
    "text_padding": 0,
    "rotary": "inner",
    "rope_scale": (20.0, 2048.0, 2048.0),
    "rope_stride": (8, 32, 32),
    "rope_fps": 25.0,
}
_OWN = ("patch", "rotary", "rope_scale", "rope_stride", "rope_fps", "rope_theta", "text_padding")
_BLOCKS = r"transformer_blocks\.(\d+)\."
_COMMON = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "in_channels": 128,
    "out_channels": 128,
    "num_layers": 28,
    "cross_attention_dim": 2048,
    "caption_channels": 4096,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_NAMES = {"num_layers": "layers", "caption_channels": "text_dim"}
_DIFFUSERS = Fields(
    "LTXVideoTransformer3DModel",
    _NAMES,
    {**_COMMON, "patch_size": 1, "patch_size_t": 1, "qk_norm": "rms_norm_across_heads", "attention_out_bias": True},
    {**configs.PLAIN_BLOCKS, "qk_norm": ("rms_norm_across_heads",), "attention_out_bias": (True,)},
)
_ORIGINAL = Fields(
    "Transformer3DModel",
    _NAMES | {"positional_embedding_theta": "rope_theta", "positional_embedding_max_pos": "rope_scale"},
    {
        **_COMMON,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "adaptive_norm": "single_scale_shift",
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20.0, 2048.0, 2048.0],
        "timestep_scale_multiplier": 1000.0,
        "causal_temporal_positioning": False,
        # leftovers of the class that it was adapted from
        "attention_type": "default",
        "double_self_attention": False,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "project_to_2d_pos": True,
        "upcast_attention": False,
        "use_linear_projection": False,
        "use_tpu_flash_attention": False,
        "use_chipmunk_attention": False,
    },
    {
        **configs.PLAIN_BLOCKS,
        "qk_norm": ("rms_norm",),
        "standardization_norm": ("rms_norm",),
        "adaptive_norm": ("single_scale_shift",),
        "positional_embedding_type": ("rope",),
        "timestep_scale_multiplier": (1000,),
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "only_cross_attention": (False,),
        "dropout": (0.0,),
    },
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    if sounds := [name for name in shapes if ".audio_" in name or name.startswith("audio_")]:
        raise StditError(f"{place}: {sounds[0]} is of LTX-2, which has a second kind of tokens and is not supported.")
    if not found:
        return checked_transformer(SETTINGS | _values_from_shapes(shapes, place, heads), shapes, place, _BLOCKS)
    original = found.get("_class_name") == _ORIGINAL.class_name or "positional_embedding_type" in found
    values, theirs = (_ORIGINAL if original else _DIFFUSERS).read(found, _OWN, place)
    if original:
        values.setdefault("rotary", "inner_causal" if theirs["causal_temporal_positioning"] else "inner")
        values.setdefault("patch", (1, 1, 1))
    else:
        values["patch"] = (theirs["patch_size_t"], theirs["patch_size"], theirs["patch_size"])
        if found.get("_pipeline") == "LTXConditionPipeline":  # this pipeline gives the transformer its positions
            values.setdefault("rotary", "inner_causal")
    values |= configs.checked_width(theirs, place)
    volume = values["patch"][0] * values["patch"][1] * values["patch"][2]
    for name in ("in_channels", "out_channels"):  # theirs count a whole patch
        if theirs[name] % volume:
            raise StditError(f"{place}: {name} {theirs[name]} is not a multiple of the {volume} latents of a patch.")
        values[name] = theirs[name] // volume
    return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As LTXVideoTransformer3DModel.save_pretrained writes it, with our own values under "_stdit"."""
    return _DIFFUSERS.write(config, _OWN, **_sizes(config), patch_size=config.patch[1], patch_size_t=config.patch[0])


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    """As the original release has it in transformer/config.json."""
    causal = config.rotary == "inner_causal"
    return _ORIGINAL.write(config, _OWN, **_sizes(config), causal_temporal_positioning=causal)


def dialect_of(names: Mapping[str, Shape]) -> str:
    for dialect, first in (("original", "patchify_proj"), ("diffusers", "proj_in")):
        if f"{first}.weight" in names and "caption_projection.linear_1.weight" in names:
            return dialect
    return ""


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    original = dialect == "original"
    order = output_order(config.patch, config.out_channels, "cthw")
    return KeyMap(
        Rule("patch_embedding.{leaf}", "patchify_proj.{leaf}" if original else "proj_in.{leaf}"),
        Rule("head.head.{leaf}", "proj_out.{leaf}", order),
        *block_rules(q_norm="{p}_norm" if original else "norm_{p}"),
        *end_rules("adaln_single" if original else "time_embed"),
    )


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI reads the other settings from `metadata`."""
    fixed: dict[str, tuple[Any, ...]] = {"rope_stride": ((8, 32, 32),), "rope_fps": (25.0,)}
    if layout == "diffusers":
        return {**fixed, "rope_theta": (10000.0,), "rope_scale": ((20.0, 2048.0, 2048.0),)}
    if layout == "original":
        return fixed
    return {**fixed, "patch": ((1, 1, 1),), "in_channels": (128,), "out_channels": (128,)}


def metadata(config: TransformerConfig) -> dict[str, str]:
    """As in the releases' single files from 0.9.5 on. Only there ComfyUI finds the number of heads and whether frame
    positions are a causal VAE's (causal_temporal_positioning)."""
    described = {name: value for name, value in config_to_original(config).items() if name != "_stdit"}
    return {"config": json.dumps({"transformer": described}, sort_keys=True)}


def _sizes(config: TransformerConfig) -> dict[str, Any]:
    return {
        **configs.head_fields(config),
        "in_channels": config.in_channels * config.patch_volume,
        "out_channels": config.out_channels * config.patch_volume,
    }


def _values_from_shapes(shapes: Mapping[str, Shape], place: object, heads: int | None) -> dict[str, Any]:
    """The releases have 32 heads and patches of one latent. Frame positions are a causal VAE's in every 13B, and in 2B
    from 0.9.5 on, whose files say so."""
    first = "patchify_proj" if dialect_of(shapes) == "original" else "proj_in"
    dim, channels = needed(shapes, f"{first}.weight", 2, place, TITLE)
    return {
        **configs.width(*configs.checked_heads(heads, dim, {2048: 32, 4096: 32}, place, TITLE)),
        "rotary": "inner_causal" if dim == 4096 else "inner",
        "layers": configs.count(shapes, _BLOCKS),
        "in_channels": channels,
        "out_channels": needed(shapes, "proj_out.weight", 2, place, TITLE)[0],
        "patch": (1, 1, 1),
        "text_dim": needed(shapes, "caption_projection.linear_1.weight", 2, place, TITLE)[1],
    }


def _scheduler(config: TransformerConfig) -> dict[str, Any]:
    shifts = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    dynamic = {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    return {**euler_config(), **shifts, **dynamic, "_pipeline": "LTXPipeline", "_caller": "ltx"}


_VAE = "LTX-Video's (128 channels, 8×32×32)"
_PIPELINE = PipelineKind(25, "704x512x161", text=Treatment(128, "none", sees_padding=True), caller="ltx")

FAMILY = Family(
    name="ltx",
    title=TITLE,
    classes=(_DIFFUSERS.class_name, _ORIGINAL.class_name),
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    metadata=metadata,
    scheduler=_scheduler,
    pipelines={
        "LTXPipeline": _PIPELINE,
        "LTXImageToVideoPipeline": _PIPELINE,
        "LTXConditionPipeline": replace(
            _PIPELINE, text=Treatment(256, "none"), caller="ltx condition", known_noise=0.15
        ),
    },
    releases=(
        Release("LTX-Video 2B", {"dim": 2048, "layers": 28}, _VAE, "T5-XXL v1.1"),
        Release("LTX-Video 13B", {"dim": 4096, "layers": 48}, _VAE, "T5-XXL v1.1"),
    ),
    autoencoders={"AutoencoderKLLTXVideo": VaeTraits("LTX-Video")},
)
