"""Inflates Stable Diffusion's image VAE (diffusers' AutoencoderKL) to a causal video VAE.

Before training, the video VAE treats every frame as the image VAE does: its convolutions have weights for the present
frame only (the inflation of I3D, Carreira & Zisserman 2017, with all of the weight in the last tap). Temporal
downsampling keeps the last of two frames, upsampling repeats a frame. The image VAE's group norm per frame is kept;
Wan's layout has no such norm, so the trained VAE has stdit's own layout (`VaeConfig.groups`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stdit.errors import StditError
from stdit.files import part_folder
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.vae.layers import Downsample, Upsample
from stdit.weights.families import on_meta, shapes_of, wan_vae
from stdit.weights.families.configs import check_keys
from stdit.weights.keymap import Flatten, KeyMap, Rule, Shape
from stdit.weights.tensor_files import open_folder, read_json

CLASS = "AutoencoderKL"
_DEFAULTS: dict[str, Any] = {  # diffusers', for keys that are absent from config.json
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_ONLY: dict[str, Any] = {  # of a list: each
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True,
    "down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D",
}  # fmt: skip
_OPTIONAL = {"use_quant_conv": "conv1.", "use_post_quant_conv": "conv2."}  # convolutions around the latents
_NO_MATTER = ("sample_size", "force_upcast")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_OLD_ATTENTION = ("query", "key", "value", "proj_attn")  # of files from before diffusers 0.18


@torch.no_grad()
def inflate_image_vae(path: str | os.PathLike[str], temporal_downsample: Sequence[bool] | None = None) -> CausalVAE:
    """A causal video VAE in fp32, inflated from the image VAE in `path` (its folder, or a model folder with vae/).

    temporal_downsample: whether frames halve, for each downsampling; None: at the last two, as in Wan's.
    Raises StditError for another class, settings without a counterpart, and tensors that do not fit.
    """
    place = part_folder(path, "vae") / "config.json"
    found = read_json(place)
    config = _config(found, temporal_downsample, place)
    files = open_folder(place.parent)
    absent = tuple(conv for name, conv in _OPTIONAL.items() if not found.get(name, True))
    image = {
        name: shape[:2] + shape[-2:] if len(shape) == 5 else shape
        for name, shape in shapes_of(on_meta(config)).items()
        if ".time_conv." not in name and not name.startswith(absent)
    }
    table = _keymap(config, files.shapes).table(image)
    table.check(files.shapes, files.path, f"Does {place} belong to these weights?")
    vae = CausalVAE(config)
    for module in vae.modules():
        if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            weight = module.time_conv.weight.zero_()  # (C or 2C, C, 3, 1, 1)
            for half in weight.split(weight.shape[1]):
                half[:, :, -1, 0, 0].fill_diagonal_(1)
    state = vae.state_dict()
    for conv in absent:
        state[f"{conv}weight"].zero_()[:, :, 0, 0, 0].fill_diagonal_(1)
        state[f"{conv}bias"].zero_()
    for name, tensor in table.to_native(files.read):
        target = state[name].zero_()
        (target[:, :, -1] if target.ndim == 5 else target).copy_(tensor)
    return vae


def image_vae_config(path: str | os.PathLike[str], temporal_downsample: Sequence[bool] | None = None) -> VaeConfig:
    """The config of the VAE that `inflate_image_vae` makes, from config.json alone."""
    place = part_folder(path, "vae") / "config.json"
    return _config(read_json(place), temporal_downsample, place)


def _config(found: Mapping[str, Any], temporal_downsample: Sequence[bool] | None, place: Path) -> VaeConfig:
    """Normalises latents as diffusers' pipelines do: (raw − shift) · scaling_factor, or with mean and std."""
    if found.get("_class_name") != CLASS:
        raise StditError(f"{place}: {found.get('_class_name')!r} is not an image VAE that stdit inflates; {CLASS} is.")
    check_keys(found, (*_DEFAULTS, *_ONLY, *_NO_MATTER), (), place)
    for name, only in _ONLY.items():
        values = found.get(name, only)
        if any(value != only for value in (values if isinstance(values, list) else [values])):
            raise StditError(f"{place}: {name} is {values!r}; stdit inflates image VAEs with {only!r} only.")
    theirs = _DEFAULTS | {name: found[name] for name in _DEFAULTS if name in found}
    try:
        widths, z = [int(width) for width in theirs["block_out_channels"]], int(theirs["latent_channels"])
        if any(width % widths[0] for width in widths):
            raise StditError(f"block_out_channels {widths} must be multiples of the first.")
        if temporal_downsample is None:
            temporal_downsample = [level >= len(widths) - 3 for level in range(len(widths) - 1)]
        shift, scale = theirs["shift_factor"] or 0.0, float(theirs["scaling_factor"] or 1.0)
        return VaeConfig(
            base_dim=widths[0],
            dim_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=int(theirs["layers_per_block"]),
            temporal_downsample=tuple(temporal_downsample),
            z_dim=z,
            groups=int(theirs["norm_num_groups"]),
            latents_mean=tuple(theirs["latents_mean"] or [float(shift)] * z),
            latents_std=tuple(std / scale for std in theirs["latents_std"] or [1.0] * z),
        )
    except (StditError, TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise StditError(f"{place}: {error}") from None


def _keymap(config: VaeConfig, names: Mapping[str, Shape]) -> KeyMap:
    """Our names except those over time ↔ diffusers': its Wan VAE's, but for norms, attention and levels."""
    theirs = "{side}.mid_block.attentions.0"
    old = "encoder.mid_block.attentions.0.query.weight" in names
    *qkv, out = _OLD_ATTENTION if old else _ATTENTION
    linear = Flatten(1, (config.dim_mult[-1] * config.base_dim, 1, 1))  # a Linear there, a convolution of 1×1 here
    side = "{side:encoder|decoder}"
    rules = [
        Rule(f"{side}.head.0.{{leaf}}", "{side}.conv_norm_out.{leaf}"),
        Rule(f"{side}.middle.1.norm.{{leaf}}", f"{theirs}.group_norm.{{leaf}}"),
        Rule(f"{side}.middle.1.to_qkv.weight", tuple(f"{theirs}.{name}.weight" for name in qkv), linear),
        Rule(f"{side}.middle.1.to_qkv.bias", tuple(f"{theirs}.{name}.bias" for name in qkv)),
        Rule(f"{side}.middle.1.proj.weight", f"{theirs}.{out}.weight", linear),
        Rule(f"{side}.middle.1.proj.bias", f"{theirs}.{out}.bias"),
    ]
    blocks = config.num_res_blocks
    for level in range(len(config.dim_mult)):  # a flat list of blocks here, levels there
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        first = level * (blocks + 1)
        for block in range(blocks):
            rules += wan_vae.residual_block(f"encoder.downsamples.{first + block}", f"{down}.resnets.{block}")
        last = first + blocks
        rules.append(Rule(f"encoder.downsamples.{last}.resample.1.{{leaf}}", f"{down}.downsamplers.0.conv.{{leaf}}"))
        last = (level + 1) * (blocks + 2) - 1
        rules.append(Rule(f"decoder.upsamples.{last}.resample.1.{{leaf}}", f"{up}.upsamplers.0.conv.{{leaf}}"))
    return KeyMap(*rules, *wan_vae.FAMILY.keymap(replace(config, groups=0), "diffusers").rules)
