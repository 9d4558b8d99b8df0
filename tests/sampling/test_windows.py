from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from stdit.sampling.windows import Windows


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize(("frames", "length"), [(4, 4), (4, 6), (6, 4), (20, 6), (16, 4), (22, 4)])
def test_windows_cover_a_clip_in_order_and_overlap(frames, length, patch):
    spans = Windows(frames, length, patch).spans
    assert spans[0][0] == 0 and spans[-1][1] == frames and len(set(spans)) == len(spans)
    assert all(start % patch == 0 and stop - start == min(length, frames) for start, stop in spans)
    assert all(before[1] > after[0] > before[0] for before, after in pairwise(spans))


def test_parts_of_one_clip_are_mixed_to_it_again():
    windows = Windows(11, 4)
    clip = torch.randn(3, 11, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(windows.mix([clip[:, start:stop] for start, stop in windows.spans]), clip)


def test_where_two_overlap_the_one_whose_middle_is_nearer_weighs_more():
    mixed = Windows(6, 4).mix([torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)]).flatten()
    assert mixed.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])
