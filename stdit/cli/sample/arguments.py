"""Reads the arguments of `stdit sample` that are text: sizes, ratios, durations and LoRAs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from typer import BadParameter

from stdit.errors import StditError
from stdit.shapes import LARGEST


def parse_size(text: str) -> tuple[int, int]:
    """(width, height)."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text)
    if not match:
        raise BadParameter(
            f"--size {text!r}: write WIDTHxHEIGHT, each of at most six digits; --frames or --duration say how long."
        )
    return int(match[1]), int(match[2])


def parse_ratio(text: str) -> float:
    """Width / height."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[:/x]\s*(\d+(?:\.\d+)?)", text.strip())
    ratio = float(match[1]) / float(match[2]) if match and float(match[2]) else 0.0
    if not 0.001 <= ratio <= 1000:
        raise BadParameter(f"--aspect {text!r}: write WIDTH:HEIGHT, such as 16:9, from 1:1000 to 1000:1.")
    return ratio


def parse_seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*s?", text.strip())
    seconds = float(match[1]) if match else 0.0
    if not 0 < seconds <= LARGEST:
        raise BadParameter(f"--duration {text!r}: write seconds, such as 3s or 2.5, at most {LARGEST:,}.")
    return seconds


def parse_interval(text: str, option: str) -> tuple[float, float]:
    """Two noise levels."""
    low, high = _numbers(text, option, "LOW:HIGH, two noise levels such as 0.2:0.8", 2)
    return low, high


def parse_levels(text: str) -> tuple[float, ...]:
    """Noise levels, such as few-step weights are published with."""
    form = "noise levels with commas, from 1 at most and falling, such as 1,0.9375,0.8,0.5"
    return tuple(_numbers(text.replace(",", ":"), "--levels", form, 1, 1000))


def parse_projection(text: str) -> dict[str, float]:
    """The options of adaptive projected guidance."""
    values = _numbers(text, "--apg", "PARALLEL:NORM:MOMENTUM, such as 0:15:-0.5; the last may be left out", 1, 3)
    return dict(zip(("parallel", "norm", "momentum"), values))


def parse_skip(text: str) -> dict[str, Any]:
    """The options of skip-layer guidance."""
    layers, _, rest = text.partition(":")
    form = "N,N:SCALE:LOW:HIGH, the blocks to skip, the scale and two noise levels, such as 9,10:3:0.8:1"
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", layers):
        raise BadParameter(f"--skip-layers {text!r}: write {form}; only the blocks are needed.")
    found: dict[str, Any] = {"skip_layers": tuple(map(int, layers.split(",")))}
    values = _numbers(rest, "--skip-layers", form, 1, 3) if rest else []
    if len(values) == 2:
        raise BadParameter(f"--skip-layers {text!r}: write {form}.")
    if values:
        found["skip_scale"] = values[0]
    return found | ({"skip_interval": (values[1], values[2])} if len(values) == 3 else {})


def _numbers(text: str, option: str, form: str, least: int, most: int | None = None) -> list[float]:
    """Finite numbers with colons between them."""
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        found = []
    if not least <= len(found) <= (most or least) or not all(map(math.isfinite, found)):
        raise BadParameter(f"{option} {text!r}: write {form}.")
    return found


def parse_lora(text: str) -> tuple[Path, float]:
    """A file and its weight. A text that names an existing file is that file, such as C:\\a.safetensors or a:2."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        file, weight = text, "1"
    try:
        strength = float(weight)
    except ValueError:
        file, strength = text, 1.0
    if not -1000 <= strength <= 1000:
        raise BadParameter(f"--lora {text!r}: the weight must be from -1000 to 1000.")
    if not Path(file).exists():
        raise StditError(f"--lora {text}: {file} is not a file.")
    return Path(file), strength
