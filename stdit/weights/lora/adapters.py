"""Adapters (LoRA; Hu et al. 2022), and their exact conversion between dialects.

An adapter is kept under our names. A key map converts it like the weights: B's rows (`up`) like a weight's rows, A's
columns (`down`) like its columns. If a dialect fuses several of our weights, its pair is split into pairs that share A;
in the other direction A is stacked and B is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.weights.keymap import Move, Table, Take


@dataclass(frozen=True)
class Pair:
    """Adds alpha / rank · B·A to a weight (out, in…). down: A, (rank, in…). up: B, (out, rank)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """pairs: by the name of the weight. differences: whole tensors to add, by name."""

    pairs: dict[str, Pair]
    differences: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def merge(model: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Adds adapters, each times its strength, to a model's weights in place. Computes in fp32 (fp64 for fp64 weights)
    and rounds once to the weights' dtype."""
    tensors = model.state_dict()  # the model's own memory
    for name in dict.fromkeys(name for adapter, _ in adapters for name in (*adapter.pairs, *adapter.differences)):
        weight = tensors[name]
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter, strength in adapters:
            if (pair := adapter.pairs.get(name)) is not None:
                product = pair.up.to(total) @ pair.down.to(total).flatten(1)
                total += product.view(total.shape) * (pair.scale * strength)
            if (difference := adapter.differences.get(name)) is not None:
                total += difference.to(total) * strength
        weight.copy_(total)


def to_native(adapter: Adapter, table: Table) -> Adapter:
    """Renames an adapter from another dialect, whose names the table has, to ours."""
    return _moved(adapter, table, back=True)


def to_foreign(adapter: Adapter, table: Table) -> Adapter:
    """The inverse of `to_native`."""
    return _moved(adapter, table, back=False)


def _moved(adapter: Adapter, table: Table, back: bool) -> Adapter:
    pairs: dict[str, Pair] = {}
    differences: dict[str, Tensor] = {}
    for move in table.moves:
        foreign_sizes = (move.foreign_shape[move.rule.dim] if move.foreign_shape else 1,) * len(move.foreign)
        sides = (move.native, move.native_sizes), (move.foreign, foreign_sizes)
        (given, given_sizes), (wanted, wanted_sizes) = reversed(sides) if back else sides
        if any(name in adapter.pairs for name in given):
            pair = _join([adapter.pairs.get(name) for name in given], given_sizes)
            parts = _split(_transformed(pair, move, back), wanted_sizes)
            pairs |= {name: part for name, part in zip(wanted, parts) if part is not None}
        if any(name in adapter.differences for name in given):
            whole = _zero_filled([adapter.differences.get(name) for name in given], given_sizes, move.rule.dim)
            differences |= zip(wanted, move.to_native(whole) if back else move.to_foreign(whole))
    return Adapter(pairs, differences)


def _transformed(pair: Pair, move: Move, back: bool) -> Pair:
    """Applies the rule's transforms: those of a weight's rows to B, those of its columns to A."""
    down, up = pair.down, pair.up
    for transform in reversed(move.rule.transforms) if back else move.rule.transforms:
        apply = transform.to_native if back else transform.to_foreign
        if transform.dim > 0:
            down = apply(down)
        elif isinstance(transform, Take):
            up = apply(up)
        else:
            raise StditError(f"{move.native[0]} is no weight of a linear layer or a convolution: no LoRA fits it.")
    return Pair(down, up, pair.alpha)


def _join(pairs: Sequence[Pair | None], sizes: Sequence[int]) -> Pair:
    """One pair for stacked weights of `sizes` rows. None: nothing is added to that weight."""
    there = [pair for pair in pairs if pair is not None]
    first = there[0]
    if len(pairs) == 1:
        return first
    if len(there) == len(pairs) and all(
        pair.alpha == first.alpha and torch.equal(pair.down, first.down) for pair in there
    ):
        return Pair(first.down, torch.cat([pair.up for pair in there]), first.alpha)
    rank = sum(pair.rank for pair in there)
    up = first.up.new_zeros(sum(sizes), rank)
    row = column = 0
    for pair, size in zip(pairs, sizes):
        if pair is not None:
            up[row : row + size, column : column + pair.rank] = pair.up * (pair.scale / first.scale)
            column += pair.rank
        row += size
    return Pair(torch.cat([pair.down for pair in there]), up, first.scale * rank)


def _split(pair: Pair, sizes: Sequence[int]) -> list[Pair | None]:
    """Pairs for weights of `sizes` rows that share A, without the rows of A that a weight's part of B does not use: so
    a pair that `_join` stacked comes apart again. None: nothing is added to that weight."""
    if len(sizes) == 1:
        return [pair]
    parts: list[Pair | None] = []
    for up in pair.up.split(list(sizes)):
        used = up.any(0)
        part = Pair(pair.down, up, pair.alpha)
        if not used.all():
            part = Pair(pair.down[used], up[:, used], pair.scale * int(used.sum()))
        parts.append(part if used.any() else None)
    if not any(parts):  # B is zero, as when training starts
        return [Pair(pair.down, up, pair.alpha) for up in pair.up.split(list(sizes))]
    return parts


def _zero_filled(tensors: Sequence[Tensor | None], sizes: Sequence[int], dim: int) -> list[Tensor]:
    like = next(tensor for tensor in tensors if tensor is not None)
    shapes = [(*like.shape[:dim], size, *like.shape[dim + 1 :]) for size in sizes]
    return [like.new_zeros(shape) if tensor is None else tensor for tensor, shape in zip(tensors, shapes)]
