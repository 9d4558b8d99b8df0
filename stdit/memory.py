"""Refuses work that needs more memory than a device has: Linux grants such allocations and kills the process later."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stdit.errors import StditError

if TYPE_CHECKING:
    import torch


def require_memory(needed: int, device: str | torch.device, what: str, advice: str) -> None:
    """Raises StditError if `what` needs more bytes than the device has in total. needed: a lower bound.

    The memory is that of the GPU, or of the machine. Does nothing on systems that do not report it.
    """
    if str(device).startswith("cuda"):
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > total:
        raise StditError(
            f"{what} needs at least {needed / 1e9:,.0f} GB of memory; {device} has {total / 1e9:,.0f} GB. {advice}"
        )
