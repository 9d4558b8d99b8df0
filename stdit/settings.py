"""Reads dataclasses of settings from YAML and JSON, with pydantic: strictly, and with errors of one line.

The type and the range of a setting are those of its field: `Literal["a", "b"]`, `PositiveInt`, `Share`. What several
fields decide together is checked by `__post_init__`. pydantic checks what `read` reads; instances made in Python are
checked by `check`.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from stdit.errors import StditError, nearest_name

Kind = TypeVar("Kind")
Share = Annotated[float, Field(ge=0, le=1)]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
DEEPEST = 20  # levels of mappings and lists

# What must be instead, by the type of pydantic's error; its own words otherwise.
WANTED = {
    "dataclass_type": "a mapping of settings",
    "dict_type": "a mapping",
    "list_type": "a list",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


@dataclass(frozen=True)
class SettingsOf:
    """Annotates a field `overrides`: a dictionary of some settings of the dataclass `kind`, checked as that class says.

    In a file they stand beside the other settings of the class that has the field.
    """

    kind: type

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        fields = get_type_hints(self.kind, include_extras=True)
        return handler(TypedDict(self.kind.__name__, fields, total=False))  # type: ignore[operator]


def read(kind: type[Kind], raw: Any, where: str) -> Kind:
    """An instance of the dataclass `kind` from the values that the file `where` gave. Raises StditError."""
    found: Kind = _validate(kind, kind, raw, where, "")
    return found


def check(settings: Any, where: str, key: str = "") -> None:
    """Raises StditError if an instance that Python made, `key` of a config, has a value that `read` refuses."""
    kind = type(settings)
    _validate(Annotated[dict[str, Any], SettingsOf(kind)], kind, dataclasses.asdict(settings), where, key)


def _validate(hint: Any, kind: type, raw: Any, where: str, key: str) -> Any:
    plain = json.dumps([_plain(raw, key, where)])
    try:
        return _adapter(hint).validate_json(plain)[0]
    except ValidationError as error:
        raise StditError(f"{where}: {_message(kind, error, key)}") from None


@cache
def _adapter(hint: Any) -> TypeAdapter[list[Any]]:
    """Of a list with one entry: pydantic takes no configuration for a dataclass alone. Those inside inherit it."""
    return TypeAdapter(list[hint], config=STRICT)


def _plain(value: Any, key: str, where: str, depth: int = 0) -> Any:
    """The value as JSON can hold it. Raises StditError for what no setting can be."""
    if depth > DEEPEST:
        raise StditError(f"{where}: {key} is nested more than {DEEPEST} levels deep.")
    if isinstance(value, dict):
        named = {_plain(str(name), key, where): part for name, part in value.items()}
        return {name: _plain(part, f"{key}.{name}" if key else name, where, depth + 1) for name, part in named.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{key}[{i}]", where, depth + 1) for i, part in enumerate(value)]
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise StditError(f"{where}: {key} is {value!r}; it must be a text without NUL and lone surrogates.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        digits = str(value) if value.bit_length() < 999 else f"{hex(value)[:20]}…"
        raise StditError(f"{where}: {key} is {digits}; it must be an integer of at most 64 bits.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StditError(f"{where}: {key} has a {type(value).__name__}, {value!r}; plain values only.")


def _message(kind: type, found: ValidationError, key: str) -> str:
    """The first of the errors as a sentence: which setting, its value, what it must be."""
    errors = [(error["type"], _setting(kind, error["loc"][1:]), error) for error in found.errors(include_url=False)]
    what, place, error = errors[0]
    if what == "missing" and isinstance(place[-1], str):
        names = [str(other[-1]) for type_, other, _ in errors if type_ == what and other[:-1] == place[:-1]]
        return f"{_key(place[:-1], key) or 'the config'} lacks {' and '.join(names)}."
    if what in ("unexpected_keyword_argument", "extra_forbidden"):
        known = names_at(kind, place[:-1])
        return (
            f"{_key(place, key)} is not a setting.{nearest_name(str(place[-1]), known)} "
            f"{_key(place[:-1], key) or 'The config'} has: {', '.join(known)}."
        )
    if what == "value_error":
        return ": ".join(filter(None, (_key(place, key), str(error["ctx"]["error"]))))
    if what == "missing":  # of a tuple
        place = place[:-1]
    value, context, remedy = error["input"], error.get("ctx", {}), ""
    parts = get_args(hint_at(kind, place))
    wanted = WANTED.get(what, error["msg"].removeprefix("Input should be "))
    if what in ("missing", "tuple_type"):
        wanted = "a list" if Ellipsis in parts else f"a list of {len(parts)} values"
    elif what == "literal_error":
        wanted, remedy = context["expected"], nearest_name(str(value), map(str, parts))
    elif what == "string_type":
        wanted, remedy = "a text", "" if value is None or isinstance(value, list | dict) else " Write it in quotes."
    for type_, other, next_ in errors[1:]:  # the other types of a union
        if other == place and next_["loc"] != error["loc"]:
            wanted += f" or {WANTED.get(type_, next_['msg'].removeprefix('Input should be '))}"
            context = next_.get("ctx", {}) | context
    numbers = {name: f"{n:,}" if isinstance(n, int) else f"{n:g}" for name, n in context.items() if name in wanted}
    return f"{_key(place, key) or 'the config'} is {value!r}; it must be {wanted.format(**numbers)}.{remedy}"


def _setting(kind: type, loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The place of a setting, without the type of a union that pydantic adds to it."""
    for depth in range(len(loc)):
        here = hint_at(kind, loc[:depth])
        if not dataclasses.is_dataclass(here) and get_origin(here) not in (dict, list, tuple):
            return tuple(loc[:depth])
    return tuple(loc)


def _key(place: Sequence[int | str], key: str) -> str:
    """A place as a user writes it, such as data.stages[0].frames."""
    for before, part in zip(("", *place), place):
        if part != "overrides" or before == "overrides":
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def hint_at(kind: Any, place: Sequence[int | str]) -> Any:
    """The type of the setting at a place, without None; of `overrides`, the class whose settings they are."""
    for part in place:
        arguments = get_args(kind)
        if dataclasses.is_dataclass(kind):
            annotated = get_type_hints(kind, include_extras=True)[str(part)]
            marks = [mark.kind for mark in getattr(annotated, "__metadata__", ()) if isinstance(mark, SettingsOf)]
            kind = marks[0] if marks else get_type_hints(kind)[str(part)]
        elif isinstance(part, int) and get_origin(kind) is tuple and Ellipsis not in arguments:
            kind = arguments[part]
        else:
            kind = arguments[1 if get_origin(kind) is dict else 0]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(one for one in get_args(kind) if one is not type(None))
    return kind


def names_at(kind: Any, place: Sequence[int | str]) -> list[str]:
    """The settings at a place, those of `overrides` among them."""
    if place and place[-1] == "overrides":
        return names_at(kind, place[:-1])
    here = hint_at(kind, place)
    names = [field.name for field in dataclasses.fields(here)]
    if "overrides" in names:
        names.remove("overrides")
        names += [field.name for field in dataclasses.fields(hint_at(here, ["overrides"]))]
    return names
