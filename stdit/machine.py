"""What the machine allows: OpenMP's idle threads, and memory for what is asked, or none left.

A training step has thousands of small parallel regions. By default, the threads that finish first spin for milliseconds
until the others arrive. On a busy machine they thus take the core that the others wait for, and a step becomes 5 to 12
times slower. With a short spin they sleep instead (benchmarks/busy.py measures both).
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from stdit.errors import StditError

if TYPE_CHECKING:
    import torch

SHORT_SPIN = {"GOMP_SPINCOUNT": "3000"}  # of libgomp, as in torch's wheels for Linux; other OpenMP runtimes ignore it
VARIABLES = ("OMP_WAIT_POLICY", *SHORT_SPIN)


def shorten_spin() -> None:
    """Sets a short spin unless the user has set any of VARIABLES. OpenMP reads them once, when torch is imported."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ.update(SHORT_SPIN)


def spin_settings() -> str:
    """The variables in force, for a log line, such as "GOMP_SPINCOUNT=2000"; '' for OpenMP's default."""
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)


# torch's messages, by device
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the machine or on a GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def require_memory(needed: int, device: str | torch.device, what: str, advice: str) -> None:
    """Raises StditError if `what` needs more bytes than the device has in total. needed: a lower bound.

    Linux grants such allocations and kills the process later. The memory is that of the GPU, or of the machine. Does
    nothing on systems that do not report it.
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
