"""`stdit sample --replay`: the command that the sidecar of a clip says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer import Context

from stdit.cli.sample.rows import REPLACES
from stdit.errors import StditError

META = "stdit.replay"
# The hashes of files that the frames depend on: the settings that name the files, and the options that change the hash.
_CONTENT = {
    "model_hash": (("model",), {"model"}),
    "lora_hashes": (("loras", "loras_2"), {"lora", "lora_2"}),
    "known_hash": (
        ("image", "last", "video", "init"),
        {"image", "last", "video", "init", "video_frames", "size", "aspect", "resolution", "frames", "duration", "fps"},
    ),
}


@dataclass(frozen=True)
class Replay:
    """A sidecar, and the options that the command line gave instead of its."""

    file: Path
    sidecar: Mapping[str, Any]
    given: frozenset[str]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises StditError if files that the clip was made with are others now, though the same options name them."""
        for name, (files, options) in _CONTENT.items():
            if self.sidecar.get(name) != settings[name] and not self.given & options:
                where = ", ".join(str(self.sidecar[key]) for key in files if self.sidecar.get(key))
                raise StditError(
                    f"{self.file}: {where} is not what the clip was made with ({name} {self.sidecar.get(name)}, now "
                    f"{settings[name]}): the frames would be others. Restore it, or give the options that name it "
                    "beside --replay."
                )


def replayed(file: Path, context: Context) -> Any:
    """A context of click for the sidecar's command, where options that the command line gives count instead.

    Raises StditError for a file that is not a sidecar.
    """
    try:
        sidecar = json.loads(file.read_text("utf-8"))
        words = _words(sidecar)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it has no command of stdit sample"
        raise StditError(
            f"--replay {file}: {reason}. Give the .json that `stdit sample` wrote beside a clip."
        ) from None
    again = context.command.make_context("sample", words)
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    for name in given - {"replay"}:
        again.params |= dict.fromkeys(REPLACES.get(name, set()) - given)
        again.params[name] = context.params[name]
    again.meta[META] = Replay(file, sidecar, given)
    return again


def _words(sidecar: Mapping[str, Any]) -> list[str]:
    program, command, *words = shlex.split(sidecar["command"])
    if (program, command) != ("stdit", "sample"):
        raise ValueError
    return words
