"""Open-Sora 1.2's autoencoder (hpcai-tech/OpenSora-VAE-v1.2), whose names are ours.

Sizes are derived from the shapes. The number of frames per group and the groups of norms are constants of the release's
code, which its config.json does not change; stdit reads them only from its own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stdit.errors import StditError
from stdit.vae.families.open_sora import OpenSoraConfig
from stdit.weights.families.configs import count, describe, described, needed
from stdit.weights.families.record import Family
from stdit.weights.keymap import KeyMap, Rule, Shape

TITLE = "Open-Sora 1.2 VAE"
CLASSES = ("VideoAutoencoderPipeline",)
_KEPT = ("group", "groups")
_FRAMES, _TIME = "spatial_vae.module.encoder.down_blocks", "temporal_vae.encoder"


def config_from(found: Mapping[str, Any], shapes: Mapping[str, Shape], place: object = "config.json") -> OpenSoraConfig:
    filters, z = needed(shapes, f"{_TIME}.conv_in.conv.weight", 5, place, TITLE)[:2]
    levels = [f"{_FRAMES}.{i}.resnets.0.conv1.weight" for i in range(count(shapes, rf"{_FRAMES}\.(\d+)\."))]
    times = range(count(shapes, rf"{_TIME}\.block_res_blocks\.(\d+)\."))
    widths = [needed(shapes, f"{_TIME}.block_res_blocks.{i}.0.conv1.conv.weight", 5, place, TITLE)[0] for i in times]
    try:
        return OpenSoraConfig(
            widths=tuple(needed(shapes, name, 4, place, TITLE)[0] for name in levels),
            blocks=count(shapes, rf"{_FRAMES}\.0\.resnets\.(\d+)\."),
            filters=filters,
            multipliers=tuple(width // filters for width in widths),
            temporal_blocks=count(shapes, rf"{_TIME}\.res_blocks\.(\d+)\."),
            temporal_downsample=tuple(f"{_TIME}.conv_blocks.{i}.conv.weight" in shapes for i in times[:-1]),
            z_dim=z,
            **described({name: value for name, value in found.items() if name == "_stdit"}, _KEPT, place),
        )
    except (StditError, TypeError) as error:
        raise StditError(f"{place}: {error}") from None


def config_to_original(config: OpenSoraConfig) -> dict[str, Any]:
    """With the release's class; its code knows its sizes."""
    return {**describe(CLASSES[0], config, _KEPT), "architectures": list(CLASSES), "model_type": CLASSES[0]}


config_to_diffusers = config_to_original


def built_in(config: OpenSoraConfig, layout: str) -> dict[str, tuple[Any, ...]] | None:
    """ComfyUI has no such VAE."""
    return None if layout == "comfyui" else {}


def dialect_of(names: Mapping[str, Shape]) -> str:
    return "original" if {f"{_TIME}.conv_in.conv.weight", f"{_FRAMES}.0.resnets.0.conv1.weight"} <= set(names) else ""


def keymap(config: OpenSoraConfig, dialect: str) -> KeyMap:
    return KeyMap(Rule("{rest}", "{rest}"))


FAMILY = Family(
    name="open_sora_vae",
    title=TITLE,
    classes=CLASSES,
    library="opensora",
    config_from=config_from,
    config_to_original=config_to_original,
    config_to_diffusers=config_to_diffusers,
    dialect_of=dialect_of,
    keymap=keymap,
    built_in=built_in,
)
