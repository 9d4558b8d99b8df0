"""Options that several commands share: their ranges, the paths that name outputs; and the exit status of Ctrl-C."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Option

from stdit.errors import Interrupted, StditError
from stdit.files import local_file, local_folder, local_path

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


PartOf = Annotated[
    str | None,
    Option(
        "--part",
        metavar="I/N",
        help="Do part I of N; `stdit data merge` joins the parts. Default: the rank under torchrun, the task of a "
        "Slurm array, or all.",
    ),
]
Manifests = Annotated[
    list[str],
    Argument(
        metavar="MANIFEST… [KEY=VALUE…]",
        help="The manifest, its URL or a pattern; or several, as one data set. KEY=VALUE: changes to the config.",
    ),
]
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


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Manifests, and changes to a config: words such as data.fps=8, after the first, unless a file has that name."""
    changes = [word for word in words[1:] if re.match(r"[A-Za-z_][\w.]*=", word) and not os.path.exists(word)]
    return [word for word in words if word not in changes], changes


def local_gpu() -> str:
    """The GPU of this process among those that torchrun started on the machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


# For `parser=`: an output that cannot be written is an error before any work. All take paths on this machine;
# `out_manifest` and `out_store` also take URLs of any fsspec scheme.


def out_folder(given: str) -> Path:
    return _checked(given, local_folder)


def out_file(given: str) -> Path:
    return _checked(given, local_file)


def out_path(given: str) -> Path:
    return out_file(given) if Path(given).is_file() else out_folder(given)


def out_manifest(given: str) -> str:
    return given if _is_url(given) else str(out_file(given))


def out_store(given: str) -> str:
    return given if _is_url(given) else str(out_folder(given))


def folder_option(help: str) -> Any:
    return Option(metavar="FOLDER", parser=out_folder, help=help)


class Unwritable(Exception):
    """A valid path that cannot be written here. Not a ValueError, for which typer would print a message of its own."""

    exit_code = 1

    def format_message(self) -> str:
        return str(self)


def _is_url(given: str) -> bool:
    return "://" in given and not given.startswith("file://")


def _checked(given: str, check: Callable[[str, str | Path], Path]) -> Path:
    try:
        path = local_path("it", given)
    except StditError as error:
        raise BadParameter(str(error)) from None
    try:
        return check("it", path)
    except StditError as error:
        raise Unwritable(str(error)) from None


@contextmanager
def when_stopped(advice: str) -> Iterator[None]:
    """A decorator for commands: Ctrl-C ends them with status 130. advice: what is kept, and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {advice}", 130) from None
