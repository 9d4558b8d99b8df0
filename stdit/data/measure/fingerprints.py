"""Fingerprints of clips. They recognise copies that were re-encoded, resized, brightened or cropped a little.

8 frames spread evenly over the clip, each as the mean grey levels of 8×8 cells, give two vectors:

- the scene: the mean over time, minus its own mean, normalised to length 1. Brightness and contrast cancel out.
- the motion: each frame minus the mean over time, normalised to length 2, so that motion tells clips of one scene
  apart.

Faint vectors stay shorter; what the scene lacks in length becomes one more coordinate, so that all flat pictures are
alike. The fingerprint holds the side of 1024 fixed hyperplanes on which the concatenated vector lies: the share of
differing bits is the angle between two clips over 180° (Charikar 2002, "Similarity estimation techniques from rounding
algorithms").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

FRAMES, CELLS, BITS = 8, 8, 1024
FAINT = 4.0  # grey levels (root mean square) below which a scene or motion has little weight
NEAR = 96  # bits in which copies may differ: 17°
LISTS, NEIGHBOURS = 32, 2  # sorted lists of `find_repeats`, and following entries compared with each


def fingerprint(grey: Sequence[np.ndarray]) -> str:
    """The fingerprint of 8 frames (H, W) float32 in grey levels: 1024 bits as hexadecimal digits."""
    cells = [Image.fromarray(frame).resize((CELLS, CELLS), Image.Resampling.BOX) for frame in grey]
    frames = np.stack([np.asarray(image, np.float64) for image in cells])  # (8, 8, 8)
    scene = frames.mean(0)
    flat = _normalised(scene - scene.mean())
    joined = np.concatenate([flat, [np.sqrt(1 - flat @ flat)], 2 * _normalised(frames - scene)])
    return np.packbits(_PLANES @ joined > 0).tobytes().hex()


def _normalised(values: np.ndarray) -> np.ndarray:
    """Flattened and scaled to length 1, or shorter if the values are faint."""
    return values.ravel() / np.sqrt((values**2).sum() + FAINT**2 * values.size)


def _bytes(name: str, count: int) -> np.ndarray:
    """Pseudo-random bytes that do not depend on a random generator's version."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), np.uint8)


_SIZE = CELLS**2 + 1 + FRAMES * CELLS**2
_PLANES = np.bitwise_count(_bytes("planes", BITS * _SIZE)).reshape(BITS, _SIZE) - 4.0  # nearly normal


def find_repeats(fingerprints: Sequence[str]) -> list[int | None]:
    """For each clip, the index of the first clip that it copies and that is itself no copy; None if there is none.

    Comparing all pairs would cost n². Instead (Charikar) the clips are sorted by 64 chosen bits, in 32 lists with
    different bits. Copies differ in few bits, so they are neighbours in most lists, and only neighbours are compared.
    """
    n = len(fingerprints)
    if n < 2:
        return [None] * n
    digests = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8).reshape(n, BITS // 8)
    words, pairs = digests.view(np.uint64), []  # (n, 16)
    for number in range(LISTS):
        chosen = np.argsort(_bytes(f"list {number}", 8 * BITS).view(np.uint64))[:64]
        bits = digests[:, chosen // 8] >> (chosen % 8).astype(np.uint8) & 1  # (n, 64)
        order = np.argsort(np.ascontiguousarray(np.packbits(bits, axis=1)).view(">u8")[:, 0], kind="stable")
        for step in range(1, NEIGHBOURS + 1):
            left, right = order[:-step], order[step:]
            near = np.bitwise_count(words[left] ^ words[right]).sum(1) <= NEAR
            earlier, later = np.minimum(left, right)[near], np.maximum(left, right)[near]
            pairs.append(later * n + earlier)
    values = [int(text, 16) for text in fingerprints]
    first_of: list[int | None] = [None] * n
    for later, earlier in (divmod(int(pair), n) for pair in np.unique(np.concatenate(pairs))):
        source = first_of[earlier]
        first = earlier if source is None else source
        if first_of[later] is None and (values[later] ^ values[first]).bit_count() <= NEAR:
            first_of[later] = first
    return first_of
