"""Groups of segments: what is padded, and that rows come back to where they were."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from stdit.models.attention import segment_attention
from stdit.models.groups import group_segments, scatter
from stdit.models.packing import Segments

CPU = torch.device("cpu")


def offsets(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


@pytest.mark.parametrize("worth", [0, 10**6])
def test_rows_come_back_to_their_places(worth: int) -> None:
    lengths = [3, 7, 3, 1, 7, 12]
    groups = group_segments(offsets(lengths), offsets(lengths), worth, CPU)
    assert len(groups) == (1 if worth else 4)
    rows = torch.randn(sum(lengths), 2, 5)
    assert torch.equal(scatter([g.queries.gather(rows) for g in groups], [g.queries for g in groups]), rows)


def test_a_group_is_padded_only_as_far_as_a_call_is_worth() -> None:
    lengths = [100, 90, 10]  # padding 90 to 100 costs 100² − 90² = 1900 pairs, 10 to 100 costs 9900
    sizes = {
        worth: len(group_segments(offsets(lengths), offsets(lengths), worth, CPU)) for worth in (0, 1899, 1900, 9900)
    }
    assert sizes == {0: 3, 1899: 3, 1900: 2, 9900: 1}
    # the keys of all are padded to the most of any: 20 to 50 costs 2 · 100 · 30 pairs, on top of the queries' own
    q, k = offsets([100, 100, 99]), offsets([20, 20, 50])
    cost = (100 - 99) * 50 + 2 * 100 * (50 - 20)
    assert [len(group_segments(q, k, worth, CPU)) for worth in (cost - 1, cost)] == [2, 1]


def test_equal_segments_side_by_side_are_not_copied() -> None:
    (group,) = group_segments(offsets([4, 4]), offsets([4, 4]), 10**6, CPU)
    rows = torch.randn(8, 2, 3)
    assert group.queries.gather(rows).data_ptr() == rows.data_ptr() and group.keys.real is None


@pytest.mark.parametrize("counts", [False, True])
def test_padding_changes_nothing(counts: bool) -> None:
    """Against the backend that writes the products out and pads nothing."""
    torch.manual_seed(0)
    lengths, keys = [96, 16, 80, 64, 64, 5, 1], [9, 3, 12, 7, 9, 5, 1]
    q, k, v = (torch.randn(sum(n), 3, 8, dtype=torch.float64, requires_grad=True) for n in (lengths, keys, keys))
    multiplicity = torch.randint(1, 20, (sum(keys),)).float() if counts else None
    found = []
    for backend in ("naive", "dense"):
        out = segment_attention(q, k, v, Segments.of(lengths), Segments.of(keys), multiplicity, backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for wanted, given in zip(*found):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
