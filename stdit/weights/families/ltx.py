"""LTX-Video (Lightricks/LTX-Video, ltx_video/models/transformers/transformer3d.py): 2B and 13B.

The original's names are diffusers' except for four, both in the release's folders and in the single files that ComfyUI
reads, which add a prefix and hold the VAE too.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from stdit.diffusion.solvers import euler_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families import configs
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, block_rules, end_rules, made, only, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape, output_order


def _sized(patch: Shape, rotary: str, theirs: Settings, place: object) -> Settings:
    found = {**configs.width(theirs, place), "patch": tuple(patch), "rotary": rotary}
    volume = math.prod(patch)
    for name in ("in_channels", "out_channels"):  # theirs count a whole patch
        if theirs[name] % volume:
            raise StditError(f"{place}: {name} {theirs[name]} is not a multiple of the {volume} latents of a patch.")
        found[name] = theirs[name] // volume
    return found


def _from_diffusers(values: Settings, theirs: Settings, place: object) -> Settings:
    patch = (theirs["patch_size_t"], theirs["patch_size"], theirs["patch_size"])
    causal = theirs.get("_pipeline") == "LTXConditionPipeline"  # which gives the transformer its positions
    return _sized(patch, values.get("rotary", "inner_causal" if causal else "inner"), theirs, place)


def _from_original(values: Settings, theirs: Settings, place: object) -> Settings:
    rotary = "inner_causal" if theirs["causal_temporal_positioning"] else "inner"
    return _sized(values.get("patch", (1, 1, 1)), values.get("rotary", rotary), theirs, place)


_COMMON = {
    **configs.PLAIN_BLOCKS,
    **configs.width_keys(32, 64, 2048),
    "num_layers": setting("layers", 28),
    "caption_channels": setting("text_dim", 4096),
    "in_channels": made(lambda config: config.in_channels * config.patch_volume, 128),
    "out_channels": made(lambda config: config.out_channels * config.patch_volume, 128),
}
_DIFFUSERS = ConfigJson(
    "LTXVideoTransformer3DModel",
    {
        **_COMMON,
        "patch_size": made(lambda config: config.patch[1], 1),
        "patch_size_t": made(lambda config: config.patch[0], 1),
        "qk_norm": only("rms_norm_across_heads"),
        "attention_out_bias": only(True),
    },
    own=("patch", "rotary", "rope_scale", "rope_stride", "rope_fps", "rope_theta", "text_padding"),
    ours=_from_diffusers,
)
_ORIGINAL = ConfigJson(
    "Transformer3DModel",
    {
        **_COMMON,
        "positional_embedding_type": only("rope"),
        "positional_embedding_theta": setting("rope_theta", 10000.0),
        "positional_embedding_max_pos": setting("rope_scale", [20.0, 2048.0, 2048.0]),
        "timestep_scale_multiplier": only(1000, default=1000.0),
        "causal_temporal_positioning": made(lambda config: config.rotary == "inner_causal", False),
        "qk_norm": only("rms_norm"),
        "standardization_norm": only("rms_norm"),
        "adaptive_norm": only("single_scale_shift"),
        # leftovers of the class that it was adapted from
        "attention_type": only("default"),
        "double_self_attention": only(False),
        "only_cross_attention": only(False),
        "dropout": only(0.0),
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "project_to_2d_pos": True,
        "upcast_attention": False,
        "use_linear_projection": False,
        "use_tpu_flash_attention": False,
        "use_chipmunk_attention": False,
    },
    own=_DIFFUSERS.own,
    ours=_from_original,
)


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """The releases have 32 heads and patches of one latent. Frame positions are a causal VAE's in every 13B, and in 2B
    from 0.9.5 on, whose files say so."""
    values = tensors.sizes(0, {2048: 32, 4096: 32})
    return {**values, "rotary": "inner_causal" if values["dim"] == 4096 else "inner"}


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    original = dialect == "original"
    order = output_order(config.patch, config.out_channels, "cthw")
    return KeyMap(
        Rule("patch_embedding.{leaf}", "patchify_proj.{leaf}" if original else "proj_in.{leaf}"),
        Rule("head.head.{leaf}", "proj_out.{leaf}", order),
        *block_rules(q_norm="{p}_norm" if original else "norm_{p}"),
        *end_rules("adaln_single" if original else "time_embed"),
    )


def _built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI reads the other settings from `_metadata`."""
    fixed: dict[str, tuple[Any, ...]] = {"rope_stride": ((8, 32, 32),), "rope_fps": (25.0,)}
    if layout == "diffusers":
        return {**fixed, "rope_theta": (10000.0,), "rope_scale": ((20.0, 2048.0, 2048.0),)}
    if layout == "original":
        return fixed
    return {**fixed, "patch": ((1, 1, 1),), "in_channels": (128,), "out_channels": (128,)}


def _metadata(config: TransformerConfig) -> dict[str, str]:
    """As in the releases' single files from 0.9.5 on. Only there ComfyUI finds the number of heads and whether frame
    positions are a causal VAE's (causal_temporal_positioning)."""
    described = {name: value for name, value in _ORIGINAL.write(config).items() if name != "_stdit"}
    return {"config": json.dumps({"transformer": described}, sort_keys=True)}


def _scheduler(config: TransformerConfig) -> dict[str, Any]:
    shifts = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    dynamic = {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    return {**euler_config(), **shifts, **dynamic, "_pipeline": "LTXPipeline", "_caller": "ltx"}


_TEXT = r"caption_projection\.linear_1\.weight"
_VAE = "LTX-Video's (128 channels, 8×32×32)"
_PIPELINE = PipelineKind(25, "704x512x161", text=Treatment(128, "none", sees_padding=True), caller="ltx")

FAMILY = Family(
    name="ltx",
    title="LTX-Video transformer",
    settings={
        "family": "ltx",
        "norm": "rms",
        "cross_norm": "none",
        "qk_eps": 1e-5,
        "text_padding": 0,
        "rotary": "inner",
        "rope_scale": (20.0, 2048.0, 2048.0),
        "rope_stride": (8, 32, 32),
        "rope_fps": 25.0,
    },
    configs={"diffusers": _DIFFUSERS, "original": _ORIGINAL},
    marks={"original": (r"patchify_proj\.weight", _TEXT), "diffusers": (r"proj_in\.weight", _TEXT)},
    blocks=r"transformer_blocks\.(\d+)\.",
    keymap=_keymap,
    bare=_bare,
    comfyui=True,
    built_in=_built_in,
    metadata=_metadata,
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
