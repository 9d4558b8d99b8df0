"""Wan 2.1's and 2.2's causal video VAEs (the releases' wan/modules/vae.py and vae2_2.py), and those stdit trains.

Our names are the releases', so the original dialect is the identity. diffusers' `AutoencoderKLWan` renames modules and
nests the levels. The releases have no config.json: the config is derived from the tensors' shapes.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from stdit.errors import StditError
from stdit.vae.config import PRESETS, WAN21_MEAN, WAN21_STD, VaeConfig
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, made, only, setting
from stdit.weights.families.record import Family
from stdit.weights.keymap import KeyMap, Rule

_FIELDS = [field.name for field in dataclasses.fields(VaeConfig)]
_COMMON = {
    "z_dim": setting("z_dim"),
    "dim_mult": setting("dim_mult"),
    "num_res_blocks": setting("num_res_blocks"),
    "temperal_downsample": setting("temporal_downsample"),  # the spelling is theirs
}


def _from_diffusers(values: Settings, theirs: Settings, place: object) -> Settings:
    patch = theirs.get("patch_size") or 1
    rgb = 3 * patch**2
    for name in ("in_channels", "out_channels"):
        if (value := theirs.get(name, 3)) != rgb:
            raise StditError(f"{place}: {name} is {value!r}; for RGB with patch_size {patch} it must be {rgb}.")
    # diffusers' defaults, whatever z_dim is
    return {"latents_mean": WAN21_MEAN, "latents_std": WAN21_STD, **values, "patch_size": patch}


_DIFFUSERS = ConfigJson(
    "AutoencoderKLWan",
    {
        **_COMMON,
        "base_dim": setting("base_dim"),
        "decoder_base_dim": setting("decoder_base_dim"),
        "latents_mean": setting("latents_mean", write=lambda config: config.latents_mean or (0.0,) * config.z_dim),
        "latents_std": setting("latents_std", write=lambda config: config.latents_std or (1.0,) * config.z_dim),
        "patch_size": setting("patch_size", write=lambda config: config.patch_size if config.patch_size > 1 else None),
        "is_residual": setting("residual"),
        "attn_scales": only([]),
        "dropout": only(0.0),
        "in_channels": made(lambda config: 3 * config.patch_size**2),
        "out_channels": made(lambda config: 3 * config.patch_size**2),
        "scale_factor_spatial": made(lambda config: config.stride[1]),
        "scale_factor_temporal": made(lambda config: config.stride[0]),
    },
    passed=("clip_output",),  # in the released Wan 2.2 VAE's config.json; diffusers always clamps
    ours=_from_diffusers,
)
_ORIGINAL = ConfigJson(  # the arguments of the releases' class, which have no config.json
    "WanVAE_",
    {**_COMMON, "dim": setting("base_dim")},
    own=("decoder_base_dim", "patch_size", "residual", "latents_mean", "latents_std"),  # which the class has not
    versioned=False,
)


def _form(config: VaeConfig, dialect: str) -> str:
    if config.groups and dialect == "original":
        raise StditError("no release has a VAE of groups: write layout 'diffusers', which is stdit's own for it.")
    return "own" if config.groups else dialect


def _built_in(config: VaeConfig, layout: str) -> dict[str, tuple[Any, ...]]:
    """ComfyUI runs only the two released sizes, and normalises latents by the releases' statistics."""
    release = PRESETS["wan2.2" if config.residual else "wan2.1"]
    return {name: (getattr(release, name),) for name in _FIELDS} if layout == "comfyui" else {}


def _keymap(config: VaeConfig, dialect: str) -> KeyMap:
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


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    """If the shapes are a release's, latents are normalised by that release's statistics."""
    shapes, diffusers = tensors.shapes, FAMILY.dialect_of(tensors.shapes) == "diffusers"
    base, channels = tensors.ours("encoder.conv1.weight", 5)[:2]
    down = "encoder.down_blocks" if diffusers else "encoder.downsamples"
    out = re.compile(  # the last tensor of each block and resampling: level (2.2) or block, block in the level (2.2)
        rf"{re.escape(down)}\.(\d+)\.(?:(?:downsamples|resnets)\.(\d+)\.|(downsampler)\.)?"
        r"(?:conv2|residual\.6|resample\.1)\.weight"
    )
    found = [match for name in shapes if (match := out.fullmatch(name))]
    widths, temporal, blocks = [], [], 0
    for match in sorted(found, key=lambda m: (int(m[1]), bool(m[3]), int(m[2] or 0))):
        width = shapes[match[0]][0]
        if match[0].endswith("resample.1.weight"):
            temporal.append(match[0].replace("resample.1", "time_conv") in shapes)
            widths.append(width)
        else:
            blocks += 1
    if not blocks or any(width % base for width in widths) or channels % 3:
        raise StditError(
            f"{tensors.place}: the {len(found)} blocks of its encoder do not make levels ({tensors.title})."
        )
    widths.append(width)
    values = {
        "base_dim": base,
        "dim_mult": tuple(width // base for width in widths),
        "num_res_blocks": blocks // len(widths),
        "temporal_downsample": tuple(temporal),
        "z_dim": tensors.ours("conv2.weight", 5)[0],
        "patch_size": round((channels // 3) ** 0.5),
        "residual": any(match[2] or match[3] for match in found),
    }
    decoder_base = tensors.ours("decoder.head.0.gamma", 4)[0] // values["dim_mult"][0]
    if decoder_base != base:
        values["decoder_base_dim"] = decoder_base
    for release in (PRESETS["wan2.1"], PRESETS["wan2.2"]):
        if values == {name: getattr(release, name) for name in values}:
            values |= {"latents_mean": release.latents_mean, "latents_std": release.latents_std}
    return values


FAMILY = Family(
    name="wan_vae",
    title="Wan causal video VAE",
    config_class=VaeConfig,
    configs={
        "diffusers": _DIFFUSERS,
        "original": _ORIGINAL,
        # for VAEs that Wan's layout cannot hold; no other program has this class
        "own": ConfigJson("CausalVAE", {name: setting(name) for name in _FIELDS}, versioned=False),
    },
    form=_form,
    marks={
        "diffusers": (r"quant_conv\.weight", r"encoder\.mid_block\..*"),
        "original": (r"encoder\.middle\..*",),
    },
    keymap=_keymap,
    bare=_bare,
    comfyui=True,
    built_in=_built_in,
)
