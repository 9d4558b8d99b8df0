"""Wan 2.1 and 2.2 text-to-video transformers (Wan-Video/Wan2.1, Wan-Video/Wan2.2), and what stdit trains itself.

Our names are the original release's, so the original dialect differs only in the patch embedding (a Conv3d there, a
Linear here). diffusers' `WanTransformer3DModel` renames everything, and swaps norm2 and norm3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights.families.configs import DIFFUSERS_VERSION, FORMAT, checked_keys
from stdit.weights.keymap import KeyMap, Rule, Shape, Unflatten

FAMILY = "Wan text-to-video transformer"
DIFFUSERS_CLASS = "WanTransformer3DModel"
ORIGINAL_CLASS = "WanModel"

# Branches that other variants of Wan have, by the start of a tensor's name in any dialect.
_BRANCHES = {
    "image-to-video with an image branch (Wan 2.1 I2V)": (
        r"img_emb\.|condition_embedder\.image_embedder\.|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\."
        r"|blocks\.\d+\.attn2\.(add_k_proj|add_v_proj|norm_added_k)\."
    ),
    "VACE control branches": r"vace_(blocks|patch_embedding|layers)\.",
    "Animate": r"(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\.",
    "speech-to-video (S2V)": r"(casual_audio_encoder|audio_injector|condition_embedder\.causal_audio_encoder)\.",
    "camera or reference control": r"(control_adapter|ref_conv|adapter)\.",
}
_MODEL_TYPES = {"t2v", "ti2v"}

# original name: our name. What is absent from a release's config.json has Wan's default.
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
}
_DIFFUSERS_DEFAULTS = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_OWN = ("text_padding", "rope_theta", "rope_max", "qk_norm")  # what others' config.json may have no place for
_SWITCHES = {"qk_norm": "across_heads", "cross_norm": "affine"}  # true or false there: ours where true, else "none"
_WORDS = re.compile(r"(dim|heads|layers|ffn_dim|in_channels|out_channels|text_dim|frequency_dim|rope_max)")


def config_from(
    found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json"
) -> TransformerConfig:
    """Our config of a config.json in any dialect, or, where `found` is empty, of the tensors' shapes alone.

    Raises StditError that names a variant that stdit does not run (image branches, VACE, Animate, …), an unknown
    class, a bad value, or a number of blocks that is not the file's.
    """
    _refuse_variants(found, shapes, place)
    if not found:
        values = _values_from_shapes(shapes, place)
    elif "num_attention_heads" in found or found.get("_class_name") == DIFFUSERS_CLASS:
        values = _values_from_diffusers(found, place)
    else:
        notes = ("model_type", "window_size" if found.get("window_size") == [-1, -1] else "")
        rest = {name: value for name, value in found.items() if name not in notes}
        values = checked_keys(rest, _ORIGINAL_FIELDS, _OWN, place)
        _need(found, ("dim", "num_heads", "num_layers", "ffn_dim"), place)
    for name, value in values.items():
        if _WORDS.fullmatch(name) and not (type(value) is int and 0 < value < 2**31):
            raise StditError(f"{place}: {name} is {value!r}, not a positive whole number.")
        if name in ("eps", "rope_theta") and not (type(value) in (int, float) and 0 < value < math.inf):
            raise StditError(f"{place}: {name} is {value!r}, not a positive number.")
        if name in _SWITCHES and type(value) is not bool:
            raise StditError(f"{place}: {name} is {value!r}, not true or false.")
    values |= {name: on if values[name] else "none" for name, on in _SWITCHES.items() if name in values}
    try:
        config = TransformerConfig(**values)
    except (StditError, TypeError, ValueError) as error:
        raise StditError(f"{place}: {error}") from None
    blocks = _blocks(shapes)
    if shapes and blocks != config.layers:
        raise StditError(
            f"{place}: the config says {config.layers} blocks, the tensors are of {blocks}. "
            "Does this config.json belong to these weights?"
        )
    return config


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """config.json as diffusers' WanTransformer3DModel.save_pretrained writes it, with our own values under "_stdit".

    diffusers normalises q and k of every model, so only stdit runs one that has qk_norm=False.
    """
    return {
        "_class_name": DIFFUSERS_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "_stdit": _own(config),
        "added_kv_proj_dim": None,
        "attention_head_dim": config.dim // config.heads,
        "cross_attn_norm": config.cross_norm != "none",
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.frequency_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": config.rope_max,
        "text_dim": config.text_dim,
    }


def config_to_original(config: TransformerConfig) -> dict[str, Any]:
    """config.json as the original releases write it."""
    values = {theirs: getattr(config, ours) for theirs, ours in _ORIGINAL_FIELDS.items()}
    values |= {"qk_norm": config.qk_norm != "none", "cross_attn_norm": config.cross_norm != "none"}
    values["patch_size"] = list(config.patch)
    kind = "t2v" if config.in_channels == config.out_channels == 16 else "ti2v"
    return {"_class_name": ORIGINAL_CLASS, "_stdit": _own(config), "model_type": kind, **values}


def _own(config: TransformerConfig) -> dict[str, Any]:
    """What a config.json of other programs has no place for."""
    return {"format": FORMAT, **{name: getattr(config, name) for name in _OWN}, "qk_norm": config.qk_norm != "none"}


def dialect_of(names: Mapping[str, Shape]) -> str:
    """ "diffusers" or "original", by the names alone; "" for another family's."""
    if any(name.startswith("condition_embedder.") or ".attn1." in name for name in names):
        return "diffusers"
    return "original" if any(name.startswith("time_projection.") or ".self_attn." in name for name in names) else ""


def keymap(config: TransformerConfig, dialect: str) -> KeyMap:
    """Our names ↔ that dialect's."""
    conv = Rule("patch_embedding.weight", "patch_embedding.weight", Unflatten(1, (config.in_channels, *config.patch)))
    if dialect == "original":
        return KeyMap(conv, Rule("{rest}", "{rest}"))
    return KeyMap(
        conv,
        Rule("patch_embedding.bias", "patch_embedding.bias"),
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
        Rule("blocks.{i}.norm3.{leaf}", "blocks.{i}.norm2.{leaf}"),  # the only norm with weights, renumbered there
        Rule("blocks.{i}.ffn.0.{leaf}", "blocks.{i}.ffn.net.0.proj.{leaf}"),
        Rule("blocks.{i}.ffn.2.{leaf}", "blocks.{i}.ffn.net.2.{leaf}"),
        Rule("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
        Rule("head.modulation", "scale_shift_table"),
    )


def build(config: TransformerConfig) -> STDiT:
    return STDiT(config)


def _refuse_variants(found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object) -> None:
    kind = found.get("_class_name")
    if kind not in (None, DIFFUSERS_CLASS, ORIGINAL_CLASS):
        raise StditError(f"{place}: {kind!r} is not a model that stdit loads; it loads {FAMILY}s ({DIFFUSERS_CLASS}).")
    advice = "stdit loads the text-to-video (t2v) and the 5B (ti2v) transformers of Wan 2.1 and 2.2."
    if found.get("model_type", "t2v") not in _MODEL_TYPES:
        raise StditError(
            f"{place}: model_type is {found['model_type']!r}, a variant of Wan not supported yet. {advice}"
        )
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if found.get(name) is not None:
            raise StditError(
                f"{place}: {name} is {found[name]!r}: image-to-video with an image branch (Wan 2.1 I2V, FLF2V) "
                f"is not supported yet. {advice}"
            )
    for branch, pattern in _BRANCHES.items():
        if names := [name for name in shapes if re.match(pattern, name)]:
            raise StditError(
                f"{place}: {branch} is not supported yet ({len(names)} tensors such as {names[0]}). {advice}"
            )
    channels = (found.get("in_channels", found.get("in_dim")), found.get("out_channels", found.get("out_dim")))
    if channels == (36, 16):
        raise StditError(
            f"{place}: 36 input channels for 16 of output is image-to-video by concatenated channels (Wan I2V), "
            f"which is not supported yet. {advice}"
        )


def _values_from_diffusers(found: Mapping[str, Any], place: object) -> dict[str, Any]:
    apart = ("attention_head_dim", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "model_type")
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
    return values


def _values_from_shapes(shapes: Mapping[str, Shape], place: object) -> dict[str, Any]:
    """A config of the tensors alone. Widths are in the shapes; heads are 128 wide, as in every release of Wan."""
    diffusers = dialect_of(shapes) == "diffusers"
    names = {
        "patch": "patch_embedding.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight" if diffusers else "time_embedding.0.weight",
        "text": "condition_embedder.text_embedder.linear_1.weight" if diffusers else "text_embedding.0.weight",
        "ffn": "blocks.0.ffn.net.0.proj.weight" if diffusers else "blocks.0.ffn.0.weight",
        "head": "proj_out.weight" if diffusers else "head.head.weight",
        "cross": "blocks.0.norm2.weight" if diffusers else "blocks.0.norm3.weight",
        "qk": "blocks.0.attn1.norm_q.weight" if diffusers else "blocks.0.self_attn.norm_q.weight",
    }
    wanted = [names[part] for part in ("patch", "time", "text", "ffn", "head")]
    absent = [name for name in wanted if len(shapes.get(name, ())) != (5 if name == names["patch"] else 2)]
    if absent:
        raise StditError(
            f"{place}: not a {FAMILY}: no config.json, and no {absent[0]} of the right rank to tell the size by."
        )
    dim, in_channels, *patch = shapes[names["patch"]]
    if dim % 128:
        raise StditError(
            f"{place}: no config.json, and a width of {dim} is not in heads of 128: the number of heads is unknown. "
            "Put the model's config.json beside the file."
        )
    return {
        "dim": dim,
        "heads": dim // 128,
        "layers": _blocks(shapes),
        "ffn_dim": shapes[names["ffn"]][0],
        "in_channels": in_channels,
        "out_channels": shapes[names["head"]][0] // math.prod(patch),
        "patch": tuple(patch),
        "text_dim": shapes[names["text"]][1],
        "frequency_dim": shapes[names["time"]][1],
        "qk_norm": names["qk"] in shapes,
        "cross_norm": names["cross"] in shapes,
    }


def _blocks(shapes: Mapping[str, Shape]) -> int:
    return len({found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))})


def _need(found: Mapping[str, Any], names: tuple[str, ...], place: object) -> None:
    if absent := [name for name in names if name not in found]:
        raise StditError(f"{place}: not the config of a {FAMILY}: it has no {', '.join(absent)}.")
