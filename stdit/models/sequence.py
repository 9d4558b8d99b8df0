"""Sequence parallelism: several ranks share every pack (Ulysses, Jacobs et al. 2023, arXiv 2309.14509).

Each rank of a group holds a contiguous range of the pack's tokens and runs the whole model on it. Only self-attention
needs the tokens of the others: one exchange turns a rank's tokens of all heads into all tokens of its share of the
heads, for q, k and v together, and another one brings the output back. Ranges may have any lengths, also 0. Heads are
dealt as evenly as possible: of 12 heads on 8 ranks, four ranks have two; with more ranks than heads some have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import StditError
from stdit.models.config import TransformerConfig


@dataclass(frozen=True)
class SequenceGroup:
    """Consecutive ranks that share every pack."""

    rank: int  # of this process in the group
    size: int
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, size: int) -> SequenceGroup | None:
        """The group of `size` consecutive ranks that this rank belongs to; None for a size of 1. All ranks call it."""
        if size == 1:
            return None
        group, _ = dist.new_subgroups(size)
        return cls(dist.get_rank() % size, size, group)

    def shares(self, count: int) -> list[int]:
        """Deals `count` things to the ranks in order, as evenly as possible."""
        return [count * (rank + 1) // self.size - count * rank // self.size for rank in range(self.size)]

    def own(self, count: int) -> range:
        """Which of `count` things are this rank's."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def exchange(self, numbers: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends the first `sent[0]` numbers to rank 0 of the group, the next `sent[1]` to rank 1, and so on.

        Returns what the ranks sent to this one, `received[0]` numbers of rank 0 first. numbers: flat.
        """
        result = numbers.new_empty(sum(received))
        dist.all_to_all_single(result, numbers, list(received), list(sent), group=self.process_group)
        return result


def gather_tokens(group: SequenceGroup, tokens: Sequence[int], *values: Tensor) -> tuple[Tensor, ...]:
    """All tokens of this rank's share of the heads, in one exchange; differentiable.

    tokens: how many each rank of the group holds, N in all. values: (n, H, d) each. Returns (N, h, d) each.
    """
    there, back = partial(_to_heads, group, tokens), partial(_to_tokens, group, tokens, values[0].shape[1])
    return _Exchange.apply(there, back, *values)


def gather_heads(group: SequenceGroup, tokens: Sequence[int], heads: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Undoes `gather_tokens`: (N, h, d) each of this rank's share of the heads to (n, H, d) of its tokens.

    heads: H.
    """
    there, back = partial(_to_tokens, group, tokens, heads), partial(_to_heads, group, tokens)
    return _Exchange.apply(there, back, *values)


class _Exchange(torch.autograd.Function):
    """An exchange moves every number to one place, so the derivative moves it back."""

    @staticmethod
    def forward(ctx: Any, there: Callable, back: Callable, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        return there(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.back(grads)


def _to_heads(group: SequenceGroup, tokens: Sequence[int], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    x = torch.stack([value.transpose(0, 1) for value in values], dim=1)  # (H, V, n, d): by receiver, contiguous
    heads, (_, count, _, d) = group.shares(len(x)), x.shape
    mine = heads[group.rank]
    sent = [share * count * tokens[group.rank] * d for share in heads]
    received = [mine * count * share * d for share in tokens]
    parts = group.exchange(x.flatten(), sent, received).split(received)
    views = [part.view(mine, count, share, d).permute(1, 2, 0, 3) for part, share in zip(parts, tokens)]
    return torch.cat(views, dim=1).unbind()  # of (V, N, h, d)


def _to_tokens(group: SequenceGroup, tokens: Sequence[int], heads: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    count, own, d = len(values), tokens[group.rank], values[0].shape[2]
    ranges = zip(*(value.split(list(tokens)) for value in values))  # by receiver
    parts = [torch.stack([part.transpose(0, 1) for part in given], dim=1) for given in ranges]  # (h, V, n of it, d)
    received = [share * count * own * d for share in group.shares(heads)]
    flat = torch.cat([part.flatten() for part in parts])
    x = group.exchange(flat, [part.numel() for part in parts], received).view(heads, count, own, d)
    return tuple(value.transpose(0, 1) for value in x.unbind(1))  # (n, H, d) each


def check_shareable(config: TransformerConfig) -> None:
    """Raises StditError for networks whose packs ranks cannot share."""
    if config.compressed:
        raise StditError(
            f"weights that compress keys ({config.family}, 2K) merge tokens of whole frames, so ranks cannot share "
            f"their packs. Set parallel.sequence_parallel=1."
        )
