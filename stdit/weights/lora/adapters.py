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


def converted(adapter: Adapter, table: Table, back: bool = False) -> Adapter:
    """Renames an adapter from our names to those of a dialect, which the table has. back: the inverse."""
    pairs: dict[str, Pair] = {}
    differences: dict[str, Tensor] = {}
    for move in table.moves:
        native = {name: table.native_shapes[name] for name in move.native}
        foreign = {name: table.foreign_shapes[name] for name in move.foreign}
        given, wanted = (foreign, native) if back else (native, foreign)
        if any(name in adapter.pairs for name in given):
            pair = _join([adapter.pairs.get(name) for name in given], [shape[0] for shape in given.values()])
            parts = _split(_transformed(pair, move, back), [shape[0] for shape in wanted.values()])
            pairs |= {name: part for name, part in zip(wanted, parts) if part is not None}
        if there := [adapter.differences[name] for name in given if name in adapter.differences]:
            whole = {name: there[0].new_zeros(shape) for name, shape in given.items()} | adapter.differences
            differences |= move.to_native(whole.__getitem__) if back else move.to_foreign(whole.__getitem__)
    return Adapter(pairs, differences)


def _transformed(pair: Pair, move: Move, back: bool) -> Pair:
    """Applies the rule's transforms: those of a weight's rows to B, those of its columns to A."""
    down, up = pair.down, pair.up
    for transform in reversed(move.transforms) if back else move.transforms:
        apply = transform.to_native if back else transform.to_foreign
        if transform.dim > 0:
            down = apply(down)
        elif isinstance(transform, Take):
            up = apply(up)
        else:
            raise StditError(f"{move.native[0]} is no weight of a linear layer or a convolution: no LoRA fits it.")
    return Pair(down, up, pair.alpha)


def _join(pairs: Sequence[Pair | None], rows: Sequence[int]) -> Pair:
    """One pair for stacked weights of so many rows each. None: nothing is added to that weight."""
    there = [pair for pair in pairs if pair is not None]
    first = there[0]
    if len(pairs) == 1:
        return first
    if len(there) == len(pairs) and all(
        pair.alpha == first.alpha and torch.equal(pair.down, first.down) for pair in there
    ):
        return Pair(first.down, torch.cat([pair.up for pair in there]), first.alpha)
    blocks = [
        first.up.new_zeros(count, 0) if pair is None else pair.up * (pair.scale / first.scale)
        for pair, count in zip(pairs, rows)
    ]
    down = torch.cat([pair.down for pair in there])
    return Pair(down, torch.block_diag(*blocks), first.scale * len(down))


def _split(pair: Pair, rows: Sequence[int]) -> list[Pair | None]:
    """Pairs for weights of so many rows each that share A, without the rows of A that a weight's part of B does not
    use: so a pair that `_join` stacked comes apart again. None: nothing is added to that weight."""
    if len(rows) == 1:
        return [pair]
    parts: list[Pair | None] = []
    for up in pair.up.split(list(rows)):
        used = up.any(0)
        if used.all() or not pair.up.any():  # B is zero when training starts
            parts.append(Pair(pair.down, up, pair.alpha))
        elif used.any():
            parts.append(Pair(pair.down[used], up[:, used], pair.scale * int(used.sum())))
        else:
            parts.append(None)
    return parts
