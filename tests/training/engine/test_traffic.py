"""What ranks that share packs send, counted and worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from stdit.models.sequence import SequenceGroup, gather_heads, gather_tokens
from stdit.training.engine.traffic import TRAFFIC, _counted


@pytest.mark.parametrize(
    ("heads", "tokens"), [(4, (6, 6)), (3, (6, 6)), (4, (5, 0, 7)), (12, (3,) * 8), (2, (1, 1, 1))]
)
def test_ranks_that_share_a_pack_send_all_but_their_own_part(
    monkeypatch: pytest.MonkeyPatch, heads: int, tokens: tuple[int, ...]
) -> None:
    """Each sends q, k and v of its tokens for the heads of others, and outputs of its heads for others' tokens."""
    size, d = len(tokens), 5

    def exchanged(*arguments: Any, **named: Any) -> None:
        """Nothing arrives: the counter sees what leaves."""

    monkeypatch.setattr(dist, "all_to_all_single", _counted("all_to_all_single", exchanged))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)
    TRAFFIC.take()
    for rank in range(size):
        monkeypatch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
        group = SequenceGroup(rank, size)
        own = len(group.own(heads))
        gather_tokens(group, tokens, *torch.zeros(3, tokens[rank], heads, d))
        seen = TRAFFIC.take()
        assert (seen.calls, seen.sent) == (1, 4 * 3 * tokens[rank] * d * (heads - own))
        gather_heads(group, tokens, heads, torch.zeros(sum(tokens), own, d))
        assert TRAFFIC.take().sent == 4 * own * d * (sum(tokens) - tokens[rank])
