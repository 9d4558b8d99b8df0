"""Wan 2.1's and 2.2's causal video VAEs (the releases' wan/modules/vae.py and vae2_2.py), and those stdit trains.

Our names are the releases', so the original dialect is the identity. diffusers' `AutoencoderKLWan` renames modules and
nests the levels. The releases have no config.json: the config is derived from the tensors' shapes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.vae.config import PRESETS, WAN21_MEAN, WAN21_STD, VaeConfig
from stdit.weights.families.configs import DIFFUSERS_VERSION, FORMAT, checked_keys, listed
from stdit.weights.families.record import Family
from stdit.weights.keymap import KeyMap, Rule, Shape

TITLE = "Wan causal video VAE"
DIFFUSERS_CLASS = "AutoencoderKLWan"
ORIGINAL_CLASS = "WanVAE_"
OWN_CLASS = "CausalVAE"  # for VAEs that Wan's layout cannot hold; no other program has this class
CLASSES = (DIFFUSERS_CLASS, ORIGINAL_CLASS, OWN_CLASS)

# The names that other programs give to fields of VaeConfig; the spelling of "temperal" is theirs.
_DIFFUSERS_FIELDS = {
    "base_dim": "base_dim",
    "decoder_base_dim": "decoder_base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
    "patch_size": "patch_size",
    "is_residual": "residual",
}
_DIFFUSERS_APART = (
    "attn_scales", "dropout", "in_channels", "out_channels", "scale_factor_spatial", "scale_factor_temporal",
    "clip_output",  # in the released Wan 2.2 VAE's config.json; diffusers always clamps
)  # fmt: skip
_ORIGINAL_FIELDS = {
    "dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
}
_OWN = (
    "decoder_base_dim",
    "patch_size",
    "residual",
    "latents_mean",
    "latents_std",
)  # arguments that the class does not have


def config_from(found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json") -> VaeConfig:
    kind = found.get("_class_name")
    if kind not in (None, *CLASSES):
        raise StditError(f"{place}: {kind!r} is not a model that stdit loads; it loads {TITLE}s ({DIFFUSERS_CLASS}).")
    if not found:
        values = _values_from_shapes(shapes, place)
    elif kind == DIFFUSERS_CLASS or {"base_dim", "temperal_downsample"} <= set(found):
        values = _values_from_diffusers(found, place)
    elif kind == ORIGINAL_CLASS or "dim" in found:
        values = checked_keys(found, _ORIGINAL_FIELDS, _OWN, place)
    else:
        values = checked_keys(found, {f.name: f.name for f in dataclasses.fields(VaeConfig)}, (), place)
    try:
        return VaeConfig(**values)
    except (StditError, TypeError) as error:
        raise StditError(f"{place}: {error}") from None


def config_to_diffusers(config: VaeConfig) -> dict[str, Any]:
    """As AutoencoderKLWan.save_pretrained writes it, every value explicit; our own class for a VAE with Stable
    Diffusion's layers."""
    if config.groups:
        return {"_class_name": OWN_CLASS, **listed(vars(config))}
    values = {theirs: getattr(config, ours) for theirs, ours in _DIFFUSERS_FIELDS.items()}
    return {
        "_class_name": DIFFUSERS_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        **listed(values),
        "attn_scales": [],
        "dropout": 0.0,
        "in_channels": 3 * config.patch_size**2,
        "latents_mean": list(config.latents_mean or (0.0,) * config.z_dim),
        "latents_std": list(config.latents_std or (1.0,) * config.z_dim),
        "out_channels": 3 * config.patch_size**2,
        "patch_size": config.patch_size if config.patch_size > 1 else None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
    }


def config_to_original(config: VaeConfig) -> dict[str, Any]:
    """The arguments of the release's class; the release itself has no config.json."""
    if config.groups:
        raise StditError("no release has a VAE of groups: write layout 'diffusers', which is stdit's own for it.")
    values = {theirs: getattr(config, ours) for theirs, ours in _ORIGINAL_FIELDS.items()}
    own = {"format": FORMAT, **{name: getattr(config, name) for name in _OWN}}
    return {"_class_name": ORIGINAL_CLASS, "_stdit": listed(own), **listed(values)}


def built_in(config: VaeConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI runs only the two released sizes, and normalises latents by the releases' statistics."""
    if layout != "comfyui":
        return {}
    release = PRESETS["wan2.2" if config.residual else "wan2.1"]
    return {field.name: (getattr(release, field.name),) for field in dataclasses.fields(VaeConfig)}


def dialect_of(names: Mapping[str, Shape]) -> str:
    if "quant_conv.weight" in names and any(name.startswith("encoder.mid_block.") for name in names):
        return "diffusers"
    return "original" if any(name.startswith("encoder.middle.") for name in names) else ""


def keymap(config: VaeConfig, dialect: str) -> KeyMap:
    if dialect == "original" or config.groups:
        return KeyMap(Rule("{rest}", "{rest}"))
    rules = [
        Rule("conv1.{leaf}", "quant_conv.{leaf}"),
        Rule("conv2.{leaf}", "post_quant_conv.{leaf}"),
        Rule("{side:encoder|decoder}.conv1.{leaf}", "{side}.conv_in.{leaf}"),
        Rule("{side:encoder|decoder}.head.0.gamma", "{side}.norm_out.gamma"),
        Rule("{side:encoder|decoder}.head.2.{leaf}", "{side}.conv_out.{leaf}"),
        *residual_block("{side:encoder|decoder}.middle.0", "{side}.mid_block.resnets.0"),
        Rule("{side:encoder|decoder}.middle.1.{rest}", "{side}.mid_block.attentions.0.{rest}"),
        *residual_block("{side:encoder|decoder}.middle.2", "{side}.mid_block.resnets.1"),
    ]
    if config.residual:  # levels are nested on both sides; the rest is resample.1 and time_conv
        for ours, theirs in (
            ("encoder.downsamples.{l}.downsamples", "encoder.down_blocks.{l}"),
            ("decoder.upsamples.{l}.upsamples", "decoder.up_blocks.{l}"),
        ):
            rules += residual_block(f"{ours}.{{i}}", f"{theirs}.resnets.{{i}}")
            rules.append(
                Rule(f"{ours}.{{i}}.{{rest}}", f"{theirs}.{'down' if 'down' in ours else 'up'}sampler.{{rest}}")
            )
        return KeyMap(*rules)
    rules += residual_block("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    rules.append(Rule("encoder.downsamples.{i}.{rest}", "encoder.down_blocks.{i}.{rest}"))
    blocks = config.num_res_blocks + 1
    for level in range(len(config.dim_mult)):  # a flat list of blocks here, levels there
        first, theirs = level * (blocks + 1), f"decoder.up_blocks.{level}"
        for block in range(blocks):
            rules += residual_block(f"decoder.upsamples.{first + block}", f"{theirs}.resnets.{block}")
        rules.append(Rule(f"decoder.upsamples.{first + blocks}.{{rest}}", f"{theirs}.upsamplers.0.{{rest}}"))
    return KeyMap(*rules)


def residual_block(ours: str, theirs: str) -> list[Rule]:
    """A residual block under diffusers' names, for Wan's VAEs and Stable Diffusion's."""
    return [
        Rule(f"{ours}.residual.0.{{leaf}}", f"{theirs}.norm1.{{leaf}}"),
        Rule(f"{ours}.residual.2.{{leaf}}", f"{theirs}.conv1.{{leaf}}"),
        Rule(f"{ours}.residual.3.{{leaf}}", f"{theirs}.norm2.{{leaf}}"),
        Rule(f"{ours}.residual.6.{{leaf}}", f"{theirs}.conv2.{{leaf}}"),
        Rule(f"{ours}.shortcut.{{leaf}}", f"{theirs}.conv_shortcut.{{leaf}}"),
    ]


def _values_from_diffusers(found: Mapping[str, Any], place: object) -> dict[str, Any]:
    for name, only in (("attn_scales", []), ("dropout", 0.0)):
        if found.get(name, only) != only:
            raise StditError(f"{place}: {name} is {found[name]!r}; stdit's VAE supports {only!r} only.")
    values = checked_keys({k: v for k, v in found.items() if k not in _DIFFUSERS_APART}, _DIFFUSERS_FIELDS, (), place)
    values["patch_size"] = values.get("patch_size") or 1
    values.setdefault("latents_mean", WAN21_MEAN)  # diffusers' defaults, whatever z_dim is
    values.setdefault("latents_std", WAN21_STD)
    for name in ("in_channels", "out_channels"):
        if found.get(name, 3) != 3 * values["patch_size"] ** 2:
            raise StditError(
                f"{place}: {name} is {found.get(name, 3)!r}; for RGB with patch_size {values['patch_size']} it must be "
                f"{3 * values['patch_size'] ** 2}."
            )
    return values


def _values_from_shapes(shapes: Mapping[str, Shape], place: object) -> dict[str, Any]:
    """From tensor shapes. If they are a release's, latents are normalised by that release's statistics."""
    diffusers = dialect_of(shapes) == "diffusers"
    down = "encoder.down_blocks" if diffusers else "encoder.downsamples"
    conv_in = "conv_in" if diffusers else "conv1"
    names = {
        "first": f"encoder.{conv_in}.weight",
        "last": f"decoder.{'norm_out' if diffusers else 'head.0'}.gamma",
        "z": f"{'post_quant_conv' if diffusers else 'conv2'}.weight",
    }
    if absent := [name for name in names.values() if len(shapes.get(name, ())) < 4]:
        raise StditError(f"{place}: not a {TITLE}: there is no config.json, and no {absent[0]} to tell the size by.")
    out = re.compile(  # the last tensor of each block and resampling: level (2.2) or block, block in the level (2.2)
        rf"{re.escape(down)}\.(\d+)\.(?:(?:downsamples|resnets)\.(\d+)\.|(downsampler)\.)?"
        r"(?:conv2|residual\.6|resample\.1)\.weight"
    )
    found = [match for name in shapes if (match := out.fullmatch(name))]
    base, channels = shapes[names["first"]][:2]
    widths, temporal, blocks = [], [], 0
    for match in sorted(found, key=lambda m: (int(m[1]), bool(m[3]), int(m[2] or 0))):
        width = shapes[match[0]][0]
        if match[0].endswith("resample.1.weight"):
            temporal.append(match[0].replace("resample.1", "time_conv") in shapes)
            widths.append(width)
        else:
            blocks += 1
    if not blocks or any(width % base for width in widths) or channels % 3:
        raise StditError(f"{place}: not a {TITLE}: its encoder's {len(found)} blocks do not make levels.")
    widths.append(width)
    values = {
        "base_dim": base,
        "dim_mult": tuple(width // base for width in widths),
        "num_res_blocks": blocks // len(widths),
        "temporal_downsample": tuple(temporal),
        "z_dim": shapes[names["z"]][0],
        "patch_size": round((channels // 3) ** 0.5),
        "residual": any(match[2] or match[3] for match in found),
    }
    decoder_base = shapes[names["last"]][0] // values["dim_mult"][0]
    if decoder_base != base:
        values["decoder_base_dim"] = decoder_base
    for release in (PRESETS["wan2.1"], PRESETS["wan2.2"]):
        if values == {name: getattr(release, name) for name in values}:
            values |= {"latents_mean": release.latents_mean, "latents_std": release.latents_std}
    return values


FAMILY = Family(
    name="wan_vae",
    title=TITLE,
    classes=CLASSES,
    own_classes=(OWN_CLASS,),
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
)
