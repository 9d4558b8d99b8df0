"""Which device a command computes on."""

from __future__ import annotations

import typer

from stdit.errors import StditError


def pick_device(name: str | None, gpu: str = "cuda") -> str:
    """The device that --device names, if torch can use it here; without a name `gpu` where there is one, else cpu."""
    import torch

    if not name:
        return gpu if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(name).type != "meta"
    except RuntimeError:
        known = False
    if not known:
        raise typer.BadParameter(f"--device {name!r} is not a device to compute on: cpu, cuda, cuda:1, mps, …")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each way to be absent
        raise StditError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name
