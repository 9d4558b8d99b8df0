"""Writes docs/settings.md from the dataclasses of a run's config: `make docs`, or `python docs/settings.py`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from stdit.models.config import CHOICES, TransformerConfig
from stdit.settings import hint_at
from stdit.training.config import RunConfig
from stdit.training.objectives.config import FlowConfig
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# All settings of a run

Written by `make docs` from the code; a test compares the two. A run's config is YAML, one mapping per section. Any
setting can also be given on the command line: `stdit train CONFIG optimizer.lr=1e-4 "data.shapes=[64x64x17]"`.
An unknown setting is an error that names the nearest one.

"""
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything"}
HUGE = 2**24  # bounds from here on only keep numbers finite, and are not worth a line
SIGNS = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< ", "multiple_of": "a multiple of "}


def type_of(hint: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [bound for mark in parts[1:] for bound in bounds_of(mark)]
        return " ".join([type_of(parts[0]), ", ".join(bounds)]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_of(part) for part in parts)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (list, tuple) and (origin is list or Ellipsis in parts):
        return f"list: {type_of(parts[0])}"
    if origin is tuple:
        return "[" + "; ".join(map(type_of, parts)) + "]"
    if origin is dict:
        return f"mapping: {type_of(parts[1])}"
    return "section" if dataclasses.is_dataclass(hint) else NAMES[hint]


def bounds_of(mark: Any) -> Iterator[str]:
    """The bounds in an annotation: one of annotated_types, or pydantic's Field, which holds several."""
    for inner in mark.metadata if isinstance(mark, FieldInfo) else [mark]:
        for name, sign in SIGNS.items():
            if (bound := getattr(inner, name, HUGE)) < HUGE:
                yield sign + number(bound)


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def meanings_of(kind: Any) -> tuple[str, dict[str, str]]:
    """The summary of a docstring, and the meaning of each field by name."""
    summary, meanings, name = [], {}, ""
    for line in (inspect.getdoc(kind) or "").splitlines():
        if found := re.match(r"(\w+): (.*)", line):
            name, meanings[found[1]] = found[1], found[2]
        elif name and line.startswith("    "):
            meanings[name] += " " + line.strip()
        else:
            name = ""
            if not meanings:
                summary.append(line.strip())
    return " ".join(summary).strip(), meanings


# By dataclass: the settings that are one of a few names, and what each name means.
LISTED: dict[Any, dict[str, dict[str, str]]] = {
    TransformerConfig: CHOICES,
    FlowConfig: {"level_weight": {name: meanings_of(weight)[0] for name, weight in LEVEL_WEIGHTS.items()}},
}


def section(kind: Any, key: str, depth: int, preset: bool = False) -> Iterator[str]:
    """A heading, a table, and then the sections inside. preset: whether a preset has the defaults."""
    summary, meanings = meanings_of(kind)
    title = f"{key}, settings of the preset" if preset else key
    yield f"{'#' * depth} {title}\n\n{summary}\n"
    hints = get_type_hints(kind, include_extras=True)
    inside = []
    rows = []
    for field in dataclasses.fields(kind):
        hint = hint_at(kind, [field.name])
        hint = get_args(hint)[0] if get_origin(hint) is list else hint
        if dataclasses.is_dataclass(hint):
            inside.append(
                (hint, key if field.name == "overrides" else f"{key}.{field.name}", field.name == "overrides")
            )
        if field.name != "overrides":
            default = "the preset's" if preset else default_of(field)
            meaning = re.sub("see (CHOICES|LEVEL_WEIGHTS)", "see below", meanings[field.name].replace("|", "\\|"))
            rows.append(f"| `{key}.{field.name}` | {type_of(hints[field.name])} | {default} | {meaning} |")
    yield "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""])
    for name, choices in LISTED.get(kind, {}).items():
        lines = [f"- `{choice}`: {meaning}" for choice, meaning in choices.items()]
        yield "\n".join([f"`{key}.{name}` is one of:\n", *lines, ""])
    for hint, name, of_preset in inside:
        yield from section(hint, name, min(depth + 1, 4), of_preset)


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "see below" if dataclasses.is_dataclass(value) else f"`{json.dumps(value, ensure_ascii=False)}`"


def page() -> str:
    names = [field.name for field in dataclasses.fields(RunConfig)]
    links = "Sections: " + ", ".join(f"[{name}](#{name})" for name in names) + ".\n"
    parts = [part for name in names for part in section(hint_at(RunConfig, [name]), name, 2)]
    return HEAD + "\n".join([links, *parts]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
