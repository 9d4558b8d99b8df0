"""Reads a run's config: YAML and `key=value` into dataclasses, strictly. Errors name the file, the key, the way out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.strict import build
from stdit.text_files import read_text, read_yaml
from stdit.training.settings import RunConfig, differences, save_config, to_dict

LARGEST = 2**24  # bytes of a config

__all__ = ["RunConfig", "differences", "from_dict", "load_config", "save_config", "to_dict"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with `a.b=c` set on top, values read as YAML; `run=PATH` sets run.path."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):
            raise StditError(f"config {path} is not a file of at most {LARGEST:,} bytes, as a YAML file is.")
        text = read_text(path)
    except OSError as error:
        raise StditError(f"config {path} cannot be read: {error.strerror}.") from error
    raw = read_yaml(text, f"{path} is")
    raw = {} if raw is None else raw
    config = from_dict(raw, str(path))
    if not overrides:
        return config
    for override in overrides:
        _set(raw, override)
    return from_dict(raw, f"{' '.join(overrides)} on top of {path}")


def from_dict(raw: Any, where: str) -> RunConfig:
    """`where` names the source in errors."""
    return build(RunConfig, raw, where)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StditError(f"{override!r} is not KEY=VALUE, such as optimizer.lr=0.001.")
    value = read_yaml(text, f"{override!r}: the value is")
    parts = ["run", "path"] if key == "run" else key.split(".")
    for part in parts[:-1]:
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
        if not isinstance(raw, dict):
            raise StditError(f"{override!r}: {part} is {raw!r} and has no settings in it.")
    raw[parts[-1]] = value
