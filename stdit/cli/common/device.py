"""The device of a command: --device."""

from __future__ import annotations

import typer

from stdit.errors import StditError

DEVICE = typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")


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
        raise typer.BadParameter(f"--device {name!r} is not a device to compute on: cpu, cuda, cuda:1, mps, …")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the kind of device
        raise StditError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name
