"""Dataclasses from mappings of YAML or JSON, strictly: keys, types and ranges are checked; errors name the place."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import types
import typing
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union

from stdit.errors import StditError, error_context, nearest_name

# All other numbers of a run's config are 0 or more.
MAY_BE_NEGATIVE = ("run.seed", "eval.seed", "objective.flow.noise_levels.mean", "vae.latents_mean")
DEEPEST = 20  # levels of mappings and lists where a setting may be anything
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")

Kind = TypeVar("Kind")


def build(kind: type[Kind], raw: Any, where: str) -> Kind:
    """An instance of a dataclass. `where` names the source in errors. Fields without a default must be there."""
    return _build(kind, raw, "", where)


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
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise StditError(f"{where}: {key or 'the config'} lacks {' and '.join(missing)}.")
    with error_context(f"{where}: {key}" if key else where):
        return kind(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, key: str, where: str) -> Any:
    """A value checked against a type hint: what YAML gives, turned into what the dataclass holds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    least = -(2.0**63) if key.startswith(MAY_BE_NEGATIVE) else 0
    if hint is Any:
        return _anything(value, key, where)
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
    elif hint is bool and type(value) is bool:
        return value
    elif hint is str and type(value) is str:
        return _text(value, key, where)
    more = ", 0 or more" if hint in (int, float) and not least else ""
    raise StditError(f"{where}: {key} is {value!r}; it must be {_describe(hint)}{more}.")


def _text(value: str, key: str, where: str) -> str:
    """A text without what no file name and no tokenizer takes."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise StditError(f"{where}: {key} is {value!r}; it must be a text without NUL and lone surrogates.")
    return value


def _anything(value: Any, key: str, where: str, depth: int = 0) -> Any:
    """YAML's plain values, for settings that a library owns. "1e-8", a text in YAML 1.1, is a number."""
    if depth > DEEPEST:
        raise StditError(f"{where}: {key} is nested more than {DEEPEST} levels deep.")
    if isinstance(value, dict):
        return {_text(str(name), key, where): _anything(one, key, where, depth + 1) for name, one in value.items()}
    if isinstance(value, list):
        return [_anything(one, key, where, depth + 1) for one in value]
    if isinstance(value, str):
        return float(value) if _SCIENTIFIC.fullmatch(value) else _text(value, key, where)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise StditError(f"{where}: {key} has a {type(value).__name__}, {value!r}; plain values only.")


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
