"""Copies of a clip are known by their fingerprints, other clips are not; against comparing all pairs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import scipy.ndimage
from PIL import Image

from stdit.data.config import DataConfig
from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.manifest import Manifest
from stdit.data.measure.fingerprints import BITS, NEAR, find_repeats, fingerprint
from stdit.data.plan.buckets import Reason, assign
from stdit.data.scan.scan import scan


def hexadecimal(bits):
    return [np.packbits(one).tobytes().hex() for one in bits]


def distance(one, other):
    return (int(one, 16) ^ int(other, 16)).bit_count()


def flipped(bits, count, rng):
    copy = bits.copy()
    copy[rng.choice(BITS, count, replace=False)] ^= 1
    return copy


def test_the_bits_that_differ_are_the_angle():
    """Charikar's theorem: clips of one scene (length 1) and motions at a right angle (2) have cosine 1/5."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        scene = 4000 * rng.standard_normal((1, 8, 8))
        motions = 2000 * rng.standard_normal((2, 8, 8, 8))
        motions -= motions.mean(1, keepdims=True)
        first = motions[0] / np.linalg.norm(motions[0])
        motions[1] -= (motions[1] * first).sum() * first
        one, other = (fingerprint((scene + motion).astype(np.float32)) for motion in motions)
        shares.append(distance(one, other) / BITS)
    assert np.mean(shares) == pytest.approx(np.arccos(0.2) / np.pi, abs=0.005)


def test_brightness_contrast_and_size_are_not_part_of_it():
    rng = np.random.default_rng(1)
    grey = np.clip(128 + scipy.ndimage.gaussian_filter(rng.standard_normal((8, 64, 96)), (1, 6, 6)) * 900, 0, 255)
    plain = fingerprint(grey.astype(np.float32))
    assert distance(plain, fingerprint((0.7 * grey + 30).astype(np.float32))) <= NEAR // 2
    assert distance(plain, fingerprint(np.kron(grey, np.ones((1, 3, 3))).astype(np.float32))) == 0
    assert distance(plain, fingerprint(grey[:, :, ::-1].astype(np.float32).copy())) > 2 * NEAR


def test_planted_copies_are_found_and_nothing_else():
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2, (3000, BITS), dtype=np.uint8)
    planted = {}
    for row in range(1000, 1000 + NEAR):
        bits[row] = flipped(bits[row - 1000], row - 1000, rng)
        planted[row] = row - 1000
    bits[2000:2100] = bits[7]  # a hundred of one, of which each list has its neighbours alone
    planted |= dict.fromkeys(range(2000, 2100), 7)
    texts = hexadecimal(bits)
    words = np.frombuffer(bytes.fromhex("".join(texts)), np.uint64).reshape(3000, -1)
    wanted = {}
    for row in range(len(words)):  # every pair
        near = np.flatnonzero(np.bitwise_count(words[:row] ^ words[row]).sum(1) <= NEAR)
        near = [other for other in near.tolist() if other not in wanted]
        if near:
            wanted[row] = near[0]
    assert wanted == planted
    found = {row: first for row, first in enumerate(find_repeats(texts)) if first is not None}
    assert found.items() <= wanted.items() and len(found) >= len(wanted) - 2
    assert find_repeats([]) == [] and find_repeats(texts[:1]) == [None]


def test_a_chain_of_small_changes_does_not_make_its_ends_copies():
    rng = np.random.default_rng(3)
    order, bits = rng.permutation(BITS), rng.integers(0, 2, BITS, dtype=np.uint8)
    chain = []
    for link in range(6):
        chain.append(bits.copy())
        bits[order[60 * link : 60 * link + 60]] ^= 1
    assert find_repeats(hexadecimal(chain)) == [None, 0, None, 2, None, 4]


def test_copies_of_real_clips_are_named_and_other_clips_of_the_same_person_are_not(videos, tmp_path):
    """Encoded badly, at half the size, cropped by 5 %, brightened; all clips are of one person in one room."""
    for name, copy in [("no", "bad"), ("yes", "small"), ("again", "cropped"), ("help", "bright")]:
        frames = read_frames(str(videos / f"asl/{name}.mkv"), 28, (320, 240), 15.0)
        copies = {
            "bad": frames,
            "small": np.stack([np.asarray(Image.fromarray(frame).resize((160, 120))) for frame in frames]),
            "cropped": frames[:, 6:-6, 8:-8],
            "bright": np.clip(1.15 * frames + 12, 0, 255).astype(np.uint8),
        }
        write_video(tmp_path / f"{name}-0.mp4", frames, 15)
        write_video(tmp_path / f"{name}-{copy}.mp4", copies[copy], 15, crf=38 if copy == "bad" else 20)
    result = scan(tmp_path, uncaptioned=True, scores=True, workers=1)
    assert {s.file: s.message for s in result.repeats} == {
        f"{name}-{copy}.mp4": f"looks like {name}-0.mp4."
        for name, copy in [("again", "cropped"), ("help", "bright"), ("no", "bad"), ("yes", "small")]
    }
    config = DataConfig(shapes=["64x48x17"], fps=15.0, repeats=False)
    found = assign(result.manifest, config)
    assert found.reasons == {"repeat": 4}
    copies = np.flatnonzero(found.bucket < 0)
    assert [result.manifest[row].path.rpartition("/")[2] for row in copies] == [s.file for s in result.repeats]
    first = result.manifest.table.column("path").to_pylist().index(str(tmp_path / "no-0.mp4"))
    heights = np.where(np.arange(8) == first, 40, result.manifest.column("height"))
    place = result.manifest.table.column_names.index("height")
    table = result.manifest.table.set_column(place, "height", pa.array(heights))
    found = assign(Manifest(table, tmp_path), config)  # too small for the shape: it does not take its copy with it
    assert found.reasons == {"repeat": 3, "small": 1} and found.reason[first] == Reason.SMALL
    alone = Manifest(result.manifest.table.take(copies), tmp_path)
    assert not assign(alone, config).reasons  # what they repeat is not there
