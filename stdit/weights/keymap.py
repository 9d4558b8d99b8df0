"""Declarative key maps: how one dialect's tensors become our own, and back, bit for bit.

A `KeyMap` is a list of rules between *native* names (ours) and *foreign* ones (another program's). Rules are matched
against native names only; the native names and shapes give the foreign ones. So one `Table` serves both directions and
every check:

    keymap = KeyMap(
        Rule("blocks.{i}.self_attn.{p:q|k|v}.{leaf}", "blocks.{i}.attn1.to_{p}.{leaf}"),       # a rename
        Rule("patch_embedding.weight", "patch_embedding.weight", Unflatten(1, (16, 1, 2, 2))),    # Linear to Conv3d
        Rule(("a.q.{leaf}", "a.k.{leaf}"), "a.qk.{leaf}"),                                        # fused over there
        Rule("a.kv.{leaf}", ("a.k.{leaf}", "a.v.{leaf}")),                                        # split over there
        ignored=("accum_{rest}",),                                   # may be in a file, holds no weights
        computed={"rope.freqs": frequencies},                        # the same, but written: a function makes it
    )
    table = keymap.table({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    table.check(shapes_in_the_file, place="model.safetensors")          # before a single tensor is read
    native = dict(table.to_native(read_foreign))                        # read_foreign: name -> tensor
    foreign = dict(table.to_foreign(native.__getitem__))

In a template, `{i}` (one letter) stands for a number, `{leaf}` (any longer name) for a part of a name without a dot,
`{p:q|k|v}` for one of these words, and `{rest}` for anything, dots included. The first rule that matches a native name
counts. Rules that depend on sizes are built by a function of the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stdit.errors import StditError, nearest_name

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]  # returns a tensor by name


@dataclass(frozen=True)
class Unflatten:
    """Splits a native dimension into several: a Linear over (c, pt, ph, pw) becomes a Conv3d."""

    dim: int
    sizes: Shape

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(self.dim, self.sizes)

    def to_native(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.dim, self.dim + len(self.sizes) - 1)


@dataclass(frozen=True)
class Flatten(Unflatten):
    """The inverse: joins the native dimensions of these sizes, from `dim` on, into one."""

    to_foreign = Unflatten.to_native
    to_native = Unflatten.to_foreign


@dataclass(frozen=True)
class Take:
    """Permutes entries along `dim`: foreign entry k is native entry `index[k]`."""

    index: Shape
    dim: int = 0

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.dim, torch.tensor(self.index).to(tensor.device))

    def to_native(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.dim, torch.tensor(self.index).argsort().to(tensor.device))


def output_order(patch: Shape, channels: int, order: str) -> Take:
    """Permutes the output rows of a patch from our order, frame, row, column, channel (thwc), to `order`."""
    rows = torch.arange(math.prod(patch) * channels).view(*patch, channels)
    return Take(tuple(rows.permute(["thwc".index(axis) for axis in order]).flatten().tolist()))


def half_split_heads(heads: int, head_dim: int, parts: int = 1) -> Take:
    """Permutes rotary rows from interleaved pairs to halves (the first of every pair, then the second).

    parts: each head consists of so many equal parts, each with halves of its own.
    """
    size = head_dim // parts
    order = [*range(0, size, 2), *range(1, size, 2)]
    return Take(tuple(part * size + row for part in range(heads * parts) for row in order))


_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a template. A field that occurs twice must match the same text."""
    pattern, end, seen = "", 0, set()
    for found in _FIELD.finditer(template):
        name, words = found[1], found[2]
        pattern += re.escape(template[end : found.start()])
        inner = words or (".+" if name == "rest" else r"\d+" if len(name) == 1 else r"[^.]+")
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{inner})"
        seen.add(name)
        end = found.end()
    return re.compile(pattern + re.escape(template[end:]))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda found: fields[found[1]], template)


class Rule:
    """Native tensors ↔ foreign tensors. One side must be a single tensor.

    Several native tensors are concatenated, then `transforms` apply, then the result is split into equal parts, as many
    as there are foreign tensors.
    """

    def __init__(
        self, native: str | tuple[str, ...], foreign: str | tuple[str, ...], *transforms: Unflatten | Take
    ) -> None:
        self.native = (native,) if isinstance(native, str) else native
        self.foreign = (foreign,) if isinstance(foreign, str) else foreign
        self.transforms = transforms
        assert min(len(self.native), len(self.foreign)) == 1, (native, foreign)
        self._patterns = [_pattern(template) for template in self.native]

    def match(self, name: str) -> dict[str, str] | None:
        """The template's fields if `name` is one of the native names, else None."""
        for pattern in self._patterns:
            if found := pattern.fullmatch(name):
                return found.groupdict()
        return None

    def move(self, fields: Mapping[str, str], shapes: Mapping[str, Shape]) -> Move:
        native = tuple(_fill(template, fields) for template in self.native)
        absent = [name for name in native if name not in shapes]
        assert not absent, f"key map: the model has no {absent}, which go with {native}"
        rows = [shapes[name][0] for name in native] if len(native) > 1 else []
        return Move(native, tuple(_fill(template, fields) for template in self.foreign), self.transforms, rows)


@dataclass(frozen=True)
class Move:
    """A rule applied to a model: these native tensors are those foreign tensors. rows: of several native tensors."""

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    transforms: tuple[Unflatten | Take, ...]
    rows: list[int]

    def to_native(self, read: Read) -> dict[str, Tensor]:
        """The native tensors by name. `read` returns foreign ones."""
        tensor = _joined([read(name) for name in self.foreign])
        for transform in reversed(self.transforms):
            tensor = transform.to_native(tensor)
        return dict(zip(self.native, tensor.split(self.rows) if self.rows else [tensor]))

    def to_foreign(self, read: Read) -> dict[str, Tensor]:
        """The inverse of `to_native`."""
        tensor = _joined([read(name) for name in self.native])
        for transform in self.transforms:
            tensor = transform.to_foreign(tensor)
        return dict(zip(self.foreign, tensor.chunk(len(self.foreign)) if len(self.foreign) > 1 else [tensor]))


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


class KeyMap:
    """How a dialect's names become ours.

    rules: the first that matches counts.
    ignored: templates of foreign names that a file may have and that hold no weights.
    computed: ignored foreign tensors that can be recomputed bit-exactly from the config, so they are written as well.
    absent: native names that the dialect cannot hold; they are not written.
    """

    def __init__(
        self,
        *rules: Rule,
        ignored: tuple[str, ...] = (),
        computed: Mapping[str, Callable[[], Tensor]] | None = None,
        absent: tuple[str, ...] = (),
    ):
        self.rules, self.ignored, self.computed, self.absent = rules, ignored, computed or {}, absent

    def unplaced(self, native: Iterable[str]) -> list[str]:
        """Native names that no rule matches."""
        return [n for n in native if n not in self.absent and all(rule.match(n) is None for rule in self.rules)]

    def foreign(self, native: str) -> str:
        """The foreign name of a native one, the first if there are several; "" if no rule matches it."""
        for rule in self.rules:
            if (fields := rule.match(native)) is not None:
                return _fill(rule.foreign[0], fields)
        return ""

    def table(self, native: Mapping[str, Shape]) -> Table:
        """Applies the rules to a model's tensors. Each tensor takes part exactly once, on both sides."""
        moves: dict[tuple[str, ...], Move] = {}
        for name in native:
            if name in self.absent:
                continue
            for rule in self.rules:
                if (fields := rule.match(name)) is not None:
                    move = rule.move(fields, native)
                    moves[move.native] = move
                    break
            else:
                raise AssertionError(f"key map: no rule for our tensor {name}")
        for side in ("native", "foreign"):
            names = [name for move in moves.values() for name in getattr(move, side)]
            assert len(names) == len(set(names)), (
                f"key map: two rules for {sorted({n for n in names if names.count(n) > 1})}"
            )
        passed_over = tuple(_pattern(template) for template in (*self.ignored, *self.computed))
        return Table(tuple(moves.values()), native, passed_over, self.computed)


@dataclass(frozen=True)
class Differences:
    """How a file's tensors differ from those that a table expects, by foreign name. misshaped: (found, wanted)."""

    missing: list[str]
    unexpected: list[str]
    misshaped: dict[str, tuple[Shape, Shape]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        lines = []
        if self.missing:
            hint = nearest_name(self.missing[0], self.unexpected).replace("Did you mean", "Is it")
            lines.append(f"missing: {abridged(self.missing)}.{hint}")
        if self.unexpected:
            lines.append(f"unexpected: {abridged(self.unexpected)}.")
        if self.misshaped:
            shapes = [f"{name} is {found}, should be {wanted}" for name, (found, wanted) in self.misshaped.items()]
            lines.append(f"misshaped: {abridged(shapes)}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A key map applied to a model: which native tensors are which foreign ones, with all shapes."""

    moves: tuple[Move, ...]
    native_shapes: Mapping[str, Shape]
    ignored: tuple[re.Pattern[str], ...]
    computed: Mapping[str, Callable[[], Tensor]]

    @cached_property
    def foreign_shapes(self) -> dict[str, Shape]:
        empty = self.to_foreign(lambda name: torch.empty(self.native_shapes[name], device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in empty}

    def differences(self, found: Mapping[str, Shape]) -> Differences:
        """Compares names and shapes; no tensor is read."""
        wanted = self.foreign_shapes
        surplus = [name for name in found if name not in wanted]
        return Differences(
            [name for name in wanted if name not in found],
            [name for name in surplus if not any(pattern.fullmatch(name) for pattern in self.ignored)],
            {n: (tuple(found[n]), wanted[n]) for n in wanted if n in found and tuple(found[n]) != wanted[n]},
        )

    def check(self, found: Mapping[str, Shape], place: object, hint: str = "") -> None:
        """Raises StditError that lists the differences. place: the file or folder that it names."""
        if differences := self.differences(found):
            raise StditError(
                f"{place}: the tensors are not those of this model.\n{differences}" + (f"\n{hint}" if hint else "")
            )

    def to_native(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """All (native name, tensor). `read` returns a foreign tensor by name and is called once for each."""
        for move in self.moves:
            yield from move.to_native(read).items()

    def to_foreign(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `to_native`."""
        for move in self.moves:
            yield from move.to_foreign(read).items()

    def native_reader(self, read: Read) -> Read:
        """A function that returns any native tensor by name. It reads its foreign tensors at every call."""
        moves = {name: move for move in self.moves for name in move.native}
        return lambda name: moves[name].to_native(read)[name]

    def foreign_reader(self, read: Read) -> Read:
        """The inverse of `native_reader`."""
        moves = {name: move for move in self.moves for name in move.foreign}
        return lambda name: moves[name].to_foreign(read)[name]


def abridged(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names, and the number of others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
