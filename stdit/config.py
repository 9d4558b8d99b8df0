"""Reads a run's config: YAML and `key=value` into dataclasses, strictly. Errors name the file, the key, the way out."""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from stdit.errors import StditError, about, nearest_name
from stdit.training.settings import RunConfig, differences, save_config, to_dict

# All other numbers are 0 or more.
MAY_BE_NEGATIVE = ("run.seed", "eval.seed", "objective.flow.noise_levels.mean", "vae.latents_mean")

__all__ = ["RunConfig", "differences", "from_dict", "load_config", "save_config", "to_dict"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with `a.b=c` set on top, values read as YAML; `run=PATH` sets run.path."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise StditError(f"config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StditError(f"{path} is not YAML: {error}") from error
    raw = {} if raw is None else raw
    config = from_dict(raw, str(path))
    if not overrides:
        return config
    for override in overrides:
        _set(raw, override)
    return from_dict(raw, f"{' '.join(overrides)} on top of {path}")


def from_dict(raw: Any, where: str) -> RunConfig:
    """`where` names the source in errors."""
    return _build(RunConfig, raw, "", where)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StditError(f"{override!r} is not KEY=VALUE, such as optimizer.lr=0.001.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StditError(f"{override!r}: the value is not YAML: {error}") from error
    parts = ["run", "path"] if key == "run" else key.split(".")
    for part in parts[:-1]:
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
        if not isinstance(raw, dict):
            raise StditError(f"{override!r}: {part} is {raw!r} and has no settings in it.")
    raw[parts[-1]] = value


def _build(kind: type, raw: Any, key: str, where: str) -> Any:
    """A dataclass from a mapping; `key` is where it stands in the config ("" for the whole)."""
    if not isinstance(raw, dict):
        raise StditError(f"{where}: {key or 'the config'} is {raw!r}; it must be a mapping of settings.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if "rest_of" not in field.metadata}
    rest = next((field for field in dataclasses.fields(kind) if "rest_of" in field.metadata), None)
    rest_hints: dict[str, Any] = {}
    if rest is not None:
        module, _, name = rest.metadata["rest_of"].partition(":")
        rest_hints = typing.get_type_hints(getattr(importlib.import_module(module), name))
    values: dict[str, Any] = {}
    for name, value in raw.items():
        full = f"{key}.{name}" if key else str(name)
        if name in fields:
            values[name] = _value(hints[name], value, full, where)
        elif rest is not None and name in rest_hints:
            values.setdefault(rest.name, {})[name] = _value(rest_hints[name], value, full, where)
        else:
            known = [*fields, *rest_hints]
            raise StditError(
                f"{where}: {full} is not a setting.{nearest_name(str(name), known)} "
                f"{key or 'The config'} has: {', '.join(known)}."
            )
    with about(f"{where}: {key}"):
        return kind(**values)


def _value(hint: Any, value: Any, key: str, where: str) -> Any:
    """A value checked against a type hint: what YAML gives, turned into what the dataclass holds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    least = -(2.0**63) if key.startswith(MAY_BE_NEGATIVE) else 0
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _value(options[0], value, key, where)
        for option in options:
            try:
                return _value(option, value, key, where)
            except StditError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        raise StditError(
            f"{where}: {key} is {value!r}; it is one of {', '.join(map(str, arguments))}."
            f"{nearest_name(str(value), [str(a) for a in arguments])}"
        )
    elif dataclasses.is_dataclass(hint):
        return _build(hint, value, key, where)  # type: ignore[arg-type]
    elif origin is list and isinstance(value, list):
        return [_value(arguments[0], one, f"{key}[{i}]", where) for i, one in enumerate(value)]
    elif origin is tuple and isinstance(value, list | tuple):
        each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(each) == len(value):
            return tuple(_value(h, one, f"{key}[{i}]", where) for i, (h, one) in enumerate(zip(each, value)))
    elif origin is dict and isinstance(value, dict):
        return {str(name): _value(arguments[1], one, f"{key}.{name}", where) for name, one in value.items()}
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # YAML takes 1e-4 for a text
            if least <= (value := float(value)) < math.inf:
                return value
    elif hint is int and type(value) is int:
        if least <= value < 2**63:
            return value
    elif hint in (bool, str) and type(value) is hint:
        return value
    more = ", 0 or more" if hint in (int, float) and not least else ""
    raise StditError(f"{where}: {key} is {value!r}; it must be {_describe(hint)}{more}.")


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is list:
        return f"a list, each {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values" if arguments[-1] is not Ellipsis else "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    names = {
        int: "an integer of at most 64 bits",
        float: "a finite number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    return names.get(hint, str(hint))
