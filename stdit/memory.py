"""Refuses memory that cannot be had before it is taken: an allocation may succeed and the process be killed later."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stdit.errors import StditError

if TYPE_CHECKING:
    import torch


def memory_of(device: str | torch.device) -> int | None:
    """Bytes in all of a device: a GPU's, else the machine's. None where nothing tells."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def require_memory(needed: int, device: str | torch.device, what: str, advice: str) -> None:
    """Raises where `what` needs more bytes than the device has in all. needed: a lower bound."""
    there = memory_of(device)
    if there is not None and needed > there:
        raise StditError(
            f"{what} needs at least {needed / 1e9:,.0f} GB of memory; {device} has {there / 1e9:,.0f} GB. {advice}"
        )
