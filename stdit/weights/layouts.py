"""Checks what a layout can hold: a setting that would be lost is refused by name, before training and on saving."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NoReturn

from stdit.errors import StditError
from stdit.weights.families import family_of, on_meta, shapes_of

LAYOUTS = ("diffusers", "original", "comfyui")


def dialect_in(layout: str) -> str:
    """The dialect of a layout. Raises StditError for an unknown layout."""
    if layout not in LAYOUTS:
        raise StditError(f"layout {layout!r} does not exist. Known: {', '.join(LAYOUTS)}.")
    return "diffusers" if layout == "diffusers" else "original"


def check_layout(config: Any, layout: str) -> None:
    """Raises StditError if a model of this config, written in `layout`, would be read as another network.

    Checked for two readers: stdit, by reading back what it would write, and the layout's own program, by the settings
    that its code has built in (`Family.built_in`).
    """
    family, dialect = family_of(config), dialect_in(layout)

    def refuse(name: str, other: Any) -> NoReturn:
        advice = "Write layout 'diffusers'." if layout != "diffusers" else f"Leave {name} as it is."
        raise StditError(
            f"layout {layout!r} cannot hold {name}={getattr(config, name)}: it gives this {family.title} "
            f"{name}={other}, so that what is written would be another network. {advice}"
        )

    native = shapes_of(on_meta(config))
    if layout == "comfyui" and not family.comfyui:
        raise StditError(f"layout {layout!r}: ComfyUI has no {family.title}. Write layout 'diffusers' or 'original'.")
    for name, allowed in family.built_in(config, layout).items():
        if getattr(config, name) not in allowed:
            refuse(name, " or ".join(map(str, allowed)))
    keymap = family.keymap(config, dialect)
    unplaced = keymap.unplaced(native)
    shapes = keymap.table({name: shape for name, shape in native.items() if name not in unplaced}).foreign_shapes
    written = [family.written(config, dialect)]
    if layout == "comfyui":  # reads the file's metadata, no config.json
        written.append(json.loads(family.metadata(config).get("config", "{}")).get("transformer", {}))
    for found in written:
        try:
            again = asdict(family.config_from(json.loads(json.dumps(found)), shapes, f"layout {layout!r}"))
        except StditError as error:
            raise StditError(f"{error}\nSo layout {layout!r} cannot hold this {family.title}.") from None
        for name, value in asdict(config).items():
            if again[name] != value and name not in family.not_written:
                refuse(name, again[name])
    if unplaced:
        raise StditError(f"layout {layout!r} has no place for this {family.title}'s tensor {unplaced[0]}.")
