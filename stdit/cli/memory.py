"""--memory: what the VAE may work in."""

from __future__ import annotations

import re
from typing import Any

import typer

from stdit.errors import StditError

_UNITS = {"": 1, **{unit: 1000**n for n, unit in enumerate("kmgt", 1)}}
_UNITS |= {f"{unit}i": 1024**n for n, unit in enumerate("kmgt", 1)}


def memory_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match or not (found := int(float(match[1]) * _UNITS[match[2]])):
        raise typer.BadParameter(f"{text!r}: write bytes, such as 8GB, 500MB or 2GiB.")
    return found


MEMORY = typer.Option(
    parser=memory_bytes,
    metavar="BYTES",
    help="What the VAE may work in, such as 8GB; large frames then go in tiles. Default: about 0.3 GB, and no tiles.",
)


def limit_memory(vae: Any, memory: int | None) -> None:
    """Makes a VAE keep to --memory. Raises StditError for another family's."""
    from stdit.vae.autoencoder import CausalVAE

    if memory is None:
        return
    if not isinstance(vae, CausalVAE):
        raise StditError(
            f"--memory {memory}: a {vae.config.name} is run by diffusers, which keeps to none. Leave it out."
        )
    vae.memory = memory
