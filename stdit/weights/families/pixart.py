"""PixArt-α and PixArt-Σ (PixArt-alpha/PixArt-alpha, diffusion/model/nets/PixArt.py and PixArtMS.py): images.

An image is a clip of one frame; each frame of a longer clip is an image of its own. The originals fuse q, k and v, keep
a learned text for "no text", and have no config.json. Inflated models (`inflate` in stdit/models/transformer.py) are
stdit's own: their config.json names a class that no other program has; keys are diffusers', and temporal_blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import IMAGE_VAE
from stdit.weights.families import configs
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, block_rules, end_rules, made, only, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule

if TYPE_CHECKING:
    from torch import Tensor

_INFLATED: Settings = {"attention": "spatial_temporal", "rotary": "time"}


def _ours(values: Settings, theirs: Settings, place: object) -> Settings:
    if theirs["caption_channels"] is None:
        raise StditError(f"{place}: caption_channels is missing; stdit runs PixArt models that project their text.")
    found = configs.picture(theirs, place)
    if theirs["interpolation_scale"]:
        found["position_stretch"] = float(theirs["interpolation_scale"])
    sized = theirs["use_additional_conditions"]
    sized = theirs["sample_size"] == 128 if sized is None else sized
    return {**found, "level_condition": "size" if sized else "none"}


_DIFFUSERS = ConfigJson(
    "PixArtTransformer2DModel",
    {
        **configs.PLAIN_BLOCKS,
        **configs.width_keys(16, 72, 1152),
        **configs.picture_keys(out_channels=8, patch=2, sample=128),
        "num_layers": setting("layers", 28),
        "in_channels": setting("in_channels", 4),
        "caption_channels": setting("text_dim", None),
        "interpolation_scale": made(attrgetter("position_stretch"), None),
        "use_additional_conditions": made(lambda config: config.level_condition == "size", None),
        "attention_type": only("default"),
        "dropout": only(0.0),
        "norm_type": only("ada_norm_single"),
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
    },
    own=("text_padding",),
    ours=_ours,
)


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """The originals' `pos_embed` gives the side of the position grid; without it, models that know the image size are
    taken to be for 1024 pixels."""
    shapes, values = tensors.shapes, tensors.sizes(2, {1152: 16})
    sized = tensors.find("clip_embedding.side.0.weight")
    tokens = shapes.get("pos_embed", (1, 4096 if sized else 1024, values["dim"]))
    compressed = {int(name.split(".")[1]): shapes[name][2] for name in shapes if name.endswith(".attn.sr.weight")}
    base = math.isqrt(tokens[1]) if len(tokens) == 3 else 32
    return {
        **values,
        "position_base": base,
        "position_stretch": float(max(base * values["patch"][1] // 64, 1)),
        "level_condition": "size" if sized else "none",
        "compressed": tuple(sorted(compressed)),
        "compression": max(compressed.values(), default=1),
        "null_text": shapes.get("y_embedder.y_embedding", (0,))[0],
    }


def _built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI knows the released size only."""
    fixed = configs.pixart_built_in(config)
    if layout != "comfyui":
        return fixed
    return {
        **fixed,
        "dim": (1152,),
        "heads": (16,),
        "in_channels": (4,),
        "out_channels": (8,),
        "patch": ((1, 2, 2),),
        "text_dim": (4096,),
        "compressed": ((),),
        "attention": ("spatial",),
        "position_stretch": (float(config.position_base * 2 // 64),),
    }


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    if dialect == "diffusers" and config.compressed:
        raise StditError(
            "diffusers' PixArtTransformer2DModel has no compressed keys and values (PixArt-Σ 2K): write layout "
            "'original'."
        )
    if dialect == "diffusers":
        emb = "adaln_single.emb"
        return KeyMap(
            *configs.patch_rules(config),
            Rule("clip_embedding.side.0.{leaf}", f"{emb}.resolution_embedder.linear_1.{{leaf}}"),
            Rule("clip_embedding.side.2.{leaf}", f"{emb}.resolution_embedder.linear_2.{{leaf}}"),
            Rule("clip_embedding.ratio.0.{leaf}", f"{emb}.aspect_ratio_embedder.linear_1.{{leaf}}"),
            Rule("clip_embedding.ratio.2.{leaf}", f"{emb}.aspect_ratio_embedder.linear_2.{{leaf}}"),
            *block_rules(),
            *block_rules("temporal_blocks", "temporal_blocks"),
            *end_rules(),
            absent=("null_text",),
        )
    if config.attention == "spatial_temporal":
        raise StditError(
            "no original release has an inflated PixArt (attention=spatial_temporal): write layout 'diffusers', which "
            "is stdit's own."
        )
    return KeyMap(
        *configs.original_rules(config, 2, {"blocks": "blocks"}),
        Rule("clip_embedding.side.{i}.{leaf}", "csize_embedder.mlp.{i}.{leaf}"),
        Rule("clip_embedding.ratio.{i}.{leaf}", "ar_embedder.mlp.{i}.{leaf}"),
        Rule("blocks.{i}.self_attn.compression.{m:sr|norm}.{leaf}", "blocks.{i}.attn.{m}.{leaf}"),
        computed={"pos_embed": lambda: _positions(config)},
    )


def _positions(config: TransformerConfig) -> Tensor:
    """The originals' get_2d_sincos_pos_embed for the trained image size: (1, side², D), by numpy's functions in their
    order, so that no bit differs. Their model does not load it, but some of their scripts fail if it is absent.
    """
    import numpy as np
    import torch

    side, quarter = config.position_base, config.dim // 4
    places = np.arange(side, dtype=np.float32) / config.position_stretch
    angles = np.outer(places, 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter))
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, D/2)
    grid = np.concatenate([np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)], axis=1)  # columns, then rows
    return torch.from_numpy(grid).float()[None]


_SD, _SDXL = "Stable Diffusion's, of images (4 channels, 8×8)", "SDXL's, of images (4 channels, 8×8)"
_XL, _T5 = {"dim": 1152, "layers": 28}, "T5-XXL v1.1"

FAMILY = Family(
    name="pixart",
    title="PixArt transformer",
    settings={
        **configs.PIXART_LIKE,
        "family": "pixart",
        "attention": "spatial",
        "rotary": "none",
        "position": "space",
    },
    configs={
        "diffusers": _DIFFUSERS,
        "original": ConfigJson("PixArtMS", own=configs.PICTURE_KEPT, bare=True),
        "inflated": replace(
            _DIFFUSERS,
            class_name="InflatedPixArtTransformer3DModel",
            ours=lambda values, theirs, place: _ours(values, theirs, place) | _INFLATED,
        ),
    },
    form=lambda config, dialect: "inflated" if config.attention == "spatial_temporal" else dialect,
    marks={
        "original": (r"y_embedder\.y_proj\.fc1\.weight", r"blocks\.0\.attn\.qkv\.weight"),
        "diffusers": (r"pos_embed\.proj\.weight", r"adaln_single\.linear\.weight"),
    },
    lacks=r"temporal_transformer_blocks\..*",  # Latte's
    fits=lambda shapes: not configs.as_many_out(shapes),
    blocks=r"(?:transformer_)?blocks\.(\d+)\.",
    keymap=_keymap,
    bare=_bare,
    comfyui=True,
    built_in=_built_in,
    not_written=("null_text",),  # diffusers has no place for it, and no output depends on it
    scheduler=lambda config: {
        "_class_name": "DPMSolverMultistepScheduler",
        **configs.LINEAR_BETAS,
        "algorithm_type": "dpmsolver++",
    },
    pipelines={
        "PixArtAlphaPipeline": PipelineKind(1, text=Treatment(120, "lower")),
        "PixArtSigmaPipeline": PipelineKind(1, text=Treatment(300, "lower")),
    },
    releases=(
        Release("PixArt-α XL 1024-MS", {**_XL, "level_condition": "size"}, _SD, _T5),
        Release("PixArt-Σ XL 2K-MS", {**_XL, "position_base": 128}, _SDXL, _T5),
        Release("PixArt-Σ XL 1024-MS", {**_XL, "position_base": 64}, _SDXL, _T5),
        Release("PixArt XL of at most 512 pixels (α or Σ)", _XL, f"α: {_SD}; Σ: {_SDXL}", _T5),
    ),
    autoencoders={"AutoencoderKL": IMAGE_VAE},
    variants=({}, {"level_condition": "size"}),
)
