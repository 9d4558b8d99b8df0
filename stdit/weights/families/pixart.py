"""PixArt-α and PixArt-Σ (PixArt-alpha/PixArt-alpha, diffusion/model/nets/PixArt.py and PixArtMS.py): images.

An image is a clip of one frame; each frame of a longer clip is an image of its own. The originals fuse q, k and v, keep
a learned text for "no text", and have no config.json. Inflated models (`inflate` in stdit/models/transformer.py) are
stdit's own: their config.json names a class that no other program has; keys are diffusers', and temporal_blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import IMAGE_VAE
from stdit.weights.families import configs
from stdit.weights.families.configs import block_rules, checked_transformer, end_rules
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import Flatten, KeyMap, Rule, Shape

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "PixArt transformer"
_ORIGINAL_CLASS = "PixArtMS"
_INFLATED_CLASS = "InflatedPixArtTransformer3DModel"
SETTINGS: dict[str, Any] = {
    **configs.PIXART_LIKE,
    "family": "pixart",
    "attention": "spatial",
    "rotary": "none",
    "position": "space",
}
_OWN = ("text_padding",)
_BLOCKS = r"(?:transformer_)?blocks\.(\d+)\."
_DIFFUSERS = configs.Fields(
    "PixArtTransformer2DModel",
    {"num_layers": "layers", "in_channels": "in_channels", "caption_channels": "text_dim"},
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "cross_attention_dim": 1152,
        "attention_bias": True,
        "sample_size": 128,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "use_additional_conditions": None,
        "caption_channels": None,
        "attention_type": "default",
    },
    {**configs.PIXART_BLOCKS, "attention_type": ("default",)},
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    if not found or found.get("_class_name") == _ORIGINAL_CLASS:
        kept = configs.described(found, configs.PICTURE_KEPT, place)
        values = _values_from_shapes(shapes, place, kept.get("heads", heads)) | kept
        return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)
    inflated = found.get("_class_name") == _INFLATED_CLASS
    values, theirs = _DIFFUSERS.read({**found, "_class_name": _DIFFUSERS.class_name}, _OWN, place)
    if values["text_dim"] is None:
        raise StditError(f"{place}: caption_channels is missing; stdit runs PixArt models that project their text.")
    values |= configs.checked_width(theirs, place) | configs.picture(theirs)
    values["position_stretch"] = float(theirs["interpolation_scale"] or values["position_stretch"])
    sized = theirs["use_additional_conditions"]
    sized = theirs["sample_size"] == 128 if sized is None else sized
    values["level_condition"] = "size" if sized else "none"
    config = checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)
    return config.inflated() if inflated else config


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As PixArtTransformer2DModel.save_pretrained writes it; an inflated model has our class."""
    written = _DIFFUSERS.write(
        config,
        _OWN,
        **configs.head_fields(config),
        **configs.picture_fields(config),
        interpolation_scale=config.position_stretch,
        use_additional_conditions=config.level_condition == "size",
    )
    return written | ({"_class_name": _INFLATED_CLASS} if _is_inflated(config) else {})


def _is_inflated(config: TransformerConfig) -> bool:
    return config.attention == "spatial_temporal"


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    return configs.describe(_ORIGINAL_CLASS, config, configs.PICTURE_KEPT)


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI knows the released size only."""
    if layout != "comfyui":
        return configs.pixart_built_in(config)
    return {
        **configs.pixart_built_in(config),
        "dim": (1152,),
        "heads": (16,),
        "ffn_dim": (4608,),
        "in_channels": (4,),
        "out_channels": (8,),
        "patch": ((1, 2, 2),),
        "text_dim": (4096,),
        "compressed": ((),),
        "attention": ("spatial",),
        "position_stretch": (float(config.position_base * 2 // 64),),
    }


def dialect_of(names: Mapping[str, Shape]) -> str:
    if "y_embedder.y_proj.fc1.weight" in names and "blocks.0.attn.qkv.weight" in names:
        return "original"
    both = {"pos_embed.proj.weight", "adaln_single.linear.weight"} <= set(names)
    return "diffusers" if both and not any(name.startswith("temporal_transformer_blocks.") for name in names) else ""


def fits(shapes: Mapping[str, Shape]) -> bool:
    """PixArt has more output than input channels (a variance); Allegro, with the same names, has as many."""
    head, patch = shapes.get("proj_out.weight", (0,)), shapes.get("pos_embed.proj.weight", (0, 0, 0, 0))
    return dialect_of(shapes) == "original" or head[0] != math.prod(patch[1:])


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    if dialect == "diffusers" and config.compressed:
        raise StditError(
            "diffusers' PixArtTransformer2DModel has no compressed keys and values (PixArt-Σ 2K): write layout "
            "'original'."
        )
    sizes = {"side": ("csize_embedder", "resolution_embedder"), "ratio": ("ar_embedder", "aspect_ratio_embedder")}
    if dialect == "diffusers":
        emb = "adaln_single.emb"
        return KeyMap(
            *configs.patch_rules(config),
            *(
                Rule(f"clip_embedding.{our}.0.{{leaf}}", f"{emb}.{its[1]}.linear_1.{{leaf}}")
                for our, its in sizes.items()
            ),
            *(
                Rule(f"clip_embedding.{our}.2.{{leaf}}", f"{emb}.{its[1]}.linear_2.{{leaf}}")
                for our, its in sizes.items()
            ),
            *block_rules(),
            *block_rules("temporal_blocks", "temporal_blocks"),
            *end_rules(),
            absent=("null_text",),
        )
    if _is_inflated(config):
        raise StditError(
            "no original release has an inflated PixArt (attention=spatial_temporal): write layout 'diffusers', which "
            "is stdit's own."
        )
    qkv = tuple(f"blocks.{{i}}.self_attn.{p}.{{leaf}}" for p in "qkv")
    kv = tuple(f"blocks.{{i}}.cross_attn.{p}.{{leaf}}" for p in "kv")
    return KeyMap(
        *configs.patch_rules(config, "x_embedder.proj"),
        Rule("time_embedding.{i}.{leaf}", "t_embedder.mlp.{i}.{leaf}"),
        Rule("time_projection.1.{leaf}", "t_block.1.{leaf}"),
        Rule("text_embedding.0.{leaf}", "y_embedder.y_proj.fc1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "y_embedder.y_proj.fc2.{leaf}"),
        Rule("null_text", "y_embedder.y_embedding"),
        *(Rule(f"clip_embedding.{our}.{{i}}.{{leaf}}", f"{its[0]}.mlp.{{i}}.{{leaf}}") for our, its in sizes.items()),
        Rule(qkv, "blocks.{i}.attn.qkv.{leaf}"),
        Rule("blocks.{i}.self_attn.o.{leaf}", "blocks.{i}.attn.proj.{leaf}"),
        Rule("blocks.{i}.self_attn.compression.{m:sr|norm}.{leaf}", "blocks.{i}.attn.{m}.{leaf}"),
        Rule("blocks.{i}.cross_attn.q.{leaf}", "blocks.{i}.cross_attn.q_linear.{leaf}"),
        Rule(kv, "blocks.{i}.cross_attn.kv_linear.{leaf}"),
        Rule("blocks.{i}.cross_attn.o.{leaf}", "blocks.{i}.cross_attn.proj.{leaf}"),
        Rule("blocks.{i}.ffn.0.{leaf}", "blocks.{i}.mlp.fc1.{leaf}"),
        Rule("blocks.{i}.ffn.2.{leaf}", "blocks.{i}.mlp.fc2.{leaf}"),
        Rule("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", Flatten(0, (1, 6))),
        Rule("head.modulation", "final_layer.scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "final_layer.linear.{leaf}"),
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


def _values_from_shapes(shapes: Mapping[str, Shape], place: object, heads: int | None) -> dict[str, Any]:
    """The originals' `pos_embed` gives the side of the position grid; without it, models that know the image size are
    taken to be for 1024 pixels."""
    names = ("pos_embed.proj.weight", "proj_out.weight", "caption_projection.linear_1.weight")
    if dialect_of(shapes) == "original":
        names = ("x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.y_proj.fc1.weight")
    values = configs.picture_from_shapes(shapes, place, TITLE, _BLOCKS, names, heads, {1152: 16})
    sized = any(name.startswith(("csize_embedder.", "adaln_single.emb.resolution_embedder.")) for name in shapes)
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


_SD, _SDXL = "Stable Diffusion's, of images (4 channels, 8×8)", "SDXL's, of images (4 channels, 8×8)"
_XL, _T5 = {"dim": 1152, "layers": 28}, "T5-XXL v1.1"

FAMILY = Family(
    name="pixart",
    title=TITLE,
    classes=(_DIFFUSERS.class_name, _ORIGINAL_CLASS, _INFLATED_CLASS),
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    fits=fits,
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
