"""Fingerprints of clips, by which copies are known that were encoded anew, resized, brightened or cropped a little.

Of the frames that `scores` looks at, those nearest to 8 times evenly over the clip, each as the mean grey levels of 8×8
cells, make two vectors: their mean over time less its own mean, the scene; and what each frame differs by from the mean
over time, the motion. The scene is brought to length 1, so that neither brightness nor contrast counts; the motion to
length 2, so that clips of one scene are told apart by what moves. What is faint stays shorter; what a scene lacks of
its length becomes one coordinate more, so that all flat pictures are alike.

A fingerprint is on which sides of 1024 fixed hyperplanes through the origin the two, joined to one vector, lie. The
share of bits that differ is the angle between two clips over 180° (Charikar 2002, "Similarity estimation techniques
from rounding algorithms").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

FRAMES, CELLS, BITS = 8, 8, 1024
FAINT = 4.0  # grey levels (root mean square) below which a scene or motion counts for little
NEAR = 96  # bits that copies may differ in: 17°
LISTS, NEIGHBOURS = 32, 2


def fingerprint(grey: Sequence[np.ndarray]) -> str:
    """Of 8 frames (H, W) in grey levels, float32: 1024 bits as hexadecimal digits."""
    from PIL import Image

    cells = [Image.fromarray(one).resize((CELLS, CELLS), Image.Resampling.BOX) for one in grey]
    frames = np.stack([np.asarray(one, np.float64) for one in cells])  # (8, 8, 8)
    scene = frames.mean(0)
    flat = _faded(scene - scene.mean())
    joined = np.concatenate([flat, [np.sqrt(1 - flat @ flat)], 2 * _faded(frames - scene)])
    return np.packbits(_PLANES @ joined > 0).tobytes().hex()


def _faded(values: np.ndarray) -> np.ndarray:
    """Flat and of length 1, or less where the values are faint."""
    return values.ravel() / np.sqrt((values**2).sum() + FAINT**2 * values.size)


def _bytes(name: str, count: int) -> np.ndarray:
    """The same ones always, whatever a random generator's version."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), np.uint8)


_SIZE = CELLS**2 + 1 + FRAMES * CELLS**2
_PLANES = np.bitwise_count(_bytes("planes", BITS * _SIZE)).reshape(BITS, _SIZE) - 4.0  # nearly normal


def repeats(fingerprints: Sequence[str]) -> list[int | None]:
    """For each clip the first one that it is a copy of, and that is itself no copy; None where there is none.

    All pairs would be n² comparisons. Instead, as Charikar has it, the clips are sorted by other 64 of their bits in
    each of 32 lists: copies, which differ in few bits, are neighbours in most of them, and only neighbours are
    compared.
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
            one, other = order[:-step], order[step:]
            near = np.bitwise_count(words[one] ^ words[other]).sum(1) <= NEAR
            earlier, later = np.minimum(one, other)[near], np.maximum(one, other)[near]
            pairs.append(later * n + earlier)
    values = [int(text, 16) for text in fingerprints]
    first_of: list[int | None] = [None] * n
    for later, earlier in (divmod(int(pair), n) for pair in np.unique(np.concatenate(pairs))):
        source = first_of[earlier]
        first = earlier if source is None else source
        if first_of[later] is None and (values[later] ^ values[first]).bit_count() <= NEAR:
            first_of[later] = first
    return first_of
