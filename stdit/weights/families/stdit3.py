"""STDiT3 of Open-Sora 1.2 (hpcaitech/Open-Sora v1.2.0, opensora/models/stdit/stdit3.py).

Spatial blocks, each followed by a temporal block, both with text. diffusers has no class for it, so both layouts are
the release's. Its config.json names no class: it is recognised by its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.weights.families.configs import PIXART_LIKE, Fields, checked_transformer, patch_rules
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import Flatten, KeyMap, Rule, Shape

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "STDiT3 (Open-Sora 1.2)"
SETTINGS: dict[str, Any] = {
    **PIXART_LIKE,
    "family": "stdit3",
    "attention": "spatial_temporal_text",
    "rotary": "time",
    "position": "space_resolution",
    "level_condition": "fps",
}
_OWN = ("text_padding",)
_BLOCKS = r"(?:spatial|temporal)_blocks\.(\d+)\."
_ORIGINAL = Fields(
    "STDiT3",
    {
        "hidden_size": "dim",
        "num_heads": "heads",
        "depth": "layers",
        "in_channels": "in_channels",
        "patch_size": "patch",
        "caption_channels": "text_dim",
        "input_sq_size": "position_base",
        "model_max_length": "null_text",
    },
    {
        "hidden_size": 1152,
        "num_heads": 16,
        "depth": 28,
        "in_channels": 4,
        "patch_size": (1, 2, 2),
        "caption_channels": 4096,
        "input_sq_size": 512,
        "model_max_length": 300,
        "mlp_ratio": 4.0,
        "pred_sigma": True,
        "qk_norm": True,
        # how it was trained or run
        "class_dropout_prob": 0.1,
        "drop_path": 0.0,
        "enable_flash_attn": False,
        "enable_layernorm_kernel": False,
        "enable_sequence_parallelism": False,
        "only_train_temporal": False,
        "freeze_y_embedder": False,
        "skip_y_embedder": False,
    },
)
_NOTES = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version", "input_size")


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    if not found:
        raise StditError(f"{place}: {TITLE} needs its config.json beside the file.")
    known = {name: value for name, value in found.items() if name not in _NOTES}
    values, theirs = _ORIGINAL.read(known, _OWN, place)
    values["qk_norm"] = "per_head_self" if theirs["qk_norm"] else "none"
    values["ffn_dim"] = int(values["dim"] * theirs["mlp_ratio"])
    values["out_channels"] = values["in_channels"] * (2 if theirs["pred_sigma"] else 1)
    return checked_transformer(SETTINGS | values, shapes, place, _BLOCKS)


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    """As the release has it."""
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise StditError(
            f"{TITLE} has out_channels of once or twice its in_channels {config.in_channels}, not "
            f"{config.out_channels}."
        )
    written = _ORIGINAL.write(
        config,
        _OWN,
        mlp_ratio=config.ffn_dim / config.dim,
        pred_sigma=config.out_channels != config.in_channels,
        qk_norm=config.qk_norm != "none",
    )
    return {"architectures": ["STDiT3"], "model_type": "STDiT3", **written}


config_to_diffusers = config_to_original


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]] | None:
    """ComfyUI has no STDiT3; it would take the tensors for PixArt's."""
    return None if layout == "comfyui" else {"blank_channels": (0,)}


def dialect_of(names: Mapping[str, Shape]) -> str:
    return "original" if "spatial_blocks.0.attn.qkv.weight" in names else ""


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    rules = []
    for ours, theirs in (("blocks", "spatial_blocks"), ("temporal_blocks", "temporal_blocks")):
        a, b = f"{ours}.{{i}}", f"{theirs}.{{i}}"
        rules += [
            Rule(tuple(f"{a}.self_attn.{p}.{{leaf}}" for p in "qkv"), f"{b}.attn.qkv.{{leaf}}"),
            Rule(f"{a}.self_attn.norm_{{p:q|k}}.weight", f"{b}.attn.{{p}}_norm.weight"),
            Rule(f"{a}.self_attn.o.{{leaf}}", f"{b}.attn.proj.{{leaf}}"),
            Rule(f"{a}.cross_attn.q.{{leaf}}", f"{b}.cross_attn.q_linear.{{leaf}}"),
            Rule(tuple(f"{a}.cross_attn.{p}.{{leaf}}" for p in "kv"), f"{b}.cross_attn.kv_linear.{{leaf}}"),
            Rule(f"{a}.cross_attn.o.{{leaf}}", f"{b}.cross_attn.proj.{{leaf}}"),
            Rule(f"{a}.ffn.0.{{leaf}}", f"{b}.mlp.fc1.{{leaf}}"),
            Rule(f"{a}.ffn.2.{{leaf}}", f"{b}.mlp.fc2.{{leaf}}"),
            Rule(f"{a}.modulation", f"{b}.scale_shift_table", Flatten(0, (1, 6))),
        ]
    return KeyMap(
        *patch_rules(config, "x_embedder.proj", axes=3),
        Rule("time_embedding.{i}.{leaf}", "t_embedder.mlp.{i}.{leaf}"),
        Rule("time_projection.1.{leaf}", "t_block.1.{leaf}"),
        Rule("clip_embedding.{i}.{leaf}", "fps_embedder.mlp.{i}.{leaf}"),
        Rule("text_embedding.0.{leaf}", "y_embedder.y_proj.fc1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "y_embedder.y_proj.fc2.{leaf}"),
        Rule("null_text", "y_embedder.y_embedding"),
        *rules,
        Rule("head.modulation", "final_layer.scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "final_layer.linear.{leaf}"),
        computed={"rope.freqs": lambda: _frequencies(config)},
    )


def _frequencies(config: TransformerConfig) -> Tensor:
    """As rotary-embedding-torch computes and stores them: (D_head/2,)."""
    import torch

    return 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)


FAMILY = Family(
    name="stdit3",
    title=TITLE,
    classes=(_ORIGINAL.class_name,),
    library="opensora",
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    scheduler=lambda config: {
        "_class_name": "RFLOW",
        "use_timestep_transform": True,
        "_pipeline": "OpenSoraPipeline",
    },
    pipelines={"OpenSoraPipeline": PipelineKind(24, "848x480x102", text=Treatment(300, "strip"), gathered=True)},
    releases=(
        Release(
            "STDiT3-XL/2",
            {"dim": 1152, "layers": 28},
            vae="Open-Sora 1.2's (4 channels, 4×8×8)",
            text="T5-XXL v1.1",
        ),
    ),
    variants=({"qk_norm": "per_head_self"},),
    guided_by_null_text=True,
)
