"""Open-Sora 1.2's autoencoder (hpcai-tech/OpenSora-VAE-v1.2), whose names are ours.

Sizes are derived from the shapes. The number of frames per group and the groups of norms are constants of the release's
code, which its config.json does not change; stdit reads them only from its own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from stdit.vae.families.open_sora import OpenSoraConfig
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, count
from stdit.weights.families.record import Family
from stdit.weights.keymap import KeyMap, Rule, Shape

_CLASS = "VideoAutoencoderPipeline"
_FRAMES, _TIME = "spatial_vae.module.encoder.down_blocks", "temporal_vae.encoder"


def _prepare(found: Settings, shapes: Mapping[str, Shape], place: object) -> Settings:
    return {name: value for name, value in found.items() if name == "_stdit"}


def _bare(tensors: Tensors, kept: Settings) -> Settings:
    shapes, theirs = tensors.shapes, tensors.theirs
    filters, z = theirs(f"{_TIME}.conv_in.conv.weight", 5)[:2]
    levels = range(count(shapes, rf"{_FRAMES}\.(\d+)\."))
    times = range(count(shapes, rf"{_TIME}\.block_res_blocks\.(\d+)\."))
    widths = [theirs(f"{_TIME}.block_res_blocks.{i}.0.conv1.conv.weight", 5)[0] for i in times]
    return {
        "widths": tuple(theirs(f"{_FRAMES}.{i}.resnets.0.conv1.weight", 4)[0] for i in levels),
        "blocks": count(shapes, rf"{_FRAMES}\.0\.resnets\.(\d+)\."),
        "filters": filters,
        "multipliers": tuple(width // filters for width in widths),
        "temporal_blocks": count(shapes, rf"{_TIME}\.res_blocks\.(\d+)\."),
        "temporal_downsample": tuple(f"{_TIME}.conv_blocks.{i}.conv.weight" in shapes for i in times[:-1]),
        "z_dim": z,
    }


FAMILY = Family(
    name="open_sora_vae",
    title="Open-Sora 1.2 VAE",
    library="opensora",
    config_class=OpenSoraConfig,
    configs={
        "original": ConfigJson(
            _CLASS, {"architectures": [_CLASS], "model_type": _CLASS}, own=("group", "groups"), bare=True
        )
    },
    marks={"original": (rf"{_TIME}\.conv_in\.conv\.weight", rf"{_FRAMES}\.0\.resnets\.0\.conv1\.weight")},
    keymap=lambda config, dialect: KeyMap(Rule("{rest}", "{rest}")),
    prepare=_prepare,
    bare=_bare,
)
