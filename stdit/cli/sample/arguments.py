"""Reads the arguments of `stdit sample` that are text: sizes, ratios, durations and LoRAs."""

from __future__ import annotations

import re
from pathlib import Path

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
