"""Cosmos-Predict 1, 2 and 2.5 (nvidia-cosmos): transformers from text, and from text and video, to video.

The originals have no config.json, and name the blocks of 1 and of 2 differently. Their rotary embedding pairs the
halves of a head, so rows of q and k and of their norms' weights are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stdit.diffusion.solvers import euler_config, unipc_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families import configs
from stdit.weights.families.configs import block_rules, checked_transformer, needed
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape, half_split_heads, output_order

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "Cosmos-Predict transformer"
_ORIGINAL_CLASS = "CosmosPredict"
SETTINGS: dict[str, Any] = {
    "family": "cosmos",
    "cross_norm": "modulated",
    "qk_norm": "per_head",
    "qk_eps": 1e-5,
    "bias": False,
    "activation": "gelu",
    "modulation": "low_rank",
    "time_scale": 1.0,
    "rotary": "axes_ntk",
    "rope_fps": 24.0,
    "blank_channels": 1,
}
_PREDICT25: dict[str, Any] = {"text_embedding": "gelu", "rope_fps": 0.0}  # recognised by its text projection
_OWN = ("text_padding", "rope_theta", "image_channels")
_KEPT = (*_OWN, "heads", "patch", "in_channels", "rope_scale")  # written beside originals
_BLOCKS = r"(?:transformer_blocks\.|blocks\.(?:block)?)(\d+)\."
_MAX_SIZE = (128, 240, 240)
_DIFFUSERS = configs.Fields(
    "CosmosTransformer3DModel",
    {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "num_layers": "layers",
        "adaln_lora_dim": "modulation_rank",
        "patch_size": "patch",
        "rope_scale": "rope_scale",
    },
    {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "num_layers": 28,
        "mlp_ratio": 4.0,
        "text_embed_dim": 1024,
        "adaln_lora_dim": 256,
        "max_size": _MAX_SIZE,
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
        "use_crossattn_projection": False,
        "crossattn_proj_in_channels": 1024,
        "encoder_hidden_states_channels": 1024,
        "controlnet_block_every_n": None,
        "img_context_dim_in": None,
        "img_context_num_tokens": 256,
        "img_context_dim_out": 2048,
    },
    {
        "extra_pos_embed_type": ("learnable", None),
        "controlnet_block_every_n": (None,),
        "img_context_dim_in": (None,),
    },
)


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    if not found or found.get("_class_name") == _ORIGINAL_CLASS:
        values = _values_from_shapes(shapes, configs.described(found, _KEPT, place), place)
        return checked_transformer(SETTINGS | _network_time(values) | values, shapes, place, _BLOCKS)
    values, theirs = _DIFFUSERS.read(found, _OWN, place)
    dim, text = theirs["num_attention_heads"] * theirs["attention_head_dim"], theirs["text_embed_dim"]
    values |= {"heads": theirs["num_attention_heads"], "dim": dim, "frequency_dim": dim}
    values |= {"ffn_dim": int(dim * theirs["mlp_ratio"]), "rope_scale": tuple(map(float, theirs["rope_scale"]))}
    values |= {"text_dim": text, "text_embedding": "none"}
    if theirs["use_crossattn_projection"]:
        if theirs["encoder_hidden_states_channels"] != text:
            raise StditError(f"{place}: encoder_hidden_states_channels is not text_embed_dim {text}.")
        values |= {"text_dim": theirs["crossattn_proj_in_channels"], "text_width": text, **_PREDICT25}
    if theirs["extra_pos_embed_type"] == "learnable":
        sizes = tuple(size // side for size, side in zip(theirs["max_size"], theirs["patch_size"]))
        values |= {"position": "learned", "position_max": sizes}
    values["blank_channels"] = int(theirs["concat_padding_mask"])
    values.setdefault("image_channels", int(values["in_channels"] == values["out_channels"] + 1))  # a frame mask
    return checked_transformer(SETTINGS | _network_time(values) | values, shapes, place, _BLOCKS)


def _network_time(values: Mapping[str, Any]) -> dict[str, str]:
    """1, the only one with learned positions, is an EDM denoiser; 2 and 2.5 are flows."""
    return {"network_time": "log_sigma" if values.get("position") == "learned" else "level"}


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As CosmosTransformer3DModel.save_pretrained writes it."""
    projected = config.text_embedding == "gelu"
    learned = config.position == "learned"
    largest = tuple(a * b for a, b in zip(config.position_max, config.patch)) if learned else _MAX_SIZE
    return _DIFFUSERS.write(
        config,
        _OWN,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        mlp_ratio=config.ffn_dim / config.dim,
        text_embed_dim=config.context_dim,
        use_crossattn_projection=projected,
        crossattn_proj_in_channels=config.text_dim if projected else 1024,
        encoder_hidden_states_channels=config.context_dim if projected else 1024,
        extra_pos_embed_type="learnable" if learned else None,
        max_size=largest,
        concat_padding_mask=config.blank_channels == 1,
    )


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    return configs.describe(_ORIGINAL_CLASS, config, _KEPT)


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI knows the released sizes of 1 and 2 only."""
    if layout != "comfyui":
        return {"rope_theta": (10000.0,)} if layout == "diffusers" else {"qk_norm": ("per_head",)}
    learned, large = config.position == "learned", config.dim == 5120
    small = (4096, 32) if learned else (2048, 16)
    return {
        "text_embedding": ("none",),  # 2.5 projects its text
        "dim": (small[0], 5120),
        "layers": (36 if large else 28,),
        "heads": (40 if large else small[1],),
        "ffn_dim": (4 * config.dim,),
        "modulation_rank": (256,),
        "text_dim": (1024,),
        "in_channels": (16, 17),
        "out_channels": (16,),
        "patch": ((1, 2, 2),),
        "blank_channels": (1,),
        "position_max": ((128, 120, 120),) if learned else ((0, 0, 0),),
        "rope_theta": (10000.0,),
    }


def dialect_of(names: Mapping[str, Shape]) -> str:
    if "x_embedder.proj.1.weight" in names:
        return "original"
    return "diffusers" if {"patch_embed.proj.weight", "time_embed.norm.weight"} <= set(names) else ""


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    """Originals with learned positions have Cosmos-Predict1's names."""
    turned = half_split_heads(config.heads, config.head_dim)
    normed = half_split_heads(1, config.head_dim)
    order = output_order(config.patch, config.out_channels, "hwtc")
    text = Rule("text_embedding.0.{leaf}", "crossattn_proj.0.{leaf}")
    branches = ("self_attn", "cross_attn", "mlp")
    if dialect == "diffusers":
        block = "transformer_blocks.{i}"
        return KeyMap(
            Rule("patch_embedding.weight", "patch_embed.proj.weight"),
            *(Rule(f"position.{our}", f"learnable_pos_embed.pos_emb_{its}") for our, its in _AXES),
            Rule("time_embedding.0.weight", "time_embed.norm.weight"),
            Rule("time_projection.0.weight", "time_embed.t_embedder.linear_1.weight"),
            Rule("time_projection.2.weight", "time_embed.t_embedder.linear_2.weight"),
            text,
            *(
                Rule(f"blocks.{{i}}.low_rank.{k}.{{j}}.weight", f"{block}.norm{k + 1}.linear_{{j}}.weight")
                for k in range(3)
            ),
            Rule("blocks.{i}.self_attn.{p:q|k}.weight", f"{block}.attn1.to_{{p}}.weight", turned),
            Rule("blocks.{i}.self_attn.norm_{p:q|k}.weight", f"{block}.attn1.norm_{{p}}.weight", normed),
            *block_rules(),
            Rule("head.low_rank.{j}.weight", "norm_out.linear_{j}.weight"),
            Rule("head.head.weight", "proj_out.weight", order),
        )
    common = [
        Rule("patch_embedding.weight", "x_embedder.proj.1.weight"),
        Rule("time_projection.0.weight", "t_embedder.1.linear_1.weight"),
        Rule("time_projection.2.weight", "t_embedder.1.linear_2.weight"),
        Rule("head.head.weight", "final_layer.linear.weight", order),
        text,
    ]
    if config.position == "learned":
        block = "blocks.block{i}.blocks"
        rules = [
            *(Rule(f"position.{our}", f"extra_pos_embedder.pos_emb_{its}") for our, its in _AXES),
            Rule("time_embedding.0.weight", "affline_norm.weight"),
            *(
                Rule(f"blocks.{{i}}.low_rank.{k}.{{j}}.weight", f"{block}.{k}.adaLN_modulation.{{j}}.weight")
                for k in range(3)
            ),
            Rule("blocks.{i}.self_attn.{p:q|k}.weight", f"{block}.0.block.attn.to_{{p}}.0.weight", turned),
            Rule("blocks.{i}.self_attn.norm_{p:q|k}.weight", f"{block}.0.block.attn.to_{{p}}.1.weight", normed),
        ]
        for k, branch in enumerate(branches[:2]):
            rules += [
                Rule(f"blocks.{{i}}.{branch}.{{p:q|k|v}}.weight", f"{block}.{k}.block.attn.to_{{p}}.0.weight"),
                Rule(f"blocks.{{i}}.{branch}.norm_{{p:q|k}}.weight", f"{block}.{k}.block.attn.to_{{p}}.1.weight"),
                Rule(f"blocks.{{i}}.{branch}.o.weight", f"{block}.{k}.block.attn.to_out.0.weight"),
            ]
        layer, last = f"{block}.2.block.layer", "final_layer.adaLN_modulation"
    else:
        block = "blocks.{i}"
        rules = [
            Rule("time_embedding.0.weight", "t_embedding_norm.weight"),
            *(
                Rule(f"blocks.{{i}}.low_rank.{k}.{{j}}.weight", f"{block}.adaln_modulation_{branch}.{{j}}.weight")
                for k, branch in enumerate(branches)
            ),
            Rule("blocks.{i}.self_attn.{p:q|k}.weight", f"{block}.self_attn.{{p}}_proj.weight", turned),
            Rule("blocks.{i}.self_attn.norm_{p:q|k}.weight", f"{block}.self_attn.{{p}}_norm.weight", normed),
            Rule("blocks.{i}.{a:self|cross}_attn.{p:q|k|v}.weight", f"{block}.{{a}}_attn.{{p}}_proj.weight"),
            Rule("blocks.{i}.{a:self|cross}_attn.norm_{p:q|k}.weight", f"{block}.{{a}}_attn.{{p}}_norm.weight"),
            Rule("blocks.{i}.{a:self|cross}_attn.o.weight", f"{block}.{{a}}_attn.output_proj.weight"),
        ]
        layer, last = f"{block}.mlp.layer", "final_layer.adaln_modulation"
    return KeyMap(
        *common,
        *rules,
        Rule("blocks.{i}.ffn.0.weight", f"{layer}1.weight"),
        Rule("blocks.{i}.ffn.2.weight", f"{layer}2.weight"),
        Rule("head.low_rank.{j}.weight", f"{last}.{{j}}.weight"),
        ignored=("logvar.{rest}", "accum_{rest}", "pos_embedder.{rest}", "{rest}._extra_state"),
        computed={f"pos_embedder.{name}": make for name, make in _rotary_buffers(config).items()},
    )


def _rotary_buffers(config: TransformerConfig) -> dict[str, Callable[[], Tensor]]:
    """The buffers of VideoRopePosition3DEmb: in 1 the positions of the longest axis, in 2 the exponents too."""
    import torch

    from stdit.models.positions import rotary_axes

    learned = config.position == "learned"
    sizes = config.position_max if learned else tuple(size // side for size, side in zip(_MAX_SIZE, config.patch))
    time, space, _ = rotary_axes(config.head_dim)

    def exponents(size: int) -> Tensor:
        return torch.arange(0, size, 2).float() / size

    made: dict[str, Callable[[], Tensor]] = {"seq": lambda: torch.arange(max(sizes), dtype=torch.float32)}
    if not learned:
        made |= {"dim_spatial_range": lambda: exponents(space), "dim_temporal_range": lambda: exponents(time)}
    return made


_AXES = (("frame", "t"), ("row", "h"), ("column", "w"))


def _values_from_shapes(shapes: Mapping[str, Shape], known: Mapping[str, Any], place: object) -> dict[str, Any]:
    """Patches are (1, 2, 2), rope_scale is each release's."""
    first = (
        "blocks.block0.blocks.{}.block.attn.to_{}"
        if "blocks.block0.blocks.0.block.attn.to_q.0.weight" in shapes
        else ""
    )
    names = {
        "norm": f"{first.format(0, 'q')}.1.weight" if first else "blocks.0.self_attn.q_norm.weight",
        "context": f"{first.format(1, 'k')}.0.weight" if first else "blocks.0.cross_attn.k_proj.weight",
        "mlp": "blocks.block0.blocks.2.block.layer1.weight" if first else "blocks.0.mlp.layer1.weight",
        "rank": "blocks.block0.blocks.0.adaLN_modulation.1.weight"
        if first
        else "blocks.0.adaln_modulation_mlp.1.weight",
    }
    dim, features = needed(shapes, "x_embedder.proj.1.weight", 2, place, TITLE)
    patch = tuple(known.get("patch", (1, 2, 2)))
    channels = features // math.prod(patch)
    values: dict[str, Any] = {
        "dim": dim,
        "frequency_dim": dim,
        "heads": dim // needed(shapes, names["norm"], 1, place, TITLE)[0],
        "layers": configs.count(shapes, _BLOCKS),
        "ffn_dim": needed(shapes, names["mlp"], 2, place, TITLE)[0],
        "modulation_rank": needed(shapes, names["rank"], 2, place, TITLE)[0],
        "patch": patch,
        "in_channels": channels - 1,
        "out_channels": needed(shapes, "final_layer.linear.weight", 2, place, TITLE)[0] // math.prod(patch),
        "text_dim": needed(shapes, names["context"], 2, place, TITLE)[1],
        "text_embedding": "none",
    }
    if projection := shapes.get("crossattn_proj.0.weight"):
        values |= {"text_dim": projection[1], "text_width": projection[0], **_PREDICT25}
    if first:
        sizes = tuple(shapes.get(f"extra_pos_embedder.pos_emb_{axis}", (0,))[0] for axis in "thw")
        values |= {"position": "learned", "position_max": sizes}
        values["rope_scale"] = (2.0, 2.0, 2.0) if dim == 5120 else (2.0, 1.0, 1.0)
    elif values["in_channels"] == values["out_channels"]:
        values["rope_scale"] = (1.0, 4.0, 4.0)
    else:
        large = dim == 5120 and not projection
        values["rope_scale"] = (20 / 24, 2.0, 2.0) if large else (1.0, 3.0, 3.0)
    values["image_channels"] = int(values["in_channels"] == values["out_channels"] + 1)
    blank = channels - known.get("in_channels", channels - 1)
    return values | dict(known) | {"blank_channels": blank, "in_channels": channels - blank}


def _scheduler(config: TransformerConfig) -> dict[str, Any]:
    if config.network_time == "log_sigma":  # 1
        sigmas = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "final_sigmas_type": "sigma_min"}
        return {
            "_class_name": "EDMEulerScheduler",
            **sigmas,
            "_pipeline": "CosmosTextToWorldPipeline",
            "_caller": "plain",
        }
    if config.text_embedding == "gelu":  # 2.5
        karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
        return {**unipc_config(), **karras, "_pipeline": "Cosmos2_5_PredictBasePipeline", "_caller": "cosmos2.5"}
    karras = {"use_karras_sigmas": True}
    return {**euler_config(), **karras, "_pipeline": "Cosmos2TextToImagePipeline", "_caller": "cosmos2"}


_VAE, _WAN_VAE = "Cosmos' (16 channels, 8×8×8)", "Wan 2.1's (16 channels, 4×8×8)"
_T5, _REASON = "T5-11B", "Cosmos-Reason1"
_2 = PipelineKind(16, "1280x704x93", text=Treatment(512, "none"), caller="cosmos2", guides_beyond=True)

FAMILY = Family(
    name="cosmos",
    title=TITLE,
    classes=(_DIFFUSERS.class_name, _ORIGINAL_CLASS),
    settings=SETTINGS,
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
    scheduler=_scheduler,
    pipelines={
        "CosmosTextToWorldPipeline": replace(_2, fps=30, shape="1280x704x121", caller="plain"),
        "CosmosVideoToWorldPipeline": PipelineKind(
            30, refused="Cosmos-Predict1 from a video adds noise to what it is given, which is not built"
        ),
        "Cosmos2TextToImagePipeline": replace(_2, shape="1360x768x1"),
        "Cosmos2VideoToWorldPipeline": _2,
        "Cosmos2_5_PredictBasePipeline": replace(_2, text=Treatment(), caller="cosmos2.5"),
    },
    releases=(
        Release("Cosmos-Predict1 7B", {"dim": 4096, "position": "learned"}, _VAE, _T5),
        Release("Cosmos-Predict1 14B", {"dim": 5120, "position": "learned"}, _VAE, _T5),
        Release("Cosmos-Predict2.5 2B", {"dim": 2048, "text_embedding": "gelu"}, _WAN_VAE, _REASON),
        Release("Cosmos-Predict2.5 14B", {"dim": 5120, "text_embedding": "gelu"}, _WAN_VAE, _REASON),
        Release("Cosmos-Predict2 2B", {"dim": 2048}, _WAN_VAE, _T5),
        Release("Cosmos-Predict2 14B", {"dim": 5120}, _WAN_VAE, _T5),
    ),
    autoencoders={"AutoencoderKLCosmos": VaeTraits("Cosmos-Predict1")},
    variants=(
        {"text_embedding": "none"},
        {"text_embedding": "none", "position": "learned", "position_max": (1, 1, 1)},
        {"text_embedding": "gelu", "text_width": 4},
    ),
    diffusers_reads_common_lora=False,
)
