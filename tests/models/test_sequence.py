"""A pack that several ranks share against the same pack on one rank: outputs and gradients in fp64.

Ranks are threads here, and processes in one test, which exchange by gloo.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Child, finish_together
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_packs import CONFIGS, LIMIT, PACKS, STAYS, WAN, joined, of_part, of_whole, random_model
from thread_group import ThreadGroup, run_together
from torch import Tensor

from stdit.errors import StditError
from stdit.models.operators import Recompute, RecomputeKind
from stdit.models.sequence import SequenceGroup, check_shareable, gather_heads, gather_tokens

WORKER = Path(__file__).with_name("sequence_worker.py")
CLOSE = 1e-12


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    one, other = (torch.cat([part.detach().flatten() for part in parts]) for parts in (found, expected))
    return float((one - other).norm() / other.norm())


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_even_and_all_there_is(count: int, ranks: int) -> None:
    shares = SequenceGroup(0, ranks).shares(count)
    assert len(shares) == ranks and sum(shares) == count and max(shares) - min(shares) <= 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=4), st.integers(1, 9), st.integers(1, 3))
def test_exchanges_move_tokens_to_heads_and_back(tokens: list[int], heads: int, count: int) -> None:
    """Ranges of any lengths, and heads that do not divide, or are too few for the ranks."""
    total = sum(tokens)
    whole = [torch.randn(total, heads, 2) for _ in range(count)]

    def work(group: ThreadGroup) -> None:
        mine = [x.split(tokens)[group.rank].requires_grad_() for x in (x.clone() for x in whole)]
        gathered = gather_tokens(group, tokens, *mine)
        share = group.shares(heads)
        for found, x in zip(gathered, whole):
            assert torch.equal(found, x.split(share, dim=1)[group.rank])
        back = gather_heads(group, tokens, heads, *gathered)
        assert all(torch.equal(found, x) for found, x in zip(back, mine))
        grads = torch.autograd.grad([(b * n).sum() for n, b in enumerate(back, 1)], mine)
        assert all(torch.equal(grad, torch.full_like(grad, n)) for n, grad in enumerate(grads, 1))
        # What goes to others is all of this rank's tokens but for its own heads, and all of its heads but its tokens.
        own, numbers = tokens[group.rank] * share[group.rank], count * 2
        there = numbers * (tokens[group.rank] * heads - own)
        again = numbers * (total * share[group.rank] - own)
        assert group.__dict__["sent"] == [there, again, there, again]

    run_together(len(tokens), work)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("clips", PACKS)
def test_ranks_compute_what_one_computes(clips: str, ranks: int) -> None:
    """4 heads on 2 and 4 ranks, unevenly on 3, and on 6, where two have none; a pack of one token on all of these."""
    model, pack = random_model(WAN), joined(WAN, PACKS[clips])
    out, grads = of_whole(model, pack)
    parts = run_together(ranks, lambda group: of_part(model, pack, group))
    assert relative([part for part, _ in parts], [out]) <= CLOSE
    assert relative([torch.stack(same).sum(0) for same in zip(*(g for _, g in parts))], grads) <= CLOSE


@pytest.mark.parametrize("recompute", ["none", "attention"])
@pytest.mark.parametrize("name", CONFIGS)
def test_other_settings_and_families_too(name: str, recompute: RecomputeKind) -> None:
    """Conditions of each clip, positions added to tokens, modulation by clip, attention within frames and over time;
    blocks computed again in backward."""
    model, pack = random_model(CONFIGS[name]), joined(CONFIGS[name], PACKS["seven clips"])
    model.recompute = Recompute.of(recompute)
    out, grads = of_whole(model, pack)
    check_shareable(model.config)
    parts = run_together(3, lambda group: of_part(model, pack, group))
    assert relative([part for part, _ in parts], [out]) <= CLOSE
    assert relative([torch.stack(same).sum(0) for same in zip(*(g for _, g in parts))], grads) <= CLOSE


@pytest.mark.parametrize("stays", STAYS)
def test_tokens_that_skip_blocks(stays: str) -> None:
    """few: a rank, or a clip on a rank, has none that stay."""
    model, pack = random_model(WAN), joined(WAN, PACKS["seven clips"])
    pack = replace(pack, stays=STAYS[stays](pack))
    out, grads = of_whole(model, pack)
    parts = run_together(4, lambda group: of_part(model, pack, group))
    assert relative([part for part, _ in parts], [out]) <= CLOSE
    assert relative([torch.stack(same).sum(0) for same in zip(*(g for _, g in parts))], grads) <= CLOSE
    assert relative([out], [of_whole(model, replace(pack, stays=None))[0]]) > 1e-3


def test_processes_compute_what_one_computes() -> None:
    """Three ranks by gloo, for which neither 4 heads nor the tokens divide."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [environment | {"RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    children = [Child([sys.executable, str(WORKER)], one) for one in ranks]
    finish_together(children, LIMIT)
    assert "3 ranks: equal" in children[0].output


def test_networks_whose_packs_cannot_be_shared_are_refused() -> None:
    with pytest.raises(StditError, match=r"compress keys \(pixart, 2K\).*sequence_parallel=1"):
        check_shareable(replace(CONFIGS["pixart"], compressed=(1,), compression=2, family="pixart"))
    check_shareable(CONFIGS["pixart"])
