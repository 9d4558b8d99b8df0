from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from stdit.keyed import keyed_generator, keyed_seed, keyed_uniform

keys = st.tuples(st.integers(), st.text(max_size=5), st.integers() | st.text(max_size=5))


def test_seed_is_sha256_of_the_typed_key():
    digest = hashlib.sha256(b"int:7\x1fstr:noise\x1fint:3\x1fstr:clip").digest()
    assert keyed_seed(7, "noise", 3, "clip") == int.from_bytes(digest[:8], "little") // 2


@given(keys, keys)
def test_other_keys_give_other_seeds(one, other):
    one, other = (tuple((type(part), part) for part in key) for key in (one, other))
    seeds = [keyed_seed(*(part for _, part in key)) for key in (one, other)]
    assert (seeds[0] == seeds[1]) == (one == other)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_types_and_places_are_part_of_the_key():
    calls = [(1, "a", 2), (1, "a", "2"), (2, "a", 1), (1, "a", 2, 0), (1, "a"), (12, "a")]
    assert len({keyed_seed(*call) for call in calls}) == len(calls)


def test_the_same_in_another_process():
    code = "from stdit.keyed import keyed_seed; print(keyed_seed(5, 'crop', 1, 'clip', 0))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert int(out.stdout) == keyed_seed(5, "crop", 1, "clip", 0)


def test_uniform_is_uniform():
    draws = np.array([keyed_uniform(0, "level", epoch, clip) for epoch in range(40) for clip in range(500)])
    assert draws.min() >= 0 and draws.max() < 1
    observed, _ = np.histogram(draws, bins=100, range=(0, 1))
    assert scipy.stats.chisquare(observed).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03  # neighbouring keys are independent


def test_generator_draws_only_by_its_key():
    def noise(*key):
        return torch.randn(2000, generator=keyed_generator(0, "noise", *key))

    first = noise(3, "clip")
    torch.manual_seed(1)
    assert torch.equal(first, noise(3, "clip"))
    others = [noise(3, "clip2"), noise(4, "clip"), torch.randn(2000, generator=keyed_generator(0, "crop", 3, "clip"))]
    for one, other in itertools.combinations([first, *others], 2):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.1
    assert scipy.stats.kstest(first.numpy(), "norm").pvalue > 1e-3
