"""Wan 2.1 and 2.2 transformers (Wan-Video/Wan2.1, Wan-Video/Wan2.2), and the models that stdit trains.

Our names are the original release's, so the original dialect differs only in the patch embedding (a Conv3d there, a
Linear here). diffusers' `WanTransformer3DModel` renames everything, and swaps norm2 and norm3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import unipc_config
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.weights.families.configs import (
    DIFFUSERS_VERSION,
    FORMAT,
    checked_heads,
    checked_keys,
    checked_transformer,
    count,
    patch_rules,
)
from stdit.weights.families.record import ClipFormat, Family, PipelineKind, Release
from stdit.weights.keymap import KeyMap, Rule, Shape

TITLE = "Wan transformer"
DIFFUSERS_CLASS = "WanTransformer3DModel"
ORIGINAL_CLASS = "WanModel"
SKYREELS_CLASS = "SkyReelsV2Transformer3DModel"  # Wan's network, unless it knows the frame rate or is causal

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

# original name: our name. A key that is absent from a release's config.json has Wan's default.
_ORIGINAL_FIELDS = {
    "dim": "dim",
    "num_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "patch_size": "patch",
    "text_dim": "text_dim",
    "freq_dim": "frequency_dim",
    "eps": "eps",
    "qk_norm": "qk_norm",
    "cross_attn_norm": "cross_norm",
    "text_len": "text_padding",
}
_DIFFUSERS_FIELDS = {
    "num_attention_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch",
    "text_dim": "text_dim",
    "freq_dim": "frequency_dim",
    "eps": "eps",
    "qk_norm": "qk_norm",
    "cross_attn_norm": "cross_norm",
    "rope_max_seq_len": "rope_max",
    "image_dim": "image_text_dim",
    "pos_embed_seq_len": "image_text_positions",
}
_DIFFUSERS_DEFAULTS = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_OWN = ("text_padding", "rope_theta", "rope_max", "qk_norm", "image_channels")  # written under "_stdit"
_SWITCHES = {"qk_norm": "across_heads", "cross_norm": "affine"}  # booleans there; our value for true, false is "none"
_BLOCKS = r"blocks\.(\d+)\."
_WORDS = re.compile(r"(dim|heads|layers|ffn_dim|in_channels|out_channels|text_dim|frequency_dim|rope_max)")


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json", heads: int | None = None
) -> TransformerConfig:
    """See `Family`. Raises StditError also for Wan's variants that stdit does not run (VACE, Animate, …), by name."""
    _refuse_variants(found, shapes, place)
    found = _without_skyreels(found, place)
    if not found:
        values = _values_from_shapes(shapes, place, heads)
    elif "num_attention_heads" in found or found.get("_class_name") == DIFFUSERS_CLASS:
        values = _values_from_diffusers(found, place)
    else:
        notes = ("model_type", "window_size" if found.get("window_size") == [-1, -1] else "")
        rest = {name: value for name, value in found.items() if name not in notes}
        values = checked_keys(rest, _ORIGINAL_FIELDS, _OWN, place)
        if absent := [name for name in ("dim", "num_heads", "num_layers", "ffn_dim") if name not in found]:
            raise StditError(f"{place}: not the config of a {TITLE}: it has no {', '.join(absent)}.")
    values = _image_values(values, shapes)
    extra = values.get("in_channels", 16), values.get("out_channels", 16)
    if "image_channels" not in found.get("_stdit", {}) and extra[1] in (16, 48) and extra[0] in _CONTROL[extra[1]]:
        raise StditError(
            f"{place}: takes {extra[0]} channels for {extra[1]} of latents: a control variant of Wan (Fun-Control), "
            "which is not supported yet. stdit loads the t2v, i2v, flf2v and ti2v transformers of Wan 2.1 and 2.2."
        )
    for name, value in values.items():
        if _WORDS.fullmatch(name) and not (type(value) is int and 0 < value < 2**31):
            raise StditError(f"{place}: {name} is {value!r}, not a positive whole number.")
        if name in ("eps", "rope_theta") and not (type(value) in (int, float) and 0 < value < math.inf):
            raise StditError(f"{place}: {name} is {value!r}, not a positive number.")
        if name in _SWITCHES and type(value) is not bool:
            raise StditError(f"{place}: {name} is {value!r}, not true or false.")
    values |= {name: on if values[name] else "none" for name, on in _SWITCHES.items() if name in values}
    return checked_transformer(values, shapes, place, _BLOCKS)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """As WanTransformer3DModel.save_pretrained writes it, with our own values under "_stdit"."""
    return {
        "_class_name": DIFFUSERS_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "_stdit": _own(config),
        "added_kv_proj_dim": config.dim if config.image_text_dim else None,
        "attention_head_dim": config.dim // config.heads,
        "cross_attn_norm": config.cross_norm != "none",
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.frequency_dim,
        "image_dim": config.image_text_dim or None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": config.image_text_positions or None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": config.rope_max,
        "text_dim": config.text_dim,
    }


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    """As the original releases write it."""
    values = {theirs: getattr(config, ours) for theirs, ours in _ORIGINAL_FIELDS.items()}
    values |= {"qk_norm": config.qk_norm != "none", "cross_attn_norm": config.cross_norm != "none"}
    values["patch_size"] = list(config.patch)
    kind = "t2v" if config.in_channels == config.out_channels == 16 else "ti2v"
    if config.image_channels:
        kind = "flf2v" if config.image_text_positions else "i2v"
    return {"_class_name": ORIGINAL_CLASS, "_stdit": _own(config), "model_type": kind, **values}


def _own(config: TransformerConfig) -> dict[str, Any]:
    """Settings that other programs' config.json cannot hold."""
    added = {name: getattr(config, name) for name in _OWN if name != "image_channels" or config.image_channels}
    return {"format": FORMAT, **added, "qk_norm": config.qk_norm != "none"}


def dialect_of(names: Mapping[str, Shape]) -> str:
    if any(re.match(r"condition_embedder\.|blocks\.\d+\.attn1\.", name) for name in names):
        return "diffusers"
    original = r"time_projection\.|blocks\.\d+\.self_attn\.(q|k|v|o|norm_q|norm_k)\."
    return "original" if any(re.match(original, name) for name in names) else ""


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    convolution = patch_rules(config, "patch_embedding", axes=3)
    if dialect == "original":
        return KeyMap(*convolution, Rule("{rest}", "{rest}"))
    return KeyMap(
        *convolution,
        Rule("time_embedding.0.{leaf}", "condition_embedder.time_embedder.linear_1.{leaf}"),
        Rule("time_embedding.2.{leaf}", "condition_embedder.time_embedder.linear_2.{leaf}"),
        Rule("time_projection.1.{leaf}", "condition_embedder.time_proj.{leaf}"),
        Rule("text_embedding.0.{leaf}", "condition_embedder.text_embedder.linear_1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "condition_embedder.text_embedder.linear_2.{leaf}"),
        Rule("blocks.{i}.self_attn.{p:q|k|v}.{leaf}", "blocks.{i}.attn1.to_{p}.{leaf}"),
        Rule("blocks.{i}.self_attn.o.{leaf}", "blocks.{i}.attn1.to_out.0.{leaf}"),
        Rule("blocks.{i}.self_attn.norm_{p:q|k}.weight", "blocks.{i}.attn1.norm_{p}.weight"),
        Rule("blocks.{i}.cross_attn.{p:q|k|v}.{leaf}", "blocks.{i}.attn2.to_{p}.{leaf}"),
        Rule("blocks.{i}.cross_attn.o.{leaf}", "blocks.{i}.attn2.to_out.0.{leaf}"),
        Rule("blocks.{i}.cross_attn.norm_{p:q|k}.weight", "blocks.{i}.attn2.norm_{p}.weight"),
        Rule("blocks.{i}.cross_attn.{p:k|v}_img.{leaf}", "blocks.{i}.attn2.add_{p}_proj.{leaf}"),
        Rule("blocks.{i}.cross_attn.norm_k_img.weight", "blocks.{i}.attn2.norm_added_k.weight"),
        Rule("img_emb.proj.0.{leaf}", "condition_embedder.image_embedder.norm1.{leaf}"),
        Rule("img_emb.proj.1.{leaf}", "condition_embedder.image_embedder.ff.net.0.proj.{leaf}"),
        Rule("img_emb.proj.3.{leaf}", "condition_embedder.image_embedder.ff.net.2.{leaf}"),
        Rule("img_emb.proj.4.{leaf}", "condition_embedder.image_embedder.norm2.{leaf}"),
        Rule("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        Rule("blocks.{i}.norm3.{leaf}", "blocks.{i}.norm2.{leaf}"),  # the one norm with weights
        Rule("blocks.{i}.ffn.0.{leaf}", "blocks.{i}.ffn.net.0.proj.{leaf}"),
        Rule("blocks.{i}.ffn.2.{leaf}", "blocks.{i}.ffn.net.2.{leaf}"),
        Rule("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
        Rule("head.modulation", "scale_shift_table"),
    )


def built_in(config: TransformerConfig, layout: str) -> dict[str, tuple[Any, ...]]:
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


def _refuse_variants(found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object) -> None:
    kind = found.get("_class_name")
    if kind not in (None, *FAMILY.classes):
        raise StditError(f"{place}: {kind!r} is not a model that stdit loads; it loads {TITLE}s ({DIFFUSERS_CLASS}).")
    advice = "stdit loads the t2v, i2v, flf2v and ti2v transformers of Wan 2.1 and 2.2."
    if found.get("model_type", "t2v") not in _MODEL_TYPES:
        raise StditError(
            f"{place}: model_type is {found['model_type']!r}, a variant of Wan not supported yet. {advice}"
        )
    for branch, pattern in _BRANCHES.items():
        if names := [name for name in shapes if re.match(pattern, name)]:
            raise StditError(
                f"{place}: {branch} is not supported yet ({len(names)} tensors such as {names[0]}). {advice}"
            )


def _without_skyreels(found: Mapping[str, Any], place: object) -> Mapping[str, Any]:
    """A config.json without what SkyReels-V2 adds to Wan's; raises where that makes another network."""
    for name, plain in _SKYREELS.items():
        if found.get(name, plain) not in (plain, None):
            raise StditError(
                f"{place}: {name} is {found[name]!r}, of SkyReels-V2's diffusion forcing, which is not supported yet. "
                "stdit loads what of it is Wan's network."
            )
    rest = {name: value for name, value in found.items() if name not in _SKYREELS}
    return {**rest, "_class_name": DIFFUSERS_CLASS} if found.get("_class_name") == SKYREELS_CLASS else rest


def _values_from_diffusers(found: Mapping[str, Any], place: object) -> dict[str, Any]:
    apart = ("attention_head_dim", "added_kv_proj_dim", "model_type")
    rest = {name: value for name, value in found.items() if name not in apart}
    values = checked_keys({**_DIFFUSERS_DEFAULTS, **rest}, _DIFFUSERS_FIELDS, _OWN, place)
    head_dim = found.get("attention_head_dim", 128)
    if type(head_dim) is not int or type(values["heads"]) is not int:
        raise StditError(f"{place}: num_attention_heads and attention_head_dim must be whole numbers.")
    values["dim"] = values["heads"] * head_dim
    norm = found.get("qk_norm", "rms_norm_across_heads")
    if norm not in ("rms_norm_across_heads", None):  # diffusers normalises q and k either way
        raise StditError(f"{place}: qk_norm {norm!r} is not one of Wan's (rms_norm_across_heads).")
    values["qk_norm"] = found.get("_stdit", {}).get("qk_norm", True)
    values["out_channels"] = values.get("out_channels", 16) or values.get("in_channels", 16)
    values |= {name: values.get(name) or 0 for name in ("image_text_dim", "image_text_positions")}
    if found.get("added_kv_proj_dim") != (values["dim"] if values["image_text_dim"] else None):
        raise StditError(
            f"{place}: added_kv_proj_dim is {found.get('added_kv_proj_dim')!r}; with an image branch (image_dim "
            f"{found.get('image_dim')!r}) it is the model's width {values['dim']}, without one it is null."
        )
    return values


def _image_values(values: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Adds what the original config.json does not say: the size of 2.1's image branch, which 2.2 does not have, and
    the number of image channels (image latents and known-frame mask): in_channels − out_channels."""
    branch = {
        "image_text_dim": shapes.get("img_emb.proj.1.weight", (0, 0))[1],
        "image_text_positions": shapes.get("img_emb.emb_pos", (0, 0, 0))[1],
    }
    found: dict[str, Any] = {**branch, **values}
    channels = (values.get("in_channels", 16), values.get("out_channels", 16))
    whole = all(type(number) is int for number in channels)
    if "image_channels" not in values and whole and (channels == (36, 16) or found["image_text_dim"]):
        found["image_channels"] = max(channels[0] - channels[1], 0)
    return found


def _values_from_shapes(shapes: Mapping[str, Shape], place: object, heads: int | None) -> dict[str, Any]:
    """From tensor shapes. Heads are 128 wide, as in every release of Wan."""
    if re.search(r"chrono[-_]?edit", Path(str(place)).name, re.IGNORECASE):
        raise StditError(
            f"{place}: is ChronoEdit by its name: Wan I2V's tensors, but its last frame stands at another place in "
            "time, which is not supported yet."
        )
    diffusers = dialect_of(shapes) == "diffusers"
    names = {
        "patch": "patch_embedding.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight" if diffusers else "time_embedding.0.weight",
        "text": "condition_embedder.text_embedder.linear_1.weight" if diffusers else "text_embedding.0.weight",
        "ffn": "blocks.0.ffn.net.0.proj.weight" if diffusers else "blocks.0.ffn.0.weight",
        "head": "proj_out.weight" if diffusers else "head.head.weight",
        "image": "condition_embedder.image_embedder.ff.net.0.proj.weight" if diffusers else "img_emb.proj.1.weight",
        "positions": "condition_embedder.image_embedder.pos_embed" if diffusers else "img_emb.emb_pos",
        "cross": "blocks.0.norm2.weight" if diffusers else "blocks.0.norm3.weight",
        "qk": "blocks.0.attn1.norm_q.weight" if diffusers else "blocks.0.self_attn.norm_q.weight",
    }
    wanted = [names[part] for part in ("patch", "time", "text", "ffn", "head")]
    absent = [name for name in wanted if len(shapes.get(name, ())) != (5 if name == names["patch"] else 2)]
    if absent:
        raise StditError(
            f"{place}: not a {TITLE}: no config.json, and no {absent[0]} of the right rank to tell the size by."
        )
    dim, in_channels, *patch = shapes[names["patch"]]
    released = {} if dim % 128 else {dim: dim // 128}
    return {
        "dim": dim,
        "heads": checked_heads(heads, dim, released, place, TITLE)[0],
        "layers": count(shapes, _BLOCKS),
        "ffn_dim": shapes[names["ffn"]][0],
        "in_channels": in_channels,
        "out_channels": shapes[names["head"]][0] // math.prod(patch),
        "patch": tuple(patch),
        "text_dim": shapes[names["text"]][1],
        "frequency_dim": shapes[names["time"]][1],
        "qk_norm": names["qk"] in shapes,
        "cross_norm": names["cross"] in shapes,
        "image_text_dim": shapes.get(names["image"], (0, 0))[1],
        "image_text_positions": shapes.get(names["positions"], (0, 0, 0))[1],
    }


_UMT5 = "UMT5-XXL"
_VAE21, _VAE22 = "Wan 2.1's (16 channels, 4×8×8)", "Wan 2.2's (48 channels, 4×16×16)"
_14B = {"dim": 5120, "layers": 40}
_5B = ClipFormat(24, "1280x704x121")
_PIPELINE = PipelineKind(16, "832x480x81", by_channels={48: _5B}, experts=True)

FAMILY = Family(
    name="wan",
    title=TITLE,
    classes=(DIFFUSERS_CLASS, ORIGINAL_CLASS, SKYREELS_CLASS),
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
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
