"""Latte (Vchitect/Latte, models/latte_t2v.py): PixArt-α's blocks, each followed by one over time.

The release has diffusers' names, and a learned text for "no text".
"""

from __future__ import annotations

from collections.abc import Mapping

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import IMAGE_VAE
from stdit.weights.families import configs
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, block_rules, end_rules, made, only, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape


def _ours(values: Settings, theirs: Settings, place: object) -> Settings:
    for name in ("in_channels", "patch_size", "caption_channels", "cross_attention_dim"):
        if theirs[name] is None:
            raise StditError(f"{place}: {name} is missing.")
    return configs.picture(theirs, place)


_DIFFUSERS = ConfigJson(
    "LatteTransformer3DModel",
    {
        **configs.width_keys(16, 88, None),
        **configs.picture_keys(out_channels=None, patch=None, sample=64),
        "num_layers": setting("layers", 1),
        "in_channels": setting("in_channels", None),
        "caption_channels": setting("text_dim", None),
        "num_embeds_ada_norm": made(lambda config: 1000, None),
        "video_length": 16,  # of the release; our frame positions are for any number
        # the class's defaults are not the release's values
        "attention_bias": only(True, default=False),
        "activation_fn": only("gelu-approximate", default="geglu"),
        "norm_type": only("ada_norm_single", default="layer_norm"),
        "norm_elementwise_affine": only(False, default=True),
        "norm_eps": only(1e-6, default=1e-5),
        "dropout": only(0.0),
    },
    own=("text_padding",),
    ours=_ours,
)
_ORIGINAL = ConfigJson("LatteT2V", own=configs.PICTURE_KEPT, bare=True)
_NULL_TEXT = "caption_projection.y_embedding"


def _prepare(found: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    """The release's config.json has keys of a larger class."""
    if found.get("_class_name") != _ORIGINAL.class_name or "_stdit" in found:
        return found
    known = {name: value for name, value in found.items() if name in _DIFFUSERS.names or name.startswith("_")}
    return {**known, "_class_name": _DIFFUSERS.class_name}


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """Positions are for 64 latents per side, as in the release."""
    values = tensors.sizes(2, {1152: 16})
    return {**values, "position_base": 64 // values["patch"][1]}


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    return KeyMap(
        *configs.patch_rules(config),
        *block_rules(),
        *block_rules("temporal_blocks", "temporal_transformer_blocks"),
        *end_rules(),
        *([Rule("null_text", _NULL_TEXT)] if dialect == "original" else []),
        absent=("null_text",) if dialect == "diffusers" else (),
    )


_MARKS = (r"pos_embed\.proj\.weight", r"temporal_transformer_blocks\..*")

FAMILY = Family(
    name="latte",
    title="Latte transformer",
    settings={
        **configs.PIXART_LIKE,
        "family": "latte",
        "attention": "spatial_temporal",
        "rotary": "none",
        "position": "space_time",
    },
    configs={"diffusers": _DIFFUSERS, "original": _ORIGINAL},
    marks={"original": (*_MARKS, _NULL_TEXT), "diffusers": _MARKS},
    blocks=r"(?:temporal_)?transformer_blocks\.(\d+)\.",
    keymap=_keymap,
    prepare=_prepare,
    bare=_bare,
    finish=lambda values, shapes, place: {**values, "null_text": shapes.get(_NULL_TEXT, (0,))[0]},
    built_in=lambda config, layout: configs.pixart_built_in(config),
    not_written=("null_text",),  # diffusers has no place for it, and no output depends on it
    scheduler=lambda config: {"_class_name": "DDIMScheduler", **configs.LINEAR_BETAS, "clip_sample": False},
    pipelines={
        "LattePipeline": PipelineKind(8, "512x512x16", text=Treatment(120, "lower"), negative_follows=True),
    },
    releases=(
        Release(
            "Latte-1", {"dim": 1152, "layers": 28}, "Stable Diffusion's, of images (4 channels, 8×8)", "T5-XXL v1.1"
        ),
    ),
    autoencoders={"AutoencoderKL": IMAGE_VAE},
)
