"""The memory budget of a VAE: --memory."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 1, **{unit: 1000**n for n, unit in enumerate("kmgt", 1)}}
_UNITS |= {f"{unit}i": 1024**n for n, unit in enumerate("kmgt", 1)}


def memory_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match or not (found := int(float(match[1]) * _UNITS[match[2]])):
        raise typer.BadParameter(f"{text!r}: write bytes, such as 8GB, 500MB or 2GiB.")
    return found


MEMORY = typer.Option(
    parser=memory_bytes,
    metavar="BYTES",
    help="Memory for the VAE, such as 8GB; large frames are then tiled. Default: about 0.3 GB, without tiles.",
)
