"""What the families' configs have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stdit.errors import StditError, nearest_name

FORMAT = 1  # of what we add to other programs' config.json, under "_stdit"
DIFFUSERS_VERSION = "0.36.0"  # the first whose WanPipeline reads every key that is written


def checked_keys(
    found: Mapping[str, Any], fields: Mapping[str, str], own: Collection[str], place: object
) -> dict[str, Any]:
    """found's values under our names, `fields` their name: ours, and those of `own` that lie under "_stdit".

    Unknown keys are an error; those with an underscore are notes of a program.
    """
    values = {}
    for name, value in found.items():
        if name in fields:
            values[fields[name]] = value
        elif not name.startswith("_"):
            raise StditError(f"{place}: unknown key {name!r}.{nearest_name(name, fields)}")
    added = found.get("_stdit", {"format": FORMAT})
    if not isinstance(added, dict) or added.get("format") != FORMAT:
        raise StditError(f"{place}: _stdit is {added!r}; this version of stdit reads format {FORMAT} of it.")
    for name, value in added.items():
        if name in own:
            values[name] = value
        elif name != "format":
            raise StditError(f"{place}: unknown key {name!r} in _stdit.{nearest_name(name, own)}")
    return values
