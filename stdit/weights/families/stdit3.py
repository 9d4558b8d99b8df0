"""STDiT3 of Open-Sora 1.2 (hpcaitech/Open-Sora v1.2.0, opensora/models/stdit/stdit3.py).

Spatial blocks, each followed by a temporal block, both with text. diffusers has no class for it, so both layouts are
the release's. Its config.json names no class: it is recognised by its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.weights.families.configs import PIXART_LIKE, ConfigJson, Settings, made, original_rules, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "STDiT3 (Open-Sora 1.2)"


def _ours(values: Settings, theirs: Settings, place: object) -> Settings:
    return {
        "qk_norm": "per_head_self" if theirs["qk_norm"] else "none",
        "ffn_dim": int(values["dim"] * theirs["mlp_ratio"]),
        "out_channels": values["in_channels"] * (2 if theirs["pred_sigma"] else 1),
    }


_ORIGINAL = ConfigJson(
    "STDiT3",
    {
        "hidden_size": setting("dim", 1152),
        "num_heads": setting("heads", 16),
        "depth": setting("layers", 28),
        "in_channels": setting("in_channels", 4),
        "patch_size": setting("patch", (1, 2, 2)),
        "caption_channels": setting("text_dim", 4096),
        "input_sq_size": setting("position_base", 512),
        "model_max_length": setting("null_text", 300),
        "mlp_ratio": made(lambda config: config.ffn_dim / config.dim, 4.0),
        "pred_sigma": made(lambda config: config.out_channels != config.in_channels, True),
        "qk_norm": made(lambda config: config.qk_norm != "none", True),
        # how it was trained or run
        "class_dropout_prob": 0.1,
        "drop_path": 0.0,
        "enable_flash_attn": False,
        "enable_layernorm_kernel": False,
        "enable_sequence_parallelism": False,
        "only_train_temporal": False,
        "freeze_y_embedder": False,
        "skip_y_embedder": False,
        "architectures": ["STDiT3"],
        "model_type": "STDiT3",
    },
    passed=("auto_map", "torch_dtype", "transformers_version", "input_size"),
    own=("text_padding",),
    ours=_ours,
)


def _prepare(found: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    if not found:
        raise StditError(f"{place}: {TITLE} needs its config.json beside the file.")
    return found


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    return KeyMap(
        *original_rules(config, 3, {"blocks": "spatial_blocks", "temporal_blocks": "temporal_blocks"}),
        Rule("clip_embedding.{i}.{leaf}", "fps_embedder.mlp.{i}.{leaf}"),
        computed={"rope.freqs": lambda: _frequencies(config)},
    )


def _frequencies(config: TransformerConfig) -> Tensor:
    """As rotary-embedding-torch computes and stores them: (D_head/2,)."""
    import torch

    return 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)


FAMILY = Family(
    name="stdit3",
    title=TITLE,
    library="opensora",
    settings={
        **PIXART_LIKE,
        "family": "stdit3",
        "attention": "spatial_temporal_text",
        "rotary": "time",
        "position": "space_resolution",
        "level_condition": "fps",
    },
    configs={"original": _ORIGINAL},
    marks={"original": (r"spatial_blocks\.0\.attn\.qkv\.weight",)},
    blocks=r"(?:spatial|temporal)_blocks\.(\d+)\.",
    keymap=_keymap,
    prepare=_prepare,
    built_in=lambda config, layout: {
        "blank_channels": (0,),
        "out_channels": (config.in_channels, 2 * config.in_channels),
    },
    scheduler=lambda config: {"_class_name": "RFLOW", "use_timestep_transform": True, "_pipeline": "OpenSoraPipeline"},
    pipelines={"OpenSoraPipeline": PipelineKind(24, "848x480x102", text=Treatment(300, "strip"), gathered=True)},
    releases=(
        Release("STDiT3-XL/2", {"dim": 1152, "layers": 28}, "Open-Sora 1.2's (4 channels, 4×8×8)", "T5-XXL v1.1"),
    ),
    variants=({"qk_norm": "per_head_self"},),
    guided_by_null_text=True,
)
