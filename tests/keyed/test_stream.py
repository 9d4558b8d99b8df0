"""Streams against numpy's Philox, Random123's known answers, and the formula of Box and Muller in Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from stdit.keyed import keyed_generator, keyed_seed
from stdit.keyed.stream import KeyedStream, keyed_stream, philox

KEYS = st.integers(0, 2**128 - 1)
PLACES = st.integers(0, 2**40)


def unsigned(words: torch.Tensor) -> list[int]:
    return [word % 2**64 for word in words.tolist()]


def test_words_are_random123s_known_answer() -> None:
    """philox4x64 10 of kat_vectors in D. E. Shaw Research's Random123: counter 0, key 0."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert unsigned(KeyedStream(0).words(0, 4)) == known
    assert unsigned(philox(0, 0, 1)) == known


@given(KEYS, PLACES, st.integers(1, 9))
def test_in_torch_they_are_numpys(key: int, first: int, blocks: int) -> None:
    generator = np.random.Philox(key=key)  # numpy draws the block of counter 1 first
    generator.advance(first)
    expected = generator.random_raw(4 * blocks)
    begin, end = first + 1, first + 1 + blocks
    for words in (philox(key, begin, end), KeyedStream(key).words(4 * begin, 4 * end)):
        assert np.array_equal(words.numpy().view(np.uint64), expected)


@given(KEYS, st.integers(0, 200_000), st.integers(0, 70_000))
def test_a_range_alone_is_that_range_of_the_whole(key: int, start: int, count: int) -> None:
    """Bit for bit, and across the chunks in which numbers are made."""
    stream = KeyedStream(key)
    before = start // 3
    for draw in (stream.words, stream.uniform, stream.normal):
        part = draw(start, start + count)
        assert part.shape == (count,)
        assert torch.equal(part, draw(before, start + count + 5)[start - before :][:count])


def test_numbers_are_box_and_mullers_of_the_words() -> None:
    stream = KeyedStream(2**127 + 5)
    normal, uniform = [], []
    for word in unsigned(stream.words(0, 500)):
        u, v = ((half + 0.5) / 2**32 for half in (word >> 32, word % 2**32))
        uniform += [u, v]
        normal += [math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * v) for turn in (math.cos, math.sin)]
    for found, expected in ((stream.normal(0, 1000), normal), (stream.uniform(0, 1000), uniform)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2**-24, atol=1e-15)


def test_numbers_are_normal_and_independent() -> None:
    streams = [keyed_stream(seed, purpose, "clip") for seed in (0, 1) for purpose in ("noise", "other")]
    draws = [stream.normal(0, 200_000).double() for stream in streams]
    for draw in draws:
        assert scipy.stats.kstest(draw.numpy(), "norm").pvalue > 1e-4
        assert abs(float((draw**4).mean()) - 3) < 0.1  # σ of it is 0.022
        for lag in (1, 2, 8):
            assert abs(float((draw[lag:] * draw[:-lag]).mean())) < 5 / 200_000**0.5
    for one, other in itertools.combinations(draws, 2):
        assert abs(float((one * other).mean())) < 5 / 200_000**0.5
    assert scipy.stats.kstest(streams[0].uniform(0, 200_000).numpy(), "uniform").pvalue > 1e-4


def test_every_bit_of_the_key_counts() -> None:
    keys = [0, *(1 << bit for bit in range(128))]
    assert len({tuple(KeyedStream(key).words(0, 4).tolist()) for key in keys}) == 129


def test_a_generator_of_torch_has_32_bits_of_its_seed() -> None:
    """What `keyed_generator` says of them, and why noise does not come from there."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(torch.randn(9, generator=one), torch.randn(9, generator=other))
    whole = torch.Generator().manual_seed(keyed_seed(0, "sample", 3))
    assert torch.equal(torch.randn(9, generator=keyed_generator(0, "sample", 3)), torch.randn(9, generator=whole))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_a_permutation_has_every_number_once(count: int) -> None:
    assert sorted(keyed_stream(0, "order", count).permutation(count).tolist()) == list(range(count))


def test_all_permutations_are_equally_frequent() -> None:
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(4)), 0)
    for number in range(4800):
        counts[tuple(keyed_stream(0, "order", number).permutation(4).tolist())] += 1
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_on_the_meta_device_nothing_is_drawn() -> None:
    found = KeyedStream(1).normal(3, 10**12, "meta")
    assert found.is_meta and found.shape == (10**12 - 3,)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1000, 1_000_003])  # below and above what is drawn on the GPU itself
def test_on_a_gpu_they_are_the_same_to_rounding(count: int) -> None:
    stream = keyed_stream(0, "noise", "gpu")
    assert torch.equal(stream.words(3, count, "cuda").cpu(), stream.words(3, count))
    for draw in (stream.normal, stream.uniform):
        here, there = draw(3, count), draw(3, count, "cuda")
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=2**-23, atol=0)
