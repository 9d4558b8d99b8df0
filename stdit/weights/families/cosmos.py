"""Cosmos-Predict 1, 2 and 2.5 (nvidia-cosmos): transformers from text, and from text and video, to video.

The originals have no config.json, and name the blocks of 1 and of 2 differently. Their rotary embedding pairs the
halves of a head, so rows of q and k and of their norms' weights are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stdit.diffusion.solvers import euler_config, unipc_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.vae.families.diffusers_vae import VaeTraits
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, made, only, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape, half_split_heads, output_order

if TYPE_CHECKING:
    from torch import Tensor

_PREDICT25: Settings = {"text_embedding": "gelu", "rope_fps": 0.0}  # recognised by its text projection
_OWN = ("text_padding", "rope_theta", "image_channels")
_MAX_SIZE = (128, 240, 240)


def _ours(values: Settings, theirs: Settings, place: object) -> Settings:
    text, dim = theirs["text_embed_dim"], theirs["num_attention_heads"] * theirs["attention_head_dim"]
    found = {
        "heads": theirs["num_attention_heads"],
        "dim": dim,
        "frequency_dim": dim,
        "ffn_dim": int(dim * theirs["mlp_ratio"]),
        "rope_scale": tuple(map(float, theirs["rope_scale"])),
        "text_dim": text,
        "text_embedding": "none",
        "blank_channels": int(theirs["concat_padding_mask"]),
    }
    if theirs["use_crossattn_projection"]:
        if theirs["encoder_hidden_states_channels"] != text:
            raise StditError(f"{place}: encoder_hidden_states_channels is not text_embed_dim {text}.")
        found |= {"text_dim": theirs["crossattn_proj_in_channels"], "text_width": text, **_PREDICT25}
    if theirs["extra_pos_embed_type"] == "learnable":
        sizes = tuple(size // side for size, side in zip(theirs["max_size"], theirs["patch_size"]))
        found |= {"position": "learned", "position_max": sizes}
    return found


def _max_size(config: TransformerConfig) -> Shape:
    learned = tuple(a * b for a, b in zip(config.position_max, config.patch))
    return learned if config.position == "learned" else _MAX_SIZE


_DIFFUSERS = ConfigJson(
    "CosmosTransformer3DModel",
    {
        "in_channels": setting("in_channels", 16),
        "out_channels": setting("out_channels", 16),
        "num_attention_heads": made(attrgetter("heads"), 32),
        "attention_head_dim": made(attrgetter("head_dim"), 128),
        "num_layers": setting("layers", 28),
        "mlp_ratio": made(lambda config: config.ffn_dim / config.dim, 4.0),
        "text_embed_dim": made(attrgetter("context_dim"), 1024),
        "adaln_lora_dim": setting("modulation_rank", 256),
        "max_size": made(_max_size, _MAX_SIZE),
        "patch_size": setting("patch", (1, 2, 2)),
        "rope_scale": setting("rope_scale", (2.0, 1.0, 1.0)),
        "concat_padding_mask": made(lambda config: config.blank_channels == 1, True),
        "extra_pos_embed_type": only("learnable", None, write=lambda c: {"learned": "learnable"}.get(c.position)),
        "use_crossattn_projection": made(lambda config: config.text_embedding == "gelu", False),
        "crossattn_proj_in_channels": made(lambda c: c.text_dim if c.text_embedding == "gelu" else 1024, 1024),
        "encoder_hidden_states_channels": made(lambda c: c.context_dim if c.text_embedding == "gelu" else 1024, 1024),
        "controlnet_block_every_n": only(None),
        "img_context_dim_in": only(None),
        "img_context_num_tokens": 256,
        "img_context_dim_out": 2048,
    },
    own=_OWN,
    ours=_ours,
)


def _finish(values: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    """1, the only one with learned positions, is an EDM denoiser; 2 and 2.5 are flows. From video there is a mask of
    known frames."""
    return {
        "network_time": "log_sigma" if values.get("position") == "learned" else "level",
        "image_channels": int(values["in_channels"] == values["out_channels"] + 1),
        **values,
    }


def _built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
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


# Our names, without .weight: those in Cosmos-Predict1's files, in 2's and 2.5's, and diffusers'. Of the blocks:
_BLOCK_NAMES = {
    "low_rank.0.{j}": ("0.adaLN_modulation.{j}", "adaln_modulation_self_attn.{j}", "norm1.linear_{j}"),
    "low_rank.1.{j}": ("1.adaLN_modulation.{j}", "adaln_modulation_cross_attn.{j}", "norm2.linear_{j}"),
    "low_rank.2.{j}": ("2.adaLN_modulation.{j}", "adaln_modulation_mlp.{j}", "norm3.linear_{j}"),
    "self_attn.{p:q|k}": ("0.block.attn.to_{p}.0", "self_attn.{p}_proj", "attn1.to_{p}"),
    "self_attn.v": ("0.block.attn.to_v.0", "self_attn.v_proj", "attn1.to_v"),
    "self_attn.norm_{p:q|k}": ("0.block.attn.to_{p}.1", "self_attn.{p}_norm", "attn1.norm_{p}"),
    "self_attn.o": ("0.block.attn.to_out.0", "self_attn.output_proj", "attn1.to_out.0"),
    "cross_attn.{p:q|k|v}": ("1.block.attn.to_{p}.0", "cross_attn.{p}_proj", "attn2.to_{p}"),
    "cross_attn.norm_{p:q|k}": ("1.block.attn.to_{p}.1", "cross_attn.{p}_norm", "attn2.norm_{p}"),
    "cross_attn.o": ("1.block.attn.to_out.0", "cross_attn.output_proj", "attn2.to_out.0"),
    "ffn.0": ("2.block.layer1", "mlp.layer1", "ff.net.0.proj"),
    "ffn.2": ("2.block.layer2", "mlp.layer2", "ff.net.2"),
}
_BLOCKS = ("blocks.block{i}.blocks", "blocks.{i}", "transformer_blocks.{i}")
_NAMES = {
    "patch_embedding": ("x_embedder.proj.1", "x_embedder.proj.1", "patch_embed.proj"),
    "time_embedding.0": ("affline_norm", "t_embedding_norm", "time_embed.norm"),
    "time_projection.0": ("t_embedder.1.linear_1", "t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    "time_projection.2": ("t_embedder.1.linear_2", "t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    "head.low_rank.{j}": (
        "final_layer.adaLN_modulation.{j}",
        "final_layer.adaln_modulation.{j}",
        "norm_out.linear_{j}",
    ),
    "head.head": ("final_layer.linear", "final_layer.linear", "proj_out"),
    **{
        f"blocks.{{i}}.{ours}": tuple(f"{block}.{name}" for block, name in zip(_BLOCKS, theirs))
        for ours, theirs in _BLOCK_NAMES.items()
    },
}


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    """Originals with learned positions have Cosmos-Predict1's names."""
    original = dialect == "original"
    column = (0 if config.position == "learned" else 1) if original else 2
    transforms = {
        "blocks.{i}.self_attn.{p:q|k}": half_split_heads(config.heads, config.head_dim),
        "blocks.{i}.self_attn.norm_{p:q|k}": half_split_heads(1, config.head_dim),
        "head.head": output_order(config.patch, config.out_channels, "hwtc"),
    }
    rules = []
    for ours, theirs in _NAMES.items():
        transform = (transforms[ours],) if ours in transforms else ()
        rules.append(Rule(f"{ours}.weight", f"{theirs[column]}.weight", *transform))
    positions = "extra_pos_embedder" if original else "learnable_pos_embed"
    for axis, letter in (("frame", "t"), ("row", "h"), ("column", "w")):
        rules.append(Rule(f"position.{axis}", f"{positions}.pos_emb_{letter}"))
    rules.append(Rule("text_embedding.0.{leaf}", "crossattn_proj.0.{leaf}"))
    if not original:
        return KeyMap(*rules)
    return KeyMap(
        *rules,
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

    buffers: dict[str, Callable[[], Tensor]] = {"seq": lambda: torch.arange(max(sizes), dtype=torch.float32)}
    if not learned:
        buffers |= {"dim_spatial_range": lambda: exponents(space), "dim_temporal_range": lambda: exponents(time)}
    return buffers


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """Patches are (1, 2, 2), rope_scale is each release's."""
    dim = tensors.ours("patch_embedding.weight")[0]
    heads = dim // tensors.ours("blocks.0.self_attn.norm_q.weight", 1)[0]
    values = tensors.sizes(0, {dim: heads}, tuple(kept.get("patch", (1, 2, 2))))
    channels = values["in_channels"]  # with the padding mask
    values |= {
        "heads": heads,
        "frequency_dim": dim,
        "modulation_rank": tensors.ours("blocks.0.low_rank.0.1.weight")[0],
        "in_channels": kept.get("in_channels", channels - 1),
        "blank_channels": channels - kept.get("in_channels", channels - 1),
        "text_embedding": "none",
    }
    projected = tensors.find("text_embedding.0.weight")
    if projected:
        values |= {"text_width": tensors.ours("text_embedding.0.weight")[0], **_PREDICT25}
    if "block0" in tensors.keymap.foreign("blocks.0.ffn.0.weight") or tensors.find("position.frame"):
        values |= {"position": "learned"}
        values["position_max"] = tuple(tensors.ours(f"position.{axis}")[0] for axis in ("frame", "row", "column"))
        values["rope_scale"] = (2.0, 2.0, 2.0) if dim == 5120 else (2.0, 1.0, 1.0)
    elif values["in_channels"] == values["out_channels"]:
        values["rope_scale"] = (1.0, 4.0, 4.0)
    else:
        values["rope_scale"] = (20 / 24, 2.0, 2.0) if dim == 5120 and not projected else (1.0, 3.0, 3.0)
    return values


def _scheduler(config: TransformerConfig) -> dict[str, Any]:
    if config.network_time == "log_sigma":  # 1
        sigmas = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "final_sigmas_type": "sigma_min"}
        edm = {"_class_name": "EDMEulerScheduler", "_pipeline": "CosmosTextToWorldPipeline", "_caller": "plain"}
        return {**edm, **sigmas}
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
    title="Cosmos-Predict transformer",
    settings={
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
    },
    configs={
        "diffusers": _DIFFUSERS,
        "original": ConfigJson("CosmosPredict", own=(*_OWN, "heads", "patch", "in_channels", "rope_scale"), bare=True),
    },
    marks={
        "original": (r"x_embedder\.proj\.1\.weight",),
        "diffusers": (r"patch_embed\.proj\.weight", r"time_embed\.norm\.weight"),
    },
    blocks=r"(?:transformer_blocks\.|blocks\.(?:block)?)(\d+)\.",
    keymap=_keymap,
    bare=_bare,
    finish=_finish,
    comfyui=True,
    built_in=_built_in,
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
