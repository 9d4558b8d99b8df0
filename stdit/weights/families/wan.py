"""Wan 2.1 and 2.2 transformers (Wan-Video/Wan2.1, Wan-Video/Wan2.2), and the models that stdit trains.

Our names are the original release's, so the original dialect differs only in the patch embedding (a Conv3d there, a
Linear here). diffusers' `WanTransformer3DModel` renames everything, and swaps norm2 and norm3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import unipc_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.weights.families import configs
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, made, setting
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape

# Branches of Wan's variants, by the start of a tensor's name in any dialect.
_BRANCHES = {
    "SkyReels-V2's embedding of the frame rate": r"fps_(embedding|projection)\.",
    "HuMo's or MultiTalk's audio": r"audio_proj\.|blocks\.\d+\.(audio_cross_attn|audio_cross_attn_wrapper)",
    "camera control (ReCamMaster)": r"blocks\.\d+\.(cam_encoder|projector)\.",
    "pose control (UniAnimate)": r"(dwpose_embedding|randomref_embedding_pose)\.",
    "VACE control branches": r"vace_(blocks|patch_embedding|layers)\.",
    "Animate": r"(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\.",
    "speech-to-video (S2V)": (
        r"(casual_audio_encoder|audio_injector|cond_encoder|frame_packer|trainable_cond_mask"
        r"|condition_embedder\.causal_audio_encoder)\."
    ),
    "camera or reference control (Fun-Control, Fun-Camera)": r"(control_adapter|ref_conv|adapter)\.",
}
_CONTROL = {16: (32, 48, 52, 68), 48: (100, 148)}  # out_channels: in_channels of control variants
_SKYREELS = {"inject_sample_info": False, "num_frame_per_block": 1, "flag_causal_attention": False}
_MODEL_TYPES = {"t2v", "ti2v", "i2v", "flf2v"}
_ADVICE = "stdit loads the t2v, i2v, flf2v and ti2v transformers of Wan 2.1 and 2.2."
_OWN = ("text_padding", "rope_theta", "rope_max", "qk_norm", "image_channels")
_EMBEDDER = "condition_embedder.image_embedder"
_IMAGE_BRANCH = {  # setting: the tensors of either dialect whose second size it is; 2.2 has no such branch
    "image_text_dim": ("img_emb.proj.1.weight", f"{_EMBEDDER}.ff.net.0.proj.weight"),
    "image_text_positions": ("img_emb.emb_pos", f"{_EMBEDDER}.pos_embed"),
}
_SWITCHES = {"qk_norm": "across_heads", "cross_norm": "affine"}  # booleans there; our value for true, false is "none"
_WORDS = re.compile(r"(dim|heads|layers|ffn_dim|in_channels|out_channels|text_dim|frequency_dim|rope_max)")


def _prepare(found: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    """Without what SkyReels-V2 adds, where that leaves Wan's network. Raises StditError for Wan's variants that stdit
    does not run (VACE, Animate, …), by name."""
    if (kind := found.get("model_type", "t2v")) not in _MODEL_TYPES:
        raise StditError(f"{place}: model_type is {kind!r}, a variant of Wan not supported yet. {_ADVICE}")
    for branch, pattern in _BRANCHES.items():
        if names := [name for name in shapes if re.match(pattern, name)]:
            raise StditError(
                f"{place}: {branch} is not supported yet ({len(names)} tensors such as {names[0]}). {_ADVICE}"
            )
    for name, plain in _SKYREELS.items():
        if found.get(name, plain) not in (plain, None):
            raise StditError(
                f"{place}: {name} is {found[name]!r}, of SkyReels-V2's diffusion forcing, which is not supported yet. "
                "stdit loads what of it is Wan's network."
            )
    passed = {*_SKYREELS, "model_type"} | ({"window_size"} if found.get("window_size") == [-1, -1] else set())
    return {name: value for name, value in found.items() if name not in passed}


def _from_original(values: Settings, theirs: Settings, place: object) -> Settings:
    if absent := [name for name in ("dim", "num_heads", "num_layers", "ffn_dim") if name not in theirs]:
        raise StditError(f"{place}: not the config of a Wan transformer: it has no {', '.join(absent)}.")
    return {}


def _model_type(config: TransformerConfig) -> str:
    if config.image_channels:
        return "flf2v" if config.image_text_positions else "i2v"
    return "t2v" if config.in_channels == config.out_channels == 16 else "ti2v"


def _from_diffusers(values: Settings, theirs: Settings, place: object) -> Settings:
    dim = values["heads"] * theirs["attention_head_dim"]
    norm, width = theirs.get("qk_norm", "rms_norm_across_heads"), theirs.get("added_kv_proj_dim")
    if norm not in ("rms_norm_across_heads", None):  # diffusers normalises q and k either way
        raise StditError(f"{place}: qk_norm {norm!r} is not one of Wan's (rms_norm_across_heads).")
    if width != (dim if theirs.get("image_dim") else None):
        raise StditError(
            f"{place}: added_kv_proj_dim is {width!r}; with an image branch (image_dim {theirs.get('image_dim')!r}) it "
            f"is the model's width {dim}, without one it is null."
        )
    return {
        "dim": dim,
        "ffn_dim": theirs.get("ffn_dim", 13824),
        "qk_norm": values.get("qk_norm", True),
        "out_channels": theirs.get("out_channels", 16) or theirs.get("in_channels", 16),
        "image_text_dim": theirs.get("image_dim") or 0,
        "image_text_positions": theirs.get("pos_embed_seq_len") or 0,
    }


def _own(config: TransformerConfig) -> Settings:
    """Settings that other programs' config.json cannot hold."""
    added = {name: getattr(config, name) for name in _OWN if name != "image_channels" or config.image_channels}
    return {"format": configs.FORMAT, **added, "qk_norm": config.qk_norm != "none"}


_COMMON = {  # a key that is absent from a config.json has our default, Wan's
    "num_layers": setting("layers"),
    "ffn_dim": setting("ffn_dim"),
    "patch_size": setting("patch"),
    "text_dim": setting("text_dim"),
    "freq_dim": setting("frequency_dim"),
    "eps": setting("eps"),
    "cross_attn_norm": setting("cross_norm", write=lambda config: config.cross_norm != "none"),
    "_stdit": made(_own),
}
_ORIGINAL = ConfigJson(
    "WanModel",
    {
        **_COMMON,
        "dim": setting("dim"),
        "num_heads": setting("heads"),
        "in_dim": setting("in_channels"),
        "out_dim": setting("out_channels"),
        "qk_norm": setting("qk_norm", write=lambda config: config.qk_norm != "none"),
        "text_len": setting("text_padding"),
        "model_type": made(_model_type),
    },
    own=_OWN,
    ours=_from_original,
    versioned=False,
)
_DIFFUSERS = ConfigJson(
    "WanTransformer3DModel",
    {
        **_COMMON,
        "num_layers": setting("layers", 40),  # the class's defaults, Wan 2.1 14B's
        "num_attention_heads": setting("heads", 40),
        "in_channels": setting("in_channels"),
        "out_channels": setting("out_channels"),
        "rope_max_seq_len": setting("rope_max"),
        "attention_head_dim": made(attrgetter("head_dim"), 128),
        "added_kv_proj_dim": made(lambda config: config.dim if config.image_text_dim else None),
        "qk_norm": made(lambda config: "rms_norm_across_heads"),
        "image_dim": made(lambda config: config.image_text_dim or None),
        "pos_embed_seq_len": made(lambda config: config.image_text_positions or None),
    },
    own=_OWN,
    ours=_from_diffusers,
)


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """Heads are 128 wide, as in every release of Wan."""
    if re.search(r"chrono[-_]?edit", Path(str(tensors.place)).name, re.IGNORECASE):
        raise StditError(
            f"{tensors.place}: is ChronoEdit by its name: Wan I2V's tensors, but its last frame stands at another "
            "place in time, which is not supported yet."
        )
    dim = tensors.ours("patch_embedding.weight", 5)[0]
    return {
        **tensors.sizes(3, {} if dim % 128 else {dim: dim // 128}),
        "frequency_dim": tensors.ours("time_embedding.0.weight")[1],
        "qk_norm": bool(tensors.find("blocks.0.self_attn.norm_q.weight")),
        "cross_norm": bool(tensors.find("blocks.0.norm3.weight")),
    }


def _finish(values: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    """Adds what the original config.json does not say: the size of 2.1's image branch, and the number of image
    channels (image latents and known-frame mask): in_channels − out_channels."""
    for name, tensors in _IMAGE_BRANCH.items():
        values.setdefault(name, next((shapes[tensor][1] for tensor in tensors if tensor in shapes), 0))
    channels, latents = values.get("in_channels", 16), values.get("out_channels", 16)
    if "image_channels" not in values:
        if latents in (16, 48) and channels in _CONTROL[latents]:
            raise StditError(
                f"{place}: takes {channels} channels for {latents} of latents: a control variant of Wan (Fun-Control), "
                f"which is not supported yet. {_ADVICE}"
            )
        whole = type(channels) is int and type(latents) is int
        if whole and ((channels, latents) == (36, 16) or values["image_text_dim"]):
            values["image_channels"] = max(channels - latents, 0)
    for name, value in values.items():
        if _WORDS.fullmatch(name) and not (type(value) is int and 0 < value < 2**31):
            raise StditError(f"{place}: {name} is {value!r}, not a positive whole number.")
        if name in ("eps", "rope_theta") and not (type(value) in (int, float) and 0 < value < math.inf):
            raise StditError(f"{place}: {name} is {value!r}, not a positive number.")
        if name in _SWITCHES and type(value) is not bool:
            raise StditError(f"{place}: {name} is {value!r}, not true or false.")
    return values | {name: on if values[name] else "none" for name, on in _SWITCHES.items() if name in values}


def _keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    convolution = configs.patch_rules(config, "patch_embedding", axes=3)
    if dialect == "original":
        return KeyMap(*convolution, Rule("{rest}", "{rest}"))
    return KeyMap(
        *convolution,
        *configs.attention_rules("blocks", "blocks"),
        Rule("time_embedding.0.{leaf}", "condition_embedder.time_embedder.linear_1.{leaf}"),
        Rule("time_embedding.2.{leaf}", "condition_embedder.time_embedder.linear_2.{leaf}"),
        Rule("time_projection.1.{leaf}", "condition_embedder.time_proj.{leaf}"),
        Rule("text_embedding.0.{leaf}", "condition_embedder.text_embedder.linear_1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "condition_embedder.text_embedder.linear_2.{leaf}"),
        Rule("img_emb.proj.0.{leaf}", f"{_EMBEDDER}.norm1.{{leaf}}"),
        Rule("img_emb.proj.1.{leaf}", f"{_EMBEDDER}.ff.net.0.proj.{{leaf}}"),
        Rule("img_emb.proj.3.{leaf}", f"{_EMBEDDER}.ff.net.2.{{leaf}}"),
        Rule("img_emb.proj.4.{leaf}", f"{_EMBEDDER}.norm2.{{leaf}}"),
        Rule("img_emb.emb_pos", f"{_EMBEDDER}.pos_embed"),
        Rule("blocks.{i}.cross_attn.{p:k|v}_img.{leaf}", "blocks.{i}.attn2.add_{p}_proj.{leaf}"),
        Rule("blocks.{i}.cross_attn.norm_k_img.weight", "blocks.{i}.attn2.norm_added_k.weight"),
        Rule("blocks.{i}.norm3.{leaf}", "blocks.{i}.norm2.{leaf}"),  # the one norm with weights
        Rule("blocks.{i}.ffn.0.{leaf}", "blocks.{i}.ffn.net.0.proj.{leaf}"),
        Rule("blocks.{i}.ffn.2.{leaf}", "blocks.{i}.ffn.net.2.{leaf}"),
        Rule("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
        Rule("head.modulation", "scale_shift_table"),
    )


def _built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI (comfy/model_detection.py) derives the number of heads from the width and assumes much else. Other
    programs that read a release's file without its config.json also assume heads of 128, and find none below that."""
    fixed: dict[str, tuple[Any, ...]] = {"rope_theta": (10000.0,), "blank_channels": (0,)}
    if layout == "diffusers":
        return {**fixed, "qk_norm": ("across_heads",)}
    fixed["heads"] = (config.dim // 128 or config.heads,)
    if layout == "original":
        return fixed
    return {
        **fixed,
        "patch": ((1, 2, 2),),
        "frequency_dim": (256,),
        "eps": (1e-6,),
        "qk_norm": ("across_heads",),
        "cross_norm": ("affine",),
        "text_dim": (4096,),
        "text_padding": (512,),
        "out_channels": (16, 48),  # the latents of the two VAEs that it has
        "in_channels": (36,) if config.image_text_dim else (config.out_channels, 36),
        "image_text_dim": (0, 1280),
    }


_UMT5 = "UMT5-XXL"
_VAE21, _VAE22 = "Wan 2.1's (16 channels, 4×8×8)", "Wan 2.2's (48 channels, 4×16×16)"
_14B = {"dim": 5120, "layers": 40}
_5B = PipelineKind(24, "1280x704x121")
_PIPELINE = PipelineKind(16, "832x480x81", by_channels={48: _5B}, experts=True)

FAMILY = Family(
    name="wan",
    title="Wan transformer",
    configs={
        "original": _ORIGINAL,
        "diffusers": _DIFFUSERS,
        "skyreels": replace(_DIFFUSERS, class_name="SkyReelsV2Transformer3DModel"),  # its extra keys: see _prepare
    },
    marks={
        "diffusers": (r"condition_embedder\..*|blocks\.\d+\.attn1\..*",),
        "original": (r"time_projection\..*|blocks\.\d+\.self_attn\.(q|k|v|o|norm_q|norm_k)\..*",),
    },
    blocks=r"blocks\.(\d+)\.",
    keymap=_keymap,
    prepare=_prepare,
    bare=_bare,
    finish=_finish,
    comfyui=True,
    built_in=_built_in,
    not_written=("rope_max",),  # not in every layout; no output depends on it here
    scheduler=lambda config: unipc_config(),
    pipelines={"WanPipeline": _PIPELINE, "WanImageToVideoPipeline": _PIPELINE},
    releases=(
        Release("Wan 2.1 T2V 1.3B", {"dim": 1536, "layers": 30, "in_channels": 16}, _VAE21, _UMT5),
        Release("Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B", {**_14B, "in_channels": 16}, _VAE21, _UMT5),
        Release("Wan 2.1 FLF2V 14B", {**_14B, "in_channels": 36, "image_text_positions": 514}, _VAE21, _UMT5),
        Release("Wan 2.1 I2V 14B", {**_14B, "in_channels": 36, "image_text_dim": 1280}, _VAE21, _UMT5),
        Release("an expert of Wan 2.2 I2V A14B", {**_14B, "in_channels": 36, "image_text_dim": 0}, _VAE21, _UMT5),
        Release("Wan 2.2 TI2V 5B", {"dim": 3072, "in_channels": 48}, _VAE22, _UMT5),
    ),
    variants=({}, {"image_text_dim": 4, "image_text_positions": 1}),
)
