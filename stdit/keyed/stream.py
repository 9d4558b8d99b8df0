"""Streams of numbers of one key, from a counter-based generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stdit.keyed.seeds import keyed_bits

_CHUNK = 2**15  # words that are turned into numbers at once on a CPU: they stay in its cache
_CHUNK_OF_DEVICE = 2**21
_MANY = 2**18  # numbers; fewer are drawn on the CPU for a GPU too: there, drawing costs 600 launches of kernels


def keyed_stream(seed: int, purpose: str, *key: int | str) -> KeyedStream:
    """The stream whose key is the first 128 bits of `keyed_bits`."""
    return KeyedStream(keyed_bits(seed, purpose, *key) % 2**128)


@dataclass(frozen=True)
class KeyedStream:
    """Endless numbers, each a function of the key and of its place: words of Philox-4x64-10 (Salmon et al. 2011).

    key: 128 bits. Words are the same on all devices. Numbers are computed from them in fp64 and rounded to fp32, so
    that those of two devices differ, if at all, in the last bit of one in millions.
    """

    key: int

    def words(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Words start to stop, each 64 random bits: (stop − start,) int64."""
        first, last = start // 4, -(-stop // 4)  # blocks of four words
        if torch.device(device).type == "cuda":
            words = philox(self.key, first, last, device)
        else:
            generator = np.random.Philox(key=self.key, counter=(first - 1) % 2**256)  # it counts before it draws
            words = torch.from_numpy(generator.random_raw(4 * (last - first)).view(np.int64)).to(device)
        return words[start - 4 * first : stop - 4 * first]

    def uniform(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Numbers start to stop, uniform between 0 and 1: (stop − start,) fp32."""
        return self._numbers(start, stop, device, lambda first, second: (first, second))

    def normal(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Numbers start to stop, normal with mean 0 and variance 1: (stop − start,) fp32."""
        return self._numbers(start, stop, device, _box_muller)

    def permutation(self, count: int) -> Tensor:
        """A permutation of 0 … count − 1, int64 on the CPU."""
        return self.words(0, count).argsort(stable=True)

    def _numbers(
        self, start: int, stop: int, device: torch.device | str, of_pair: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> Tensor:
        """of_pair: makes two numbers of the two halves of a word, which are uniform in (0, 1) in fp64."""
        if torch.device(device).type == "meta":
            return torch.empty(stop - start, device=device)
        source = device if torch.device(device).type == "cuda" and stop - start >= _MANY else "cpu"
        first, last = start // 2, -(-stop // 2)  # words
        pairs = torch.empty(last - first, 2, dtype=torch.float32, device=source)
        chunk = _CHUNK if source == "cpu" else _CHUNK_OF_DEVICE
        for low in range(first, last, chunk):
            high = min(low + chunk, last)
            words = self.words(low, high, source)
            halves = ((words >> 32) & 0xFFFFFFFF, words & 0xFFFFFFFF)
            for column, numbers in enumerate(of_pair(*(half.double().add_(0.5).mul_(2.0**-32) for half in halves))):
                pairs[low - first : high - first, column] = numbers
        return pairs.view(-1)[start - 2 * first : stop - 2 * first].to(device)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers of two uniform ones in (0, 1) (Box & Muller 1958). Changes its arguments."""
    radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def philox(key: int, first: int, last: int, device: torch.device | str = "cpu") -> Tensor:
    """Blocks first to last of Philox-4x64-10 in torch, for any device: (4·(last − first),) int64.

    Block i is four words of the counter i: the words that numpy's Philox gives on a CPU, many times faster there.
    """
    counter = torch.arange(first, last, device=device)
    a, b, c, d = counter, *(torch.zeros_like(counter) for _ in range(3))
    for number in range(10):
        low, high = (key + number * 0x9E3779B97F4A7C15) % 2**64, ((key >> 64) + number * 0xBB67AE8584CAA73B) % 2**64
        a_low, a_high = _product(a, 0xD2E7470EE14C6C93)
        c_low, c_high = _product(c, 0xCA5A826395121157)
        a, b, c, d = c_high ^ b ^ _signed(low), c_low, a_high ^ d ^ _signed(high), a_low
    return torch.stack([a, b, c, d], dim=1).flatten()


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The low and the high 64 bits of the 128 of a product. x: int64, read as unsigned."""
    mask, low, high = 0xFFFFFFFF, factor & 0xFFFFFFFF, factor >> 32
    x_low, x_high = x & mask, (x >> 32) & mask
    across, other = x_low * high, x_high * low  # below 2⁶⁴: their bits are right, though not their sign
    carried = (((x_low * low) >> 32) & mask) + (across & mask) + (other & mask)
    upper = x_high * high + ((across >> 32) & mask) + ((other >> 32) & mask) + (carried >> 32)
    return x * _signed(factor), upper


def _signed(bits: int) -> int:
    """64 bits as the int64 that they are."""
    return bits - 2**64 if bits >= 2**63 else bits
