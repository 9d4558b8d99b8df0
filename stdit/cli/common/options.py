"""Options that several commands share, with their ranges; and the exit status of Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from typer import BadParameter, Option

from stdit.errors import Interrupted, StditError

Number = float | int


def within(low: Number, high: Number) -> Callable[[Number | None], Number | None]:
    """For `Option(callback=…)`: refuses numbers below low or above high. (Ranges of click let NaN pass.)"""

    def check(value: Number | None) -> Number | None:
        if value is not None and not low <= value <= high:
            raise BadParameter(f"{value} is not from {low:g} to {high:g}.")
        return value

    return check


STEPS = within(1, 1000)  # of a solver; no schedule has more
GUIDANCE = within(0, 1000)
FPS = within(0.001, 1000)
SECONDS = within(1, 1_000_000)  # of a time limit
SEED = within(-(2**63), 2**63 - 1)

_UNITS = {"": 1, **{unit: 1000**n for n, unit in enumerate("kmgt", 1)}}
_UNITS |= {f"{unit}i": 1024**n for n, unit in enumerate("kmgt", 1)}


def memory_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match or not (found := int(float(match[1]) * _UNITS[match[2]])):
        raise BadParameter(f"{text!r}: write bytes, such as 8GB, 500MB or 2GiB.")
    return found


Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, Option(help="cpu, cuda, …; default: a GPU if there is one.")]
Memory = Annotated[
    int | None,
    Option(
        parser=memory_bytes,
        metavar="BYTES",
        help="Memory for the VAE, such as 8GB; large frames are then tiled. Default: about 0.3 GB, without tiles.",
    ),
]


def pick_device(name: str | None, gpu: str = "cuda") -> str:
    """The device that --device names, if torch can use it. Without a name: `gpu` if there is a GPU, else the CPU."""
    import torch

    if not name:
        return gpu if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(name).type != "meta"
    except RuntimeError:
        known = False
    if not known:
        raise BadParameter(f"--device {name!r} is not a device to compute on: cpu, cuda, cuda:1, mps, …")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the kind of device
        raise StditError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


@contextmanager
def when_stopped(advice: str) -> Iterator[None]:
    """A decorator for commands: Ctrl-C ends them with status 130. advice: what is kept, and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {advice}", 130) from None
