"""Declarative key maps: how one dialect's tensors become our own, and back, bit for bit.

A `KeyMap` is a list of rules between *native* names (ours) and *foreign* ones (another program's). It is only read from
the native side: our names and shapes give the foreign ones, so both directions, and every check, come from one `Table`:

    keymap = KeyMap(
        Rule("blocks.{i}.self_attn.{p:q|k|v}.{leaf}", "blocks.{i}.attn1.to_{p}.{leaf}"),       # a rename
        Rule("patch_embedding.weight", "patch_embedding.weight", Unflatten(1, (16, 1, 2, 2))),    # Linear to Conv3d
        Rule(("a.q.{leaf}", "a.k.{leaf}"), "a.qk.{leaf}"),                                        # fused over there
        Rule("a.kv.{leaf}", ("a.k.{leaf}", "a.v.{leaf}")),                                        # split over there
        ignored=("accum_{rest}",),                                   # over there, may be present, holds no weights
        computed={"rope.freqs": frequencies},                        # the same, and written back: a function gives it
    )
    table = keymap.table({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    table.check(shapes_in_the_file, place="model.safetensors")          # before a single tensor is read
    native = dict(table.to_native(read_foreign))                        # read_foreign: name -> tensor
    foreign = dict(table.to_foreign(native.__getitem__))

In a template `{i}` (one letter) stands for a number, `{leaf}` (any longer name) for one part of a name without a dot,
`{p:q|k|v}` for one of these words, and `{rest}` for anything, dots included. The first rule that matches a native name
is the one that counts. Rules that depend on sizes are built by a function of the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from stdit.errors import StditError, nearest_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]


class Step(Protocol):
    """One reversible move of a tensor's elements, told from the native side."""

    def shape(self, native: Shape) -> Shape: ...

    def to_foreign(self, tensor: Tensor) -> Tensor: ...

    def to_native(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Unflatten:
    """One native dimension is several foreign ones: a Linear over (c, pt, ph, pw) is a Conv3d's flattened weight."""

    dim: int
    sizes: Shape

    def shape(self, native: Shape) -> Shape:
        return (*native[: self.dim], *self.sizes, *native[self.dim + 1 :])

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(self.dim, self.sizes)

    def to_native(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.dim, self.dim + len(self.sizes) - 1)


@dataclass(frozen=True)
class Flatten:
    """Several native dimensions, from `dim` on and of these sizes, are one foreign one."""

    dim: int
    sizes: Shape

    def shape(self, native: Shape) -> Shape:
        end = self.dim + len(self.sizes)
        assert native[self.dim : end] == self.sizes, f"{self} of {native}"
        return (*native[: self.dim], math.prod(self.sizes), *native[end:])

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.dim, self.dim + len(self.sizes) - 1)

    def to_native(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(self.dim, self.sizes)


@dataclass(frozen=True)
class Permute:
    """Foreign dimension k is native dimension `dims[k]`."""

    dims: Shape

    def shape(self, native: Shape) -> Shape:
        return tuple(native[dim] for dim in self.dims)

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.dims)

    def to_native(self, tensor: Tensor) -> Tensor:
        return tensor.permute([self.dims.index(dim) for dim in range(len(self.dims))])


@dataclass(frozen=True)
class Take:
    """Foreign entry k along `dim` is native entry `index[k]`; the index is a permutation of all entries."""

    index: Shape
    dim: int = 0

    def shape(self, native: Shape) -> Shape:
        return native

    def to_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.dim, tensor.new_tensor(self.index, dtype=_int64()))

    def to_native(self, tensor: Tensor) -> Tensor:
        back = sorted(range(len(self.index)), key=self.index.__getitem__)
        return tensor.index_select(self.dim, tensor.new_tensor(back, dtype=_int64()))


def output_order(patch: Shape, channels: int, order: str) -> Take:
    """Rows of a head in our order (t, h, w, c) of a patch's frames, rows, columns and channels, there in `order`."""
    sizes = dict(zip("thwc", (*patch, channels)))
    strides = {axis: math.prod(list(sizes.values())[place + 1 :]) for place, axis in enumerate(sizes)}
    rows = [0]
    for axis in order:
        rows = [row + step * strides[axis] for row in rows for step in range(sizes[axis])]
    return Take(tuple(rows))


def _int64():
    import torch

    return torch.int64


def half_split_heads(heads: int, head_dim: int, parts: int = 1) -> Take:
    """Interleaved rotary rows here, half-split rotary rows (first halves, then second halves of the pairs) there.

    parts: how many equal parts of a head are split in halves on their own.
    """
    size = head_dim // parts
    order = [*range(0, size, 2), *range(1, size, 2)]
    return Take(tuple(part * size + row for part in range(heads * parts) for row in order))


_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def _pattern(template: str) -> str:
    """A template as a regular expression over whole names; a field named twice must be the same both times."""
    pattern, end, seen = "", 0, set()
    for found in _FIELD.finditer(template):
        name, words = found[1], found[2]
        pattern += re.escape(template[end : found.start()])
        inner = words or (".+" if name == "rest" else r"\d+" if len(name) == 1 else r"[^.]+")
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{inner})"
        seen.add(name)
        end = found.end()
    return pattern + re.escape(template[end:])


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda found: fields[found[1]], template)


class Rule:
    """Native tensors ↔ foreign tensors: concatenated along `dim` on the side that has several, then moved by `steps`.

    Several foreign tensors are equal parts of the joined one. One side must be a single tensor.
    """

    def __init__(self, native: str | tuple[str, ...], foreign: str | tuple[str, ...], *steps: Step, dim: int = 0):
        self.native = (native,) if isinstance(native, str) else native
        self.foreign = (foreign,) if isinstance(foreign, str) else foreign
        self.steps, self.dim = steps, dim
        assert min(len(self.native), len(self.foreign)) == 1, (native, foreign)
        self._patterns = [re.compile(_pattern(template)) for template in self.native]

    def match(self, name: str) -> dict[str, str] | None:
        """The template's fields where `name` is one of the native names, else None."""
        for pattern in self._patterns:
            if found := pattern.fullmatch(name):
                return found.groupdict()
        return None

    def move(self, fields: Mapping[str, str], shapes: Mapping[str, Shape]) -> Move:
        native = tuple(_fill(template, fields) for template in self.native)
        foreign = tuple(_fill(template, fields) for template in self.foreign)
        absent = [name for name in native if name not in shapes]
        assert not absent, f"key map: the model has no {absent}, which go with {native}"
        sizes = tuple(shapes[name][self.dim] if len(native) > 1 else 0 for name in native)
        shape = shapes[native[0]]
        if len(native) > 1:
            shape = (*shape[: self.dim], sum(sizes), *shape[self.dim + 1 :])
        for step in self.steps:
            assert len(shape) > 0 and math.prod(step.shape(shape)) == math.prod(shape), f"{native}: {step} of {shape}"
            shape = step.shape(shape)
        if len(foreign) > 1:
            assert shape[self.dim] % len(foreign) == 0, f"{native}: {shape} in {len(foreign)} parts"
            shape = (*shape[: self.dim], shape[self.dim] // len(foreign), *shape[self.dim + 1 :])
        return Move(self, native, foreign, sizes, shape)


@dataclass(frozen=True)
class Move:
    """A rule applied to particular names: these native tensors are those foreign ones."""

    rule: Rule
    native: tuple[str, ...]
    foreign: tuple[str, ...]
    native_sizes: tuple[int, ...]
    foreign_shape: Shape

    def to_native(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensor = _join(tensors, self.rule.dim)
        for step in reversed(self.rule.steps):
            tensor = step.to_native(tensor)
        return [tensor] if len(self.native) == 1 else list(tensor.split(self.native_sizes, self.rule.dim))

    def to_foreign(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensor = _join(tensors, self.rule.dim)
        for step in self.rule.steps:
            tensor = step.to_foreign(tensor)
        return [tensor] if len(self.foreign) == 1 else list(tensor.chunk(len(self.foreign), self.rule.dim))


class KeyMap:
    """Rules, first match wins; the foreign names that may be there and hold no weights (`ignored` templates); those of
    them that a config tells to the last bit, so that they are written too (`computed`); the native names that have no
    place there and are left out of what is written (`absent`)."""

    def __init__(
        self,
        *rules: Rule,
        ignored: tuple[str, ...] = (),
        computed: Mapping[str, Callable[[], Tensor]] | None = None,
        absent: tuple[str, ...] = (),
    ):
        self.rules, self.ignored, self.computed, self.absent = rules, ignored, computed or {}, absent

    def unplaced(self, native: Iterable[str]) -> list[str]:
        """Our names that no rule is for."""
        return [n for n in native if n not in self.absent and all(rule.match(n) is None for rule in self.rules)]

    def table(self, native: Mapping[str, Shape]) -> Table:
        """Applies the rules to a model's tensors. Every native tensor that is not `absent` takes part
        once; so does every foreign one."""
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
        passed_over = tuple(re.compile(_pattern(template)) for template in (*self.ignored, *self.computed))
        return Table(tuple(moves.values()), passed_over, self.computed)


@dataclass(frozen=True)
class Differences:
    """What a file holds against what a table wants, in foreign names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # name: (found, wanted)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        lines = []
        if self.missing:
            hint = (
                nearest_name(self.missing[0], self.unexpected).replace("Did you mean", "Is it")
                if self.unexpected
                else ""
            )
            lines.append(f"missing: {_list(self.missing)}.{hint}")
        if self.unexpected:
            lines.append(f"unexpected: {_list(self.unexpected)}.")
        if self.misshaped:
            shapes = [f"{name} is {found}, should be {wanted}" for name, (found, wanted) in self.misshaped.items()]
            lines.append(f"misshaped: {_list(shapes)}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A key map applied to one model: which native tensors are which foreign ones, with all shapes."""

    moves: tuple[Move, ...]
    ignored: tuple[re.Pattern[str], ...] = ()
    computed: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    @cached_property
    def foreign_shapes(self) -> dict[str, Shape]:
        return {name: move.foreign_shape for move in self.moves for name in move.foreign}

    def differences(self, found: Mapping[str, Shape]) -> Differences:
        """Compares names and shapes only, so it costs nothing and can be asked of any file."""
        wanted = self.foreign_shapes
        surplus = [name for name in found if name not in wanted]
        return Differences(
            [name for name in wanted if name not in found],
            [name for name in surplus if not any(pattern.fullmatch(name) for pattern in self.ignored)],
            {n: (tuple(found[n]), wanted[n]) for n in wanted if n in found and tuple(found[n]) != wanted[n]},
        )

    def check(self, found: Mapping[str, Shape], place: object, hint: str = "") -> None:
        """Raises StditError that names every kind of difference, and the file or folder `place`."""
        if differences := self.differences(found):
            raise StditError(
                f"{place}: the tensors are not those of this model.\n{differences}" + (f"\n{hint}" if hint else "")
            )

    def to_native(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(native name, tensor) of everything; `read` gives a foreign tensor by name, each one once."""
        for move in self.moves:
            yield from zip(move.native, move.to_native([read(name) for name in move.foreign]))

    def native_reader(self, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """A function that gives any one native tensor by name, reading (again) what it is made of."""
        moves = {name: move for move in self.moves for name in move.native}

        def read_native(name: str) -> Tensor:
            move = moves[name]
            return move.to_native([read(foreign) for foreign in move.foreign])[move.native.index(name)]

        return read_native

    def written(
        self, read: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, tuple[torch.dtype, Shape]], Callable[[str], Tensor]]:
        """What a file of this dialect holds, computed tensors too: dtypes and shapes by foreign name, and a function
        that gives any one by name, reading (again) what it is made of.

        read and dtypes are of the native tensors; what is computed has the dtype of the first of them.
        """
        moves = {name: move for move in self.moves for name in move.foreign}
        entries = {name: (dtypes[move.native[0]], move.foreign_shape) for name, move in moves.items()}
        first = next(iter(entries.values()))[0]
        made = {name: make().to(first) for name, make in self.computed.items()}
        entries |= {name: (first, tuple(tensor.shape)) for name, tensor in made.items()}

        def read_foreign(name: str) -> Tensor:
            if name in made:
                return made[name]
            move = moves[name]
            return move.to_foreign([read(native) for native in move.native])[move.foreign.index(name)]

        return entries, read_foreign

    def to_foreign(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(foreign name, tensor) of everything; `read` gives a native tensor by name, each one once."""
        for move in self.moves:
            yield from zip(move.foreign, move.to_foreign([read(name) for name in move.native]))


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    import torch

    return torch.cat(list(tensors), dim)


def _list(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
